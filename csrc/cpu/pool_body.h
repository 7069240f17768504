// The largest and the mean of several pixels, channel by channel. One source for every ISA; after
// conv_microkernel_body.h, and needs maximum_or_nan(a, b), which is NaN where either is.

#include "conv_microkernel.h"

namespace disco {
namespace {

template <typename Type>
void largest_pixel(const PixelList& call) {
  using Element = typename Type::Element;
  for (int64_t c = 0; c < call.channels; c += kVectorLength) {
    const int64_t left = call.channels - c;
    Element* out = reinterpret_cast<Element*>(call.out) + c;
    if (left >= kVectorLength) {
      Vector most = Type::read(reinterpret_cast<const Element*>(call.pixels[0]) + c);
      for (int64_t p = 1; p < call.num_pixels; ++p) {
        most =
            maximum_or_nan(most, Type::read(reinterpret_cast<const Element*>(call.pixels[p]) + c));
      }
      Type::write(out, most);
    } else {
      Vector most = Type::read_n(reinterpret_cast<const Element*>(call.pixels[0]) + c, left);
      for (int64_t p = 1; p < call.num_pixels; ++p) {
        const Element* x = reinterpret_cast<const Element*>(call.pixels[p]) + c;
        most = maximum_or_nan(most, Type::read_n(x, left));
      }
      Type::write_n(out, most, left);
    }
  }
}

// Several vectors at a time: pixels often are a multiple of 4 KB apart, and their lines then push
// each other out of the first-level cache. Row by row, since the error of a sum grows with its
// length.
template <typename Type, int kCount>
void mean_of_vectors(const PixelMap& call, int64_t c) {
  using Element = typename Type::Element;
  Vector sum[kCount];
  for (int v = 0; v < kCount; ++v) sum[v] = zero();
  for (int64_t h = 0; h < call.h; ++h) {
    const char* pixel = call.first + h * call.stride_h;
    Vector row[kCount];
    for (int v = 0; v < kCount; ++v) row[v] = zero();
    for (int64_t w = 0; w < call.w; ++w, pixel += call.stride_w) {
      const Element* x = reinterpret_cast<const Element*>(pixel) + c;
      for (int v = 0; v < kCount; ++v) row[v] = add(row[v], Type::read(x + v * kVectorLength));
    }
    for (int v = 0; v < kCount; ++v) sum[v] = add(sum[v], row[v]);
  }
  const float count = static_cast<float>(call.h * call.w);
  Element* out = reinterpret_cast<Element*>(call.out) + c;
  for (int v = 0; v < kCount; ++v) {
    Type::write(out + v * kVectorLength, divide(sum[v], broadcast(&count)));
  }
}

// Fewer channels than a vector holds.
template <typename Type>
void mean_of_rest(const PixelMap& call, int64_t c, int64_t left) {
  using Element = typename Type::Element;
  Vector sum = zero();
  for (int64_t h = 0; h < call.h; ++h) {
    const char* pixel = call.first + h * call.stride_h;
    Vector row = zero();
    for (int64_t w = 0; w < call.w; ++w, pixel += call.stride_w) {
      row = add(row, Type::read_n(reinterpret_cast<const Element*>(pixel) + c, left));
    }
    sum = add(sum, row);
  }
  const float count = static_cast<float>(call.h * call.w);
  Type::write_n(reinterpret_cast<Element*>(call.out) + c, divide(sum, broadcast(&count)), left);
}

template <typename Type>
void mean_pixel(const PixelMap& call) {
  int64_t c = 0;
  for (; c + 4 * kVectorLength <= call.channels; c += 4 * kVectorLength) {
    mean_of_vectors<Type, 4>(call, c);
  }
  for (; c + kVectorLength <= call.channels; c += kVectorLength) mean_of_vectors<Type, 1>(call, c);
  if (c < call.channels) mean_of_rest<Type>(call, c, call.channels - c);
}

}  // namespace
}  // namespace disco
