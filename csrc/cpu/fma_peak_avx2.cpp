// The register loop of fma_peak.h in AVX2 + FMA.

#include <immintrin.h>

#include <cstdint>

namespace disco {
namespace {

constexpr int kVectorLength = 8;
using Vector = __m256;

Vector broadcast(const float* x) { return _mm256_broadcast_ss(x); }
Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
float sum(Vector v) {
  alignas(32) float lanes[kVectorLength];
  _mm256_store_ps(lanes, v);
  float total = 0.0f;
  for (int i = 0; i < kVectorLength; ++i) total += lanes[i];
  return total;
}

}  // namespace
}  // namespace disco

#include "fma_peak_body.h"

namespace disco {

const FmaLoop& avx2_fma_loop() {
  static constexpr FmaLoop loop = {"avx2", kFlopsPerRound, fma_rounds};
  return loop;
}

}  // namespace disco
