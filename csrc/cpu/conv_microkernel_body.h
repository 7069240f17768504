// One micro-kernel source for every ISA. An ISA file defines the vector type and its primitives in
// an anonymous namespace (internal linkage: the linker must never merge code of two instruction
// sets), then includes this file.
//
//   Vector (float32 lanes), kVectorLength, kMaxVectors, kMaxPixels
//   zero(), splat(float), broadcast(const float*), load(const float*), load_n(const float*, n),
//   store(float*, v), store_n(float*, v, n), add(a, b), subtract(a, b), maximum(a, b),
//   multiply_add(a, b, c) = a * b + c
//
//   Pairs (a bfloat16 pair in every lane), broadcast_pair(const uint16_t*), load_pairs(const
//   void*), multiply_add_pairs(a, b, c) = c + a.low * b.low + a.high * b.high, load_bf16(const
//   uint16_t*), load_bf16_n(..., n), store_bf16(uint16_t*, v), store_bf16_n(..., n)
//
//   and those that activation_body.h lists
//
// The tile is kMaxPixels x (kMaxVectors * kVectorLength): output channels lie in vector lanes,
// input values are broadcast. The gather is the offset list of the K loop, so it costs one scalar
// load a k.

#include <cstddef>
#include <utility>

#include "activation_body.h"
#include "conv_microkernel.h"

namespace disco {
namespace {

// How a data type is read, multiplied and written. A row of weights is 4 bytes a lane in all.
struct Float32 {
  using Element = float;
  using Operand = Vector;
  // Whether sums that are accumulated begin with what the output holds: the same order of summation
  // as without a break, so the same bits. Otherwise it is added to the sums.
  static constexpr bool kContinuesSums = true;
  static Vector first(Vector bias) { return bias; }
  static Vector total(Vector sum, const Tile&, int) { return sum; }
  static Operand spread(const char* x) { return broadcast(reinterpret_cast<const float*>(x)); }
  static Operand weights(const char* w) { return load(reinterpret_cast<const float*>(w)); }
  static Vector accumulate(Operand x, Operand w, Vector sum) { return multiply_add(x, w, sum); }
  static Vector read(const float* x) { return load(x); }
  static Vector read_n(const float* x, int64_t n) { return load_n(x, n); }
  static void write(float* x, Vector v) { store(x, v); }
  static void write_n(float* x, Vector v, int64_t n) { store_n(x, v, n); }
};

struct BFloat16 {
  using Element = uint16_t;
  using Operand = Pairs;
  static constexpr bool kContinuesSums = false;
  static Vector first(Vector bias) { return bias; }
  static Vector total(Vector sum, const Tile&, int) { return sum; }
  static Operand spread(const char* x) {
    return broadcast_pair(reinterpret_cast<const uint16_t*>(x));
  }
  static Operand weights(const char* w) { return load_pairs(w); }
  static Vector accumulate(Operand x, Operand w, Vector sum) {
    return multiply_add_pairs(x, w, sum);
  }
  static Vector read(const uint16_t* x) { return load_bf16(x); }
  static Vector read_n(const uint16_t* x, int64_t n) { return load_bf16_n(x, n); }
  static void write(uint16_t* x, Vector v) { store_bf16(x, v); }
  static void write_n(uint16_t* x, Vector v, int64_t n) { store_bf16_n(x, v, n); }
};

// Bfloat16 operands, and float32 rows.
struct BFloat16Sums : Float32 {
  using Operand = Pairs;
  static Operand spread(const char* x) { return BFloat16::spread(x); }
  static Operand weights(const char* w) { return BFloat16::weights(w); }
  static Vector accumulate(Operand x, Operand w, Vector sum) {
    return BFloat16::accumulate(x, w, sum);
  }
};

// acc[p][v] = rows[p] or, with kAdds, += rows[p]; never reading past `num_channels` of a row.
template <typename Type, bool kAdds, int MR, int NV, typename Row>
inline void take_rows(Vector (&acc)[MR][NV], Row* const* rows, int64_t first_channel,
                      int64_t num_channels) {
  using Element = typename Type::Element;
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) {
    const int64_t left = num_channels - v * kVectorLength;
    const int64_t first = first_channel + v * kVectorLength;
    if (left >= kVectorLength) {
#pragma GCC unroll 16
      for (int p = 0; p < MR; ++p) {
        const Vector row = Type::read(reinterpret_cast<const Element*>(rows[p]) + first);
        acc[p][v] = kAdds ? add(acc[p][v], row) : row;
      }
    } else if (left > 0) {
#pragma GCC unroll 16
      for (int p = 0; p < MR; ++p) {
        const Vector row = Type::read_n(reinterpret_cast<const Element*>(rows[p]) + first, left);
        acc[p][v] = kAdds ? add(acc[p][v], row) : row;
      }
    }
  }
}

template <Activation kActivation, int MR, int NV>
inline void activate_tile(Vector (&acc)[MR][NV]) {
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) {
#pragma GCC unroll 16
    for (int p = 0; p < MR; ++p) acc[p][v] = activate(acc[p][v], kActivation);
  }
}

