// Winograd transforms F(2x2, 3x3) and F(4x4, 3x3), channels in vector lanes, one source for every
// ISA (Lavin and Gray, arXiv 1509.09308). An ISA file includes this after conv_microkernel_body.h;
// it needs the primitives of that file.
//
// A convolution of one tile is output(sum over channels of input(d) * weight(g)), all of them
// evaluations of polynomials at a few points. F(2x2) takes 0, 1, -1 and infinity. F(4x4) takes 0,
// 5/8, -5/8, 3/2, -3/2 and infinity: the usual 1 and 2 lose four times as many digits (measured
// against float64, K = 64, largest error over largest value: 1.6e-6 against 6.3e-6; direct
// convolution 5.7e-7), and these numbers and their products are exact in binary. weight(g) is
// computed in float64 when the weights are packed (pack.cpp). Bfloat16 is transformed in float32
// and, in F(2x2), multiplied in bfloat16: every transformed value is rounded once.

#include "winograd_points.h"

namespace disco {
namespace {

// d[0], d[step], ... in place, one dimension of the input transform.
template <int M>
inline void winograd_input_line(Vector* d, int step) {
  Vector x[M + 2];
#pragma GCC unroll 6
  for (int i = 0; i < M + 2; ++i) x[i] = d[i * step];
  if constexpr (M == 2) {
    d[0 * step] = subtract(x[0], x[2]);
    d[1 * step] = add(x[2], x[1]);
    d[2 * step] = subtract(x[2], x[1]);
    d[3 * step] = subtract(x[3], x[1]);
  } else {
    constexpr float a2 = kWinogradA * kWinogradA, b2 = kWinogradB * kWinogradB;
    const Vector sum = splat(-(a2 + b2)), product = splat(a2 * b2);
    d[0 * step] = multiply_add(product, x[0], multiply_add(sum, x[2], x[4]));
    d[5 * step] = multiply_add(product, x[1], multiply_add(sum, x[3], x[5]));
    const Vector even_a = multiply_add(splat(-b2), x[2], x[4]);
    const Vector odd_a = multiply_add(splat(-b2), x[1], x[3]);
    d[1 * step] = multiply_add(splat(kWinogradA), odd_a, even_a);
    d[2 * step] = multiply_add(splat(-kWinogradA), odd_a, even_a);
    const Vector even_b = multiply_add(splat(-a2), x[2], x[4]);
    const Vector odd_b = multiply_add(splat(-a2), x[1], x[3]);
    d[3 * step] = multiply_add(splat(kWinogradB), odd_b, even_b);
    d[4 * step] = multiply_add(splat(-kWinogradB), odd_b, even_b);
  }
}

// The first M of m[0], m[step], ... in place, one dimension of the output transform.
template <int M>
inline void winograd_output_line(Vector* m, int step) {
  const Vector sum_a = add(m[1 * step], m[2 * step]);
  const Vector difference_a = subtract(m[1 * step], m[2 * step]);
  if constexpr (M == 2) {
    m[0 * step] = add(m[0 * step], sum_a);
    m[1 * step] = add(difference_a, m[3 * step]);
  } else {
    constexpr float a2 = kWinogradA * kWinogradA, b2 = kWinogradB * kWinogradB;
    const Vector sum_b = add(m[3 * step], m[4 * step]);
    const Vector difference_b = subtract(m[3 * step], m[4 * step]);
    const Vector y0 = add(add(m[0 * step], sum_a), sum_b);
    const Vector a1 = multiply_add(splat(kWinogradA), difference_a, zero());
    const Vector b1 = multiply_add(splat(kWinogradB), difference_b, zero());
    const Vector y2 = multiply_add(splat(a2), sum_a, multiply_add(splat(b2), sum_b, zero()));
    const Vector y3 = multiply_add(splat(a2), a1, multiply_add(splat(b2), b1, m[5 * step]));
    m[0 * step] = y0;
    m[1 * step] = add(a1, b1);
    m[2 * step] = y2;
    m[3 * step] = y3;
  }
}

// Type of the pixels, and of what they are multiplied as.
template <typename Type, typename Product, int M>
void winograd_input(const WinogradInput& call) {
  using Element = typename Type::Element;
  constexpr int N = M + 2;
  for (int64_t g = 0; g < call.num_groups; ++g) {
    const int64_t first = call.groups[g];
    const int64_t left = call.channels - first;
    Vector d[N * N];
    if (left >= kVectorLength) {
#pragma GCC unroll 36
      for (int i = 0; i < N * N; ++i) {
        d[i] = Type::read(reinterpret_cast<const Element*>(call.pixels[i]) + first);
      }
    } else {
#pragma GCC unroll 36
      for (int i = 0; i < N * N; ++i) {
        d[i] = Type::read_n(reinterpret_cast<const Element*>(call.pixels[i]) + first, left);
      }
    }
#pragma GCC unroll 6
    for (int j = 0; j < N; ++j) winograd_input_line<M>(d + j, N);
    char* out = call.out + first * static_cast<int64_t>(sizeof(typename Product::Element));
#pragma GCC unroll 6
    for (int i = 0; i < N; ++i) {
      winograd_input_line<M>(d + i * N, 1);
#pragma GCC unroll 6
      for (int j = 0; j < N; ++j) {
        char* point = out + (i * N + j) * call.out_stride;
        Product::write(reinterpret_cast<typename Product::Element*>(point), d[i * N + j]);
      }
    }
  }
}

template <typename Type, int M>
void winograd_output(const WinogradOutput& call) {
  using Element = typename Type::Element;
  constexpr int N = M + 2;
  for (int64_t c = 0; c < call.num_channels; c += kVectorLength) {
    const int64_t left = call.num_channels - c;
    Vector m[N * N];
#pragma GCC unroll 6
    for (int j = 0; j < N; ++j) {
#pragma GCC unroll 6
      for (int i = 0; i < N; ++i)
        m[i * N + j] = load(call.products + (i * N + j) * call.stride + c);
      winograd_output_line<M>(m + j, N);
    }
    const Vector bias = load(call.bias + c);
    alignas(64) float sums[M * M * kVectorLength];
    const bool whole = left >= kVectorLength;
    const bool relu = call.activation == kActivationRelu;
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      winograd_output_line<M>(m + i * N, 1);
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) {
        Vector y = add(m[i * N + j], bias);
        if (call.out[i * M + j] != nullptr) {
          const Element* out = reinterpret_cast<const Element*>(call.out[i * M + j]) + c;
          if (call.accumulate) y = add(y, whole ? Type::read(out) : Type::read_n(out, left));
          if (call.residual != nullptr) {
            const Element* residual =
                reinterpret_cast<const Element*>(call.residual[i * M + j]) + c;
            y = add(y, whole ? Type::read(residual) : Type::read_n(residual, left));
          }
        }
        store(sums + (i * M + j) * kVectorLength, relu ? activate(y, kActivationRelu) : y);
      }
    }
    if (!relu) activate_in_place(sums, M * M * kVectorLength, call.activation);
#pragma GCC unroll 4
    for (int i = 0; i < M * M; ++i) {
      if (call.out[i] == nullptr) continue;
      Element* out = reinterpret_cast<Element*>(call.out[i]) + c;
      const Vector y = load(sums + i * kVectorLength);
      if (whole) {
        Type::write(out, y);
      } else {
        Type::write_n(out, y, left);
      }
    }
  }
}

constexpr WinogradKernels kWinograd2 = {
    2,
    {&winograd_input<Float32, Float32, 2>, &winograd_input<BFloat16, BFloat16, 2>},
    {&winograd_output<Float32, 2>, &winograd_output<BFloat16, 2>}};
constexpr WinogradKernels kWinograd4 = {
    4,
    {&winograd_input<Float32, Float32, 4>, &winograd_input<BFloat16, Float32, 4>},
    {&winograd_output<Float32, 4>, &winograd_output<BFloat16, 4>}};

}  // namespace
}  // namespace disco
