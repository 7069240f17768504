#include "gather_pack.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "gather_pack_work.h"
#include "streamer.h"

namespace disco {
namespace {

constexpr int64_t kLineFloats = 16;

// The numbers below come from sweeps on a Zen 5 core (48 KB first-level and 1 MB second-level
// cache, large memcpy 40 GB/s read and written): maps of 256 x 56 x 56 and 1024 x 14 x 14, batches
// of 1 to 64, densities 0.05 to 1, one and three messages. GB/s are touched lines plus bytes
// written.

// Bytes read and written below which a second thread costs more than it saves: 119 KB take 1.98 us
// on one thread and 1.89 on two, 58 KB 1.63 and 1.65.
constexpr int64_t kParallelBytes = 128 * 1024;
// Several messages, or one that is converted, are made of this many bytes of x at a time: they stay
// in the first-level cache for the next list. 4 to 32 KB are within 10% where x is cached; from
// memory, three messages of half the channels take 36 GB/s with 4 KB, 32 with 8, 25 with 16.
constexpr int64_t kBlockBytes = 8 * 1024;
// From here on little of what is read and written is still in a cache for anyone, and it pays to
// fetch ahead and to write past the caches. 64 images: one message of a fifth of the channels 46
// GB/s instead of 28, three of half of them 45 instead of 19. 4 images (13 MB and the messages):
// one message of a fifth 69 GB/s instead of 90.
constexpr int64_t kStreamBytes = 16 * 1024 * 1024;
// Then a block may be less than the four pixels that kernels take together, unless several lists
// read it and four are not too many. 1024 channels, three messages of half of them: 35 GB/s with
// four pixels, 30 with two; one message 37 and 44. 2048 channels, three messages: 28 and 35.
constexpr int64_t kFoursBytes = 16 * 1024;
// How far ahead then: 36 GB/s with 4 KB, 46 with 8, 47 with 16, 45 with 32.
constexpr int64_t kAheadBytes = 16 * 1024;
// Fetching ahead pays where most lines are touched. Then the others are fetched, too: in unbroken
// order memory gives twice as much (of 24 lines of 32 touched, 30 GB/s instead of 22). With 11
// lines of 16 four pixels at a time without are faster, 31 GB/s; a loop that only reads those
// lines, 28.
constexpr double kDenseLines = 0.7;
// Of a bfloat16 activation, gathered before they are widened: 4 KB stay in the first-level cache.
constexpr int64_t kWords = 2048;

int64_t element_bytes(WireType wire) {
  return wire == WireType::kFloat32 ? 4 : wire == WireType::kInt8 ? 1 : 2;
}

}  // namespace

int64_t message_bytes(WireType wire, int64_t images, int64_t pixels, int64_t channels) {
  if (wire != WireType::kInt8) return element_bytes(wire) * pixels * channels;
  return (kFloatBytes * images * channels + pixels * channels + 3) / 4 * 4;
}

GatherPack::GatherPack(std::vector<std::vector<int32_t>> lists)
    : kernels_(active_message_kernels()) {
  std::vector<int64_t> lines;
  for (std::vector<int32_t>& list : lists) {
    for (const int32_t channel : list) lines.push_back(channel / kLineFloats);
    words_.emplace_back(list, 1, WordList::kWords);
    lists_.emplace_back(std::move(list), kernels_.vector_length);
    before_.push_back(num_channels_);
    num_channels_ += lists_.back().num_channels();
    most_channels_ = std::max(most_channels_, lists_.back().num_channels());
  }
  if (lines.empty()) return;
  std::sort(lines.begin(), lines.end());
  first_line_ = lines.front();
  last_line_ = lines.back();
  touched_lines_ = std::unique(lines.begin(), lines.end()) - lines.begin();
}

GatherPack::Work GatherPack::plan(const Activation2d& x, WireType wire, int32_t num_threads) const {
  Work work = {};
  work.x = {x.data, x.channels, x.grid.simplified(), x.dtype};
  work.images = x.grid.n;
  work.image_pixels = x.grid.h * x.grid.w;
  work.pixels = work.images * work.image_pixels;
  work.wire = wire;
  const int64_t touched = touched_lines_ * kLineFloats;
  const int64_t bytes = work.pixels * (touched * kFloatBytes + num_channels_ * element_bytes(wire));
  const int64_t pixel_bytes = kFloatBytes * std::max<int64_t>(1, work.x.grid.stride_w);
  const bool dense = static_cast<double>(touched) >= kDenseLines * static_cast<double>(x.channels);
  work.streamed = x.dtype == kFloat32 && bytes > kStreamBytes && dense;
  const bool fours = !work.streamed || (lists_.size() > 1 && 4 * pixel_bytes <= kFoursBytes);
  work.block = std::max<int64_t>(fours ? 4 : 1, kBlockBytes / pixel_bytes);
  work.ahead = work.streamed ? std::max(work.block, kAheadBytes / pixel_bytes) : 0;
  work.parts = bytes > kParallelBytes ? std::max(1, num_threads) : 1;
  for (int64_t i = 0; work.ahead > 0 && i < work.block; ++i) {
    for (int64_t line = first_line_; line <= last_line_; ++line) {
      const int64_t offset = i * work.x.grid.stride_w + line * kLineFloats;
      work.fetched.push_back(static_cast<int32_t>(offset));
    }
  }
  return work;
}

void GatherPack::run(const Activation2d& x, WireType wire, const std::vector<void*>& messages,
                     int32_t num_threads) const {
  if (messages.size() != lists_.size()) {
    throw std::invalid_argument(std::to_string(lists_.size()) + " lists need as many messages, " +
                                "given " + std::to_string(messages.size()));
  }
  for (const ChannelList& list : lists_) {
    if (list.channels_needed() > x.channels) {
      throw std::invalid_argument("channel " + std::to_string(list.channels_needed() - 1) +
                                  " is listed; the activation has " + std::to_string(x.channels));
    }
  }
  if (num_channels_ == 0) return;
  const Work work = plan(x, wire, num_threads);
  if (wire == WireType::kInt8) {
    write_int8(work, messages);
  } else if (work.pixels == 0) {
    return;
  } else if (work.streamed) {
    write_streamed(work, messages);
  } else if (wire == WireType::kFloat32) {
    write_float32(work, messages);
  } else {
    write_halves(work, messages);
  }
}

// bfloat16 pixels as float32; `words` has room for kWords.
void GatherPack::gather_widened(size_t list, const uint16_t* x, int64_t stride, int64_t pixels,
                                uint16_t* words, float* to) const {
  const int64_t channels = lists_[list].num_channels();
  std::unique_ptr<uint16_t[]> larger;
  if (pixels * channels > kWords) {
    larger.reset(new uint16_t[static_cast<size_t>(pixels * channels)]);
    words = larger.get();
  }
  words_[list].gather(x, stride, pixels, words, channels);
  kernels_.widen_bfloat16(words, pixels * channels, to);
}

// One list's channels of a block of pixels that are stride_w apart. Each list fetches its share of
// what a later block needs, every line once and in the order of memory.
void GatherPack::gather(const Work& work, size_t list, int64_t offset, int64_t pixels,
                        float* to) const {
  const ChannelListView view = lists_[list].view();
  const int64_t stride = work.x.grid.stride_w;
  if (view.num_channels == 0) return;
  if (work.x.dtype == kBFloat16) {
    // The words first: to widen them where they come from would be to widen what is not listed.
    uint16_t words[kWords];
    const int64_t together = std::max<int64_t>(1, kWords / view.num_channels);
    for (int64_t p = 0; p < pixels; p += together) {
      const int64_t count = std::min(together, pixels - p);
      gather_widened(list, work.x.words() + offset + p * stride, stride, count, words,
                     to + p * view.num_channels);
    }
    return;
  }
  const float* x = work.x.floats() + offset;
  if (work.ahead == 0) {
    kernels_.gather(view, x, stride, pixels, to, view.num_channels);
    return;
  }
  const int64_t lines = (last_line_ - first_line_ + 1) * pixels;
  const int64_t begin = lines * before_[list] / num_channels_;
  const int64_t end = lines * (before_[list] + view.num_channels) / num_channels_;
  kernels_.gather_ahead(view, x + work.ahead * stride, work.fetched.data() + begin, end - begin, x,
                        stride, pixels, to);
}

void GatherPack::write_float32(const Work& work, const std::vector<void*>& messages) const {
  const int64_t block = lists_.size() == 1 ? work.pixels : work.block;
#pragma omp parallel for schedule(static, 1) num_threads(work.parts) if (work.parts > 1)
  for (int32_t part = 0; part < work.parts; ++part) {
    for_each_run(work.x.grid, work.edge(work.pixels, part), work.edge(work.pixels, part + 1), block,
                 work.pixels, [&](int64_t offset, int64_t first, int64_t count) {
                   for (size_t m = 0; m < lists_.size(); ++m) {
                     float* message = static_cast<float*>(messages[m]);
                     gather(work, m, offset, count, message + first * lists_[m].num_channels());
                   }
                 });
  }
}

void GatherPack::write_halves(const Work& work, const std::vector<void*>& messages) const {
  const bool as_they_are = work.x.dtype == kBFloat16 && work.wire == WireType::kBfloat16;
  const auto narrow =
      work.wire == WireType::kFloat16 ? kernels_.narrow_float16 : kernels_.narrow_bfloat16;
#pragma omp parallel for schedule(static, 1) num_threads(work.parts) if (work.parts > 1)
  for (int32_t part = 0; part < work.parts; ++part) {
    std::unique_ptr<float[]> rows(new float[static_cast<size_t>(work.block * most_channels_)]);
    for_each_run(work.x.grid, work.edge(work.pixels, part), work.edge(work.pixels, part + 1),
                 work.block, work.pixels, [&](int64_t offset, int64_t first, int64_t count) {
                   for (size_t m = 0; m < lists_.size(); ++m) {
                     const int64_t channels = lists_[m].num_channels();
                     uint16_t* to = static_cast<uint16_t*>(messages[m]) + first * channels;
                     if (as_they_are) {
                       words_[m].gather(work.x.words() + offset, work.x.grid.stride_w, count, to,
                                        channels);
                       continue;
                     }
                     gather(work, m, offset, count, rows.get());
                     narrow(rows.get(), count * channels, to);
                   }
                 });
  }
}

void GatherPack::write_streamed(const Work& work, const std::vector<void*>& messages) const {
  const auto narrow =
      work.wire == WireType::kFloat16 ? kernels_.narrow_float16 : kernels_.narrow_bfloat16;
  const int64_t size = element_bytes(work.wire);
#pragma omp parallel for schedule(static, 1) num_threads(work.parts) if (work.parts > 1)
  for (int32_t part = 0; part < work.parts; ++part) {
    const int64_t begin = work.edge(work.pixels, part);
    std::unique_ptr<float[]> rows(new float[static_cast<size_t>(work.block * most_channels_)]);
    std::vector<Streamer> streamers;
    for (size_t m = 0; m < lists_.size(); ++m) {
      const int64_t row_bytes = size * lists_[m].num_channels();
      streamers.emplace_back(kernels_, static_cast<char*>(messages[m]) + begin * row_bytes,
                             work.block * row_bytes);
    }
    for_each_run(work.x.grid, begin, work.edge(work.pixels, part + 1), work.block, work.pixels,
                 [&](int64_t offset, int64_t, int64_t count) {
                   for (size_t m = 0; m < lists_.size(); ++m) {
                     const int64_t values = count * lists_[m].num_channels();
                     void* block = streamers[m].block();
                     if (work.wire == WireType::kFloat32) {
                       gather(work, m, offset, count, static_cast<float*>(block));
                     } else {
                       gather(work, m, offset, count, rows.get());
                       narrow(rows.get(), values, static_cast<uint16_t*>(block));
                     }
                     streamers[m].take(values * size);
                   }
                 });
    for (Streamer& streamer : streamers) streamer.finish();
  }
}

}  // namespace disco