// A tile has more pointers than there are registers. What is used once a step is read where it is:
// the compiler's copies of it on the stack would be writes, and those wait in a queue behind the
// last tile's sums.
constexpr int kPointersInRegisters = 7;

template <typename T>
inline T reread(const T& value) {
  return *const_cast<const volatile T*>(&value);
}

// Rows of the panel in a turn of the loop. A small tile has so few products a row that the turn's
// own instructions are two thirds of it, as many as a Zen 3 decodes meanwhile: two rows share them
// (1 x 1 and 3 x 3 layers of ResNet-50 with AVX2, hot: 72 to 87 GFLOP/s of 104 before, 82 to 102
// with it).
constexpr int kStepsAtOnce = kMaxPixels * kMaxVectors < 16 ? 2 : 1;

// What a tile reads or writes of one row.
template <int kBytes>
inline void fetch_row(const char* row) {
  constexpr int kLineBytes = 64;
#pragma GCC unroll 16
  for (int byte = 0; byte < kBytes; byte += kLineBytes) __builtin_prefetch(row + byte);
}

// acc[p][v] += one row of weights times what lies at the offset from each pixel.
template <typename Type, int MR, int NV>
__attribute__((always_inline)) inline void add_products(Vector (&acc)[MR][NV],
                                                        const char* const* pixels, ptrdiff_t offset,
                                                        const char* weights) {
  typename Type::Operand w[NV];
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) w[v] = Type::weights(weights + v * kVectorLength * 4);
#pragma GCC unroll 16
  for (int p = 0; p < MR; ++p) {
    const char* pixel = p < kPointersInRegisters ? pixels[p] : reread(pixels[p]);
    const typename Type::Operand x = Type::spread(pixel + offset);
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) acc[p][v] = Type::accumulate(x, w[v], acc[p][v]);
  }
}

