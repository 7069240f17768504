// The multiply-add rate of one core, for benchmarks: what a kernel that never waits for memory and
// never runs short of independent work could reach.
#pragma once

#include <cstdint>

#include "conv_microkernel.h"

namespace disco {

// A multiply-add takes 4 or 5 cycles and two can start in each, so 10 independent chains keep the
// units busy; 12 leave room and still fit the 16 registers of AVX2 beside the two constants.
constexpr int kFmaChains = 12;

// A loop over registers for one instruction set. `run` writes one sum to `sink`, so that no
// compiler can leave the loop out, and computes x = x * factors[0] + factors[1] (in NEON x +
// factors[0] * factors[1]) in kFmaChains chains that start from factors[2 + i], so that none can
// foresee it or compute a chain for two.
struct FmaLoop {
  const char* isa;          // as IsaKernels names it
  int64_t flops_per_round;  // a multiply-add counts as two
  void (*run)(int64_t rounds, const float* factors, float* sink);
};

const FmaLoop& scalar_fma_loop();
const FmaLoop& avx2_fma_loop();
const FmaLoop& avx512_fma_loop();
const FmaLoop& avx512bf16_fma_loop();
const FmaLoop& avx512vnni_fma_loop();
const FmaLoop& neon_fma_loop();

// GFLOP/s of the calling thread in the instruction set in use, multiplying float32 or, where that
// has an instruction for it, bfloat16 or 8-bit integers (whose operations count alike); without one
// it is float32 too. The best of `bursts` bursts of about a millisecond each. The best, because a
// burst can only be slowed down (by another process, by a clock that has yet to rise), never sped
// up.
double fma_peak_gflops(int32_t bursts, DataType product);

}  // namespace disco
