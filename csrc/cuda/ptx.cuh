// What needs an instruction by name: conversions between float32 and the 16-bit formats, to
// nearest, ties to even (cuda_fp16.h and cuda_bf16.h include host headers that a run-time compiler
// may not find), and stores of several words, which the compiler would take apart.
#pragma once

namespace disco::cuda {

__device__ __forceinline__ unsigned short f16_of(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ float float_of_f16(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ __forceinline__ unsigned short bf16_of(float value) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ void store_16_bytes(void* to, const unsigned int* words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}

__device__ __forceinline__ void store_8_bytes(void* to, const unsigned int* words) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(words[0]), "r"(words[1])
               : "memory");
}

}  // namespace disco::cuda
