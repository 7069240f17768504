// int8 messages: the largest magnitude of every image's listed channels, then the values in steps
// of their scales. x is read twice; a map that the second-level cache holds, once from memory. The
// second launch goes backwards, so that it begins with what the first read last.
#pragma once

#include "pack.cuh"

namespace disco::cuda {

constexpr int kMagnitudeUnroll = 4;

// As disco_kernels/wire.py.
constexpr u32 kInfinity = 0x7f800000u;
constexpr u32 kNan = 0x7fc00000u;
constexpr u32 kSmallestMagnitude = 0x0d800000u;  // 2**-100
constexpr float kLargestScale = 0x1.020406p+121f;

// Of every `step`-th pixel. Beyond the last it takes that again, which changes nothing.
template <typename X, int kCount, typename Offset>
__device__ __forceinline__ void largest_of(const typename X::Bits* x, u32 begin, u32 end, u32 step,
                                           u32 (&largest)[kCount], Offset offset) {
  constexpr u32 kSign = 1u << (8 * sizeof(typename X::Bits) - 1);
  for (u32 pixel = begin; pixel < end; pixel += step * kMagnitudeUnroll) {
    Values<X, kCount> read[kMagnitudeUnroll];
#pragma unroll
    for (int u = 0; u < kMagnitudeUnroll; ++u) {
      read[u].load(x + offset(smaller(pixel + u * step, end - 1)));
    }
#pragma unroll
    for (int u = 0; u < kMagnitudeUnroll; ++u) {
#pragma unroll
      for (int v = 0; v < kCount; ++v) {
        largest[v] = larger(largest[v], read[u].get(v) & (kSign - 1));
      }
    }
  }
}

// Magnitudes are compared as the bits of their formats: these are in the order of the numbers, with
// infinity and NaN after all others.
template <typename X, int kCount>
__device__ __forceinline__ void magnitudes(const MagnitudeArgs& args) {
  using XBits = typename X::Bits;
  __shared__ u32 shared[kThreads * kCount];
  const u32 split = blockIdx.x % args.splits;
  const u32 chunk = blockIdx.x / args.splits % args.num_chunks;
  const u32 image = blockIdx.x / args.splits / args.num_chunks;
  const u32 first_group = chunk * args.chunk_groups;
  const u32 groups = smaller(args.chunk_groups, args.num_groups - first_group);
  // A row of threads takes the groups of a pixel.
  const u32 rows = kThreads / args.chunk_groups;
  const u32 row = quotient(threadIdx.x, args.magic);
  const u32 column = threadIdx.x - row * args.chunk_groups;
  const u32 begin = split * args.split_pixels;
  const u32 end = smaller(args.x.pixels, begin + args.split_pixels);

  u32 largest[kCount] = {};
  if (row < rows && column < groups) {
    const i32 channel = __ldg(reinterpret_cast<const i32*>(args.table) + first_group + column);
    const XBits* x =
        reinterpret_cast<const XBits*>(args.x.address) + image * args.x.stride_image + channel;
    if (args.x.even_rows) {
      largest_of<X>(x, begin + row, end, rows, largest,
                    [&](u32 pixel) { return pixel * args.x.stride_pixel; });
    } else {
      largest_of<X>(x, begin + row, end, rows, largest,
                    [&](u32 pixel) { return offset_in_image(args.x, pixel); });
    }
  }
#pragma unroll
  for (int v = 0; v < kCount; ++v) shared[threadIdx.x * kCount + v] = largest[v];
  __syncthreads();

  const u32 row_values = args.chunk_groups * kCount;
  const u64 channels = static_cast<u64>(args.num_groups) * kCount;
  u32* out = reinterpret_cast<u32*>(args.magnitudes) +
             (static_cast<u64>(image) * args.splits + split) * channels + first_group * kCount;
  for (u32 c = threadIdx.x; c < groups * kCount; c += kThreads) {
    u32 found = 0;
    for (u32 r = 0; r < rows; ++r) found = larger(found, shared[r * row_values + c]);
    out[c] = __float_as_uint(X::widen(found));
  }
}

// A value's inverse step, 0 for a channel that is sent as zeros or as NaN, and its scale.
__device__ __forceinline__ float inverse_step(u32 magnitude, float* scale) {
  const float largest = __uint_as_float(magnitude);
  const bool known = magnitude < kInfinity;
  const bool used = known && magnitude >= kSmallestMagnitude;
  const float step = __fdiv_rn(largest, 127.0f);
  const float sent = step < kLargestScale ? step : kLargestScale;
  *scale = used ? sent : known ? 0.0f : __uint_as_float(kNan);
  return used ? __fdiv_rn(127.0f, largest) : 0.0f;
}

__device__ __forceinline__ u32 quantised(float value, float inverse) {
  const float scaled = __fmul_rn(value, inverse);
  // Infinity times zero is NaN; whole numbers have none.
  return static_cast<u32>(__float2int_rn(scaled == scaled ? scaled : 0.0f)) & 0xffu;
}

template <typename X, int kCount, typename Offset>
__device__ __forceinline__ void quantise_tile(const typename X::Bits* x, const i32* table,
                                              const float* inverse, u8* out, const Tile& tile,
                                              Offset offset) {
  constexpr int kGroups = kGroupsInPiece<i8, kCount>;
  for (u32 piece = threadIdx.x; piece * kGroups < tile.end; piece += kThreads * kPackUnroll) {
    Values<X, kCount> read[kPackUnroll][kGroups];
    u32 group[kPackUnroll][kGroups];
#pragma unroll
    for (int u = 0; u < kPackUnroll; ++u) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const Tile::Place place = tile.place((piece + u * kThreads) * kGroups + g);
        group[u][g] = place.group;
        read[u][g].load(x + offset(place.pixel) + __ldg(table + place.group));
      }
    }
#pragma unroll
    for (int u = 0; u < kPackUnroll; ++u) {
      Values<i8, kCount * kGroups> written;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const float* steps = inverse + group[u][g] * kCount;
#pragma unroll
        for (int v = 0; v < kCount; ++v) {
          const float value = X::widen(read[u][g].get(v));
          written.put(g * kCount + v, quantised(value, steps[v]));
        }
      }
      store_piece<i8, kCount, kGroups>(tile, (piece + u * kThreads) * kGroups, out, written);
    }
  }
}

