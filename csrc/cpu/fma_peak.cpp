// Times the register loops of fma_peak.h.

#include "fma_peak.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <iterator>

#include "conv2d.h"

namespace disco {
namespace {

// About a millisecond at 100 GFLOP/s in AVX-512: long against the clock's resolution, short against
// a scheduler's time slice.
constexpr int64_t kRounds = 1 << 18;

const FmaLoop& active_fma_loop([[maybe_unused]] DataType product) {
#if defined(DISCO_HAVE_AVX512BF16)
  if (product == kBFloat16 && active_isa().pair_products) return avx512bf16_fma_loop();
#endif
#if defined(DISCO_HAVE_AVX512VNNI)
  if (product == kInt8 && active_isa().quads == &avx512vnni_kernels()) return avx512vnni_fma_loop();
#endif
#if defined(DISCO_HAVE_AVX512)
  if (std::strncmp(active_isa().name, "avx512", 6) == 0) return avx512_fma_loop();
#endif
#if defined(DISCO_HAVE_AVX2)
  if (std::strcmp(active_isa().name, "avx2") == 0) return avx2_fma_loop();
#endif
#if defined(DISCO_HAVE_NEON)
  if (std::strcmp(active_isa().name, "neon") == 0) return neon_fma_loop();
#endif
  return scalar_fma_loop();
}

}  // namespace

double fma_peak_gflops(int32_t bursts, DataType product) {
  const FmaLoop& loop = active_fma_loop(product);
  // x = x / 2 + 1 comes and stays near 2: neither denormal, slow on some CPUs, nor infinite.
  volatile float unforeseen[2 + kFmaChains] = {0.5f, 1.0f};
  for (int i = 0; i < kFmaChains; ++i) unforeseen[2 + i] = 1.0f + 0.125f * static_cast<float>(i);
  float factors[2 + kFmaChains];
  std::copy(std::begin(unforeseen), std::end(unforeseen), factors);
  double best = 0.0;
  for (int32_t burst = 0; burst < bursts; ++burst) {
    float sum = 0.0f;
    const auto begin = std::chrono::steady_clock::now();
    loop.run(kRounds, factors, &sum);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
    const volatile float sink = sum;
    static_cast<void>(sink);
    best = std::max(best,
                    static_cast<double>(loop.flops_per_round * kRounds) / elapsed.count() * 1e-9);
  }
  return best;
}

}  // namespace disco
