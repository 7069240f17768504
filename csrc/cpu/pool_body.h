// The largest of several pixels, channel by channel. One source for every ISA; included after
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

}  // namespace
}  // namespace disco
