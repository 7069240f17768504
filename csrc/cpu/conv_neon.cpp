// NEON micro-kernels for AArch64: 5 pixels x 16 output channels, 20 of 32 registers accumulate;
// four hold weights, five the inputs, so that all loads of a step can be on their way before its
// first multiply-add.
//
// Chosen by what GCC 12 (-O3, no -mcpu) makes of the loop, and by LLVM 19's models of the cores; a
// model, not a measurement. Per step of K:
//
//   tile         5x16   6x16   7x12   8x12    8x8
//   multiply-add   20     24     21     24     16
//   instructions   33     40     36     45     31
//   spilled         0      2      0      3      0 accumulators
//   Neoverse N1  10.1   13.1   10.6   14.1    8.1 cycles (as the Cortex-A76 of a Raspberry Pi 5)
//   Cortex-A72   20.1   24.1   21.1   24.1   16.1 cycles
//   Cortex-A55   32.0   42.0   30.0   41.0   27.0 cycles (in order)
//
// Whatever does not spill keeps the multipliers of the larger cores busy. Of those, 5x16 issues the
// fewest instructions a multiply-add, and 16 divides the usual numbers of channels where 12 leaves
// narrow panels.

#include <arm_neon.h>

#include <cstdint>

namespace disco {
namespace {

constexpr int kVectorLength = 4;
constexpr int kMaxVectors = 4;
constexpr int kMaxPixels = 5;

using Vector = float32x4_t;

Vector zero() { return vdupq_n_f32(0.0f); }
// Compilers merge this into the multiply-add, which can take its factor from one lane: the input is
// then a scalar load with an index, and no register is filled with copies.
Vector broadcast(const float* x) { return vdupq_n_f32(*x); }
Vector load(const float* x) { return vld1q_f32(x); }
// NEON has no masked load or store; n is 1 to 4.
Vector load_n(const float* x, int64_t n) {
  Vector v = vld1q_lane_f32(x, zero(), 0);
  if (n > 1) v = vld1q_lane_f32(x + 1, v, 1);
  if (n > 2) v = vld1q_lane_f32(x + 2, v, 2);
  if (n > 3) v = vld1q_lane_f32(x + 3, v, 3);
  return v;
}
void store(float* x, Vector v) { vst1q_f32(x, v); }
void store_n(float* x, Vector v, int64_t n) {
  vst1q_lane_f32(x, v, 0);
  if (n > 1) vst1q_lane_f32(x + 1, v, 1);
  if (n > 2) vst1q_lane_f32(x + 2, v, 2);
  if (n > 3) vst1q_lane_f32(x + 3, v, 3);
}
Vector add(Vector a, Vector b) { return vaddq_f32(a, b); }
Vector subtract(Vector a, Vector b) { return vsubq_f32(a, b); }
// NaN where either operand is: a NaN in `a` stays, as torch.relu keeps it.
Vector maximum(Vector a, Vector b) { return vmaxq_f32(a, b); }
Vector splat(float x) { return vdupq_n_f32(x); }
Vector multiply(Vector a, Vector b) { return vmulq_f32(a, b); }
Vector divide(Vector a, Vector b) { return vdivq_f32(a, b); }
Vector minimum(Vector a, Vector b) { return vminq_f32(a, b); }
Vector bit_and(Vector v, uint32_t mask) {
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), vdupq_n_u32(mask)));
}
Vector shift_left_23(Vector v) {
  return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(v), 23));
}
Vector select_negative(Vector x, Vector a, Vector b) {
  return vbslq_f32(vcltzq_s32(vreinterpretq_s32_f32(x)), a, b);
}
Vector maximum_or_nan(Vector a, Vector b) { return vmaxq_f32(a, b); }
Vector multiply_add(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }

using Pairs = uint32x4_t;

Pairs broadcast_pair(const uint16_t* x) {
  uint32_t pair;
  __builtin_memcpy(&pair, x, sizeof(pair));
  return vdupq_n_u32(pair);
}
Pairs load_pairs(const void* x) {
  return vreinterpretq_u32_u8(vld1q_u8(static_cast<const uint8_t*>(x)));
}
Vector low(Pairs x) { return vreinterpretq_f32_u32(vshlq_n_u32(x, 16)); }
Vector high(Pairs x) { return vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000u))); }
Vector multiply_add_pairs(Pairs a, Pairs b, Vector c) {
  return vfmaq_f32(vfmaq_f32(c, low(a), low(b)), high(a), high(b));
}

Vector load_bf16(const uint16_t* x) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(x), 16)); }
Vector load_bf16_n(const uint16_t* x, int64_t n) {
  uint16x4_t v = vld1_lane_u16(x, vdup_n_u16(0), 0);
  if (n > 1) v = vld1_lane_u16(x + 1, v, 1);
  if (n > 2) v = vld1_lane_u16(x + 2, v, 2);
  if (n > 3) v = vld1_lane_u16(x + 3, v, 3);
  return vreinterpretq_f32_u32(vshll_n_u16(v, 16));
}
// To the nearest, ties to even; a NaN stays one.
void store_bf16(uint16_t* x, Vector v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  vst1_u16(x, vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16));
}
void store_bf16_n(uint16_t* x, Vector v, int64_t n) {
  uint16_t some[kVectorLength];
  store_bf16(some, v);
  for (int64_t i = 0; i < n; ++i) x[i] = some[i];
}

// 14 accumulators, up to 7 weights and an input of 32 registers.
constexpr int kLanePixels = 14;
constexpr int kLaneWindows = 6;
constexpr bool kFreeMasks = false;

using Lanes = uint8x16_t;  // places of bytes

Lanes load_lanes(const int32_t* lanes) {
  const uint32x4_t places = vreinterpretq_u32_s32(vld1q_s32(lanes));
  return vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100u), places, 0x04040404u));
}
Vector permute(Vector v, Lanes lanes) {
  return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(v), lanes));
}

}  // namespace
}  // namespace disco

#include "conv_microkernel_body.h"
#include "depthwise_body.h"
#include "pool_body.h"
#include "winograd_body.h"

namespace disco {

const IsaKernels& neon_kernels() {
  static constexpr IsaKernels table = {"neon",
                                       kVectorLength,
                                       kMaxVectors,
                                       kMaxPixels,
                                       {kernel_table<Float32>(), kernel_table<BFloat16>()},
                                       kernel_table<BFloat16Sums>(),
                                       &kWinograd2,
                                       &kWinograd4,
                                       {&largest_pixel<Float32>, &largest_pixel<BFloat16>},
                                       {&mean_pixel<Float32>, &mean_pixel<BFloat16>},
                                       nullptr,
                                       &lane_kernels};
  return table;
}

}  // namespace disco
