// One micro-kernel source of depthwise and narrowly grouped convolutions for every ISA; included
// like conv_microkernel_body.h. It needs what activation_body.h lists, and
//
//   splat(float), load_n(const float*, n), store_n(float*, v, n), load_bf16(const uint16_t*),
//   load_bf16_n(..., n), store_bf16(uint16_t*, v), store_bf16_n(..., n), n up to kVectorLength
//   Lanes, load_lanes(const int32_t*), permute(v, lanes): lane l is v[lanes[l]]
//   kLanePixels: of a tile; kLaneWindows: of LaneWindow, so many first ones get kernels
//   kFreeMasks: whether load_n and store_n cost no more than load and store
//
// Channels lie in vector lanes, on both sides: an input vector is multiplied lane by lane. The
// accumulators are neighbours in a row. With the taps of a row in registers an input vector is
// loaded once for all of them, so that the multiply-add units set the pace: 16 loads for 14 x 3
// multiply-adds of a 3x3 window, a third of what loading for each tap would take.

#include <utility>

#include "activation_body.h"
#include "depthwise_microkernel.h"

namespace disco {
namespace {

// How activations are read and written. Weights and bias are float32 for both.
struct LaneFloat32 {
  using Element = float;
  static Vector read(const float* x) { return load(x); }
  static Vector read_n(const float* x, int64_t n) { return load_n(x, n); }
  static Vector read_one(const float* x) { return splat(*x); }
  static void write(float* x, Vector v) { store(x, v); }
  static void write_n(float* x, Vector v, int64_t n) { store_n(x, v, n); }
};

struct LaneBFloat16 {
  using Element = uint16_t;
  static Vector read(const uint16_t* x) { return load_bf16(x); }
  static Vector read_n(const uint16_t* x, int64_t n) { return load_bf16_n(x, n); }
  static Vector read_one(const uint16_t* x) {
    const uint32_t bits = static_cast<uint32_t>(*x) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return splat(value);
  }
  static void write(uint16_t* x, Vector v) { store_bf16(x, v); }
  static void write_n(uint16_t* x, Vector v, int64_t n) { store_bf16_n(x, v, n); }
};

// What does not change from one row of taps to the next.
struct LaneSource {
  LaneVector vector;
  Lanes lanes;
};

template <typename Type, LaneInput kInput>
inline Vector read_lanes(const char* pixel, int64_t first, const LaneSource& source) {
  const auto* x = reinterpret_cast<const typename Type::Element*>(pixel) + first;
  if constexpr (kInput == kInputWhole) return Type::read(x);
  if constexpr (kInput == kInputPart) return Type::read_n(x, source.vector.num_out);
  if constexpr (kInput == kInputSpread) {
    return permute(Type::read_n(x, source.vector.num_in), source.lanes);
  }
  if constexpr (kInput == kInputOne) return Type::read_one(x);
}

// A row of kTaps taps over one input.
template <typename Type, LaneInput kInput, int kTaps, int kStride, int MR>
inline void add_row(Vector (&acc)[MR], const char* const* columns, int64_t first,
                    const float* weights, const LaneSource& source) {
  Vector w[kTaps];
#pragma GCC unroll 16
  for (int s = 0; s < kTaps; ++s) w[s] = load(weights + s * kVectorLength);
#pragma GCC unroll 64
  for (int j = 0; j < (MR - 1) * kStride + kTaps; ++j) {
    const Vector x = read_lanes<Type, kInput>(columns[j], first, source);
#pragma GCC unroll 16
    for (int s = 0; s < kTaps; ++s) {
      const int p = (j - s) / kStride;
      if (j >= s && (j - s) % kStride == 0 && p < MR) acc[p] = multiply_add(x, w[s], acc[p]);
    }
  }
}

// The same for any number of taps, stride and dilation.
template <typename Type, LaneInput kInput, int MR>
inline void add_any_row(Vector (&acc)[MR], const char* const* columns, int64_t first,
                        const float* weights, const LaneSource& source, const LaneTile& tile) {
  const int64_t step = tile.stride_w;
  for (int64_t s = 0; s < tile.kernel_w; ++s, columns += tile.dilation_w) {
    const Vector w = load(weights + s * kVectorLength);
    const char* const* column = columns;
#pragma GCC unroll 16
    for (int p = 0; p < MR; ++p, column += step) {
      acc[p] = multiply_add(read_lanes<Type, kInput>(*column, first, source), w, acc[p]);
    }
  }
}

template <int MR>
inline void activate_lanes(Vector (&acc)[MR], Activation activation) {
  if (activation > kActivationRelu6) {
    // As in convolve_tile: these want registers and code of their own.
    alignas(64) float sums[MR * kVectorLength];
#pragma GCC unroll 16
    for (int p = 0; p < MR; ++p) store(sums + p * kVectorLength, acc[p]);
    activate_in_place(sums, MR * kVectorLength, activation);
#pragma GCC unroll 16
    for (int p = 0; p < MR; ++p) acc[p] = load(sums + p * kVectorLength);
  } else if (activation != kActivationNone) {
#pragma GCC unroll 16
    for (int p = 0; p < MR; ++p) acc[p] = activate(acc[p], kActivationRelu);
  }
  if (activation == kActivationRelu6) {
#pragma GCC unroll 16
    for (int p = 0; p < MR; ++p) acc[p] = activate(acc[p], kActivationRelu6);
  }
}

template <typename Type, LaneInput kInput, int kTaps, int kStride, int MR>
void convolve_lanes(const LaneTile& tile) {
  using Element = typename Type::Element;
  constexpr bool kWhole = kInput == kInputWhole;
  const float* panel = tile.panels;
  for (int64_t v = 0; v < tile.num_vectors; ++v, panel += tile.panel_floats) {
    LaneSource source = {tile.vectors[v], {}};
    const int64_t first_out = source.vector.first_out, num_out = source.vector.num_out;
    Vector acc[MR];
    acc[0] = zero();
    if (tile.bias != nullptr) {
      const float* bias = tile.bias + first_out;
      acc[0] = kWhole ? load(bias) : load_n(bias, num_out);
    }
#pragma GCC unroll 16
    for (int p = 1; p < MR; ++p) acc[p] = acc[0];

    for (int64_t i = 0; i < tile.num_passes; ++i) {
      const LanePass& pass = tile.passes[i];
      const int64_t first = source.vector.first_in - tile.first_in + pass.offset;
      const float* weights = panel + pass.first_row * kVectorLength;
      if constexpr (kInput == kInputSpread) {
        const int64_t list = v * tile.lane_lists + pass.lane_list;
        source.lanes = load_lanes(tile.lanes + list * kVectorLength);
      }
      if constexpr (kTaps > 0) {
        add_row<Type, kInput, kTaps, kStride, MR>(acc, pass.columns, first, weights, source);
      } else {
        add_any_row<Type, kInput, MR>(acc, pass.columns, first, weights, source, tile);
      }
    }

    if (tile.residual != nullptr) {
      const Element* added = reinterpret_cast<const Element*>(tile.residual) + first_out;
#pragma GCC unroll 16
      for (int p = 0; p < MR; ++p, added += tile.residual_step) {
        acc[p] = add(acc[p], kWhole ? Type::read(added) : Type::read_n(added, num_out));
      }
    }
    activate_lanes<MR>(acc, tile.activation);
    Element* out = reinterpret_cast<Element*>(tile.out) + first_out;
#pragma GCC unroll 16
    for (int p = 0; p < MR; ++p, out += tile.out_step) {
      if constexpr (kWhole) {
        Type::write(out, acc[p]);
      } else {
        Type::write_n(out, acc[p], num_out);
      }
    }
  }
}

template <typename Type, LaneInput kInput, LaneWindow kWindow, int MR>
constexpr LaneKernel lane_kernel() {
  // Groups of several channels are 3x3 in the networks there are; and where a part of a bfloat16
  // vector takes several instructions, a window of its own gains little for its code (AVX2: a
  // quarter of the time for groups of 4 channels, nothing for wider ones, for 40% more of it).
  constexpr bool kGroups = kInput == kInputSpread || kInput == kInputOne;
  constexpr bool kByElements = !kFreeMasks && sizeof(typename Type::Element) == 2 &&
                               (kInput == kInputPart || kInput == kInputSpread);
  if constexpr (kInput == kInputWhole && kFreeMasks) {
    return lane_kernel<Type, kInputPart, kWindow, MR>();
  } else if constexpr (kWindow == kWindowAny || kWindow >= kLaneWindows || kByElements) {
    return &convolve_lanes<Type, kInput, 0, 0, MR>;
  } else if constexpr (kWindow == kWindow3) {
    return &convolve_lanes<Type, kInput, 3, 1, MR>;
  } else if constexpr (kWindow == kWindow3Stride2) {
    return &convolve_lanes<Type, kInput, 3, 2, MR>;
  } else if constexpr (kGroups) {
    return &convolve_lanes<Type, kInput, 0, 0, MR>;
  } else {
    constexpr int kTaps = kWindow == kWindow7 ? 7 : 5;
    return &convolve_lanes < Type, kInput, kTaps, kWindow == kWindow5Stride2 ? 2 : 1, MR > ;
  }
}

template <typename Type, int... I>
struct LaneKernelTable {
  static constexpr LaneKernel value[] = {
      lane_kernel<Type, static_cast<LaneInput>(I / (kNumLaneWindows * kLanePixels)),
                  static_cast<LaneWindow>(I / kLanePixels % kNumLaneWindows),
                  I % kLanePixels + 1>()...};
};

template <typename Type, int... I>
constexpr const LaneKernel* lane_kernel_table(std::integer_sequence<int, I...>) {
  return LaneKernelTable<Type, I...>::value;
}

constexpr std::make_integer_sequence<int, kNumLaneInputs * kNumLaneWindows * kLanePixels>
    kLaneTiles{};

const LaneKernels& lane_kernels() {
  static constexpr LaneKernels table = {
      kLanePixels,
      {lane_kernel_table<LaneFloat32>(kLaneTiles), lane_kernel_table<LaneBFloat16>(kLaneTiles)}};
  return table;
}

}  // namespace
}  // namespace disco
