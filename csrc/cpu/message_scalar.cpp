// Packing and unpacking of messages in portable C++.

#include <cstring>

#include "message_kernels.h"
#include "wire_scalar.h"

namespace disco {
namespace {

void gather(const ChannelListView& list, const float* x, int64_t stride, int64_t pixels, float* out,
            int64_t out_stride) {
  if (list.runs != nullptr) {
    for (int64_t i = 0; i < pixels; ++i, x += stride, out += out_stride) {
      float* to = out;
      for (int64_t r = 0; r < list.num_runs; ++r) {
        const int64_t count = list.runs[r].count;
        std::memcpy(to, x + list.runs[r].first, sizeof(float) * static_cast<size_t>(count));
        to += count;
      }
    }
    return;
  }
  const int32_t* channels = list.channels;
  const int64_t count = list.num_channels;
  for (int64_t i = 0; i < pixels; ++i, x += stride, out += out_stride) {
    for (int64_t c = 0; c < count; ++c) out[c] = x[channels[c]];
  }
}

void gather_ahead(const ChannelListView& list, const float* later, const int32_t* offsets,
                  int64_t num_offsets, const float* x, int64_t stride, int64_t pixels, float* out) {
  int64_t next = 0;
  for (int64_t i = 0; i < pixels; ++i, x += stride, out += list.num_channels) {
    const int64_t end = num_offsets * (i + 1) / pixels;
    for (; next < end; ++next) __builtin_prefetch(later + offsets[next]);
    gather(list, x, stride, 1, out, list.num_channels);
  }
}

void stream(const void* from, int64_t lines, void* to) {
  std::memcpy(to, from, 64 * static_cast<size_t>(lines));
}

void finish_streams() {}

void narrow_float16(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = float16_of(from[i]);
}

void narrow_bfloat16(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = bfloat16_of(from[i]);
}

void widen_float16(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = float_of_float16(from[i]);
}

void widen_bfloat16(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = float_of_bfloat16(from[i]);
}

void max_magnitude(const float* from, int64_t rows, int64_t columns, int32_t* magnitudes) {
  for (int64_t r = 0; r < rows; ++r, from += columns) {
    for (int64_t c = 0; c < columns; ++c) {
      const int32_t magnitude = magnitude_of(from[c]);
      magnitudes[c] = magnitude > magnitudes[c] ? magnitude : magnitudes[c];
    }
  }
}

void quantise(const float* from, int64_t rows, int64_t columns, const float* inverse, int8_t* to) {
  for (int64_t r = 0; r < rows; ++r, from += columns, to += columns) {
    for (int64_t c = 0; c < columns; ++c) to[c] = quantised(from[c], inverse[c]);
  }
}

void dequantise(const int8_t* from, int64_t rows, int64_t columns, const float* scale, float* to) {
  for (int64_t r = 0; r < rows; ++r, from += columns, to += columns) {
    for (int64_t c = 0; c < columns; ++c) to[c] = static_cast<float>(from[c]) * scale[c];
  }
}

}  // namespace

const MessageKernels& scalar_message_kernels() {
  static constexpr MessageKernels table = {"scalar",       1,
                                           gather,         gather_ahead,
                                           stream,         finish_streams,
                                           narrow_float16, narrow_bfloat16,
                                           widen_float16,  widen_bfloat16,
                                           max_magnitude,  quantise,
                                           dequantise};
  return table;
}

}  // namespace disco
