// Grouped convolutions as their callers see them: which outputs share a vector, and packing.

#include "depthwise.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <string>

#include "conv2d_plan.h"
#include "depthwise_plan.h"
#include "packed_header.h"

namespace disco {
namespace {

constexpr int32_t kLaneMagic = 0x44534731;  // "DSG1"

// The first words of packed weights, so that those of another instruction set or layer are refused
// instead of read.
struct LaneHeader {
  int32_t magic;
  int32_t vector_length;
  int32_t groups;
  int32_t in_per_group;
  int32_t out_per_group;
  int32_t kernel_h;
  int32_t kernel_w;
  int32_t dtype;
  int32_t reserved[8];
};
static_assert(sizeof(LaneHeader) == kHeaderBytes, "header must keep alignment");

LaneHeader lane_header(int64_t length, const Groups& groups, const Conv2dGeometry& geometry) {
  LaneHeader header = {};
  header.magic = kLaneMagic;
  header.vector_length = static_cast<int32_t>(length);
  header.groups = static_cast<int32_t>(groups.count);
  header.in_per_group = static_cast<int32_t>(groups.in_channels);
  header.out_per_group = static_cast<int32_t>(groups.out_channels);
  header.kernel_h = static_cast<int32_t>(geometry.kernel_h);
  header.kernel_w = static_cast<int32_t>(geometry.kernel_w);
  header.dtype = geometry.dtype;
  return header;
}

}  // namespace

DepthwiseConv2d::DepthwiseConv2d(const Conv2dGeometry& geometry, const Groups& groups,
                                 Activation activation)
    : geometry_(geometry),
      groups_(groups),
      activation_(activation),
      length_(active_isa().vector_length) {
  check_window(geometry);
  check_activation(activation);
  if (geometry.algorithm != Algorithm::kDirect) refuse("narrow groups have no Winograd");
  if (groups.count < 1 || groups.in_channels < 1 || groups.out_channels < 1) {
    refuse("a grouped convolution has at least one group with one input and one output channel");
  }
  plan_vectors();
}

// Against conv2d.h with a node for each group, AVX-512, 3x3, one thread, GFLOP/s: 238 to 107 at 16
// channels on 14x14, 237 to 210 at 48, 234 to 247 at 64, 207 to 243 at 120 on 28x28. AVX2 meets it
// at 24 channels. Where conv2d.h multiplies bfloat16 in pairs: 121 us to 142 at 16 channels on
// 14x14, 105 to 58 at 26, 168 to 76 at 32 on 7x7.
constexpr int64_t kNarrowVectors = 3;
constexpr int64_t kNarrowVectorsInPairs = 1;

bool narrow_groups(int64_t out_channels, DataType dtype) {
  const IsaKernels& isa = active_isa();
  const bool pairs = dtype == kBFloat16 && isa.pair_products;
  return out_channels <= (pairs ? kNarrowVectorsInPairs : kNarrowVectors) * isa.vector_length;
}

// A vector's lanes may belong to several groups, as long as one load spans the first inputs of them
// all. Where a group fills vectors of its own it does not share them: its inputs are then
// broadcast.
void DepthwiseConv2d::plan_vectors() {
  const int64_t outputs = groups_.count * groups_.out_channels, inputs = groups_.in_channels;
  const bool shared = groups_.out_channels < length_;
  const bool depthwise = inputs == 1 && groups_.out_channels == 1;
  input_ = depthwise ? kInputWhole : shared ? kInputSpread : kInputOne;
  std::vector<int32_t> first_inputs;
  int64_t most = 0;
  for (int64_t first = 0; first < outputs; first += vectors_.back().num_out) {
    const int64_t first_group = first / groups_.out_channels;
    LaneVector vector = {first, 0, first_group * inputs, 0};
    while (vector.num_out < length_ && first + vector.num_out < outputs) {
      const int64_t group = (first + vector.num_out) / groups_.out_channels;
      const int64_t lane = (group - first_group) * inputs;
      if (lane >= length_ || (lane > 0 && !shared)) break;
      first_inputs.push_back(static_cast<int32_t>(lane));
      vector.num_in = lane + 1;
      ++vector.num_out;
    }
    first_inputs.insert(first_inputs.end(), static_cast<size_t>(length_ - vector.num_out), 0);
    most = std::max(most, vector.num_in);
    vectors_.push_back(vector);
  }
  if (input_ != kInputSpread) return;
  lane_lists_ = most + inputs - 1 <= length_ ? inputs : 1;
  for (size_t v = 0; v < vectors_.size(); ++v) {
    vectors_[v].num_in += lane_lists_ - 1;
    for (int64_t list = 0; list < lane_lists_; ++list) {
      for (int64_t lane = 0; lane < length_; ++lane) {
        lanes_.push_back(
            first_inputs[v * static_cast<size_t>(length_) + static_cast<size_t>(lane)] +
            static_cast<int32_t>(list));
      }
    }
  }
}

int64_t DepthwiseConv2d::panel_floats() const {
  return geometry_.taps() * groups_.in_channels * length_;
}

int64_t DepthwiseConv2d::packed_bytes() const {
  const int64_t panels = static_cast<int64_t>(vectors_.size() * sizeof(float)) * panel_floats();
  return kHeaderBytes + (panels + kHeaderBytes - 1) / kHeaderBytes * kHeaderBytes;
}

void DepthwiseConv2d::pack(const float* weight, void* packed) const {
  std::memset(packed, 0, static_cast<size_t>(packed_bytes()));
  const LaneHeader header = lane_header(length_, groups_, geometry_);
  std::memcpy(packed, &header, sizeof(header));
  float* to = reinterpret_cast<float*>(static_cast<char*>(packed) + kHeaderBytes);
  for (const LaneVector& vector : vectors_) {
    for (int64_t r = 0; r < geometry_.kernel_h; ++r) {
      for (int64_t c = 0; c < groups_.in_channels; ++c) {
        for (int64_t s = 0; s < geometry_.kernel_w; ++s, to += length_) {
          const int64_t tap = c * geometry_.taps() + r * geometry_.kernel_w + s;
          for (int64_t lane = 0; lane < vector.num_out; ++lane) {
            const int64_t row = (vector.first_out + lane) * groups_.in_channels;
            const float value = weight[row * geometry_.taps() + tap];
            to[lane] = std::fabs(value) < FLT_MIN ? 0.0f : value;
          }
        }
      }
    }
  }
}

void DepthwiseConv2d::run(const Conv2dCall& call) const {
  const int64_t inputs = groups_.count * groups_.in_channels;
  const int64_t outputs = groups_.count * groups_.out_channels;
  const LaneHeader wanted = lane_header(length_, groups_, geometry_);
  if (call.packed_bytes != packed_bytes() ||
      std::memcmp(call.packed, &wanted, sizeof(wanted)) != 0) {
    refuse(std::string("the packed weights are not those of this layer for ") + active_isa().name +
           ": pack them again (prepack_grouped, or repack() of the module)");
  }
  if (call.sources.size() != 1 || call.accumulate || !call.messages.empty()) {
    refuse("a grouped convolution reads one source, adds onto no output and writes no messages");
  }
  const SourceView& source = call.sources[0];
  if (source.type != WireType::kFloat32) {
    refuse("a grouped convolution reads its own data type, and no message in a wire type");
  }
  if (source.channels != inputs || call.out_channels != outputs) {
    refuse("the layer has " + std::to_string(inputs) + " input and " + std::to_string(outputs) +
           " output channels, given " + std::to_string(source.channels) + " and " +
           std::to_string(call.out_channels));
  }
  if (source.channels > 1 && source.stride_c != 1) {
    refuse("the source must have a channel stride of 1, given " + std::to_string(source.stride_c));
  }
  const OutputSize size = output_size(geometry_, call.in_h, call.in_w);
  if (call.batch == 0) return;
  const char* packed = static_cast<const char*>(call.packed);
  run_lanes({geometry_, call, active_isa().lane_kernels(), vectors_, lanes_, lane_lists_,
             reinterpret_cast<const float*>(packed + kHeaderBytes), length_, panel_floats(),
             groups_.in_channels, input_, activation_, size.h, size.w});
}

}  // namespace disco
