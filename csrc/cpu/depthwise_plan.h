// What a call of a grouped convolution comes down to.
#pragma once

#include <vector>

#include "depthwise.h"

namespace disco {

// Everything that is decided before the first multiplication; the threads only read it.
struct LanePlan {
  const Conv2dGeometry& geometry;
  const Conv2dCall& call;
  const LaneKernels& kernels;
  const std::vector<LaneVector>& vectors;
  const std::vector<int32_t>& lanes;
  int64_t lane_lists;  // of a vector, in lanes
  const float* panels;
  int64_t length;        // of a vector
  int64_t panel_floats;  // of one vector's panel
  int64_t in_per_group;
  LaneInput input;  // of all vectors; kInputWhole also if the last one is kInputPart
  Activation activation;
  int64_t out_h, out_w;

  int64_t element_bytes() const { return geometry.element_bytes(); }
  const SourceView& source() const { return call.sources[0]; }
  int64_t max_strip() const { return out_w < kernels.max_pixels ? out_w : kernels.max_pixels; }
  // Input columns that `count` output pixels read.
  int64_t window(int64_t count) const {
    return (count - 1) * geometry.stride_w + (geometry.kernel_w - 1) * geometry.dilation_w + 1;
  }
};

// Runs the whole plan, on as many threads as the call asks for.
void run_lanes(const LanePlan& plan);

}  // namespace disco
