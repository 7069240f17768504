// AVX-512 micro-kernels for CPUs with AVX-512-VNNI: one instruction multiplies four 8-bit integers
// in every lane and adds the products.

#include "avx512_pairs.h"
#include "conv_microkernel.h"
#include "gather_words_avx512.h"

namespace disco {
namespace {

using Quads = __m512i;

Quads broadcast_quad(const char* x) {
  int32_t quad;
  __builtin_memcpy(&quad, x, sizeof(quad));
  return _mm512_set1_epi32(quad);
}
Quads load_quads(const void* x) { return _mm512_loadu_si512(x); }
Vector multiply_add_quads(Quads a, Quads b, Vector c) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  return c;
}
// Zero, but not as a constant: those GCC 12 would rather keep in memory.
Vector no_sum() {
  Vector v = zero();
  __asm__("" : "+v"(v));
  return v;
}
Vector integers_to_float(Vector x) { return _mm512_cvtepi32_ps(_mm512_castps_si512(x)); }

// To the nearest whole number, ties to even; NaN gives the lowest.
__m512i nearest(Vector x, Vector inverse) {
  // What is too large for an int32 would come out negative; of a NaN the second operand is taken.
  return _mm512_cvtps_epi32(_mm512_min_ps(splat(512.0f), multiply(x, inverse)));
}

// As gather_words: what is written too much belongs to a later step or pixel.
void quantise_float32(const QuadGather& call) {
  const Vector inverse = splat(call.inverse_scale);
  const __m512i zero_point = _mm512_set1_epi32(call.zero_point);
  for (int64_t p = 0; p < call.num_pixels; ++p) {
    const uint16_t* from = call.from + p * call.from_stride;
    const int64_t first = p * call.to_stride;
    for (int64_t s = 0; s < call.num_steps; ++s) {
      const WordStep& step = call.steps[s];
      const __m512i words = words_of(step, from);
      const __m512i steps =
          _mm512_add_epi32(nearest(_mm512_castsi512_ps(words), inverse), zero_point);
      const __m128i bytes = _mm512_cvtusepi32_epi8(_mm512_max_epi32(steps, _mm512_setzero_si512()));
      const int64_t begin = first + step.first_to / 2, room = call.to_bytes - begin;
      if (room >= kVectorLength) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(call.to + begin), bytes);
      } else {
        _mm_mask_storeu_epi8(call.to + begin, first_lanes(room), bytes);
      }
    }
  }
}

// Likewise. Of eight words, those at even places come first: split in two vectors of float32,
// packed together as integers they are in order (QuadGather).
void quantise_bfloat16(const QuadGather& call) {
  const Vector inverse = splat(call.inverse_scale);
  const __m512i zero_point = _mm512_set1_epi16(static_cast<int16_t>(call.zero_point));
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const __m512i first_halves = _mm512_setr_epi64(0, 2, 4, 6, 0, 2, 4, 6);
  for (int64_t p = 0; p < call.num_pixels; ++p) {
    const uint16_t* from = call.from + p * call.from_stride;
    const int64_t first = p * call.to_stride;
    for (int64_t s = 0; s < call.num_steps; ++s) {
      const WordStep& step = call.steps[s];
      const __m512i words = words_of(step, from);
      const __m512i even = nearest(_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)), inverse);
      const __m512i odd = nearest(_mm512_castsi512_ps(_mm512_and_si512(words, upper)), inverse);
      const __m512i steps = _mm512_adds_epi16(_mm512_packs_epi32(even, odd), zero_point);
      const __m256i bytes = _mm512_castsi512_si256(
          _mm512_permutexvar_epi64(first_halves, _mm512_packus_epi16(steps, steps)));
      const int64_t begin = first + step.first_to, room = call.to_bytes - begin;
      if (room >= 2 * kVectorLength) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(call.to + begin), bytes);
      } else {
        _mm256_mask_storeu_epi8(call.to + begin, static_cast<__mmask32>((1ull << room) - 1), bytes);
      }
    }
  }
}

}  // namespace
}  // namespace disco

#include "conv_microkernel_body.h"
#include "conv_quads_body.h"

namespace disco {

const QuadKernels& avx512vnni_kernels() {
  static constexpr QuadKernels table = {
      {kernel_table<QuadsTo<Float32>>(), kernel_table<QuadsTo<BFloat16>>()},
      {&quantise_float32, &quantise_bfloat16}};
  return table;
}

}  // namespace disco
