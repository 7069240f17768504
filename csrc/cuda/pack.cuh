// Selected channels, cast and written to the messages of all destinations in one launch.
//
// A block writes a tile: some pixels of a part, which lie next to each other in the message, so
// that consecutive threads write consecutive pieces. Where channels are listed in groups that one
// load takes, a piece is a group; otherwise it is the 4 bytes that a store should have at least,
// put together from single loads. The blocks of one tile for all parts follow each other: what they
// read is in the second-level cache after the first.
#pragma once

#include "arguments.cuh"

namespace disco::cuda {

constexpr int kPackUnroll = 4;  // pieces that a thread has in flight

// Groups of kCount that make a piece of at least 4 bytes.
template <typename Format, int kCount>
constexpr int kGroupsInPiece =
    kCount * sizeof(typename Format::Bits) >= 4 ? 1 : 4 / (kCount * sizeof(typename Format::Bits));

// The groups of a tile, counted from the multiple of a piece in memory at which or after which, by
// `head`, they begin. Positions outside are taken for the nearest inside: loads need no branches.
struct Tile {
  u32 head;
  u32 end;
  u32 groups;  // of a pixel
  u32 magic;

  struct Place {
    u32 pixel;
    u32 group;
  };
  __device__ __forceinline__ Place place(u32 position) const {
    const u32 i = smaller(larger(position, head), end - 1) - head;
    const u32 pixel = quotient(i, magic);
    return {pixel, i - pixel * groups};
  }
};

template <typename Format, int kCount, int kGroups>
__device__ __forceinline__ Tile make_tile(const typename Format::Bits* out, const Part& part,
                                          u32 pixels) {
  constexpr u32 kBytes = kCount * sizeof(typename Format::Bits);
  const u32 head = static_cast<u32>(reinterpret_cast<u64>(out) / kBytes % kGroups);
  return {head, head + pixels * part.groups, part.groups, part.magic};
}

// Writes a piece of the tile that begins at `out`; whole ones in one store.
template <typename Format, int kCount, int kGroups>
__device__ __forceinline__ void store_piece(const Tile& tile, u32 position,
                                            typename Format::Bits* out,
                                            const Values<Format, kCount * kGroups>& piece) {
  using Bits = typename Format::Bits;
  Bits* to = out + (static_cast<i64>(position) - tile.head) * kCount;
  if (position >= tile.head && position + kGroups <= tile.end) {
    piece.store(to);
    return;
  }
  if constexpr (kGroups > 1) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (position + g < tile.head || position + g >= tile.end) continue;
#pragma unroll
      for (int v = 0; v < kCount; ++v) {
        to[g * kCount + v] = static_cast<Bits>(piece.get(g * kCount + v));
      }
    }
  }
}

template <typename X, typename Wire, int kCount, typename Offset>
__device__ __forceinline__ void pack_tile(const typename X::Bits* x, const i32* table,
                                          typename Wire::Bits* out, const Tile& tile,
                                          Offset offset) {
  constexpr int kGroups = kGroupsInPiece<Wire, kCount>;
  for (u32 piece = threadIdx.x; piece * kGroups < tile.end; piece += kThreads * kPackUnroll) {
    Values<X, kCount> read[kPackUnroll][kGroups];
#pragma unroll
    for (int u = 0; u < kPackUnroll; ++u) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const Tile::Place place = tile.place((piece + u * kThreads) * kGroups + g);
        read[u][g].load(x + offset(place.pixel) + __ldg(table + place.group));
      }
    }
#pragma unroll
    for (int u = 0; u < kPackUnroll; ++u) {
      Values<Wire, kCount * kGroups> written;
#pragma unroll
      for (int i = 0; i < kCount * kGroups; ++i) {
        written.put(i, convert<X, Wire>(read[u][i / kCount].get(i % kCount)));
      }
      store_piece<Wire, kCount, kGroups>(tile, (piece + u * kThreads) * kGroups, out, written);
    }
  }
}

template <typename X, typename Wire, int kCount>
__device__ __forceinline__ void pack(const PackArgs& args) {
  using WireBits = typename Wire::Bits;
  const u32 tile_number = blockIdx.x / args.num_parts;
  const Part& part = args.parts[blockIdx.x - tile_number * args.num_parts];
  const u64 first_pixel = static_cast<u64>(tile_number) * args.tile_pixels;
  const u64 left = args.num_pixels - first_pixel;
  const u32 pixels = left < args.tile_pixels ? static_cast<u32>(left) : args.tile_pixels;
  WireBits* out = reinterpret_cast<WireBits*>(part.message) + first_pixel * part.row + part.first;
  const Tile tile = make_tile<Wire, kCount, kGroupsInPiece<Wire, kCount>>(out, part, pixels);
  const i32* table = reinterpret_cast<const i32*>(args.table) + part.table;
  const auto* x = reinterpret_cast<const typename X::Bits*>(args.x.address);
  if (args.x.even_images) {
    x += static_cast<i64>(first_pixel) * args.x.stride_pixel;
    pack_tile<X, Wire, kCount>(x, table, out, tile,
                               [&](u32 pixel) { return pixel * args.x.stride_pixel; });
  } else {
    pack_tile<X, Wire, kCount>(x, table, out, tile,
                               [&](u32 pixel) { return offset_of(args.x, first_pixel + pixel); });
  }
}

}  // namespace disco::cuda
