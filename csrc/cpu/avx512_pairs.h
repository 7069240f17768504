// AVX-512 without AVX-512-BF16: a pair of bfloat16 is two float32 multiplications. For the files
// that are compiled with AVX-512; see vector_avx512.h.
#pragma once

#include "narrow_avx512.h"

namespace disco {
namespace {

using Pairs = __m512i;

inline Pairs broadcast_pair(const uint16_t* x) {
  int32_t pair;
  __builtin_memcpy(&pair, x, sizeof(pair));
  return _mm512_set1_epi32(pair);
}
inline Pairs load_pairs(const void* x) { return _mm512_loadu_si512(x); }
inline Vector low(Pairs x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
inline Vector high(Pairs x) {
  return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
inline Vector multiply_add_pairs(Pairs a, Pairs b, Vector c) {
  return _mm512_fmadd_ps(high(a), high(b), _mm512_fmadd_ps(low(a), low(b), c));
}

}  // namespace
}  // namespace disco
