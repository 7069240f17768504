// The register loop of fma_peak.h with 8-bit integers, in AVX-512-VNNI.

#include <immintrin.h>

#include <cstdint>

namespace disco {
namespace {

constexpr int kVectorLength = 64;  // of bytes: every lane multiplies four
using Vector = __m512;

Vector broadcast(const float* x) { return _mm512_set1_ps(*x); }
// a + b * c, the bits taken as int32 sums, unsigned and signed bytes: the chain is through the sum.
// Only the time counts, and it does not depend on the values.
Vector multiply_add(Vector a, Vector b, Vector c) {
  return _mm512_castsi512_ps(
      _mm512_dpbusd_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b), _mm512_castps_si512(c)));
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

const FmaLoop& avx512vnni_fma_loop() {
  static constexpr FmaLoop loop = {"avx512_vnni", kFlopsPerRound, fma_rounds};
  return loop;
}

}  // namespace disco
