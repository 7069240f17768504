// What one call of GatherPack comes down to; for its source files only.
#pragma once

#include <cstdint>
#include <vector>

#include "gather_pack.h"

namespace disco {

constexpr int64_t kFloatBytes = static_cast<int64_t>(sizeof(float));

struct GatherPack::Work {
  Activation2d x;  // dimensions of one pixel in front
  int64_t images, image_pixels, pixels;
  WireType wire;
  bool streamed;
  int64_t block;  // pixels taken at a time
  int64_t ahead;  // pixels to fetch ahead, 0 for none
  int32_t parts;  // of the pixels, one a thread
  // If ahead > 0: where the lines of a block's pixels begin that are fetched, in floats from it.
  std::vector<int32_t> fetched;

  int64_t edge(int64_t count, int32_t part) const { return count * part / parts; }
};

}  // namespace disco
