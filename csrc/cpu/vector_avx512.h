// AVX-512 primitives of the micro-kernels (see conv_microkernel_body.h), for the files that are
// compiled with AVX-512. Internal linkage, as everything in those.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace disco {
namespace {

// 14 pixels x 32 output channels: 28 of 32 registers accumulate; the rest hold two weight vectors
// and the broadcast input, so each input value is loaded once for both.
constexpr int kVectorLength = 16;
constexpr int kMaxVectors = 2;
constexpr int kMaxPixels = 14;

using Vector = __m512;

inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector splat(float x) { return _mm512_set1_ps(x); }
inline Vector broadcast(const float* x) { return _mm512_set1_ps(*x); }
inline Vector load(const float* x) { return _mm512_loadu_ps(x); }
inline Vector load_n(const float* x, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), x); }
inline void store(float* x, Vector v) { _mm512_storeu_ps(x, v); }
inline void store_n(float* x, Vector v, int64_t n) { _mm512_mask_storeu_ps(x, first_lanes(n), v); }
inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
// The second operand is returned where either is NaN: a NaN in `a` stays, as torch.relu keeps it.
inline Vector maximum(Vector a, Vector b) { return _mm512_max_ps(b, a); }
inline Vector maximum_or_nan(Vector a, Vector b) {
  return _mm512_mask_mov_ps(maximum(a, b), _mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q), b);
}
inline Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Vector divide(Vector a, Vector b) { return _mm512_div_ps(a, b); }
inline Vector minimum(Vector a, Vector b) { return _mm512_min_ps(b, a); }
inline Vector bit_and(Vector v, uint32_t mask) {
  return _mm512_and_ps(v, _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int32_t>(mask))));
}
inline Vector shift_left_23(Vector v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v), 23));
}
inline Vector select_negative(Vector x, Vector a, Vector b) {
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), b, a);
}
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

inline Vector widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline Vector load_bf16(const uint16_t* x) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
inline Vector load_bf16_n(const uint16_t* x, int64_t n) {
  return widen(_mm256_maskz_loadu_epi16(first_lanes(n), x));
}

}  // namespace
}  // namespace disco
