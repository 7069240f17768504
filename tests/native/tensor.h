// A [batch][h][w][channels] tensor in one of the memory layouts that callers bring.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace selftest {

// Bfloat16 is the upper half of a float32; to the nearest, ties to even.
inline uint16_t to_bfloat16(float value) {
  if (std::isnan(value)) return 0x7fc0;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float from_bfloat16(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// kSlice is a run of channels of a larger tensor, kCrop a part of its rows and pixels, kPlanes has
// its channels outermost.
enum class Layout { kWhole, kSlice, kCrop, kPlanes };

struct Tensor {
  Tensor(int64_t n, int64_t h, int64_t w, int64_t c, Layout layout) : n(n), h(h), w(w), c(c) {
    const int64_t channels = layout == Layout::kSlice ? c + 5 : c;
    const int64_t width = layout == Layout::kCrop ? w + 3 : w;
    const int64_t height = layout == Layout::kCrop ? h + 2 : h;
    stride_c = layout == Layout::kPlanes ? height * width : 1;
    stride_w = layout == Layout::kPlanes ? 1 : channels;
    stride_h = width * stride_w;
    stride_n = height * width * channels;
    // From the first element to the last and no further, so that both lie at guarded edges. What
    // lies between and is not the tensor's stays NaN: whoever reads it shows.
    if (n * h * w * c > 0) {
      const int64_t last = index(n - 1, h - 1, w - 1, c - 1);
      values.assign(static_cast<size_t>(last + 1), std::numeric_limits<float>::quiet_NaN());
    }
  }

  int64_t index(int64_t in, int64_t ih, int64_t iw, int64_t ic) const {
    return in * stride_n + ih * stride_h + iw * stride_w + ic * stride_c;
  }
  float& at(int64_t in, int64_t ih, int64_t iw, int64_t ic) {
    return values[static_cast<size_t>(index(in, ih, iw, ic))];
  }
  float at(int64_t in, int64_t ih, int64_t iw, int64_t ic) const {
    return values[static_cast<size_t>(index(in, ih, iw, ic))];
  }

  int64_t n, h, w, c;
  int64_t stride_n, stride_h, stride_w, stride_c;
  std::vector<float> values;
};

}  // namespace selftest
