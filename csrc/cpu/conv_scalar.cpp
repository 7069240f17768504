// Portable micro-kernels: plain C++, compiled with the baseline flags of the target. The
// fixed-length loops are the compiler's to vectorise (SSE2 on x86-64, NEON on AArch64).

#include <cstdint>

namespace disco {
namespace {

constexpr int kVectorLength = 4;
constexpr int kMaxVectors = 2;
constexpr int kMaxPixels = 4;

struct Vector {
  float lane[kVectorLength];
};

Vector zero() { return Vector{}; }
Vector broadcast(const float* x) { return {{*x, *x, *x, *x}}; }
Vector load_n(const float* x, int64_t n) {
  Vector v{};
  for (int64_t i = 0; i < n; ++i) v.lane[i] = x[i];
  return v;
}
Vector load(const float* x) { return {{x[0], x[1], x[2], x[3]}}; }
void store_n(float* x, const Vector& v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = v.lane[i];
}
void store(float* x, const Vector& v) {
  for (int i = 0; i < kVectorLength; ++i) x[i] = v.lane[i];
}
Vector add(const Vector& a, const Vector& b) {
  Vector v;
  for (int i = 0; i < kVectorLength; ++i) v.lane[i] = a.lane[i] + b.lane[i];
  return v;
}
// NaN in `a` stays NaN, as torch.relu keeps it.
Vector maximum(const Vector& a, const Vector& b) {
  Vector v;
  for (int i = 0; i < kVectorLength; ++i) v.lane[i] = a.lane[i] < b.lane[i] ? b.lane[i] : a.lane[i];
  return v;
}
Vector maximum_or_nan(const Vector& a, const Vector& b) {
  Vector v = maximum(a, b);
  for (int i = 0; i < kVectorLength; ++i) {
    if (b.lane[i] != b.lane[i]) v.lane[i] = b.lane[i];
  }
  return v;
}
Vector multiply_add(const Vector& a, const Vector& b, const Vector& c) {
  Vector v;
  for (int i = 0; i < kVectorLength; ++i) v.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
  return v;
}
Vector splat(float x) { return {{x, x, x, x}}; }
Vector subtract(const Vector& a, const Vector& b) {
  Vector v;
  for (int i = 0; i < kVectorLength; ++i) v.lane[i] = a.lane[i] - b.lane[i];
  return v;
}
Vector multiply(const Vector& a, const Vector& b) {
  Vector v;
  for (int i = 0; i < kVectorLength; ++i) v.lane[i] = a.lane[i] * b.lane[i];
  return v;
}
Vector divide(const Vector& a, const Vector& b) {
  Vector v;
  for (int i = 0; i < kVectorLength; ++i) v.lane[i] = a.lane[i] / b.lane[i];
  return v;
}
Vector minimum(const Vector& a, const Vector& b) {
  Vector v;
  for (int i = 0; i < kVectorLength; ++i) v.lane[i] = b.lane[i] < a.lane[i] ? b.lane[i] : a.lane[i];
  return v;
}

struct Bits {
  uint32_t lane[kVectorLength];
};

Bits bits_of(const Vector& v) {
  Bits bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  return bits;
}
Vector from_bits(const Bits& bits) {
  Vector v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}
Vector bit_and(const Vector& v, uint32_t mask) {
  Bits bits = bits_of(v);
  for (int i = 0; i < kVectorLength; ++i) bits.lane[i] &= mask;
  return from_bits(bits);
}
Vector shift_left_23(const Vector& v) {
  Bits bits = bits_of(v);
  for (int i = 0; i < kVectorLength; ++i) bits.lane[i] <<= 23;
  return from_bits(bits);
}
Vector select_negative(const Vector& x, const Vector& a, const Vector& b) {
  Bits chosen = bits_of(x);
  const Bits yes = bits_of(a), no = bits_of(b);
  for (int i = 0; i < kVectorLength; ++i) {
    const uint32_t sign = 0u - (chosen.lane[i] >> 31);
    chosen.lane[i] = (yes.lane[i] & sign) | (no.lane[i] & ~sign);
  }
  return from_bits(chosen);
}

using Pairs = Vector;  // the bits of a pair in every lane

Pairs load_pairs(const void* x) {
  Pairs v;
  __builtin_memcpy(&v, x, sizeof(v));
  return v;
}
Pairs broadcast_pair(const uint16_t* x) {
  float pair;
  __builtin_memcpy(&pair, x, sizeof(pair));
  return splat(pair);
}
float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}
uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}
Vector multiply_add_pairs(const Pairs& a, const Pairs& b, const Vector& c) {
  Vector v;
  for (int i = 0; i < kVectorLength; ++i) {
    const uint32_t x = bits_of(a.lane[i]), w = bits_of(b.lane[i]);
    v.lane[i] = from_bits(x << 16) * from_bits(w << 16) + c.lane[i];
    v.lane[i] += from_bits(x & 0xffff0000u) * from_bits(w & 0xffff0000u);
  }
  return v;
}
Vector load_bf16_n(const uint16_t* x, int64_t n) {
  Vector v{};
  for (int64_t i = 0; i < n; ++i) v.lane[i] = from_bits(static_cast<uint32_t>(x[i]) << 16);
  return v;
}
Vector load_bf16(const uint16_t* x) { return load_bf16_n(x, kVectorLength); }
// To the nearest, ties to even; a NaN stays one.
void store_bf16_n(uint16_t* x, const Vector& v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(v.lane[i]);
    const uint32_t rounded =
        v.lane[i] != v.lane[i] ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
    x[i] = static_cast<uint16_t>(rounded >> 16);
  }
}
void store_bf16(uint16_t* x, const Vector& v) { store_bf16_n(x, v, kVectorLength); }

