// Packing and unpacking of messages in AVX-512 (F, DQ, BW, VL).

#include <immintrin.h>

#include <cstdint>

namespace disco {
namespace message_simd {
namespace {

constexpr int kLanes = 16;

using Floats = __m512;
using Ints = __m512i;
using Mask = __mmask16;

__mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

Floats load(const float* x) { return _mm512_loadu_ps(x); }
Floats load_n(const float* x, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), x); }
void store(float* x, Floats v) { _mm512_storeu_ps(x, v); }
void store_n(float* x, Floats v, int64_t n) { _mm512_mask_storeu_ps(x, first_lanes(n), v); }
void store_past_caches(float* x, Floats v) { _mm512_stream_ps(x, v); }
void finish_streams() { _mm_sfence(); }
Ints load_ints(const int32_t* x) { return _mm512_loadu_si512(x); }
void store_ints(int32_t* x, Ints v) { _mm512_storeu_si512(x, v); }
Mask mask_of(uint32_t lanes) { return static_cast<Mask>(lanes); }
Floats permute(Floats v, Ints from) { return _mm512_permutexvar_ps(from, v); }
Floats merge(Floats a, Mask mask, Floats b) { return _mm512_mask_mov_ps(a, mask, b); }
Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
Ints maximum(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
Ints magnitude(Floats v) {
  return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
}

void store_float16(uint16_t* to, Floats v) {
  const __m256i half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
}

Floats load_float16(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

void store_bfloat16(uint16_t* to, Floats v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i result = _mm512_srli_epi32(_mm512_mask_mov_epi32(sum, nan, quiet), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(result));
}

Floats load_bfloat16(const uint16_t* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Whole numbers, NaN as 0.
void store_int8(int8_t* to, Floats v) {
  const __mmask16 ordered = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
  const __m512i whole =
      _mm512_maskz_cvt_roundps_epi32(ordered, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(whole));
}

Floats load_int8(const int8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

}  // namespace
}  // namespace message_simd
}  // namespace disco

#include "message_simd_body.h"

namespace disco {

const MessageKernels& avx512_message_kernels() {
  using namespace message_simd;
  static constexpr MessageKernels table = {
      "avx512",       kLanes,         gather,          gather_ahead,  stream,
      finish_streams, narrow_float16, narrow_bfloat16, widen_float16, widen_bfloat16,
      max_magnitude,  quantise,       dequantise};
  return table;
}

}  // namespace disco
