// The register loop of fma_peak.h in what every CPU of the architecture has: vectors of 16 bytes,
// and a multiplication and an addition where there is no instruction that does both.

#include <cstdint>

namespace disco {
namespace {

constexpr int kVectorLength = 4;
using Vector = float __attribute__((vector_size(kVectorLength * sizeof(float))));

Vector broadcast(const float* x) { return Vector{*x, *x, *x, *x}; }
Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
float sum(Vector v) { return v[0] + v[1] + v[2] + v[3]; }

}  // namespace
}  // namespace disco

#include "fma_peak_body.h"

namespace disco {

const FmaLoop& scalar_fma_loop() {
  static constexpr FmaLoop loop = {"scalar", kFlopsPerRound, fma_rounds};
  return loop;
}

}  // namespace disco
