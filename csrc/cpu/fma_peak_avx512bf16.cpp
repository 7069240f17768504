// The register loop of fma_peak.h with bfloat16 pairs, in AVX-512-BF16.

#include <immintrin.h>

#include <cstdint>

namespace disco {
namespace {

constexpr int kVectorLength = 32;  // of bfloat16: every lane multiplies two
using Vector = __m512;

Vector broadcast(const float* x) { return _mm512_set1_ps(*x); }
// a + b * c, the bits of b and c taken as pairs of bfloat16: the chain is through the sum. Only the
// time counts, and it does not depend on the values.
Vector multiply_add(Vector a, Vector b, Vector c) {
  return _mm512_dpbf16_ps(a, reinterpret_cast<__m512bh>(b), reinterpret_cast<__m512bh>(c));
}
float sum(Vector v) {
  alignas(64) float lanes[16];
  _mm512_store_ps(lanes, v);
  float total = 0.0f;
  for (int i = 0; i < 16; ++i) total += lanes[i];
  return total;
}

}  // namespace
}  // namespace disco

#include "fma_peak_body.h"

namespace disco {

const FmaLoop& avx512bf16_fma_loop() {
  static constexpr FmaLoop loop = {"avx512_bf16", kFlopsPerRound, fma_rounds};
  return loop;
}

}  // namespace disco
