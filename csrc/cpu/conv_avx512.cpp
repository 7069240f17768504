// AVX-512F micro-kernels: 14 pixels x 32 output channels, 28 of 32 registers accumulate; the rest
// hold two weight vectors and the broadcast input, so each input value is loaded once for both.

#include <immintrin.h>

#include <cstdint>

namespace disco {
namespace {

constexpr int kVectorLength = 16;
constexpr int kMaxVectors = 2;
constexpr int kMaxPixels = 14;

using Vector = __m512;

__mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

Vector zero() { return _mm512_setzero_ps(); }
Vector set(float x) { return _mm512_set1_ps(x); }
Vector broadcast(const float* x) { return _mm512_set1_ps(*x); }
Vector load(const float* x) { return _mm512_loadu_ps(x); }
Vector load_n(const float* x, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), x); }
void store(float* x, Vector v) { _mm512_storeu_ps(x, v); }
void store_n(float* x, Vector v, int64_t n) { _mm512_mask_storeu_ps(x, first_lanes(n), v); }
Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
// The second operand is returned where either is NaN: a NaN in `a` stays, as torch.relu keeps it.
Vector maximum(Vector a, Vector b) { return _mm512_max_ps(b, a); }
Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

}  // namespace
}  // namespace disco

#include "conv_microkernel_body.h"
#include "winograd_body.h"

namespace disco {

const IsaKernels& avx512_kernels() {
  static constexpr IsaKernels table = {"avx512", kVectorLength, kMaxVectors, kMaxPixels, kKernels,
                                       &kWinograd2, &kWinograd4};
  return table;
}

}  // namespace disco
