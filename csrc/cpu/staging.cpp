#include "staging.h"

#include <algorithm>
#include <cstring>

#include "arena.h"
#include "conv2d_plan.h"

namespace disco {
namespace {

int64_t even(int64_t n) { return (n + 1) / 2 * 2; }

// With three channels a tap is over after three steps, and an image comes in planes: a copy with
// the padding around it costs less than the borders and another layout would.
bool pads(const Conv2dGeometry& geometry, const Conv2dCall& call) {
  bool few = true, plain = geometry.taps() == 1;
  for (const SourceView& source : call.sources) {
    few &= source.channels <= kFewChannels;
    plain &= source.stride_c == 1;
  }
  return few && !plain;
}

}  // namespace

bool StagedCall::needed(const Conv2dGeometry& geometry, const std::vector<Node>& nodes,
                        const Conv2dCall& call) {
  if (pads(geometry, call)) return true;
  if (geometry.dtype == kFloat32) return false;
  for (const Node& node : nodes) {
    for (const Segment& segment : node.segments) {
      if (!in_pairs(segment)) return true;
    }
  }
  return false;
}

StagedCall::StagedCall(const Conv2dGeometry& geometry, const std::vector<Node>& nodes,
                       const Conv2dCall& call)
    : geometry_(geometry), nodes_(nodes), call_(call) {
  for (const Node& node : nodes_) {
    for (const Segment& segment : node.segments) {
      if (segment.source < 0 || segment.source >= static_cast<int64_t>(call_.sources.size())) {
        refuse("a segment reads source " + std::to_string(segment.source) + " of " +
               std::to_string(call_.sources.size()));
      }
      const SourceView& source = call_.sources[static_cast<size_t>(segment.source)];
      for (const int32_t channel : segment.channels) {
        if (channel < 0 || channel >= source.channels) {
          refuse("channel " + std::to_string(channel) + " is not one of the segment's " +
                 std::to_string(source.channels));
        }
      }
    }
  }
  if (pads(geometry, call)) pad_sources();
  if (geometry.dtype == kBFloat16) gather_segments();
  memory_ = static_cast<char*>(arena(ArenaSlot::kStaging, bytes_));
  for (const Padded& padded : padded_) call_.sources[padded.source].data = memory_ + padded.begin;
  for (const Gathered& g : gathered_) call_.sources[g.source].data = memory_ + g.begin;
}

int64_t StagedCall::reserve(int64_t bytes) {
  const int64_t begin = bytes_;
  bytes_ += (bytes + kCacheLineBytes - 1) / kCacheLineBytes * kCacheLineBytes;
  return begin;
}

void StagedCall::pad_sources() {
  const int64_t in_h = call_.in_h, in_w = call_.in_w;
  const int64_t padding_h = geometry_.padding_h, padding_w = geometry_.padding_w;
  geometry_.padding_h = geometry_.padding_w = 0;
  call_.in_h += 2 * padding_h;
  call_.in_w += 2 * padding_w;
  for (size_t s = 0; s < call_.sources.size(); ++s) {
    SourceView& source = call_.sources[s];
    const int64_t channels = geometry_.dtype == kFloat32 ? source.channels : even(source.channels);
    const int64_t row = call_.in_w * channels;
    const int64_t begin = reserve(call_.batch * call_.in_h * row * geometry_.element_bytes());
    padded_.push_back({source, s, in_h, in_w, padding_h, padding_w, begin});
    if (channels > source.channels) {
      // The channel of zeros makes a pair of a segment's last channel.
      for (Node& node : nodes_) {
        for (Segment& segment : node.segments) {
          if (segment.source == static_cast<int64_t>(s) && segment.channels.size() % 2 != 0) {
            segment.channels.push_back(static_cast<int32_t>(source.channels));
          }
        }
      }
    }
    source = {nullptr, channels, call_.in_h * row, 1, row, channels};
  }
}

void StagedCall::gather_segments() {
  for (Node& node : nodes_) {
    for (Segment& segment : node.segments) {
      if (in_pairs(segment)) continue;
      const int64_t count = even(static_cast<int64_t>(segment.channels.size()));
      const int64_t row = call_.in_w * count;
      const int64_t begin = reserve(call_.batch * call_.in_h * row * geometry_.element_bytes());
      const size_t target = call_.sources.size();
      gathered_.push_back(
          {static_cast<size_t>(segment.source), target, std::move(segment.channels), begin});
      call_.sources.push_back({nullptr, count, call_.in_h * row, 1, row, count});
      segment.source = static_cast<int64_t>(target);
      segment.channels.resize(static_cast<size_t>(count));
      for (int64_t c = 0; c < count; ++c) {
        segment.channels[static_cast<size_t>(c)] = static_cast<int32_t>(c);
      }
    }
  }
}

bool StagedCall::memory_moved() const { return arena(ArenaSlot::kStaging, bytes_) != memory_; }

void StagedCall::copy(int32_t num_threads) const {
  for (const Padded& padded : padded_) {
    if (geometry_.dtype == kFloat32) {
      copy_padded<float>(padded, num_threads);
    } else {
      copy_padded<uint16_t>(padded, num_threads);
    }
  }
  for (const Gathered& gathered : gathered_) copy_gathered(gathered, num_threads);
}

template <typename Element>
void StagedCall::copy_padded(const Padded& padded, int32_t num_threads) const {
  const SourceView& from = padded.from;
  const int64_t channels = call_.sources[padded.source].channels, width = call_.in_w;
  const int64_t rows = call_.batch * call_.in_h;
  Element* to = reinterpret_cast<Element*>(memory_ + padded.begin);
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t n = i / call_.in_h, h = i % call_.in_h - padded.padding_h;
    Element* row = to + i * width * channels;
    std::fill(row, row + width * channels, Element{});
    if (h < 0 || h >= padded.in_h) continue;
    for (int64_t c = 0; c < from.channels; ++c) {
      const Element* x = static_cast<const Element*>(from.data) + n * from.stride_n +
                         c * from.stride_c + h * from.stride_h;
      Element* y = row + padded.padding_w * channels + c;
      for (int64_t w = 0; w < padded.in_w; ++w) y[w * channels] = x[w * from.stride_w];
    }
  }
}

void StagedCall::copy_gathered(const Gathered& gathered, int32_t num_threads) const {
  const SourceView& from = call_.sources[gathered.from];
  const SourceView& to = call_.sources[gathered.source];
  const int64_t count = static_cast<int64_t>(gathered.channels.size());
  const int32_t* index = gathered.channels.data();
  // A 1 x 1 kernel skips the pixels between its strides.
  const bool skips = geometry_.taps() == 1 && geometry_.padding_h == 0 && geometry_.padding_w == 0;
  const int64_t step_h = skips ? geometry_.stride_h : 1, step_w = skips ? geometry_.stride_w : 1;
  const int64_t rows_h = (call_.in_h + step_h - 1) / step_h;
  const int64_t rows = call_.batch * rows_h;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t n = i / rows_h, h = i % rows_h * step_h;
    const uint16_t* x =
        static_cast<const uint16_t*>(from.data) + n * from.stride_n + h * from.stride_h;
    uint16_t* y =
        reinterpret_cast<uint16_t*>(memory_ + gathered.begin) + n * to.stride_n + h * to.stride_h;
    for (int64_t w = 0; w < call_.in_w; w += step_w) {
      const uint16_t* pixel = x + w * from.stride_w;
      uint16_t* target = y + w * to.stride_w;
      for (int64_t c = 0; c < count; ++c) target[c] = pixel[index[c]];
      if (count % 2 != 0) target[count] = 0;
    }
  }
}

}  // namespace disco
