// What the portable driver and the per-ISA micro-kernels of grouped convolutions agree on. Plain C
// types only, for the reasons that conv_microkernel.h gives.
#pragma once

#include <cstdint>

#include "conv_microkernel.h"

namespace disco {

// How the lanes of a vector of outputs get their inputs.
enum LaneInput : int32_t {
  kInputWhole = 0,   // lane l reads channel first_in + l, all lanes in use
  kInputPart = 1,    // the same, but only num_out lanes are in use
  kInputSpread = 2,  // lanes of several groups: of the num_in channels from first_in, as listed
  kInputOne = 3,     // lanes of one group: all read channel first_in
  kNumLaneInputs = 4
};

struct LaneVector {
  int64_t first_out, num_out;  // output channels; num_out is at most the vector length
  int64_t first_in, num_in;    // input channels
};

// Windows whose input is loaded once for all taps in a row; any other takes kWindowAny.
enum LaneWindow : int32_t {
  kWindowAny = 0,
  kWindow3 = 1,         // 3 taps in a row, stride 1, dilation 1
  kWindow3Stride2 = 2,  // stride 2
  kWindow5 = 3,
  kWindow5Stride2 = 4,
  kWindow7 = 5,
  kNumLaneWindows = 6
};

// One row of taps over one input of each group.
struct LanePass {
  const char* const* columns;  // input pixels of a row, from the first that the tile reads
  int64_t offset;              // of the input in channels, added to first_in
  int64_t first_row;           // of the panels
  int64_t lane_list;           // which list of lanes, for kInputSpread
};

// A register tile for each of several vectors: mr pixels of an output row x a vector of channels.
struct LaneTile {
  const LanePass* passes;
  int64_t num_passes;
  int64_t kernel_w, stride_w, dilation_w;  // read for kWindowAny
  int64_t first_in;                        // the channel that the pixel pointers point at
  const LaneVector* vectors;
  const int32_t* lanes;  // [num_vectors][lane_lists][vector length], read for kInputSpread
  int64_t lane_lists;
  int64_t num_vectors;
  const float* panels;  // [num_vectors][rows][vector length], a row for each tap of each input
  int64_t panel_floats;
  const float* bias;     // of output channel 0, or nullptr
  char* out;             // output channel 0 of the first pixel
  int64_t out_step;      // elements from one pixel to the next
  const char* residual;  // likewise, or nullptr
  int64_t residual_step;
  Activation activation;
};

using LaneKernel = void (*)(const LaneTile&);

struct LaneKernels {
  int32_t max_pixels;  // of a tile
  // [kNumLaneInputs][kNumLaneWindows][max_pixels], by data type.
  const LaneKernel* kernels[2];
};

#if defined(DISCO_HAVE_AVX512) || defined(DISCO_HAVE_AVX512BF16)
// In a file of their own: both AVX-512 instruction sets use them.
const LaneKernels& avx512_lane_kernels();
#endif

}  // namespace disco
