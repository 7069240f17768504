#include "max_pool2d.h"

#include <cstring>
#include <vector>

#include "conv2d_plan.h"

namespace disco {
namespace {

std::vector<char> minus_infinities(int64_t count, DataType dtype) {
  constexpr uint32_t kBits = 0xff800000u;  // of a float; its upper half is the bfloat16
  const size_t bytes = dtype == kFloat32 ? sizeof(float) : sizeof(uint16_t);
  const uint16_t upper = kBits >> 16;
  std::vector<char> values(static_cast<size_t>(count) * bytes);
  for (size_t at = 0; at < values.size(); at += bytes) {
    if (dtype == kFloat32) {
      std::memcpy(&values[at], &kBits, bytes);
    } else {
      std::memcpy(&values[at], &upper, bytes);
    }
  }
  return values;
}

}  // namespace

void max_pool2d(const MaxPool2dCall& call) {
  const Conv2dGeometry& window = call.window;
  if (window.kernel_h < 1 || window.kernel_w < 1 || 2 * window.padding_h > window.kernel_h ||
      2 * window.padding_w > window.kernel_w) {
    refuse("the padding of max_pool2d must be at most half of its kernel");
  }
  const int64_t bytes = window.element_bytes();
  const Map<const char> x = {static_cast<const char*>(call.x.data), call.x.channels,
                             call.x.stride_n * bytes, call.x.stride_h * bytes,
                             call.x.stride_w * bytes};
  const Map<char> out = {static_cast<char*>(call.out.data), call.x.channels,
                         call.out.stride_n * bytes, call.out.stride_h * bytes,
                         call.out.stride_w * bytes};
  // What a window holds that dilation spreads over nothing but padding.
  const std::vector<char> nothing = minus_infinities(call.x.channels, window.dtype);
  const auto largest = active_isa().largest_pixel[window.dtype];
  const int64_t rows = call.batch * call.out_h;
#pragma omp parallel num_threads(call.num_threads) if (call.num_threads > 1)
  {
    std::vector<const char*> pixels(static_cast<size_t>(window.taps()));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t n = row / call.out_h, oh = row % call.out_h;
      for (int64_t ow = 0; ow < call.out_w; ++ow) {
        int64_t count = 0;
        for (int64_t r = 0; r < window.kernel_h; ++r) {
          const int64_t h = oh * window.stride_h - window.padding_h + r * window.dilation_h;
          if (h < 0 || h >= call.in_h) continue;
          for (int64_t s = 0; s < window.kernel_w; ++s) {
            const int64_t w = ow * window.stride_w - window.padding_w + s * window.dilation_w;
            if (w >= 0 && w < call.in_w) pixels[static_cast<size_t>(count++)] = x.at(n, h, w);
          }
        }
        if (count == 0) pixels[static_cast<size_t>(count++)] = nothing.data();
        largest({pixels.data(), count, call.x.channels, out.at(n, oh, ow)});
      }
    }
  }
}

}  // namespace disco
