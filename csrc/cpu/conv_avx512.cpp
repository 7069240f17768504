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
Vector broadcast(const float* x) { return _mm512_set1_ps(*x); }
Vector load(const float* x) { return _mm512_loadu_ps(x); }
Vector load_n(const float* x, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), x); }
void store(float* x, Vector v) { _mm512_storeu_ps(x, v); }
void store_n(float* x, Vector v, int64_t n) { _mm512_mask_storeu_ps(x, first_lanes(n), v); }
Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
// The second operand is returned where either is NaN: a NaN in `a` stays, as torch.relu keeps it.
Vector maximum(Vector a, Vector b) { return _mm512_max_ps(b, a); }
Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
Vector splat(float x) { return _mm512_set1_ps(x); }
Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
Vector divide(Vector a, Vector b) { return _mm512_div_ps(a, b); }
Vector minimum(Vector a, Vector b) { return _mm512_min_ps(b, a); }
Vector bit_and(Vector v, uint32_t mask) {
  return _mm512_and_ps(v, _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int32_t>(mask))));
}
Vector shift_left_23(Vector v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v), 23));
}
Vector select_negative(Vector x, Vector a, Vector b) {
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), b, a);
}

}  // namespace
}  // namespace disco

#include "conv_microkernel_body.h"

namespace disco {

const IsaKernels& avx512_kernels() {
  static constexpr IsaKernels table = {"avx512", kVectorLength, kMaxVectors, kMaxPixels, kKernels};
  return table;
}

}  // namespace disco
