// Tiles of 8-bit integers, to be included after conv_microkernel_body.h by the ISA files that
// define
//
//   Quads (four 8-bit integers in every lane), broadcast_quad(const char*), load_quads(const
//   void*), multiply_add_quads(a, b, c) = c + the sum of the four products of a lane, a unsigned
//   and b signed, exactly; integers_to_float(Vector), no_sum(). Sums are the bits of an int32 in
//   every lane of a Vector.
#pragma once

namespace disco {
namespace {

// Unsigned inputs, signed weights, exact sums; rows of the output as in `Row`.
template <typename Row>
struct QuadsTo : Row {
  using Operand = Quads;
  static constexpr bool kContinuesSums = false;
  static Vector first(Vector) { return no_sum(); }
  static Operand spread(const char* x) { return broadcast_quad(x); }
  static Operand weights(const char* w) { return load_quads(w); }
  static Vector accumulate(Operand x, Operand w, Vector sum) {
    return multiply_add_quads(x, w, sum);
  }
  static Vector total(Vector sum, const Tile& tile, int v) {
    return multiply_add(integers_to_float(sum), load(reread(tile.scale) + v * kVectorLength),
                        load(reread(tile.bias) + v * kVectorLength));
  }
};

}  // namespace
}  // namespace disco
