// How Hopper's copy engine and products find numbers in shared memory: arithmetic alone, no
// instructions. PTX ISA 8.0, sections on tensor maps and on wgmma's operands in shared memory.
#pragma once

namespace disco_sm90 {

// What the driver's cuTensorMapEncodeTiled writes.
struct alignas(64) TensorMap {
  unsigned long long words[16];
};

// Where the copy engine puts what belongs at an address, lines being 128 bytes.
__device__ __forceinline__ unsigned swizzle_128(unsigned address) {
  return address ^ (address >> 3 & 0x70);
}

enum Swizzle : unsigned long long { kSwizzle128 = 1, kSwizzle64 = 2 };

// Where an operand lies in shared memory; distances in bytes.
__device__ __forceinline__ unsigned long long operand(unsigned address, unsigned leading,
                                                      unsigned stride, Swizzle swizzle) {
  return static_cast<unsigned long long>((address & 0x3FFFF) >> 4) |
         static_cast<unsigned long long>(leading >> 4) << 16 |
         static_cast<unsigned long long>(stride >> 4) << 32 | swizzle << 62;
}

}  // namespace disco_sm90
