// What the portable packing and unpacking of messages and their per-ISA loops agree on. Plain C
// types only: see conv_microkernel.h.
//
// A message holds selected channels of an activation, [pixel][channel], in a wire type. What the
// conversions mean (all instruction sets give the same bits):
//   float16, bfloat16  rounded to nearest, ties to even. Beyond the range: infinity. NaN stays NaN.
//   int8               nearest whole number (ties to even) of value * inverse; NaN becomes 0.
#pragma once

#include <cstdint>

namespace disco {

enum class WireType : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2, kInt8 = 3 };

// One load from a pixel: the lanes of the output vector that it fills, as bits.
struct Window {
  int32_t first;  // channel at which the load starts
  uint32_t lanes;
};

struct ChannelRun {
  int32_t first;
  int32_t count;
};

// A list of channels, made ready for a vector length (make_channel_list). An output vector is put
// together from windows; every lane in use belongs to exactly one of them.
struct ChannelListView {
  const int32_t* channels;
  int64_t num_channels;
  const int32_t* num_windows;  // [vectors]
  const Window* windows;       // of the first vector, then of the second, ...
  int64_t total_windows;
  const int32_t* lanes;    // [vectors][vector length]: channel less its window's first
  int32_t load_length;     // floats of a load: the vector length, or less if x is narrower
  const ChannelRun* runs;  // the same list as runs, if these are long; else nullptr
  int64_t num_runs;
};

struct MessageKernels {
  const char* name;
  int32_t vector_length;  // float32 lanes; 1 if `gather` uses no windows

  // Channels of `pixels` pixels, `stride` floats apart, to rows of `out`, `out_stride` floats
  // apart.
  void (*gather)(const ChannelListView& list, const float* x, int64_t stride, int64_t pixels,
                 float* out, int64_t out_stride);
  // To out [pixels][num_channels], while the lines at these offsets (in floats) from `later` are
  // fetched.
  void (*gather_ahead)(const ChannelListView& list, const float* later, const int32_t* offsets,
                       int64_t num_offsets, const float* x, int64_t stride, int64_t pixels,
                       float* out);
  // Copies lines of 64 bytes to an address that is a multiple of 64, past the caches where the
  // instruction set can. What was copied is for others to see after finish_streams().
  void (*stream)(const void* from, int64_t lines, void* to);
  void (*finish_streams)();

  void (*narrow_float16)(const float* from, int64_t count, uint16_t* to);
  void (*narrow_bfloat16)(const float* from, int64_t count, uint16_t* to);
  void (*widen_float16)(const uint16_t* from, int64_t count, float* to);
  void (*widen_bfloat16)(const uint16_t* from, int64_t count, float* to);

  // Rows of `columns` values. magnitudes [columns]: the bits of the largest absolute values so far;
  // as whole numbers they order floats, with NaN above infinity.
  void (*max_magnitude)(const float* from, int64_t rows, int64_t columns, int32_t* magnitudes);
  void (*quantise)(const float* from, int64_t rows, int64_t columns, const float* inverse,
                   int8_t* to);
  void (*dequantise)(const int8_t* from, int64_t rows, int64_t columns, const float* scale,
                     float* to);
};

const MessageKernels& scalar_message_kernels();
const MessageKernels& avx2_message_kernels();
const MessageKernels& avx512_message_kernels();

// Those of the instruction set in use (conv2d.h); scalar where it has none of its own.
const MessageKernels& active_message_kernels();

}  // namespace disco
