// Portable micro-kernels: the vectors of GCC and Clang, compiled with the baseline flags of the
// target (SSE2 on x86-64, NEON on AArch64, single numbers elsewhere).

#include <cstdint>

namespace disco {
namespace {

constexpr int kVectorLength = 4;
constexpr int kMaxVectors = 2;
constexpr int kMaxPixels = 4;

using Vector = float __attribute__((vector_size(kVectorLength * sizeof(float))));
using Bits = uint32_t __attribute__((vector_size(kVectorLength * sizeof(uint32_t))));
using Integers = int32_t __attribute__((vector_size(kVectorLength * sizeof(int32_t))));

Vector zero() { return Vector{}; }
Vector splat(float x) { return Vector{x, x, x, x}; }
Vector broadcast(const float* x) { return splat(*x); }
Vector load_n(const float* x, int64_t n) {
  Vector v{};
  for (int64_t i = 0; i < n; ++i) v[i] = x[i];
  return v;
}
Vector load(const float* x) {
  Vector v;
  __builtin_memcpy(&v, x, sizeof(v));
  return v;
}
void store_n(float* x, Vector v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = v[i];
}
void store(float* x, Vector v) { __builtin_memcpy(x, &v, sizeof(v)); }
Vector add(Vector a, Vector b) { return a + b; }
Vector subtract(Vector a, Vector b) { return a - b; }
Vector multiply(Vector a, Vector b) { return a * b; }
Vector divide(Vector a, Vector b) { return a / b; }
Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
// NaN in `a` stays NaN, as torch.relu keeps it.
Vector maximum(Vector a, Vector b) { return a < b ? b : a; }
Vector maximum_or_nan(Vector a, Vector b) { return b != b ? b : maximum(a, b); }
Vector minimum(Vector a, Vector b) { return b < a ? b : a; }

Bits bits_of(Vector v) { return reinterpret_cast<Bits>(v); }
Vector from_bits(Bits bits) { return reinterpret_cast<Vector>(bits); }
Vector bit_and(Vector v, uint32_t mask) { return from_bits(bits_of(v) & mask); }
Vector shift_left_23(Vector v) { return from_bits(bits_of(v) << 23); }
Vector select_negative(Vector x, Vector a, Vector b) {
  return reinterpret_cast<Integers>(x) < 0 ? a : b;
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
Vector multiply_add_pairs(Pairs a, Pairs b, Vector c) {
  const Bits x = bits_of(a), w = bits_of(b);
  const Vector sum = from_bits(x << 16) * from_bits(w << 16) + c;
  return sum + from_bits(x & 0xffff0000u) * from_bits(w & 0xffff0000u);
}
Vector load_bf16_n(const uint16_t* x, int64_t n) {
  Bits bits{};
  for (int64_t i = 0; i < n; ++i) bits[i] = static_cast<uint32_t>(x[i]) << 16;
  return from_bits(bits);
}
Vector load_bf16(const uint16_t* x) { return load_bf16_n(x, kVectorLength); }
// To the nearest, ties to even; a NaN stays one.
void store_bf16_n(uint16_t* x, Vector v, int64_t n) {
  const Bits bits = bits_of(v);
  const Bits rounded = (v != v ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<uint16_t>(rounded[i]);
}
void store_bf16(uint16_t* x, Vector v) { store_bf16_n(x, v, kVectorLength); }

using Quads = Bits;  // four bytes in every lane

Quads load_quads(const void* x) {
  Quads v;
  __builtin_memcpy(&v, x, sizeof(v));
  return v;
}
Quads broadcast_quad(const char* x) {
  uint32_t quad;
  __builtin_memcpy(&quad, x, sizeof(quad));
  return Quads{quad, quad, quad, quad};
}
// The byte that ends at this bit, without and with its sign.
template <int kEnd>
Integers unsigned_byte(Quads v) {
  return reinterpret_cast<Integers>(v << (32 - kEnd) >> 24);
}
template <int kEnd>
Integers signed_byte(Quads v) {
  return reinterpret_cast<Integers>(v << (32 - kEnd)) >> 24;
}
Vector multiply_add_quads(Quads a, Quads b, Vector c) {
  const Integers sum =
      unsigned_byte<8>(a) * signed_byte<8>(b) + unsigned_byte<16>(a) * signed_byte<16>(b) +
      unsigned_byte<24>(a) * signed_byte<24>(b) + unsigned_byte<32>(a) * signed_byte<32>(b);
  return from_bits(bits_of(c) + reinterpret_cast<Bits>(sum));
}
Vector no_sum() { return zero(); }
Vector integers_to_float(Vector x) {
  return __builtin_convertvector(reinterpret_cast<Integers>(x), Vector);
}

constexpr int kLanePixels = 4;
// The larger ones are not worth their code: their weights would not stay in registers.
constexpr int kLaneWindows = 3;
constexpr bool kFreeMasks = false;

using Lanes = Integers;

Lanes load_lanes(const int32_t* lanes) {
  Lanes v;
  __builtin_memcpy(&v, lanes, sizeof(v));
  return v;
}
Vector permute(Vector v, Lanes lanes) {
  return Vector{v[lanes[0]], v[lanes[1]], v[lanes[2]], v[lanes[3]]};
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
