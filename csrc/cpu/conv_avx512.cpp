// AVX-512 micro-kernels. Without AVX-512-BF16 a pair of bfloat16 is two float32 multiplications.

#include "vector_avx512.h"

namespace disco {
namespace {

using Pairs = __m512i;

Pairs broadcast_pair(const uint16_t* x) {
  int32_t pair;
  __builtin_memcpy(&pair, x, sizeof(pair));
  return _mm512_set1_epi32(pair);
}
Pairs load_pairs(const void* x) { return _mm512_loadu_si512(x); }
Vector low(Pairs x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
Vector high(Pairs x) {
  return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
Vector multiply_add_pairs(Pairs a, Pairs b, Vector c) {
  return _mm512_fmadd_ps(high(a), high(b), _mm512_fmadd_ps(low(a), low(b), c));
}

// To the nearest, ties to even; a NaN stays one.
__m256i narrow(Vector v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}
void store_bf16(uint16_t* x, Vector v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), narrow(v));
}
void store_bf16_n(uint16_t* x, Vector v, int64_t n) {
  _mm256_mask_storeu_epi16(x, first_lanes(n), narrow(v));
}

}  // namespace
}  // namespace disco

#include "conv_microkernel_body.h"
#include "gather_words_avx512.h"
#include "pool_body.h"
#include "winograd_body.h"

namespace disco {

const IsaKernels& avx512_kernels() {
  static constexpr IsaKernels table = {"avx512",
                                       kVectorLength,
                                       kMaxVectors,
                                       kMaxPixels,
                                       {kFloat32Kernels, kBFloat16Kernels},
                                       &kWinograd2,
                                       &kWinograd4,
                                       {&largest_pixel<Float32>, &largest_pixel<BFloat16>},
                                       {&mean_pixel<Float32>, &mean_pixel<BFloat16>},
                                       &gather_words};
  return table;
}

}  // namespace disco
