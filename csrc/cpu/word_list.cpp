#include "word_list.h"

#include <algorithm>

#include "conv2d.h"

namespace disco {

WordList::WordList(std::vector<int32_t> channels, bool even) : channels_(std::move(channels)) {
  const int64_t count = num_channels();
  words_ = even ? (count + 1) / 2 * 2 : count;
  int64_t needed = 0;
  for (const int32_t channel : channels_) needed = std::max<int64_t>(needed, int64_t{channel} + 1);
  for (int64_t i = 0; i < count;) {
    WordStep step = {};
    // Aligned windows where pixels are: a load that crosses two cache lines counts twice.
    const int64_t low = channels_[static_cast<size_t>(i)] / kWordWindow * kWordWindow;
    int64_t n = 0;
    while (i + n < count && n < kWordWindow &&
           channels_[static_cast<size_t>(i + n)] / kWordWindow * kWordWindow == low) {
      ++n;
    }
    step.first_from = static_cast<int32_t>(low);
    step.first_to = static_cast<int32_t>(i);
    for (int64_t lane = 0; lane < n; ++lane) {
      step.lane[lane] = static_cast<uint16_t>(channels_[static_cast<size_t>(i + lane)] - low);
      step.written |= 1u << lane;
    }
    for (int64_t lane = 0; lane < kWordWindow && low + lane < needed; ++lane) {
      step.readable |= 1u << lane;
    }
    i += n;
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
  const int64_t count = num_channels();
  for (int64_t p = 0; p < pixels; ++p, x += stride, out += out_stride) {
    for (int64_t c = 0; c < count; ++c) out[c] = x[channels_[static_cast<size_t>(c)]];
    if (words_ > count) out[count] = 0;
  }
}

}  // namespace disco
