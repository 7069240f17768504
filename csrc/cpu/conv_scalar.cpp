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
Vector set(float x) { return {{x, x, x, x}}; }
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
Vector subtract(const Vector& a, const Vector& b) {
  Vector v;
  for (int i = 0; i < kVectorLength; ++i) v.lane[i] = a.lane[i] - b.lane[i];
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

}  // namespace
}  // namespace disco

#include "conv_microkernel_body.h"
#include "winograd_body.h"

namespace disco {

const IsaKernels& scalar_kernels() {
  static constexpr IsaKernels table = {"scalar", kVectorLength, kMaxVectors, kMaxPixels, kKernels,
                                       &kWinograd2, &kWinograd4};
  return table;
}

}  // namespace disco
