// Convolution over the virtual concatenation of segments, for one or more virtual nodes.
//
// A segment is a list of channels of one source tensor: all channels of the local activation, the
// selected channels of a whole activation, or a received payload read in place. Each node has its
// own segments, weights and output channels; all nodes of a layer run in one call. Layout is NHWC:
// the channel stride is 1, the strides over image, row and pixel are free.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "conv_microkernel.h"
#include "message_kernels.h"

namespace disco {

struct Conv2dGeometry {
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t padding_h, padding_w;
  int64_t dilation_h, dilation_w;

  int64_t taps() const { return kernel_h * kernel_w; }
};

struct Segment {
  int64_t source;                 // which of the call's sources
  std::vector<int32_t> channels;  // of that source, in the order of the weight's columns
};

struct Node {
  std::vector<Segment> segments;
  std::vector<int32_t> out_channels;  // of the output tensor, in the order of the weight's rows

  int64_t num_in_channels() const;
};

// Sources of at most this many channels (images) may have any channel stride: they are copied.
constexpr int64_t kFewChannels = 8;

// Strides in elements; the channel stride is 1 where there are more than kFewChannels, and where
// the type is not float32. Sources in another type are read where they lie and widened by the call.
struct SourceView {
  const float* data;  // float32, or nullptr
  int64_t channels;
  int64_t stride_n, stride_c, stride_h, stride_w;
  WireType type = WireType::kFloat32;
  const void* wire = nullptr;    // the data of another type
  const float* scale = nullptr;  // int8: [batch / images_per_scale][channels]
  int64_t images_per_scale = 1;
};

// Strides in elements; the channel stride is 1.
struct OutputView {
  float* data;
  int64_t stride_n, stride_h, stride_w;
};

struct Conv2dCall {
  std::vector<SourceView> sources;
  int64_t batch, in_h, in_w;
  const float* packed;    // every node's packed weights, one after the other
  int64_t packed_size;    // in floats
  const float* bias;      // [all output channels] or nullptr
  const float* residual;  // strides below, or nullptr
  int64_t residual_stride_n, residual_stride_h, residual_stride_w;
  OutputView out;
  int64_t out_channels;  // of the output tensor
  bool accumulate;       // add onto what `out` holds; the bias is then not added again
  int32_t num_threads;
};

// Floats that pack_weights writes for one node; a multiple of 16, so that nodes stay 64-byte
// aligned.
int64_t packed_size(const IsaKernels& isa, int64_t out_channels, int64_t in_channels, int64_t taps);

// weight: [out_channels][sum of segment_channels][taps], contiguous. Layout of `packed`: a header
// of 16 words that names the layout, then panels [K][panel width], K ordered segment, tap, channel.
// Denormal weights become zero: they cost some 40 times a normal multiplication.
void pack_weights(const IsaKernels& isa, const float* weight, int64_t out_channels,
                  const std::vector<int64_t>& segment_channels, int64_t taps, float* packed);

class Conv2d {
 public:
  // Throws std::invalid_argument for a geometry or channel list that cannot be.
  Conv2d(const Conv2dGeometry& geometry, std::vector<Node> nodes, Activation activation);

  // Throws std::invalid_argument if sources, packed weights and output do not fit each other.
  void run(const Conv2dCall& call) const;

  int64_t packed_size() const;

 private:
  void run_float32(const Conv2dCall& call) const;

  Conv2dGeometry geometry_;
  std::vector<Node> nodes_;
  Activation activation_;
};

// The instruction set in use: the best that CPU and build offer, or what DISCO_KERNELS_ISA names.
// Throws std::invalid_argument if that one is unknown or not to be had here.
const IsaKernels& active_isa();
std::vector<std::string> available_isas();

}  // namespace disco
