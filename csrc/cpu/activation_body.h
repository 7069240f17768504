// Activations over vectors: one source for every ISA. An ISA file defines the vector type and its
// primitives in an anonymous namespace, then includes whatever includes this file.
//
//   Vector, kVectorLength, zero(), load(const float*), store(float*, v), store_n(float*, v, n),
//   add(a, b), maximum(a, b), multiply_add(a, b, c) = a * b + c; and
//   splat(float), subtract(a, b), multiply(a, b), divide(a, b)
//   minimum(a, b): a NaN in `a` stays, as in maximum
//   bit_and(v, mask): each lane's 32 bits and the mask's
//   shift_left_23(v): each lane's 32 bits, shifted as an integer
//   select_negative(x, a, b): a where the sign bit of x is set, else b
//
// Divisions are exact ones: the reciprocal estimates of two vendors' CPUs have different bits.
//
// Largest error in units in the last place of the result (ULP) against double precision, measured
// over every float32 of 2^-26 <= |x| <= 128 and, beyond, where no polynomial moves any more, over
// every eleventh; where the result is at least 2^-119 in magnitude (smaller ones may come out as
// zero). The largest of the x86 builds, of which the portable one has no fused multiply-add:
//
//   relu, relu6  0    hardsigmoid  1.4    hardswish, sigmoid  2.5    silu  3.3
//   gelu  8.2 (with fused multiply-add 6.3; 4.4 for x >= -1)
//   gelu_tanh  3.1 for x >= -1, else 3.1 + 2.8 w for a result of x e^-w: 16 at x = -3, 202 at -9.8
//
// In that tail w is rounded before it becomes an exponent. (torch's float32 gelus add 1 and a tanh
// or erf near -1 there, and have no correct digit left from some x = -5.5 on.) The absolute error
// of all is at most 2.2 (1 + |x|) 2^-24.
//
// Not a number stays. A result that the definition makes of infinity times zero (x = -infinity for
// silu, gelu, gelu_tanh and hardswish) is NaN, as it is in torch; no finite x gives one.
#pragma once

#include <cstdint>

#include "conv_microkernel.h"

