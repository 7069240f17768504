// The convolution as its callers see it.

#include "conv2d.h"

#include <algorithm>
#include <memory>

#include "conv2d_plan.h"
#include "widen.h"

namespace disco {
namespace {

// The same convolution over copies of the sources, channels last, with zeros around them.
struct PaddedCall {
  PaddedCall(const Conv2dGeometry& original, const Conv2dCall& from)
      : geometry(original), call(from) {
    geometry.padding_h = geometry.padding_w = 0;
    call.in_h += 2 * original.padding_h;
    call.in_w += 2 * original.padding_w;
    for (SourceView& source : call.sources) {
      const int64_t row = call.in_w * source.channels;
      copies.emplace_back(new float[static_cast<size_t>(call.batch * call.in_h * row)]);
      copy(source, from, original, copies.back().get());
      source = {copies.back().get(), source.channels, call.in_h * row, 1, row, source.channels};
    }
  }

  Conv2dGeometry geometry;
  Conv2dCall call;

 private:
  void copy(const SourceView& source, const Conv2dCall& from, const Conv2dGeometry& original,
            float* to) const {
    const int64_t channels = source.channels, width = call.in_w;
    const int64_t rows = call.batch * call.in_h;
#pragma omp parallel for schedule(static) num_threads(call.num_threads) if (call.num_threads > 1)
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t n = i / call.in_h, h = i % call.in_h - original.padding_h;
      float* row = to + i * width * channels;
      std::fill(row, row + width * channels, 0.0f);
      if (h < 0 || h >= from.in_h) continue;
      for (int64_t c = 0; c < channels; ++c) {
        const float* x =
            source.data + n * source.stride_n + c * source.stride_c + h * source.stride_h;
        float* y = row + original.padding_w * channels + c;
        for (int64_t w = 0; w < from.in_w; ++w) y[w * channels] = x[w * source.stride_w];
      }
    }
  }

  std::vector<std::unique_ptr<float[]>> copies;
};

}  // namespace

int64_t Node::num_in_channels() const {
  int64_t count = 0;
  for (const Segment& segment : segments) count += static_cast<int64_t>(segment.channels.size());
  return count;
}

Conv2d::Conv2d(const Conv2dGeometry& geometry, std::vector<Node> nodes, Activation activation)
    : geometry_(geometry), nodes_(std::move(nodes)), activation_(activation) {
  if (geometry.kernel_h < 1 || geometry.kernel_w < 1 || geometry.stride_h < 1 ||
      geometry.stride_w < 1 || geometry.dilation_h < 1 || geometry.dilation_w < 1 ||
      geometry.padding_h < 0 || geometry.padding_w < 0) {
    refuse("kernel, stride and dilation must be at least 1 and padding at least 0");
  }
}

int64_t Conv2d::packed_size() const {
  int64_t size = 0;
  for (const Node& node : nodes_) {
    size += disco::packed_size(active_isa(), static_cast<int64_t>(node.out_channels.size()),
                               node.num_in_channels(), geometry_.taps());
  }
  return size;
}

void Conv2d::run(const Conv2dCall& call) const {
  bool wide = true;
  for (const SourceView& source : call.sources) wide &= source.type == WireType::kFloat32;
  if (wide) {
    run_float32(call);
  } else {
    WidenedCall widened(call);
    widened.widen();
    run_float32(widened.call());
  }
}

void Conv2d::run_float32(const Conv2dCall& call) const {
  bool few = true, plain = geometry_.taps() == 1;
  for (const SourceView& source : call.sources) {
    few &= source.channels <= kFewChannels;
    plain &= source.stride_c == 1;
  }
  if (few && !plain) {
    // With three channels a tap is over after three steps, and an image comes in planes: a copy
    // with the padding around it costs less than the borders and another layout would.
    const PaddedCall padded(geometry_, call);
    run_plan(ConvPlan(padded.geometry, nodes_, activation_, padded.call));
  } else {
    run_plan(ConvPlan(geometry_, nodes_, activation_, call));
  }
}

}  // namespace disco
