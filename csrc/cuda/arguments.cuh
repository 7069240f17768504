// What kernels are given. disco_kernels/cuda/arguments.py has the same structures and makes them.
#pragma once

#include "scalar.cuh"

namespace disco::cuda {

// Messages, or pieces of long ones, that one launch writes.
constexpr u32 kMaxParts = 32;
// Channels of a part: the scales of one image's share of a part lie in shared memory.
constexpr u32 kMaxPartChannels = 4096;

// A map [images][height][width][channels] with a channel stride of 1; strides in elements.
struct Map {
  u64 address;
  i64 stride_image;
  i64 stride_row;
  i64 stride_pixel;
  u32 pixels;  // of an image
  u32 width;
  u32 even_rows;    // whether an image's pixels are all stride_pixel apart
  u32 even_images;  // whether all images' are
};

// Some neighbouring channels of a message, read group by group: a group is as many channels, next
// to each other in x, as the kernel loads at a time.
struct Part {
  u64 message;  // where all of it begins
  u32 row;      // channels of the whole message
  u32 first;    // channel of the message where the part begins
  u32 groups;
  u32 magic;  // of `groups`, for quotient()
  u32 table;  // where the part's groups begin in the table
  u32 slots;  // where its channels begin in the table of slots
};

struct PackArgs {
  Map x;
  u64 table;  // int32, the first channel of each group
  u64 num_pixels;
  u32 tile_pixels;
  u32 num_parts;
  Part parts[kMaxParts];
};

struct MagnitudeArgs {
  Map x;
  u64 table;       // int32, the first channel of each group; no channel twice
  u64 magnitudes;  // float32 [images][splits][channels]
  u32 num_groups;
  u32 chunk_groups;  // that a block looks at, at most kThreads
  u32 num_chunks;
  u32 splits;
  u32 split_pixels;
  u32 magic;  // of chunk_groups
};

struct QuantiseArgs {
  Map x;
  u64 table;       // as of PackArgs
  u64 slots;       // int32, the place of each channel in a row of `magnitudes`
  u64 magnitudes;  // what the magnitude kernel wrote
  u32 num_magnitudes;
  u32 splits;
  u32 images;
  u32 tiles;  // of an image
  u32 tile_pixels;
  u32 num_parts;
  Part parts[kMaxParts];
};

struct WidenArgs {
  Map out;  // its address is that of the first channel written
  u64 message;
  u64 scales;  // float32 [rows][channels], for int8
  u64 num_pixels;
  u32 scale_pixels;  // pixels for which a row of scales holds
  u32 channels;
  u32 groups;
  u32 magic;  // of `groups`
  u32 tile_pixels;
  u32 unused;
};

// i / divisor, for magic = ceil(2**31 / divisor) and i * divisor < 2**31: i * magic / 2**31 is more
// than i / divisor by less than i / 2**31, so by less than the 1 / divisor up to the next quotient.
__device__ __forceinline__ u32 quotient(u32 i, u32 magic) { return __umulhi(i << 1, magic); }

__device__ __forceinline__ i64 offset_in_image(const Map& map, u32 pixel) {
  if (map.even_rows) return pixel * map.stride_pixel;
  const u32 row = pixel / map.width;
  return row * map.stride_row + (pixel - row * map.width) * map.stride_pixel;
}

__device__ __forceinline__ i64 offset_of(const Map& map, u64 pixel) {
  if (map.even_images) return static_cast<i64>(pixel) * map.stride_pixel;
  const u64 image = pixel / map.pixels;
  return static_cast<i64>(image) * map.stride_image +
         offset_in_image(map, static_cast<u32>(pixel - image * map.pixels));
}

}  // namespace disco::cuda
