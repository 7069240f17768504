// Number formats, and values that lie next to each other in one to four 32-bit words.
#pragma once

#ifdef __CUDACC__  // the emulation that the tests use brings its own
#include "ptx.cuh"
#endif

namespace disco::cuda {

using i32 = int;
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

constexpr u32 kThreads = 256;  // of every kernel's blocks

// Bits: how a value is stored.
struct f32 {
  using Bits = u32;
  static __device__ __forceinline__ float widen(u32 bits) { return __uint_as_float(bits); }
  static __device__ __forceinline__ u32 narrow(float value) { return __float_as_uint(value); }
};

struct f16 {
  using Bits = u16;
  static __device__ __forceinline__ float widen(u32 bits) {
    return float_of_f16(static_cast<u16>(bits));
  }
  static __device__ __forceinline__ u32 narrow(float value) { return f16_of(value); }
};

struct bf16 {
  using Bits = u16;
  static __device__ __forceinline__ float widen(u32 bits) { return __uint_as_float(bits << 16); }
  static __device__ __forceinline__ u32 narrow(float value) { return bf16_of(value); }
};

struct i8 {
  using Bits = u8;
  static __device__ __forceinline__ float widen(u32 bits) {
    return static_cast<float>(static_cast<signed char>(bits));
  }
};

// 16 bits of either format, copied as they are.
struct b16 {
  using Bits = u16;
};

template <typename A, typename B>
constexpr bool kSame = false;
template <typename A>
constexpr bool kSame<A, A> = true;

// kCount values of a format, in registers.
template <typename Format, int kCount>
struct Values {
  static constexpr int kBytes = kCount * static_cast<int>(sizeof(typename Format::Bits));
  static constexpr int kBits = 8 * static_cast<int>(sizeof(typename Format::Bits));
  static constexpr int kPerWord = 32 / kBits;
  u32 words[kBytes < 4 ? 1 : kBytes / 4] = {};

  __device__ __forceinline__ u32 get(int i) const {
    const u32 word = words[i / kPerWord] >> (i % kPerWord * kBits);
    return kBits == 32 ? word : word & ((1u << (kBits % 32)) - 1);
  }
  // Once for each i.
  __device__ __forceinline__ void put(int i, u32 bits) {
    words[i / kPerWord] |= bits << (i % kPerWord * kBits);
  }
  // Memory that the kernel does not write, aligned to all kBytes.
  __device__ __forceinline__ void load(const void* from) {
    if constexpr (kBytes == 16) {
      const uint4 read = __ldg(static_cast<const uint4*>(from));
      words[0] = read.x, words[1] = read.y, words[2] = read.z, words[3] = read.w;
    } else if constexpr (kBytes == 8) {
      const uint2 read = __ldg(static_cast<const uint2*>(from));
      words[0] = read.x, words[1] = read.y;
    } else if constexpr (kBytes == 4) {
      words[0] = __ldg(static_cast<const u32*>(from));
    } else if constexpr (kBytes == 2) {
      words[0] = __ldg(static_cast<const u16*>(from));
    } else {
      words[0] = __ldg(static_cast<const u8*>(from));
    }
  }
  __device__ __forceinline__ void store(void* to) const {
    if constexpr (kBytes == 16) {
      store_16_bytes(to, words);
    } else if constexpr (kBytes == 8) {
      store_8_bytes(to, words);
    } else if constexpr (kBytes == 4) {
      *static_cast<u32*>(to) = words[0];
    } else if constexpr (kBytes == 2) {
      *static_cast<u16*>(to) = static_cast<u16>(words[0]);
    } else {
      *static_cast<u8*>(to) = static_cast<u8>(words[0]);
    }
  }
};

// The bits of a value of format From in format To.
template <typename From, typename To>
__device__ __forceinline__ u32 convert(u32 bits) {
  if constexpr (kSame<From, To>) {
    return bits;
  } else {
    return To::narrow(From::widen(bits));
  }
}

__device__ __forceinline__ u32 smaller(u32 a, u32 b) { return a < b ? a : b; }
__device__ __forceinline__ u32 larger(u32 a, u32 b) { return a > b ? a : b; }

}  // namespace disco::cuda
