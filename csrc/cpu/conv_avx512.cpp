// AVX-512 micro-kernels. Without AVX-512-BF16 a pair of bfloat16 is two float32 multiplications.

#include "narrow_avx512.h"

namespace disco {
namespace {

using Pairs = __m512i;

Pairs broadcast_pair(const uint16_t* x) {
  int32_t pair;
  __builtin_memcpy(&pair, x, sizeof(pair));
  return _mm512_set1_epi32(pair);
}
Pairs load_pairs(const void* x) { return _mm512_loadu_si512(x); }
Vector low(Pairs x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
Vector high(Pairs x) {
  return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
Vector multiply_add_pairs(Pairs a, Pairs b, Vector c) {
  return _mm512_fmadd_ps(high(a), high(b), _mm512_fmadd_ps(low(a), low(b), c));
}

}  // namespace
}  // namespace disco

#include "conv_microkernel_body.h"
#include "depthwise_microkernel.h"
#include "gather_words_avx512.h"
#include "pool_body.h"
#include "winograd_body.h"

namespace disco {

const IsaKernels& avx512_kernels() {
  static constexpr IsaKernels table = {"avx512",
                                       kVectorLength,
                                       kMaxVectors,
                                       kMaxPixels,
                                       {kFloat32Kernels, kBFloat16Kernels},
                                       kBFloat16SumKernels,
                                       &kWinograd2,
                                       &kWinograd4,
                                       {&largest_pixel<Float32>, &largest_pixel<BFloat16>},
                                       {&mean_pixel<Float32>, &mean_pixel<BFloat16>},
                                       &gather_words,
                                       &avx512_lane_kernels};
  return table;
}

}  // namespace disco
