// Words picked from a row by permutation: 32 of them in reach of one load. For the files that are
// compiled with AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "conv_microkernel.h"

namespace disco {
namespace {

// The listed words of one step, in order; what the row does not have reads as zero.
inline __m512i words_of(const WordStep& step, const uint16_t* row) {
  const uint16_t* from = row + step.first_from;
  const __m512i window = step.readable == ~0u ? _mm512_loadu_si512(from)
                                              : _mm512_maskz_loadu_epi16(step.readable, from);
  return _mm512_permutexvar_epi16(_mm512_loadu_si512(step.lane), window);
}

// Unmasked stores of the next larger register are several times faster than masked ones, and the
// short ones seldom cross a cache line. What they write too much belongs to a later step or pixel,
// which overwrites it; only at the end of the row that would be somebody else's.
inline void gather_words(const WordGather& call) {
  for (int64_t p = 0; p < call.num_pixels; ++p) {
    const uint16_t* from = call.from + p * call.from_stride;
    const int64_t first = p * call.to_stride;
    for (int64_t s = 0; s < call.num_steps; ++s) {
      const WordStep& step = call.steps[s];
      const __m512i words = words_of(step, from);
      uint16_t* to = call.to + first + step.first_to;
      if (first + step.first_to + kWordWindow > call.to_words) {
        _mm512_mask_storeu_epi16(to, step.written, words);
      } else if (step.written < 1u << 8) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(words));
      } else if (step.written < 1u << 16) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(words));
      } else {
        _mm512_storeu_si512(to, words);
      }
    }
  }
}

}  // namespace
}  // namespace disco
