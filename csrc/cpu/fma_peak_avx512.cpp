// The register loop of fma_peak.h in AVX-512.

#include <immintrin.h>

#include <cstdint>

namespace disco {
namespace {

constexpr int kVectorLength = 16;
using Vector = __m512;

Vector broadcast(const float* x) { return _mm512_set1_ps(*x); }
Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
float sum(Vector v) {
  alignas(64) float lanes[kVectorLength];
  _mm512_store_ps(lanes, v);
  float total = 0.0f;
  for (int i = 0; i < kVectorLength; ++i) total += lanes[i];
  return total;
}

}  // namespace
}  // namespace disco

#include "fma_peak_body.h"

namespace disco {

const FmaLoop& avx512_fma_loop() {
  static constexpr FmaLoop loop = {"avx512", kFlopsPerRound, fma_rounds};
  return loop;
}

}  // namespace disco
