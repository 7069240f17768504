// Convolution over the virtual concatenation of segments, for one or more virtual nodes.
//
// A segment is a list of channels of one source tensor: all channels of the local activation, the
// selected channels of a whole activation, or a received payload read in place. Each node has its
// own segments, weights and output channels; all nodes of a layer run in one call. Layout is NHWC:
// the channel stride is 1, the strides over image, row and pixel are free.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "conv_microkernel.h"
#include "message_kernels.h"

namespace disco {

// How the sums are made. Winograd is for 3 x 3 kernels with stride and dilation 1; kQuads is direct
// convolution in 8-bit integers.
enum class Algorithm : int32_t { kDirect = 0, kWinograd2 = 2, kWinograd4 = 4, kQuads = 8 };

constexpr bool is_winograd(Algorithm algorithm) {
  return algorithm == Algorithm::kWinograd2 || algorithm == Algorithm::kWinograd4;
}

// What is multiplied, given the data type of activations and weights. In F(4x4) the transforms
// grow too much for the 8 bits of bfloat16.
constexpr DataType product_type(Algorithm algorithm, DataType dtype) {
  if (algorithm == Algorithm::kQuads) return kInt8;
  return algorithm == Algorithm::kWinograd4 ? kFloat32 : dtype;
}

// Neighbouring channels that a row of a weight panel takes.
constexpr int64_t channels_of_row(DataType product) {
  return product == kInt8 ? 4 : product == kBFloat16 ? 2 : 1;
}

// Inputs of kQuads: byte q stands for (q - zero_point) * scale.
struct InputBytes {
  float scale = 1.0f;      // above zero
  int32_t zero_point = 0;  // 0 .. 255
};

struct Conv2dGeometry {
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t padding_h, padding_w;
  int64_t dilation_h, dilation_w;
  Algorithm algorithm = Algorithm::kDirect;
  DataType dtype = kFloat32;  // of sources, weights, residual and output
  InputBytes input = {};      // of kQuads

  int64_t element_bytes() const { return dtype == kFloat32 ? 4 : 2; }
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
// the type is another. kFloat32 stands for the convolution's own data type; for float32, sources in
// the other types are read where they lie and widened by the call.
struct SourceView {
  const void* data;
  int64_t channels;
  int64_t stride_n, stride_c, stride_h, stride_w;
  WireType type = WireType::kFloat32;
  const float* scale = nullptr;  // int8: [batch / images_per_scale][channels]
  int64_t images_per_scale = 1;
};

// Strides in elements; the channel stride is 1.
struct OutputView {
  void* data;
  int64_t stride_n, stride_h, stride_w;
};

struct Conv2dCall {
  std::vector<SourceView> sources;
  int64_t batch, in_h, in_w;
  const void* packed;  // every node's packed weights, one after the other
  int64_t packed_bytes;
  const float* bias;     // [all output channels] or nullptr; float32 for every data type
  const void* residual;  // strides below, or nullptr
  int64_t residual_stride_n, residual_stride_h, residual_stride_w;
  OutputView out;
  int64_t out_channels;  // of the output tensor
  // Add onto what `out` holds; the bias is then not added again. Direct float32 sums begin with it,
  // others are added to it.
  bool accumulate;
  int32_t num_threads;
  // As many as the Conv2d has lists of channels, or none: then nothing is packed. The pixels of
  // the output are those of `message_images` images, which int8 scales one by one.
  std::vector<void*> messages;
  WireType wire = WireType::kFloat32;
  int64_t message_images = 0;
  // Segments [first_segment, end_segment) only, for a convolution of one node that sums directly in
  // float32. The others' sources are not read. With an end before the last segment `out` gets
  // unfinished sums: no activation, and no residual or messages may be given. A call that
  // accumulates from there on ends with the bits of one call over all segments.
  int64_t first_segment = 0;
  int64_t end_segment = -1;  // -1: all

