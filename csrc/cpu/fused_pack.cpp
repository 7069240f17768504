#include "fused_pack.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "pixel_runs.h"

namespace disco {
namespace {

// Pixels that are converted at a time: some KB, which stay in the first-level cache.
constexpr int64_t kPixels = 16;

}  // namespace

FusedPack::FusedPack(const std::vector<Node>& nodes, DataType dtype,
                     const std::vector<std::vector<int32_t>>& lists)
    : kernels_(active_message_kernels()), dtype_(dtype), lists_(lists) {
  const int64_t width = int64_t{active_isa().vector_length} * active_isa().max_vectors;
  for (size_t n = 0; n < nodes.size(); ++n) {
    const std::vector<int32_t>& channels = nodes[n].out_channels;
    for (size_t o = 0; o < channels.size(); ++o) {
      const size_t channel = static_cast<size_t>(channels[o]);
      if (channel >= writers_.size()) writers_.resize(channel + 1);
      writers_[channel] = {static_cast<int32_t>(n), static_cast<int64_t>(o) / width};
    }
  }
  for (size_t m = 0; m < lists_.size(); ++m) {
    std::vector<int32_t> all;
    for (const int32_t channel : lists_[m]) {
      if (channel < 0 || static_cast<size_t>(channel) >= writers_.size() ||
          writers_[static_cast<size_t>(channel)].node < 0) {
        refuse("message " + std::to_string(m) + " lists channel " + std::to_string(channel) +
               ", which the convolution does not write");
      }
      all.push_back(static_cast<int32_t>(all.size()));
    }
    all_.emplace_back(std::vector<std::vector<int32_t>>{std::move(all)});
  }
}

const std::vector<FusedPack::Part>& FusedPack::parts(const Range& range) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = parts_.find(range);
  if (found != parts_.end()) return found->second;
  const auto& [node, first_panel, num_panels] = range;
  std::vector<Part> parts;
  for (size_t m = 0; m < lists_.size(); ++m) {
    const std::vector<int32_t>& list = lists_[m];
    const auto inside = [&, node = node, first = first_panel, num = num_panels](int32_t channel) {
      const Writer& writer = writers_[static_cast<size_t>(channel)];
      return writer.node == node && writer.panel >= first && writer.panel < first + num;
    };
    for (size_t begin = 0, end = 0; begin < list.size(); begin = ++end) {
      end = begin;
      while (end < list.size() && inside(list[end])) ++end;
      if (end == begin) continue;
      const std::vector<int32_t> channels(list.begin() + static_cast<std::ptrdiff_t>(begin),
                                          list.begin() + static_cast<std::ptrdiff_t>(end));
      parts.push_back({m, static_cast<int64_t>(begin),
                       ChannelList(channels, kernels_.vector_length),
                       WordList(channels, 1, WordList::kWords)});
    }
  }
  return parts_.emplace(range, std::move(parts)).first->second;
}

FusedMessages::FusedMessages(const FusedPack& pack, const ConvPlan& plan)
    : pack_(pack),
      out_(PixelGrid{plan.call.batch, plan.out_h, plan.out_w, plan.call.out.stride_n,
                     plan.call.out.stride_h, plan.call.out.stride_w}
               .simplified()),
      data_(plan.call.out.data),
      wire_(plan.call.wire),
      images_(plan.call.message_images),
      messages_(plan.call.messages) {
  if (messages_.size() != pack.num_messages()) {
    refuse(std::to_string(pack.num_messages()) + " lists need as many messages, given " +
           std::to_string(messages_.size()));
  }
  const int64_t pixels = out_.num_pixels();
  if (images_ < 0 || (images_ == 0 ? pixels != 0 : pixels % images_ != 0)) {
    refuse(std::to_string(pixels) + " pixels are no whole number of pixels in each of " +
           std::to_string(images_) + " images");
  }
  if (wire_ != WireType::kInt8) return;
  for (const std::vector<int32_t>& list : pack.lists_) {
    kept_.emplace_back(new float[static_cast<size_t>(pixels) * list.size()]);
  }
}

