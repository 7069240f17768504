// AVX2 + FMA micro-kernels: 6 pixels x 16 output channels, 12 of 16 registers accumulate.

#include <immintrin.h>

#include <cstdint>

namespace disco {
namespace {

constexpr int kVectorLength = 8;
constexpr int kMaxVectors = 2;
constexpr int kMaxPixels = 6;

using Vector = __m256;

alignas(32) const int32_t kLaneMasks[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

__m256i first_lanes(int64_t n) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLaneMasks + 8 - n));
}

Vector zero() { return _mm256_setzero_ps(); }
Vector broadcast(const float* x) { return _mm256_broadcast_ss(x); }
Vector load(const float* x) { return _mm256_loadu_ps(x); }
Vector load_n(const float* x, int64_t n) { return _mm256_maskload_ps(x, first_lanes(n)); }
void store(float* x, Vector v) { _mm256_storeu_ps(x, v); }
void store_n(float* x, Vector v, int64_t n) { _mm256_maskstore_ps(x, first_lanes(n), v); }
Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
// The second operand is returned where either is NaN: a NaN in `a` stays, as torch.relu keeps it.
Vector maximum(Vector a, Vector b) { return _mm256_max_ps(b, a); }
Vector maximum_or_nan(Vector a, Vector b) {
  return _mm256_blendv_ps(maximum(a, b), b, _mm256_cmp_ps(b, b, _CMP_UNORD_Q));
}
Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
Vector splat(float x) { return _mm256_set1_ps(x); }
Vector subtract(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
Vector divide(Vector a, Vector b) { return _mm256_div_ps(a, b); }
Vector minimum(Vector a, Vector b) { return _mm256_min_ps(b, a); }
Vector bit_and(Vector v, uint32_t mask) {
  return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int32_t>(mask))));
}
Vector shift_left_23(Vector v) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(v), 23));
}
Vector select_negative(Vector x, Vector a, Vector b) { return _mm256_blendv_ps(b, a, x); }

using Pairs = __m256i;

Pairs broadcast_pair(const uint16_t* x) {
  int32_t pair;
  __builtin_memcpy(&pair, x, sizeof(pair));
  return _mm256_set1_epi32(pair);
}
Pairs load_pairs(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }
Vector low(Pairs x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
Vector high(Pairs x) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  return _mm256_castsi256_ps(_mm256_and_si256(x, mask));
}
Vector multiply_add_pairs(Pairs a, Pairs b, Vector c) {
  return _mm256_fmadd_ps(high(a), high(b), _mm256_fmadd_ps(low(a), low(b), c));
}

Vector load_bf16(const uint16_t* x) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return low(_mm256_cvtepu16_epi32(bits));
}
// Put together in registers: through an array that is written by elements, a load waits for all of
// them (32 groups of 4 on 56 x 56: 3,220 us so, and 700).
Vector load_bf16_n(const uint16_t* x, int64_t n) {
  if (n == kVectorLength) return load_bf16(x);
  uint64_t first = 0, last = 0;
  if (n >= 4) {
    __builtin_memcpy(&first, x, 8);
    if (n > 4) {
      __builtin_memcpy(&last, x + n - 4, 8);
      last >>= 16 * (8 - n);
    }
  } else {
    for (int64_t i = n; i > 0; --i) first = first << 16 | x[i - 1];
  }
  const __m128i bits = _mm_set_epi64x(static_cast<int64_t>(last), static_cast<int64_t>(first));
  return low(_mm256_cvtepu16_epi32(bits));
}
// To the nearest, ties to even; a NaN stays one.
void store_bf16(uint16_t* x, Vector v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i high_half = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m128i words =
      _mm_packus_epi32(_mm256_castsi256_si128(high_half), _mm256_extracti128_si256(high_half, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), words);
}
void store_bf16_n(uint16_t* x, Vector v, int64_t n) {
  uint16_t some[kVectorLength];
  store_bf16(some, v);
  for (int64_t i = 0; i < n; ++i) x[i] = some[i];
}

constexpr int kLanePixels = 7;
constexpr int kLaneWindows = 6;
constexpr bool kFreeMasks = false;

using Lanes = __m256i;

Lanes load_lanes(const int32_t* lanes) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
}
Vector permute(Vector v, Lanes lanes) { return _mm256_permutevar8x32_ps(v, lanes); }

}  // namespace
}  // namespace disco

#include "conv_microkernel_body.h"
#include "depthwise_body.h"
#include "pool_body.h"
#include "winograd_body.h"

namespace disco {

const IsaKernels& avx2_kernels() {
  static constexpr IsaKernels table = {"avx2",
                                       kVectorLength,
                                       kMaxVectors,
                                       kMaxPixels,
                                       {kernel_table<Float32>(), kernel_table<BFloat16>()},
                                       kernel_table<BFloat16Sums>(),
                                       &kWinograd2,
                                       &kWinograd4,
                                       {&largest_pixel<Float32>, &largest_pixel<BFloat16>},
                                       {&mean_pixel<Float32>, &mean_pixel<BFloat16>},
                                       nullptr,
                                       &lane_kernels};
  return table;
}

}  // namespace disco