namespace disco {
namespace {

// Horner's rule, the highest power first.
template <int kCount>
__attribute__((always_inline)) inline Vector polynomial(Vector x,
                                                        const float (&coefficients)[kCount]) {
  Vector sum = splat(coefficients[0]);
#pragma GCC unroll 8
  for (int i = 1; i < kCount; ++i) sum = multiply_add(sum, x, splat(coefficients[i]));
  return sum;
}

__attribute__((always_inline)) inline Vector magnitude(Vector x) { return bit_and(x, 0x7fffffffu); }

// e^-(x + low) for x >= 0 and a small low. Zero from x = 87.68 on, where the result would be below
// 2^-126.5.
//
// e^-x = 2^n e^-r with n = round(-x / ln 2) and r = x + n ln 2, at most ln(2) / 2 in magnitude. The
// sum with 1.5 * 2^23 leaves n in the low bits of a float, and 127 beside it makes them the
// exponent of 2^n: 2^-127 comes out as zero, which is where x is cut off. ln 2 is split into 355 /
// 512, whose product with n is exact, and the rest.
__attribute__((always_inline)) inline Vector exp_minus(Vector x, Vector low) {
  // Relative error 0.06 * 2^-24 for |r| <= 0.352: minimax, then rounded to float32 one coefficient
  // after the other with the rest fitted again.
  static constexpr float kExp[] = {0.00138212810f, -0.00836961716f, 0.0416682847f, -0.166665137f,
                                   0.499999940f,   -1.0f,           1.0f};
  constexpr float kShifter = 12582912.0f + 127.0f;
  const Vector cut = minimum(x, splat(88.02969f));  // 127 ln 2
  const Vector shifted = multiply_add(cut, splat(-1.44269504f), splat(kShifter));
  const Vector n = subtract(shifted, splat(kShifter));
  Vector r = multiply_add(n, splat(0.693359375f), cut);
  r = add(multiply_add(n, splat(-2.12194440e-4f), r), low);
  return multiply(polynomial(r, kExp), shift_left_23(shifted));
}

// 1 / (1 + e^-x) for a = |x|, which x has but for its sign: from e^-a, so that nothing overflows
// and small results keep their digits.
__attribute__((always_inline)) inline Vector logistic(Vector x, Vector a) {
  const Vector e = exp_minus(a, zero());
  return divide(select_negative(x, e, splat(1.0f)), add(e, splat(1.0f)));
}

// Phi(x) = (1 + erf(x / sqrt 2)) / 2, the normal distribution, through the side on which it is
// small: Phi(-b) = e^(-b^2 / 2) R(b), and R(b) = erfcx(b / sqrt 2) / 2 falls from 1/2 as 0.4 / b.
__attribute__((always_inline)) inline Vector normal_distribution(Vector x) {
  // R as a quotient: relative error 0.32 * 2^-24 on [0, 13.3], minimax (iterated least squares),
  // rounded as above. All coefficients are positive, so no digits cancel.
  static constexpr float kAbove[] = {0.00399083411f, 0.0397977829f, 0.180770263f, 0.434987843f,
                                     0.5f};
  static constexpr float kBelow[] = {0.0100033907f, 0.0997657925f, 0.462958932f,
                                     1.19229734f,   1.66786051f,   1.0f};
  const Vector half = splat(0.5f);
  const Vector b = minimum(magnitude(x), splat(14.0f));  // Phi(-14) is zero in float32
  // b^2 / 2 to more than 24 bits, as e^-(b^2 / 2) needs it: the square of b's leading 12 bits,
  // which is exact, and the rest.
  const Vector lead = bit_and(b, 0xfffff000u);
  const Vector square = multiply(multiply(lead, lead), half);
  const Vector rest = multiply(multiply(subtract(b, lead), add(b, lead)), half);
  const Vector ratio = divide(polynomial(b, kAbove), polynomial(b, kBelow));
  const Vector small = multiply(exp_minus(square, rest), ratio);
  return select_negative(x, small, subtract(splat(1.0f), small));
}

__attribute__((always_inline)) inline Vector hard_sigmoid(Vector x) {
  const Vector ramp = minimum(maximum(add(x, splat(3.0f)), zero()), splat(6.0f));
  return multiply(ramp, splat(1.0f / 6.0f));  // 6 * (1.0f / 6.0f) rounds to 1
}

// x * logistic(2 sqrt(2 / pi) (x + 0.044715 x^3)): Hendrycks and Gimpel, arXiv 1606.08415, with
// (1 + tanh u) / 2 = logistic(2 u).
__attribute__((always_inline)) inline Vector gelu_tanh(Vector x) {
  const Vector a = magnitude(x);
  const Vector slope = multiply_add(multiply(a, a), splat(0.0713548163f), splat(1.59576912f));
  return multiply(x, logistic(x, multiply(a, slope)));
}

// The one entry: what the epilogue applies to a finished sum. Inlined, so that a constant
// `activation` leaves no choice to be made at run time.
__attribute__((always_inline)) inline Vector activate(Vector x, Activation activation) {
  switch (activation) {
    case kActivationNone:
      return x;
    case kActivationRelu:
      return maximum(x, zero());
    case kActivationRelu6:
      return minimum(maximum(x, zero()), splat(6.0f));
    case kActivationSilu:
      return multiply(x, logistic(x, magnitude(x)));
    case kActivationGelu:
      return multiply(x, normal_distribution(x));
    case kActivationGeluTanh:
      return gelu_tanh(x);
    case kActivationHardswish:
      return multiply(x, hard_sigmoid(x));
    case kActivationHardsigmoid:
      return hard_sigmoid(x);
    case kActivationSigmoid:
      return logistic(x, magnitude(x));
  }
  return x;
}

template <Activation kActivation>
inline void activate_all(float* sums, int64_t count) {
  for (int64_t i = 0; i < count; i += kVectorLength) {
    store(sums + i, activate(load(sums + i), kActivation));
  }
}

// The activation of `count` sums, whole vectors of them. The choice of the activation lies outside
// of the loops.
__attribute__((noinline)) void activate_in_place(float* sums, int64_t count,
                                                 Activation activation) {
  switch (activation) {
    case kActivationNone:
      return;
    case kActivationRelu:
      return activate_all<kActivationRelu>(sums, count);
    case kActivationRelu6:
      return activate_all<kActivationRelu6>(sums, count);
    case kActivationSilu:
      return activate_all<kActivationSilu>(sums, count);
    case kActivationGelu:
      return activate_all<kActivationGelu>(sums, count);
    case kActivationGeluTanh:
      return activate_all<kActivationGeluTanh>(sums, count);
    case kActivationHardswish:
      return activate_all<kActivationHardswish>(sums, count);
    case kActivationHardsigmoid:
      return activate_all<kActivationHardsigmoid>(sums, count);
    case kActivationSigmoid:
      return activate_all<kActivationSigmoid>(sums, count);
  }
}

}  // namespace
}  // namespace disco
