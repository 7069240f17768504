#include "staging.h"

#include <algorithm>
#include <cstring>

#include "arena.h"
#include "conv2d_plan.h"

namespace disco {
namespace {

// Up to here starting the other threads, and their reading what one of them wrote, takes longer.
constexpr int64_t kAloneBytes = 8 * 1024;
constexpr int64_t kPartsPerThread = 4;

int64_t even(int64_t n) { return (n + 1) / 2 * 2; }

DataType product_of(const Conv2dGeometry& geometry) {
  return product_type(geometry.algorithm, geometry.dtype);
}

bool multiplies_pairs(const Conv2dGeometry& geometry) { return product_of(geometry) == kBFloat16; }

// Distances at which lines fall into the same set of a first-level cache. Its 8 or 12 ways are
// fewer than the pixels of an AVX-512 tile, which then push each other out at every channel. On a
// Zen 4, 1024 channels at 14 x 14: 0.70 of the multiply-add peak, gathered 0.93.
constexpr int64_t kSetPeriodBytes = 4096;
constexpr int32_t kFewestWays = 8;

bool shares_sets(const Conv2dGeometry& geometry, const SourceView& source) {
  const int64_t step = geometry.stride_w * source.stride_w * geometry.element_bytes();
  return geometry.algorithm == Algorithm::kDirect && active_isa().max_pixels > kFewestWays &&
         step > 0 && step % kSetPeriodBytes == 0;
}

// Whether a segment's channels are brought together before they are used.
bool gathers(const Conv2dGeometry& geometry, const Conv2dCall& call, const Segment& segment) {
  if (segment.channels.empty()) return false;
  if (product_of(geometry) == kInt8) return true;
  return (multiplies_pairs(geometry) && !neighbours(segment, 2)) ||
         shares_sets(geometry, call.sources[static_cast<size_t>(segment.source)]);
}

WordList::Use use_of(const Conv2dGeometry& geometry) {
  if (product_of(geometry) == kInt8) return WordList::kBytes;
  return multiplies_pairs(geometry) ? WordList::kEvenWords : WordList::kWords;
}

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
  for (const Node& node : nodes) {
    for (const Segment& segment : node.segments) {
      const bool known =
          segment.source >= 0 && segment.source < static_cast<int64_t>(call.sources.size());
      if (!known || gathers(geometry, call, segment)) return true;
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
  gather_segments();
  memory_ = static_cast<char*>(arena(ArenaSlot::kStaging, bytes_));
  for (const Padded& padded : padded_) call_.sources[padded.source].data = memory_ + padded.begin;
  for (const Gathered& g : gathered_) call_.sources[g.source].data = memory_ + g.begin;
}

int64_t StagedCall::reserve(int64_t bytes) {
  const int64_t begin = bytes_;
  bytes_ += (bytes + kCacheLineBytes - 1) / kCacheLineBytes * kCacheLineBytes;
  return begin;
}

// Of an element.
int64_t StagedCall::gathered_bytes() const {
  return product_of(geometry_) == kInt8 ? 1 : geometry_.element_bytes();
}

void StagedCall::pad_sources() {
  const int64_t in_h = call_.in_h, in_w = call_.in_w;
  const int64_t padding_h = geometry_.padding_h, padding_w = geometry_.padding_w;
  geometry_.padding_h = geometry_.padding_w = 0;
  call_.in_h += 2 * padding_h;
  call_.in_w += 2 * padding_w;
  for (size_t s = 0; s < call_.sources.size(); ++s) {
    SourceView& source = call_.sources[s];
    const int64_t channels = multiplies_pairs(geometry_) ? even(source.channels) : source.channels;
    const int64_t row = call_.in_w * channels;
    const int64_t begin = reserve(call_.batch * call_.in_h * row * geometry_.element_bytes());
    padded_.push_back({source, s, in_h, in_w, padding_h, padding_w, begin, read_from(s)});
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

bool StagedCall::read_from(size_t source) const {
  for (const Node& node : nodes_) {
    for (size_t s = 0; s < node.segments.size(); ++s) {
      if (node.segments[s].source == static_cast<int64_t>(source) &&
          call_.reads(static_cast<int64_t>(s))) {
        return true;
      }
    }
  }
  return false;
}

void StagedCall::gather_segments() {
  for (size_t i = 0; i < nodes_.size(); ++i) {
    for (size_t s = 0; s < nodes_[i].segments.size(); ++s) {
      Segment& segment = nodes_[i].segments[s];
      if (!gathers(geometry_, call_, segment) || !call_.reads(static_cast<int64_t>(s))) continue;
      const int64_t listed = static_cast<int64_t>(segment.channels.size());
      const int64_t together = channels_of_row(product_of(geometry_));
      const int64_t count = (listed + together - 1) / together * together;
      int64_t pixel = count;
      if (geometry_.stride_w * pixel * gathered_bytes() % kSetPeriodBytes == 0) {
        pixel += kCacheLineBytes / gathered_bytes();
      }
      const int64_t row = call_.in_w * pixel;
      const int64_t begin = reserve(call_.batch * call_.in_h * row * gathered_bytes());
      const size_t target = call_.sources.size();
      gathered_.push_back({static_cast<int32_t>(i), static_cast<size_t>(segment.source), target,
                           WordList(segment.channels, words(), use_of(geometry_)), begin});
      call_.sources.push_back({nullptr, count, call_.in_h * row, 1, row, pixel});
      segment.source = static_cast<int64_t>(target);
      segment.channels.assign(static_cast<size_t>(count), 0);
      for (int64_t c = 0; c < count; ++c) {
        segment.channels[static_cast<size_t>(c)] = static_cast<int32_t>(c);
      }
    }
  }
}

bool StagedCall::memory_moved() const { return arena(ArenaSlot::kStaging, bytes_) != memory_; }

void StagedCall::copy(bool gather, bool by_rows) const {
  for (const Padded& padded : padded_) {
    if (!padded.is_read) continue;
    if (geometry_.dtype == kFloat32) {
      copy_padded<float>(padded);
    } else {
      copy_padded<uint16_t>(padded);
    }
  }
  if (gather) copy_gathered(by_rows);
}

template <typename Element>
void StagedCall::copy_padded(const Padded& padded) const {
  const int32_t num_threads = call_.num_threads;
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

void StagedCall::copy_gathered(bool by_rows) const {
  const int64_t count = static_cast<int64_t>(gathered_.size());
  const int64_t rows = call_.batch * call_.in_h;
  const int32_t threads = std::max(1, call_.num_threads);
  // Rows are cut up where there are few: pixels that need no neighbours are all one row.
  const int64_t parts = std::max<int64_t>(
      1, std::min(call_.in_w, kPartsPerThread * threads / std::max<int64_t>(1, rows)));
  const int64_t pieces = rows * parts, all = pieces * count;
  // Starting the other threads takes as long as one needs for this much.
  const int32_t num_threads = bytes_ < kAloneBytes ? 1 : call_.num_threads;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
  for (int64_t i = 0; i < all; ++i) {
    const int64_t piece = by_rows ? i / count : i % pieces;
    const int64_t list = by_rows ? i % count : i / pieces;
    const int64_t row = piece / parts, part = piece % parts;
    const int64_t begin = call_.in_w * part / parts, end = call_.in_w * (part + 1) / parts;
    gather_row(gathered_[static_cast<size_t>(list)], row / call_.in_h, row % call_.in_h, begin,
               end - begin, 1);
  }
}

void StagedCall::gather_pixels(int32_t node, int64_t first, int64_t end, int64_t out_h,
                               int64_t out_w) const {
  for (const Gathered& gathered : gathered_) {
    if (gathered.node != node) continue;
    for (int64_t pixel = first; pixel < end;) {
      const int64_t w = pixel % out_w, row = pixel / out_w;
      const int64_t count = std::min(end - pixel, out_w - w);
      gather_row(gathered, row / out_h, row % out_h * geometry_.stride_h, w * geometry_.stride_w,
                 count, geometry_.stride_w);
      pixel += count;
    }
  }
}

void StagedCall::gather_row(const Gathered& gathered, int64_t n, int64_t h, int64_t w,
                            int64_t count, int64_t step) const {
  const SourceView& from = call_.sources[gathered.from];
  const SourceView& to = call_.sources[gathered.source];
  const uint16_t* x = static_cast<const uint16_t*>(from.data) +
                      words() * (n * from.stride_n + h * from.stride_h + w * from.stride_w);
  if (product_of(geometry_) == kInt8) {
    uint8_t* bytes = reinterpret_cast<uint8_t*>(memory_ + gathered.begin) + n * to.stride_n +
                     h * to.stride_h + w * to.stride_w;
    gathered.words.quantise(x, words() * step * from.stride_w, count, geometry_.input, bytes,
                            step * to.stride_w);
    return;
  }
  uint16_t* y = reinterpret_cast<uint16_t*>(memory_ + gathered.begin) +
                words() * (n * to.stride_n + h * to.stride_h + w * to.stride_w);
  gathered.words.gather(x, words() * step * from.stride_w, count, y, words() * step * to.stride_w);
}

}  // namespace disco
