// AVX-512 micro-kernels. Without AVX-512-BF16 a pair of bfloat16 is two float32 multiplications.

#include "avx512_pairs.h"
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
                                       {kernel_table<Float32>(), kernel_table<BFloat16>()},
                                       kernel_table<BFloat16Sums>(),
                                       &kWinograd2,
                                       &kWinograd4,
                                       {&largest_pixel<Float32>, &largest_pixel<BFloat16>},
                                       {&mean_pixel<Float32>, &mean_pixel<BFloat16>},
                                       &gather_words,
                                       &avx512_lane_kernels};
  return table;
}

}  // namespace disco
