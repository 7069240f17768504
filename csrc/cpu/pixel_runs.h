// Walks the pixels of a channels-last tensor of any strides as few long runs.
#pragma once

#include <algorithm>
#include <cstdint>

namespace disco {

// [n][h][w] pixels, strides in elements.
struct PixelGrid {
  int64_t n, h, w;
  int64_t stride_n, stride_h, stride_w;

  int64_t num_pixels() const { return n * h * w; }

  // The same pixels in the same order, dimensions of one pixel moved to the front: their strides
  // mean nothing, and would hide that the others follow each other.
  PixelGrid simplified() const {
    PixelGrid grid = *this;
    if (grid.w == 1) grid = {1, grid.n, grid.h, 0, grid.stride_n, grid.stride_h};
    if (grid.w == 1) grid = {1, 1, grid.h, 0, 0, grid.stride_h};
    return grid;
  }

  // Pixels that follow each other at stride_w, from the first of a row on.
  int64_t run_length() const {
    int64_t run = w;
    if (h > 1 && stride_h != w * stride_w) return run;
    run *= h;
    return n > 1 && stride_n != run * stride_w ? run : run * n;
  }
};

// Calls visit(offset, first, count) for the pixels [begin, end), in order: `count` pixels from
// pixel `first` on, which lies `offset` elements from the tensor's start. No run is longer than
// `most` nor crosses a multiple of `boundary` pixels.
template <typename Visit>
void for_each_run(const PixelGrid& grid, int64_t begin, int64_t end, int64_t most, int64_t boundary,
                  const Visit& visit) {
  const int64_t run = grid.run_length();
  while (begin < end) {
    const int64_t count =
        std::min({end - begin, most, run - begin % run, boundary - begin % boundary});
    const int64_t row = begin / grid.w;
    visit(row / grid.h * grid.stride_n + row % grid.h * grid.stride_h +
              begin % grid.w * grid.stride_w,
          begin, count);
    begin += count;
  }
}

}  // namespace disco
