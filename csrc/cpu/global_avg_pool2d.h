// The mean of every channel over a whole channels-last map, for heads and squeeze-excite blocks.
#pragma once

#include <cstdint>

#include "conv2d.h"

namespace disco {

struct GlobalAvgPool2dCall {
  SourceView x;  // channel stride 1
  DataType dtype;
  int64_t batch, in_h, in_w;
  void* out;  // [batch][channels], channel stride 1
  int64_t out_stride_n;
  int32_t num_threads;
};

// Sums are float32, a row of pixels at a time. Throws std::invalid_argument for a map without
// pixels.
void global_avg_pool2d(const GlobalAvgPool2dCall& call);

}  // namespace disco
