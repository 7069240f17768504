// The loop of fma_peak.h over a `Vector` of kVectorLength floats with `broadcast`, `multiply_add`
// and `sum`, which the including file defines for its instruction set. No STL: see
// conv_microkernel_body.h.

#include "fma_peak.h"

namespace disco {
namespace {

void fma_rounds(int64_t rounds, const float* factors, float* sink) {
  const Vector factor = broadcast(factors), addend = broadcast(factors + 1);
  Vector chains[kFmaChains];
  // Equal chains would be computed once.
#pragma GCC unroll 16
  for (int i = 0; i < kFmaChains; ++i) chains[i] = broadcast(factors + 2 + i);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < kFmaChains; ++i) chains[i] = multiply_add(chains[i], factor, addend);
  }
  float total = 0.0f;
#pragma GCC unroll 16
  for (int i = 0; i < kFmaChains; ++i) total += sum(chains[i]);
  *sink = total;
}

constexpr int64_t kFlopsPerRound = 2LL * kFmaChains * kVectorLength;

}  // namespace
}  // namespace disco
