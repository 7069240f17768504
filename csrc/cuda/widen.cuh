// A message, in any wire format, as some channels of a map in a computing format.
#pragma once

#include "arguments.cuh"

namespace disco::cuda {

constexpr int kWidenUnroll = 4;

template <typename Wire, typename Out, int kCount>
__device__ __forceinline__ void widen(const WidenArgs& args) {
  using WireBits = typename Wire::Bits;
  using OutBits = typename Out::Bits;
  const u64 first_pixel = static_cast<u64>(blockIdx.x) * args.tile_pixels;
  const u64 left = args.num_pixels - first_pixel;
  const u32 pixels = left < args.tile_pixels ? static_cast<u32>(left) : args.tile_pixels;
  const u32 end = pixels * args.groups;
  // In memory the tile's values follow each other.
  const WireBits* message =
      reinterpret_cast<const WireBits*>(args.message) + first_pixel * args.channels;
  OutBits* out = reinterpret_cast<OutBits*>(args.out.address);
  const u32 scale_row = args.scale_pixels ? static_cast<u32>(first_pixel / args.scale_pixels) : 0;
  const u32 skipped =
      static_cast<u32>(first_pixel - static_cast<u64>(scale_row) * args.scale_pixels);

  for (u32 i = threadIdx.x; i < end; i += kThreads * kWidenUnroll) {
    Values<Wire, kCount> read[kWidenUnroll];
#pragma unroll
    for (int u = 0; u < kWidenUnroll; ++u) {
      read[u].load(message + static_cast<u64>(smaller(i + u * kThreads, end - 1)) * kCount);
    }
#pragma unroll
    for (int u = 0; u < kWidenUnroll; ++u) {
      const u32 at = i + u * kThreads;
      if (at >= end) continue;
      const u32 pixel = quotient(at, args.magic);
      const u32 channel = (at - pixel * args.groups) * kCount;
      Values<Out, kCount> written;
      if constexpr (kSame<Wire, i8>) {
        const u64 row = scale_row + (skipped + pixel) / args.scale_pixels;
        const float* scales =
            reinterpret_cast<const float*>(args.scales) + row * args.channels + channel;
#pragma unroll
        for (int v = 0; v < kCount; ++v) {
          const float value = __fmul_rn(i8::widen(read[u].get(v)), __ldg(scales + v));
          written.put(v, Out::narrow(value));
        }
      } else {
#pragma unroll
        for (int v = 0; v < kCount; ++v) written.put(v, convert<Wire, Out>(read[u].get(v)));
      }
      written.store(out + offset_of(args.out, first_pixel + pixel) + channel);
    }
  }
}

}  // namespace disco::cuda