// The steps of a part's channels in an image; tile 0 of the image writes their scales.
__device__ __forceinline__ void find_steps(const QuantiseArgs& args, const Part& part, u32 channels,
                                           u32 image, float* scales, float* inverse) {
  const i32* slots = reinterpret_cast<const i32*>(args.slots) + part.slots;
  const u32* found = reinterpret_cast<const u32*>(args.magnitudes) +
                     static_cast<u64>(image) * args.splits * args.num_magnitudes;
  for (u32 c = threadIdx.x; c < channels; c += kThreads) {
    const u32 slot = static_cast<u32>(__ldg(slots + c));
    u32 magnitude = 0;
#pragma unroll 4
    for (u32 s = 0; s < args.splits; ++s) {
      const u64 row = static_cast<u64>(s) * args.num_magnitudes;
      magnitude = larger(magnitude, __ldg(found + row + slot));
    }
    float scale;
    inverse[c] = inverse_step(magnitude, &scale);
    if (scales) scales[static_cast<u64>(image) * part.row + part.first + c] = scale;
  }
}

template <typename X, int kCount>
__device__ __forceinline__ void quantise(const QuantiseArgs& args) {
  __shared__ __align__(16) float inverse[kMaxPartChannels];
  const u32 block = gridDim.x - 1 - blockIdx.x;
  const u32 number = block / args.num_parts;
  const Part& part = args.parts[block - number * args.num_parts];
  const u32 image = number / args.tiles;
  const u32 tile_number = number - image * args.tiles;
  float* scales = reinterpret_cast<float*>(part.message);
  find_steps(args, part, part.groups * kCount, image, tile_number == 0 ? scales : nullptr, inverse);
  __syncthreads();

  const u32 first_pixel = tile_number * args.tile_pixels;
  const u32 pixels = smaller(args.tile_pixels, args.x.pixels - first_pixel);
  u8* values = reinterpret_cast<u8*>(scales + static_cast<u64>(args.images) * part.row);
  u8* out =
      values + (static_cast<u64>(image) * args.x.pixels + first_pixel) * part.row + part.first;
  const Tile tile = make_tile<i8, kCount, kGroupsInPiece<i8, kCount>>(out, part, pixels);
  const i32* table = reinterpret_cast<const i32*>(args.table) + part.table;
  const auto* x =
      reinterpret_cast<const typename X::Bits*>(args.x.address) + image * args.x.stride_image;
  if (args.x.even_rows) {
    x += first_pixel * args.x.stride_pixel;
    quantise_tile<X, kCount>(x, table, inverse, out, tile,
                             [&](u32 pixel) { return pixel * args.x.stride_pixel; });
  } else {
    quantise_tile<X, kCount>(x, table, inverse, out, tile, [&](u32 pixel) {
      return offset_in_image(args.x, first_pixel + pixel);
    });
  }
  // Zeros up to a multiple of 4 bytes; the message begins at one.
  const u64 total = static_cast<u64>(args.images) * args.x.pixels * part.row;
  const bool last = number + 1 == args.images * args.tiles && part.first == 0;
  if (last && threadIdx.x < (4 - total % 4) % 4) values[total + threadIdx.x] = 0;
}

}  // namespace disco::cuda
