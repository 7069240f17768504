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

}  // namespace
}  // namespace disco

#include "conv_microkernel_body.h"

namespace disco {

const IsaKernels& scalar_kernels() {
  static constexpr IsaKernels table = {"scalar", kVectorLength, kMaxVectors, kMaxPixels, kKernels};
  return table;
}

}  // namespace disco
