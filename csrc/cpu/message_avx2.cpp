// Packing and unpacking of messages in AVX2. The conversions of float16 are made of whole-number
// operations: F16C is an extension of its own, which these files are not built with.

#include <immintrin.h>

#include <cstdint>

namespace disco {
namespace message_simd {
namespace {

constexpr int kLanes = 8;

using Floats = __m256;
using Ints = __m256i;
using Mask = __m256;  // by the sign bits

alignas(32) const int32_t kLaneMasks[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

__m256i first_lanes(int64_t n) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLaneMasks + 8 - n));
}

Floats load(const float* x) { return _mm256_loadu_ps(x); }
Floats load_n(const float* x, int64_t n) { return _mm256_maskload_ps(x, first_lanes(n)); }
void store(float* x, Floats v) { _mm256_storeu_ps(x, v); }
void store_n(float* x, Floats v, int64_t n) { _mm256_maskstore_ps(x, first_lanes(n), v); }
void store_past_caches(float* x, Floats v) { _mm256_stream_ps(x, v); }
void finish_streams() { _mm_sfence(); }
Ints load_ints(const int32_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
void store_ints(int32_t* x, Ints v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), v); }
// Lane i's bit, moved to where the blend looks.
Mask mask_of(uint32_t lanes) {
  const __m256i shift = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
  return _mm256_castsi256_ps(
      _mm256_sllv_epi32(_mm256_set1_epi32(static_cast<int32_t>(lanes)), shift));
}
Floats permute(Floats v, Ints from) { return _mm256_permutevar8x32_ps(v, from); }
Floats merge(Floats a, Mask mask, Floats b) { return _mm256_blendv_ps(a, b, mask); }
Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
Ints maximum(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
Ints magnitude(Floats v) {
  return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
}

Ints constant(int32_t value) { return _mm256_set1_epi32(value); }
Ints choose(Ints otherwise, Ints mask, Ints value) {
  return _mm256_blendv_epi8(otherwise, value, mask);
}

// The low 16 bits of every lane.
void store_low_halves(uint16_t* to, Ints v) {
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
}

Ints load_halves(const uint16_t* from) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// As float16_of, with every case computed and one chosen.
void store_float16(uint16_t* to, Floats v) {
  const Ints size = magnitude(v);
  const Ints sign =
      _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(v), 16), constant(0x8000));
  const Ints shifted = _mm256_srli_epi32(size, 13);
  const Ints odd = _mm256_and_si256(shifted, constant(1));
  Ints result = _mm256_srli_epi32(
      _mm256_add_epi32(_mm256_add_epi32(size, constant(0xfff - (112 << 23))), odd), 13);
  const Floats small = _mm256_add_ps(_mm256_castsi256_ps(size), _mm256_set1_ps(0.5f));
  result = choose(result, _mm256_cmpgt_epi32(constant(0x38800000), size),
                  _mm256_sub_epi32(_mm256_castps_si256(small), constant(0x3f000000)));
  result = choose(result, _mm256_cmpgt_epi32(size, constant(0x477fefff)), constant(0x7c00));
  const Ints nan = _mm256_or_si256(_mm256_and_si256(shifted, constant(0x3ff)), constant(0x7e00));
  result = choose(result, _mm256_cmpgt_epi32(size, constant(0x7f800000)), nan);
  store_low_halves(to, _mm256_or_si256(result, sign));
}

Floats load_float16(const uint16_t* from) {
  const Ints half = load_halves(from);
  const Ints size = _mm256_and_si256(half, constant(0x7fff));
  const Ints sign = _mm256_slli_epi32(_mm256_and_si256(half, constant(0x8000)), 16);
  const Ints shifted = _mm256_slli_epi32(size, 13);
  Ints result = _mm256_add_epi32(shifted, constant(112 << 23));
  const Floats small = _mm256_mul_ps(_mm256_cvtepi32_ps(size), _mm256_set1_ps(0x1p-24f));
  result = choose(result, _mm256_cmpgt_epi32(constant(0x400), size), _mm256_castps_si256(small));
  const Ints nan = _mm256_cmpgt_epi32(size, constant(0x7c00));
  const Ints huge = _mm256_or_si256(_mm256_or_si256(shifted, constant(0x7f800000)),
                                    _mm256_and_si256(nan, constant(0x400000)));
  result = choose(result, _mm256_cmpgt_epi32(size, constant(0x7bff)), huge);
  return _mm256_castsi256_ps(_mm256_or_si256(result, sign));
}

void store_bfloat16(uint16_t* to, Floats v) {
  const Ints bits = _mm256_castps_si256(v);
  const Ints odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), constant(1));
  const Ints sum = _mm256_add_epi32(_mm256_add_epi32(bits, constant(0x7fff)), odd);
  const Ints quiet = _mm256_or_si256(bits, constant(0x400000));
  const Ints nan = _mm256_cmpgt_epi32(magnitude(v), constant(0x7f800000));
  store_low_halves(to, _mm256_srli_epi32(choose(sum, nan, quiet), 16));
}

Floats load_bfloat16(const uint16_t* from) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(load_halves(from), 16));
}

// Whole numbers, NaN as 0.
void store_int8(int8_t* to, Floats v) {
  const Ints ordered = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_ORD_Q));
  const Floats rounded = _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Ints whole = _mm256_and_si256(_mm256_cvtps_epi32(rounded), ordered);
  const __m128i halves =
      _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(halves, halves));
}

Floats load_int8(const int8_t* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

}  // namespace
}  // namespace message_simd
}  // namespace disco

#include "message_simd_body.h"

namespace disco {

const MessageKernels& avx2_message_kernels() {
  using namespace message_simd;
  static constexpr MessageKernels table = {
      "avx2",         kLanes,         gather,          gather_ahead,  stream,
      finish_streams, narrow_float16, narrow_bfloat16, widen_float16, widen_bfloat16,
      max_magnitude,  quantise,       dequantise};
  return table;
}

}  // namespace disco
