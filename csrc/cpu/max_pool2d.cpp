#include "max_pool2d.h"

#include <cstring>
#include <vector>

#include "conv2d_plan.h"

namespace disco {

static void fill_lowest(DataType dtype, int64_t channels, char* out) {
  const uint32_t infinity = 0xFF800000u;  // float32's -inf; its upper half is bfloat16's
  const uint16_t half = static_cast<uint16_t>(infinity >> 16);
  for (int64_t c = 0; c < channels; ++c) {
    if (dtype == kFloat32) {
      std::memcpy(out + c * 4, &infinity, 4);
    } else {
      std::memcpy(out + c * 2, &half, 2);
    }
  }
}

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
        if (count > 0) {
          largest({pixels.data(), count, call.x.channels, out.at(n, oh, ow)});
        } else {
          // A dilated window can lie in the padding altogether.
          fill_lowest(window.dtype, call.x.channels, out.at(n, oh, ow));
        }
      }
    }
  }
}

}  // namespace disco
