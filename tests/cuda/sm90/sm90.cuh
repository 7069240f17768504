// Hopper's instructions, of the names in csrc/cuda/sm90.cuh, on the CPU: a block's threads take
// turns, and give up theirs where they wait. Copies arrive late and products are computed as late
// as the program allows, so that a wait which is missing shows.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)

struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));
struct float2 {
  float x, y;
};
struct Index {
  unsigned x;
};
extern Index threadIdx, blockIdx, gridDim;
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
void __syncthreads();
void __syncwarp();
unsigned __shfl_sync(unsigned mask, unsigned value, int lane);
unsigned __shfl_xor_sync(unsigned mask, unsigned value, int lanes);

#include "sm90_layout.cuh"

namespace disco_sm90 {

extern unsigned char memory[];

unsigned shared_address(const void* pointer);
void barrier_init(unsigned barrier, unsigned arrivals);
inline void fence_barrier_init() {}
void barrier_expect(unsigned barrier, unsigned bytes);
void barrier_arrive(unsigned barrier);
void barrier_wait(unsigned barrier, unsigned parity);
void copy_box_3d(unsigned target, const TensorMap* map, unsigned barrier, int x0, int x1, int x2);
void copy_box_4d(unsigned target, const TensorMap* map, unsigned barrier, int x0, int x1, int x2,
                 int x3);
uint4 read_shared(unsigned address);
inline void products_begin() {}
void products_commit();
void wait_for_products(int left);
template <int kLeft>
void products_wait() {
  wait_for_products(kLeft);
}
template <int kRegisters>
void give_registers_back() {}
template <int kRegisters>
void take_registers() {}

struct BFloat16 {};
struct Float16 {};

inline float widen(BFloat16, unsigned short bits) {
  const unsigned wide = static_cast<unsigned>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline float widen(Float16, unsigned short bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}
inline unsigned short narrow(BFloat16, float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;
  return static_cast<unsigned short>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline unsigned short narrow(Float16, float value) {
  const _Float16 rounded = static_cast<_Float16>(value);
  unsigned short bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}

void add_product(bool bfloat16, float* sums, int columns, unsigned long long a,
                 unsigned long long b, bool keep);
template <size_t kSums>
void multiply(BFloat16, float (&sums)[kSums], unsigned long long a, unsigned long long b,
              int keep) {
  add_product(true, sums, 2 * kSums, a, b, keep != 0);
}
template <size_t kSums>
void multiply(Float16, float (&sums)[kSums], unsigned long long a, unsigned long long b, int keep) {
  add_product(false, sums, 2 * kSums, a, b, keep != 0);
}

template <typename T>
unsigned pack_pair(T type, float low, float high) {
  return narrow(type, low) | static_cast<unsigned>(narrow(type, high)) << 16;
}
template <typename T>
float2 widen_pair(T type, unsigned word) {
  return {widen(type, static_cast<unsigned short>(word)),
          widen(type, static_cast<unsigned short>(word >> 16))};
}

}  // namespace disco_sm90
