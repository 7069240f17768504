// AVX-512 micro-kernels for CPUs with AVX-512-BF16: one instruction multiplies a bfloat16 pair in
// every lane. It takes denormal inputs as zero and rounds each sum once.

#include "vector_avx512.h"

namespace disco {
namespace {

using Pairs = __m512bh;

Pairs broadcast_pair(const uint16_t* x) {
  int32_t pair;
  __builtin_memcpy(&pair, x, sizeof(pair));
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}
Pairs load_pairs(const void* x) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(x)); }
Vector multiply_add_pairs(Pairs a, Pairs b, Vector c) { return _mm512_dpbf16_ps(c, a, b); }

__m256i narrow(Vector v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
void store_bf16(uint16_t* x, Vector v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), narrow(v));
}
void store_bf16_n(uint16_t* x, Vector v, int64_t n) {
  _mm256_mask_storeu_epi16(x, first_lanes(n), narrow(v));
}

}  // namespace
}  // namespace disco

#include "conv_microkernel_body.h"
#include "depthwise_microkernel.h"
#include "gather_words_avx512.h"
#include "pool_body.h"
#include "winograd_body.h"

namespace disco {

const IsaKernels& avx512bf16_kernels() {
  static constexpr IsaKernels table = {"avx512_bf16",
                                       kVectorLength,
                                       kMaxVectors,
                                       kMaxPixels,
                                       {kernel_table<Float32>(), kernel_table<BFloat16>()},
                                       kernel_table<BFloat16Sums>(),
                                       &kWinograd2,
                                       &kWinograd4,
                                       {&largest_pixel<Float32>, &largest_pixel<BFloat16>},
                                       {&mean_pixel<Float32>, &mean_pixel<BFloat16>},
                                       &gather_words,
                                       &avx512_lane_kernels,
                                       true};
  return table;
}

}  // namespace disco
