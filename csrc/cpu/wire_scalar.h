// The conversions of message_kernels.h for one value, in what every CPU has. Internal linkage: this
// header is compiled with different instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

namespace disco {
namespace {

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

uint16_t float16_of(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {  // NaN: quiet, with the upper bits of its payload
    result = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520, half way from the largest to the next
    result = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: in [0.5, 1) a float's step is 2^-24, too
    result = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    result = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | result);
}

float float_of_float16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude < 0x400u) {
    return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
  }
  if (magnitude < 0x7c00u) return float_of(sign | ((magnitude << 13) + (112u << 23)));
  const uint32_t quiet = magnitude > 0x7c00u ? 0x400000u : 0u;
  return float_of(sign | 0x7f800000u | quiet | magnitude << 13);
}

uint16_t bfloat16_of(float x) {
  const uint32_t bits = bits_of(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(nan ? bits >> 16 | 0x40u
                                   : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

float float_of_bfloat16(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

int32_t magnitude_of(float x) { return static_cast<int32_t>(bits_of(x) & 0x7fffffffu); }

int8_t quantised(float x, float inverse) {
  const float scaled = x * inverse;
  // Adding 1.5 * 2^23 leaves no room for a fraction. Statements of their own, so that no compiler
  // makes one rounding of the two.
  const float rounded = scaled + 12582912.0f;
  const int32_t whole = static_cast<int32_t>(bits_of(rounded) - bits_of(12582912.0f));
  return scaled == scaled ? static_cast<int8_t>(whole) : int8_t{0};
}

}  // namespace
}  // namespace disco
