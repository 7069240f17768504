// The register loop of fma_peak.h in NEON.

#include <arm_neon.h>

#include <cstdint>

namespace disco {
namespace {

constexpr int kVectorLength = 4;
using Vector = float32x4_t;

Vector broadcast(const float* x) { return vdupq_n_f32(*x); }
// NEON's instruction overwrites its addend. With the addend for the chain, as the kernels use it,
// no register has to be copied before; x grows by a half a round, to some 100,000.
Vector multiply_add(Vector chain, Vector factor, Vector addend) {
  return vfmaq_f32(chain, factor, addend);
}
float sum(Vector v) { return vaddvq_f32(v); }

}  // namespace
}  // namespace disco

#include "fma_peak_body.h"

namespace disco {

const FmaLoop& neon_fma_loop() {
  static constexpr FmaLoop loop = {"neon", kFlopsPerRound, fma_rounds};
  return loop;
}

}  // namespace disco
