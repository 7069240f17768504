// AVX-512 without AVX-512-BF16: rounding to bfloat16 in integers. For the files that are compiled
// with AVX-512; see vector_avx512.h.
#pragma once

#include "vector_avx512.h"

namespace disco {
namespace {

// To the nearest, ties to even; a NaN stays one.
inline __m256i narrow(Vector v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}
inline void store_bf16(uint16_t* x, Vector v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), narrow(v));
}
inline void store_bf16_n(uint16_t* x, Vector v, int64_t n) {
  _mm256_mask_storeu_epi16(x, first_lanes(n), narrow(v));
}

}  // namespace
}  // namespace disco
