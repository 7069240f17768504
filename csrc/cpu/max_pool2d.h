// Max pooling over channels-last maps, for models that stay in that layout from end to end.
#pragma once

#include <cstdint>

#include "conv2d.h"

namespace disco {

struct MaxPool2dCall {
  Conv2dGeometry window;  // kernel, stride, padding and dilation; what lies outside never wins
  SourceView x;           // channel stride 1
  int64_t batch, in_h, in_w;
  OutputView out;
  int64_t out_h, out_w;
  int32_t num_threads;
};

// A window that dilation spreads over nothing but padding gives minus infinity. Throws
// std::invalid_argument for padding of more than half of the kernel.
void max_pool2d(const MaxPool2dCall& call);

}  // namespace disco
