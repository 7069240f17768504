// One micro-kernel source for every ISA. An ISA file defines the vector type and its primitives in
// an anonymous namespace (internal linkage: the linker must never merge code of two instruction
// sets), then includes this file.
//
//   Vector, kVectorLength, kMaxVectors, kMaxPixels
//   zero(), broadcast(const float*), load(const float*), load_n(const float*, n), store(float*, v),
//   store_n(float*, v, n), add(a, b), maximum(a, b), multiply_add(a, b, c) = a * b + c
//   and those that activation_body.h lists
//
// The tile is kMaxPixels x (kMaxVectors * kVectorLength): output channels lie in vector lanes,
// input values are broadcast. The gather is the offset list of the K loop, so it costs one scalar
// load a k.

#include <cstddef>
#include <type_traits>
#include <utility>

#include "activation_body.h"
#include "conv_microkernel.h"

namespace disco {
namespace {

// acc[p][v] += rows[p], never reading past `num_channels` of a row.
template <int MR, int NV, typename Row>
inline void add_rows(Vector (&acc)[MR][NV], Row* const* rows, int64_t first_channel,
                     int64_t num_channels) {
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) {
    const int64_t left = num_channels - v * kVectorLength;
    const int64_t first = first_channel + v * kVectorLength;
    if (left >= kVectorLength) {
#pragma GCC unroll 16
      for (int p = 0; p < MR; ++p) acc[p][v] = add(acc[p][v], load(rows[p] + first));
    } else if (left > 0) {
#pragma GCC unroll 16
      for (int p = 0; p < MR; ++p) {
        acc[p][v] = add(acc[p][v], load_n(rows[p] + first, left));
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

template <int MR, int kWidth, typename Row>
inline void fetch_rows(Row* const* rows, int64_t first_channel) {
  constexpr int kLineFloats = 16;
#pragma GCC unroll 16
  for (int p = 0; p < MR; ++p) {
#pragma GCC unroll 16
    for (int c = 0; c < kWidth; c += kLineFloats) {
      __builtin_prefetch(rows[p] + first_channel + c, !std::is_const<Row>::value);
    }
  }
}

template <int MR, int NV>
void convolve_tile(const Tile& tile) {
  constexpr int kWidth = NV * kVectorLength;
  Vector acc[MR][NV];

#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) {
    const Vector b = load(tile.bias + v * kVectorLength);
#pragma GCC unroll 16
    for (int p = 0; p < MR; ++p) acc[p][v] = b;
  }

  // The rows that the epilogue adds and writes are fetched while the sum is computed: the loop is
  // longer than the reorder buffer, so their loads would start only after it.
  if (tile.residual != nullptr) fetch_rows<MR, kWidth>(tile.residual, tile.first_channel);
  fetch_rows<MR, kWidth>(tile.out, tile.first_channel);

  const char* prefetch = tile.prefetch;
  const int64_t prefetch_step = tile.prefetch_step;
  for (int64_t i = 0; i < tile.num_passes; ++i) {
    const Pass& pass = tile.passes[i];
    const float* const* pixels = pass.pixels;
    const int32_t* offsets = pass.offsets;
    const int32_t* const end = offsets + pass.k;
    const float* weights = tile.panel + pass.first_row * kWidth;
    do {
      const ptrdiff_t offset = *offsets++;
      Vector w[NV];
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) w[v] = load(weights + v * kVectorLength);
      weights += kWidth;
      __builtin_prefetch(prefetch, 0, 2);
      prefetch += prefetch_step;
#pragma GCC unroll 16
      for (int p = 0; p < MR; ++p) {
        const Vector x = broadcast(pixels[p] + offset);
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) acc[p][v] = multiply_add(x, w[v], acc[p][v]);
      }
    } while (offsets != end);
  }

  if (tile.accumulate) add_rows<MR, NV>(acc, tile.out, tile.first_channel, tile.num_channels);
  if (tile.residual != nullptr) {
    add_rows<MR, NV>(acc, tile.residual, tile.first_channel, tile.num_channels);
  }
  if (tile.activation > kActivationRelu6) {
    // These need more registers than a tile leaves, and code that should not be there once a size.
    alignas(64) float sums[MR * kWidth];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
#pragma GCC unroll 16
      for (int p = 0; p < MR; ++p) store(sums + p * kWidth + v * kVectorLength, acc[p][v]);
    }
    activate_rows(sums, kWidth, MR, tile.out, tile.first_channel, tile.num_channels,
                  tile.activation);
    return;
  }
  if (tile.activation != kActivationNone) activate_tile<kActivationRelu>(acc);
  if (tile.activation == kActivationRelu6) activate_tile<kActivationRelu6>(acc);
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) {
    const int64_t left = tile.num_channels - v * kVectorLength;
    const int64_t first = tile.first_channel + v * kVectorLength;
    if (left >= kVectorLength) {
#pragma GCC unroll 16
      for (int p = 0; p < MR; ++p) store(tile.out[p] + first, acc[p][v]);
    } else if (left > 0) {
#pragma GCC unroll 16
      for (int p = 0; p < MR; ++p) store_n(tile.out[p] + first, acc[p][v], left);
    }
  }
}

template <int... I>
struct KernelTable {
  static constexpr MicroKernel value[] = {
      &convolve_tile<I / kMaxVectors + 1, I % kMaxVectors + 1>...};
};

template <int... I>
constexpr const MicroKernel* kernel_table(std::integer_sequence<int, I...>) {
  return KernelTable<I...>::value;
}

constexpr const MicroKernel* kKernels =
    kernel_table(std::make_integer_sequence<int, kMaxPixels * kMaxVectors>{});

}  // namespace
}  // namespace disco
