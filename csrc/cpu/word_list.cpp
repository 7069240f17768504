#include "word_list.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace disco {

namespace {

// In the order that QuadGather has for bytes.
void order_for_bytes(WordStep& step) {
  uint16_t ordered[kWordWindow];
  for (int i = 0; i < kWordWindow; ++i) {
    const int byte = i % 8 / 2 + (i % 2 == 0 ? 0 : 4);  // of eight, that word i becomes
    ordered[i] = step.lane[i / 8 * 8 + byte];
  }
  std::copy(ordered, ordered + kWordWindow, step.lane);
}

}  // namespace

WordList::WordList(const std::vector<int32_t>& channels, int64_t words, Use use)
    : words_of_channel_(words) {
  for (const int32_t channel : channels) {
    for (int64_t w = 0; w < words; ++w) {
      listed_.push_back(static_cast<int32_t>(channel * words + w));
    }
  }
  const int64_t count = num_words();
  words_ = use == kEvenWords ? (count + 1) / 2 * 2 : count;
  int64_t needed = 0;
  for (const int32_t word : listed_) needed = std::max<int64_t>(needed, int64_t{word} + 1);
  for (int64_t i = 0; i < count;) {
    WordStep step = {};
    // Aligned windows where pixels are: a load that crosses two cache lines counts twice.
    const int64_t low = listed_[static_cast<size_t>(i)] / kWordWindow * kWordWindow;
    int64_t n = 0;
    while (i + n < count && n < kWordWindow &&
           listed_[static_cast<size_t>(i + n)] / kWordWindow * kWordWindow == low) {
      ++n;
    }
    step.first_from = static_cast<int32_t>(low);
    step.first_to = static_cast<int32_t>(i);
    for (int64_t lane = 0; lane < n; ++lane) {
      step.lane[lane] = static_cast<uint16_t>(listed_[static_cast<size_t>(i + lane)] - low);
      step.written |= 1u << lane;
    }
    for (int64_t lane = 0; lane < kWordWindow && low + lane < needed; ++lane) {
      step.readable |= 1u << lane;
    }
    i += n;
    if (use == kBytes && words == 1) order_for_bytes(step);
    steps_.push_back(step);
  }
  if (words_ > count) {
    // Nothing is readable, so what is written is zero.
    WordStep zero = {};
    zero.first_to = static_cast<int32_t>(count);
    zero.written = 1;
    steps_.push_back(zero);
  }
}

void WordList::gather(const uint16_t* x, int64_t stride, int64_t pixels, uint16_t* out,
                      int64_t out_stride) const {
  if (pixels < 1) return;
  if (active_isa().gather_words != nullptr) {
    active_isa().gather_words({x, out, stride, out_stride, pixels,
                               (pixels - 1) * out_stride + words_, steps_.data(),
                               static_cast<int64_t>(steps_.size())});
    return;
  }
  const int64_t count = num_words();
  for (int64_t p = 0; p < pixels; ++p, x += stride, out += out_stride) {
    for (int64_t c = 0; c < count; ++c) out[c] = x[listed_[static_cast<size_t>(c)]];
    if (words_ > count) out[count] = 0;
  }
}

namespace {

float value_of(const uint16_t* words, int64_t count) {
  const uint32_t bits = count == 2 ? words[0] | static_cast<uint32_t>(words[1]) << 16
                                   : static_cast<uint32_t>(words[0]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace

void WordList::quantise(const uint16_t* x, int64_t stride, int64_t pixels, InputBytes input,
                        uint8_t* out, int64_t out_stride) const {
  if (pixels < 1) return;
  const int64_t words = words_of_channel_;
  const int64_t count = num_words() / words;
  const float inverse = 1.0f / input.scale;
  const auto vectorised = active_isa().quads->quantise[words == 2 ? kFloat32 : kBFloat16];
  if (vectorised != nullptr) {
    vectorised({x, out, stride, out_stride, pixels, (pixels - 1) * out_stride + count,
                steps_.data(), static_cast<int64_t>(steps_.size()), inverse, input.zero_point});
    return;
  }
  for (int64_t p = 0; p < pixels; ++p, x += stride, out += out_stride) {
    for (int64_t c = 0; c < count; ++c) {
      const float scaled = value_of(x + listed_[static_cast<size_t>(c * words)], words) * inverse;
      const float byte = std::nearbyint(scaled) + static_cast<float>(input.zero_point);
      // A NaN fails both comparisons.
      out[c] = static_cast<uint8_t>(byte > 255.0f ? 255.0f : byte > 0.0f ? byte : 0.0f);
    }
  }
}

}  // namespace disco