struct Quads {
  char byte[kVectorLength][4];
};
Quads load_quads(const void* x) {
  Quads v;
  __builtin_memcpy(&v, x, sizeof(v));
  return v;
}
Quads broadcast_quad(const char* x) {
  Quads v;
  for (auto& lane : v.byte) __builtin_memcpy(lane, x, sizeof(lane));
  return v;
}
Vector multiply_add_quads(const Quads& a, const Quads& b, const Vector& c) {
  Bits sums = bits_of(c);
  for (int i = 0; i < kVectorLength; ++i) {
    for (int k = 0; k < 4; ++k) {
      sums.lane[i] += static_cast<uint32_t>(static_cast<uint8_t>(a.byte[i][k]) *
                                            static_cast<int8_t>(b.byte[i][k]));
    }
  }
  return from_bits(sums);
}
Vector no_sum() { return zero(); }
Vector integers_to_float(const Vector& x) {
  const Bits bits = bits_of(x);
  Vector v;
  for (int i = 0; i < kVectorLength; ++i) {
    v.lane[i] = static_cast<float>(static_cast<int32_t>(bits.lane[i]));
  }
  return v;
}

constexpr int kLanePixels = 4;
// The larger ones are not worth their code: their weights would not stay in registers.
constexpr int kLaneWindows = 3;
constexpr bool kFreeMasks = false;

struct Lanes {
  int32_t lane[kVectorLength];
};

Lanes load_lanes(const int32_t* lanes) { return {{lanes[0], lanes[1], lanes[2], lanes[3]}}; }
Vector permute(const Vector& v, const Lanes& lanes) {
  return {
      {v.lane[lanes.lane[0]], v.lane[lanes.lane[1]], v.lane[lanes.lane[2]], v.lane[lanes.lane[3]]}};
}

}  // namespace
}  // namespace disco

#include "conv_microkernel_body.h"
#include "conv_quads_body.h"
#include "depthwise_body.h"
#include "pool_body.h"
#include "winograd_body.h"

namespace disco {

const IsaKernels& scalar_kernels() {
  static constexpr QuadKernels quads = {
      {kernel_table<QuadsTo<Float32>>(), kernel_table<QuadsTo<BFloat16>>()}, {}};
  static constexpr IsaKernels table = {"scalar",
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
                                       &lane_kernels,
                                       false,
                                       &quads};
  return table;
}

}  // namespace disco
