// What the device code takes from CUDA, for a C++ compiler of the host: a block's threads run one
// after the other, and change places where they wait for each other.
#pragma once

#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#define __launch_bounds__(n)

struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));
struct uint2 {
  unsigned x, y;
} __attribute__((aligned(8)));
struct Index {
  unsigned x;
};
extern Index threadIdx, blockIdx, gridDim;
void __syncthreads();

template <typename T>
T __ldg(const T* from) {
  return *from;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float2int_rn(float value) { return static_cast<int>(__builtin_nearbyintf(value)); }

namespace disco::cuda {

inline unsigned short f16_of(float value) {
  const _Float16 rounded = static_cast<_Float16>(value);
  unsigned short bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}
inline float float_of_f16(unsigned short bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}
inline unsigned short bf16_of(float value) {
  const unsigned bits = __float_as_uint(value);
  if (value != value) return 0x7fff;
  return static_cast<unsigned short>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
// Aligned, as the instructions ask for: the sanitizer looks.
inline void store_16_bytes(void* to, const unsigned* words) {
  *static_cast<uint4*>(to) = uint4{words[0], words[1], words[2], words[3]};
}
inline void store_8_bytes(void* to, const unsigned* words) {
  *static_cast<uint2*>(to) = uint2{words[0], words[1]};
}

}  // namespace disco::cuda
