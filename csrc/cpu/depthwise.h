// Convolution of many narrow groups: depthwise, with a channel multiplier, or of a few channels a
// group (ResNeXt, RegNet). Each group reads its own input channels and writes its own outputs.
//
// Where conv2d.h has one input value for a vector of output channels, here every lane may have an
// input of its own, so that the lanes of a vector can belong to several groups.
#pragma once

#include <cstdint>
#include <vector>

#include "conv2d.h"
#include "depthwise_microkernel.h"

namespace disco {

struct Groups {
  int64_t count;
  int64_t in_channels, out_channels;  // of one group
};

// Whether groups of so many output channels run faster here than by conv2d.h with a node for each.
bool narrow_groups(int64_t out_channels, DataType dtype);

class DepthwiseConv2d {
 public:
  // Throws std::invalid_argument for a geometry or groups that cannot be.
  DepthwiseConv2d(const Conv2dGeometry& geometry, const Groups& groups, Activation activation);

  // Bytes that `pack` writes, a multiple of 64.
  int64_t packed_bytes() const;

  // weight: [groups * out_channels][in_channels][taps], contiguous. Layout of `packed`: a header of
  // 64 bytes that names the layout, then a panel [kernel_h][in_channels][kernel_w][vector length]
  // of float32, whatever the data type is, for each vector of outputs. Denormal weights become
  // zero: they cost some 40 times a normal multiplication.
  void pack(const float* weight, void* packed) const;

  // The call has one source, of any number of channels but with a channel stride of 1, and does not
  // accumulate. Throws std::invalid_argument if it does not fit.
  void run(const Conv2dCall& call) const;

 private:
  void plan_vectors();
  int64_t panel_floats() const;

  Conv2dGeometry geometry_;
  Groups groups_;
  Activation activation_;
  int64_t length_;  // of a vector
  LaneInput input_;
  std::vector<LaneVector> vectors_;  // all outputs, in order
  // Where the lanes find their inputs: [vectors][lane_lists_][length]. One list for each input of a
  // group if a vector holds all inputs of its lanes' groups, else one for the first inputs: the
  // others are as many channels further.
  std::vector<int32_t> lanes_;
  int64_t lane_lists_ = 1;
};

}  // namespace disco
