#include "line_read.h"

namespace disco {

float read_lines(const float* x, int64_t stride, int64_t pixels, const std::vector<int32_t>& lines,
                 int32_t num_threads) {
  float total = 0.0f;
#pragma omp parallel for schedule(static) num_threads(num_threads) reduction(+ : total)
  for (int64_t block = 0; block < pixels / 4; ++block) {
    // Four pixels at a time keep most reads under way: of 9 random lines in 16, 26 GB/s from memory
    // on a Zen 5 core; one pixel at a time 20, and with prefetches 24.
    const float* pixel = x + 4 * block * stride;
    float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
    for (const int32_t line : lines) {
      a += pixel[line];
      b += pixel[line + stride];
      c += pixel[line + 2 * stride];
      d += pixel[line + 3 * stride];
    }
    total += a + b + c + d;
  }
  for (int64_t i = pixels / 4 * 4; i < pixels; ++i) {
    for (const int32_t line : lines) total += x[i * stride + line];
  }
  return total;
}

}  // namespace disco