  bool in_parts() const { return first_segment != 0 || end_segment >= 0; }
  bool reads(int64_t segment) const {
    return segment >= first_segment && (end_segment < 0 || segment < end_segment);
  }
};

// One node's weights.
struct WeightShape {
  int64_t out_channels;
  std::vector<int64_t> segment_channels;  // inputs taken from each segment
  int64_t taps;
  Algorithm algorithm;
  DataType dtype;

  int64_t in_channels() const;
  DataType product() const { return product_type(algorithm, dtype); }
  // Rows of a panel that a segment has at every tap.
  int64_t rows(int64_t channels) const {
    const int64_t together = channels_of_row(product());
    return (channels + together - 1) / together;
  }
  int64_t rows() const;
  // Weights that every pair of an input and an output channel has when packed.
  int64_t points() const {
    const int64_t edge = static_cast<int64_t>(algorithm) + 2;
    return is_winograd(algorithm) ? edge * edge : taps;
  }
};

// Bytes that pack_weights writes for one node; a multiple of 64, so that nodes stay aligned.
int64_t packed_bytes(const IsaKernels& isa, const WeightShape& shape);

// weight: [out_channels][in_channels][taps] float32, contiguous. Layout of `packed`: a header of 64
// bytes that names the layout, then panels. A panel is [row][panel width], rows ordered segment,
// tap, channel; for Winograd [point][row][panel width], rows ordered segment, channel. A bfloat16
// row holds pairs, the last one of an odd segment with a zero. Denormal weights become zero: they
// cost some 40 times a normal multiplication. Rows of kQuads hold four signed bytes, zeros behind a
// segment; before their panels come, of every output channel, the float32 scale that its largest
// weight, 127, stands for, and the int32 sum of its bytes. Throws std::invalid_argument for
// Winograd weights that are not 3 x 3.
void pack_weights(const IsaKernels& isa, const float* weight, const WeightShape& shape,
                  void* packed);

class FusedPack;

class Conv2d {
 public:
  // `messages`: per message that a call may write beside its output, the channels of the output
  // tensor. Throws std::invalid_argument for a geometry or channel list that cannot be.
  Conv2d(const Conv2dGeometry& geometry, std::vector<Node> nodes, Activation activation,
         const std::vector<std::vector<int32_t>>& messages = {});

  // Throws std::invalid_argument if sources, packed weights and output do not fit each other.
  void run(const Conv2dCall& call) const;

 private:
  friend class BoundConv2d;
  // Whether sources have to be widened. Throws std::invalid_argument where they cannot be.
  bool in_wire_type(const Conv2dCall& call) const;
  void run_wide(Conv2dCall call) const;

  Conv2dGeometry geometry_;
  std::vector<Node> nodes_;
  Activation activation_;
  std::shared_ptr<const FusedPack> pack_;  // nullptr without messages
};

struct ConvPlan;
class FusedMessages;
class StagedCall;
class WidenedCall;

// A convolution bound to its sources, weights and output: what depends on their addresses and sizes
// alone is done once. They must outlive it, as must the Conv2d. Not for two threads at a time.
class BoundConv2d {
 public:
  // Throws as Conv2d::run does.
  BoundConv2d(const Conv2d& conv2d, Conv2dCall call);
  ~BoundConv2d();

  void run(int32_t num_threads);

 private:
  void plan();

  const Conv2d& conv2d_;
  const Conv2dCall given_;
  Conv2dCall call_;                       // as it is computed, over what is widened
  std::unique_ptr<WidenedCall> widened_;  // if sources are in a wire type
  std::unique_ptr<StagedCall> staged_;    // if sources have to be copied
  std::unique_ptr<FusedMessages> messages_;
  std::unique_ptr<ConvPlan> plan_;
};

// The instruction set in use: the best that CPU and build offer, or what DISCO_KERNELS_ISA names.
// Throws std::invalid_argument if that one is unknown or not to be had here.
const IsaKernels& active_isa();
std::vector<std::string> available_isas();

}  // namespace disco