template <typename Type, int MR, int NV>
__attribute__((always_inline)) inline void convolve_tile(const Tile& tile) {
  constexpr int kWidth = NV * kVectorLength;
  constexpr int kRowBytes = kWidth * 4;
  using Element = typename Type::Element;
  Vector acc[MR][NV];

#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) {
    const Vector first = Type::first(load(tile.bias + v * kVectorLength));
#pragma GCC unroll 16
    for (int p = 0; p < MR; ++p) acc[p][v] = first;
  }
  if (Type::kContinuesSums && tile.accumulate) {
    take_rows<Type, false, MR, NV>(acc, tile.out, tile.first_channel, tile.num_channels);
  }

  // The rows that the epilogue adds and writes are fetched while the sum is computed: the loop is
  // longer than the reorder buffer, so their loads would start only after it. One a step: all at
  // once they keep the loop's own loads waiting (a tile of 14 x 32 on a Zen 4 loses 130 cycles).
  constexpr int kElement = sizeof(Element);
  const int64_t first_byte = tile.first_channel * kElement;
  const char* const* touched = tile.touched;
  const char* prefetch = tile.prefetch;
  for (int64_t i = 0; i < tile.num_passes; ++i) {
    const Pass& pass = tile.passes[i];
    const char* const* pixels = pass.pixels;
    const int32_t* offsets = pass.offsets;
    const char* weights = tile.panel + pass.first_row * kRowBytes;
    if (kStepsAtOnce == 2 && (pass.end - offsets) % 2 != 0) {
      __builtin_prefetch(prefetch, 0, 2);
      prefetch += tile.prefetch_step;
      add_products<Type, MR, NV>(acc, pixels, *offsets++, weights);
      weights += kRowBytes;
      if (offsets == pass.end) continue;
    }
    do {
      const ptrdiff_t prefetch_step = reread(tile.prefetch_step);
#pragma GCC unroll 2
      for (int k = 0; k < kStepsAtOnce; ++k) {
        __builtin_prefetch(prefetch, 0, 2);
        prefetch += prefetch_step;
      }
      fetch_row<kWidth * kElement>(*touched + first_byte);
      touched += touched != reread(tile.last_touched);
#pragma GCC unroll 2
      for (int k = 0; k < kStepsAtOnce; ++k) {
        add_products<Type, MR, NV>(acc, pixels, *offsets++, weights);
        weights += kRowBytes;
      }
    } while (offsets != reread(pass.end));
  }

#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) {
#pragma GCC unroll 16
    for (int p = 0; p < MR; ++p) acc[p][v] = Type::total(acc[p][v], tile, v);
  }

  if (!Type::kContinuesSums && tile.accumulate) {
    take_rows<Type, true, MR, NV>(acc, tile.out, tile.first_channel, tile.num_channels);
  }
  if (tile.residual != nullptr) {
    take_rows<Type, true, MR, NV>(acc, tile.residual, tile.first_channel, tile.num_channels);
  }
  if (tile.activation > kActivationRelu6) {
    // These need more registers than a tile leaves, and code that should not be there once a size.
    alignas(64) float sums[MR * kWidth];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
#pragma GCC unroll 16
      for (int p = 0; p < MR; ++p) store(sums + p * kWidth + v * kVectorLength, acc[p][v]);
    }
    activate_in_place(sums, MR * kWidth, tile.activation);
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
#pragma GCC unroll 16
      for (int p = 0; p < MR; ++p) acc[p][v] = load(sums + p * kWidth + v * kVectorLength);
    }
  } else if (tile.activation != kActivationNone) {
    activate_tile<kActivationRelu>(acc);
  }
  if (tile.activation == kActivationRelu6) activate_tile<kActivationRelu6>(acc);
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) {
    const int64_t left = tile.num_channels - v * kVectorLength;
    const int64_t first = tile.first_channel + v * kVectorLength;
    if (left >= kVectorLength) {
#pragma GCC unroll 16
      for (int p = 0; p < MR; ++p) {
        Type::write(reinterpret_cast<Element*>(tile.out[p]) + first, acc[p][v]);
      }
    } else if (left > 0) {
#pragma GCC unroll 16
      for (int p = 0; p < MR; ++p) {
        Type::write_n(reinterpret_cast<Element*>(tile.out[p]) + first, acc[p][v], left);
      }
    }
  }
}

template <typename Type, int MR, int NV>
void convolve_tiles(const Tile* tiles, int64_t num_tiles) {
  for (int64_t i = 0; i < num_tiles; ++i) convolve_tile<Type, MR, NV>(tiles[i]);
}

template <typename Type, int... I>
struct KernelTable {
  static constexpr MicroKernel value[] = {
      &convolve_tiles<Type, I / kMaxVectors + 1, I % kMaxVectors + 1>...};
};

template <typename Type, int... I>
constexpr const MicroKernel* tiles_of(std::integer_sequence<int, I...>) {
  return KernelTable<Type, I...>::value;
}

template <typename Type>
constexpr const MicroKernel* kernel_table() {
  return tiles_of<Type>(std::make_integer_sequence<int, kMaxPixels * kMaxVectors>{});
}

}  // namespace
}  // namespace disco