void FusedMessages::write(int32_t node, int64_t first_panel, int64_t num_panels, int64_t begin,
                          int64_t end) const {
  const std::vector<FusedPack::Part>& parts = pack_.parts({node, first_panel, num_panels});
  int64_t most = 0;
  for (const FusedPack::Part& part : parts) most = std::max(most, part.words.num_words());
  if (most == 0) return;
  // Selected values, and the same as they are sent.
  const bool converts = pack_.dtype_ != kFloat32 || wire_ != WireType::kFloat32;
  std::unique_ptr<float[]> scratch(converts ? new float[static_cast<size_t>(2 * kPixels * most)]
                                            : nullptr);
  const int64_t longest = converts ? kPixels : end - begin;
  for_each_run(out_, begin, end, longest, out_.num_pixels(),
               [&](int64_t offset, int64_t first, int64_t count) {
                 for (const FusedPack::Part& part : parts) {
                   if (pack_.dtype_ == kFloat32) {
                     write_float32(part, offset, count, first, scratch.get());
                   } else {
                     write_bfloat16(part, offset, count, first, scratch.get());
                   }
                 }
               });
}

void FusedMessages::write_float32(const FusedPack::Part& part, int64_t offset, int64_t count,
                                  int64_t first, float* scratch) const {
  const ChannelListView list = part.channels.view();
  const float* x = static_cast<const float*>(data_) + offset;
  if (wire_ == WireType::kFloat32 || wire_ == WireType::kInt8) {
    float* to = wire_ == WireType::kInt8 ? kept_[part.message].get()
                                         : static_cast<float*>(messages_[part.message]);
    pack_.kernels_.gather(list, x, out_.stride_w, count, to + first * row(part) + part.place,
                          row(part));
    return;
  }
  pack_.kernels_.gather(list, x, out_.stride_w, count, scratch, list.num_channels);
  uint16_t* sent = reinterpret_cast<uint16_t*>(scratch + kPixels * list.num_channels);
  narrow(part, scratch, count, first, sent);
}

void FusedMessages::write_bfloat16(const FusedPack::Part& part, int64_t offset, int64_t count,
                                   int64_t first, float* scratch) const {
  const int64_t channels = part.words.num_words();
  const uint16_t* x = static_cast<const uint16_t*>(data_) + offset;
  uint16_t* words = reinterpret_cast<uint16_t*>(scratch + kPixels * channels);
  part.words.gather(x, out_.stride_w, count, words, channels);
  const int64_t at = first * row(part) + part.place;
  if (wire_ == WireType::kBfloat16) {
    uint16_t* message = static_cast<uint16_t*>(messages_[part.message]) + at;
    for (int64_t p = 0; p < count; ++p) {
      std::memcpy(message + p * row(part), words + p * channels,
                  sizeof(uint16_t) * static_cast<size_t>(channels));
    }
    return;
  }
  pack_.kernels_.widen_bfloat16(words, count * channels, scratch);
  if (wire_ == WireType::kFloat16) {
    narrow(part, scratch, count, first, words);
    return;
  }
  float* to = wire_ == WireType::kInt8 ? kept_[part.message].get()
                                       : static_cast<float*>(messages_[part.message]);
  for (int64_t p = 0; p < count; ++p) {
    std::memcpy(to + at + p * row(part), scratch + p * channels,
                sizeof(float) * static_cast<size_t>(channels));
  }
}

void FusedMessages::narrow(const FusedPack::Part& part, const float* values, int64_t count,
                           int64_t first, uint16_t* scratch) const {
  const int64_t channels = part.words.num_words();
  const auto convert =
      wire_ == WireType::kFloat16 ? pack_.kernels_.narrow_float16 : pack_.kernels_.narrow_bfloat16;
  uint16_t* message =
      static_cast<uint16_t*>(messages_[part.message]) + first * row(part) + part.place;
  if (channels == row(part)) {
    convert(values, count * channels, message);
    return;
  }
  convert(values, count * channels, scratch);
  for (int64_t p = 0; p < count; ++p) {
    std::memcpy(message + p * row(part), scratch + p * channels,
                sizeof(uint16_t) * static_cast<size_t>(channels));
  }
}

void FusedMessages::finish(int32_t num_threads) const {
  const int64_t pixels = images_ > 0 ? out_.num_pixels() / images_ : 0;
  for (size_t m = 0; m < kept_.size(); ++m) {
    const int64_t count = static_cast<int64_t>(pack_.lists_[m].size());
    const PixelGrid grid = {images_, pixels, 1, pixels * count, count, count};
    pack_.all_[m].run({kept_[m].get(), count, grid}, WireType::kInt8, {messages_[m]}, num_threads);
  }
}

}  // namespace disco
