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

}  // namespace
}  // namespace disco

#include "conv_microkernel_body.h"

namespace disco {

const IsaKernels& avx2_kernels() {
  static constexpr IsaKernels table = {"avx2", kVectorLength, kMaxVectors, kMaxPixels, kKernels};
  return table;
}

}  // namespace disco
