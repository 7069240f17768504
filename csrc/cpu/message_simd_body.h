// The loops of message_kernels.h over vectors of kLanes floats; the including file defines the
// vectors' operations for its instruction set. No STL: see conv_microkernel_body.h.
//
// A remainder shorter than a vector is done as one more vector that overlaps the last: every
// operation here gives the same result when it is done twice. Rows shorter than a vector take the
// scalar way; callers join such rows (message_rows.h).

#include "message_kernels.h"
#include "wire_scalar.h"

namespace disco {
namespace message_simd {
namespace {

// Whether loads are whole vectors. A narrower activation must not be read beyond its channels.
template <bool kWhole>
Floats fetch(const float* x, int32_t length) {
  return kWhole ? load(x) : load_n(x, length);
}

// Lines that come later, fetched between the loads of these: all at once they would find the
// processor without room for so many, and then leave memory idle.
struct Ahead {
  const float* from;
  const int32_t* offset;
  const int32_t* end;
  int64_t step;  // for every window
};

template <bool kAhead>
void fetch_ahead(Ahead& ahead) {
  if (!kAhead) return;
  for (int64_t i = 0; i < ahead.step && ahead.offset < ahead.end; ++i) {
    __builtin_prefetch(ahead.from + *ahead.offset++);
  }
}

template <int kPixels, bool kWhole, bool kAhead>
void gather_pixels(const ChannelListView& list, const float* x, int64_t stride, Ahead& ahead,
                   float* out, int64_t out_stride) {
  const Window* window = list.windows;
  const int32_t* lanes = list.lanes;
  const int32_t* num_windows = list.num_windows;
  for (int64_t first = 0; first < list.num_channels; first += kLanes) {
    const Ints from = load_ints(lanes);
    lanes += kLanes;
    Floats picked[kPixels];
    // The first window may fill every lane: the others' are overwritten by their own windows.
#pragma GCC unroll 4
    for (int p = 0; p < kPixels; ++p) {
      const float* group = x + p * stride + window->first;
      picked[p] = permute(fetch<kWhole>(group, list.load_length), from);
    }
    fetch_ahead<kAhead>(ahead);
    const Window* const end = window + *num_windows++;
    for (++window; window < end; ++window) {
      const Mask mask = mask_of(window->lanes);
#pragma GCC unroll 4
      for (int p = 0; p < kPixels; ++p) {
        const float* group = x + p * stride + window->first;
        picked[p] = merge(picked[p], mask, permute(fetch<kWhole>(group, list.load_length), from));
      }
      fetch_ahead<kAhead>(ahead);
    }
    const int64_t valid = list.num_channels - first;
#pragma GCC unroll 4
    for (int p = 0; p < kPixels; ++p) {
      float* to = out + p * out_stride + first;
      if (valid >= kLanes) {
        store(to, picked[p]);
      } else {
        store_n(to, picked[p], valid);
      }
    }
  }
}

// Four pixels share what is read of the list, and keep more loads under way than one.
template <bool kWhole, bool kAhead>
void gather_rows(const ChannelListView& list, const float* x, int64_t stride, int64_t pixels,
                 Ahead ahead, float* out, int64_t out_stride) {
  int64_t i = 0;
  for (; i + 4 <= pixels; i += 4) {
    gather_pixels<4, kWhole, kAhead>(list, x + i * stride, stride, ahead, out + i * out_stride,
                                     out_stride);
  }
  for (; i < pixels; ++i) {
    gather_pixels<1, kWhole, kAhead>(list, x + i * stride, stride, ahead, out + i * out_stride,
                                     out_stride);
  }
}

void gather(const ChannelListView& list, const float* x, int64_t stride, int64_t pixels, float* out,
            int64_t out_stride) {
  if (list.load_length == kLanes) {
    gather_rows<true, false>(list, x, stride, pixels, {}, out, out_stride);
  } else {
    gather_rows<false, false>(list, x, stride, pixels, {}, out, out_stride);
  }
}

void gather_ahead(const ChannelListView& list, const float* later, const int32_t* offsets,
                  int64_t num_offsets, const float* x, int64_t stride, int64_t pixels, float* out) {
  const int64_t windows = list.total_windows * (pixels / 4 + pixels % 4);
  const int64_t step = windows > 0 ? (num_offsets + windows - 1) / windows : 0;
  const Ahead ahead = {later, offsets, offsets + num_offsets, step};
  if (list.load_length == kLanes) {
    gather_rows<true, true>(list, x, stride, pixels, ahead, out, list.num_channels);
  } else {
    gather_rows<false, true>(list, x, stride, pixels, ahead, out, list.num_channels);
  }
}

void stream(const void* from, int64_t lines, void* to) {
  const float* values = static_cast<const float*>(from);
  float* target = static_cast<float*>(to);
  for (int64_t i = 0; i < lines * 16; i += kLanes) {
    store_past_caches(target + i, load(values + i));
  }
}

void narrow_float16(const float* from, int64_t count, uint16_t* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_float16(to + i, load(from + i));
  if (i < count && count >= kLanes) {
    store_float16(to + count - kLanes, load(from + count - kLanes));
  } else {
    for (; i < count; ++i) to[i] = float16_of(from[i]);
  }
}

void narrow_bfloat16(const float* from, int64_t count, uint16_t* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_bfloat16(to + i, load(from + i));
  if (i < count && count >= kLanes) {
    store_bfloat16(to + count - kLanes, load(from + count - kLanes));
  } else {
    for (; i < count; ++i) to[i] = bfloat16_of(from[i]);
  }
}

void widen_float16(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load_float16(from + i));
  if (i < count && count >= kLanes) {
    store(to + count - kLanes, load_float16(from + count - kLanes));
  } else {
    for (; i < count; ++i) to[i] = float_of_float16(from[i]);
  }
}

void widen_bfloat16(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load_bfloat16(from + i));
  if (i < count && count >= kLanes) {
    store(to + count - kLanes, load_bfloat16(from + count - kLanes));
  } else {
    for (; i < count; ++i) to[i] = float_of_bfloat16(from[i]);
  }
}

template <int kVectors>
void max_magnitude_columns(const float* from, int64_t rows, int64_t columns, int32_t* magnitudes) {
  Ints largest[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) largest[v] = load_ints(magnitudes + v * kLanes);
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      largest[v] = maximum(largest[v], magnitude(load(from + r * columns + v * kLanes)));
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) store_ints(magnitudes + v * kLanes, largest[v]);
}

void max_magnitude(const float* from, int64_t rows, int64_t columns, int32_t* magnitudes) {
  if (columns < kLanes) {
    for (int64_t r = 0; r < rows; ++r, from += columns) {
      for (int64_t c = 0; c < columns; ++c) {
        const int32_t magnitude = magnitude_of(from[c]);
        magnitudes[c] = magnitude > magnitudes[c] ? magnitude : magnitudes[c];
      }
    }
    return;
  }
  // Several vectors of a row at a time: down a single one, every load would be on another page.
  int64_t c = 0;
  for (; c + 8 * kLanes <= columns; c += 8 * kLanes) {
    max_magnitude_columns<8>(from + c, rows, columns, magnitudes + c);
  }
  for (; c < columns; c += kLanes) {
    const int64_t at = c + kLanes <= columns ? c : columns - kLanes;
    max_magnitude_columns<1>(from + at, rows, columns, magnitudes + at);
  }
}

void quantise(const float* from, int64_t rows, int64_t columns, const float* inverse, int8_t* to) {
  for (int64_t r = 0; r < rows; ++r, from += columns, to += columns) {
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
      store_int8(to + c, multiply(load(from + c), load(inverse + c)));
    }
    if (c < columns && columns >= kLanes) {
      c = columns - kLanes;
      store_int8(to + c, multiply(load(from + c), load(inverse + c)));
    } else {
      for (; c < columns; ++c) to[c] = quantised(from[c], inverse[c]);
    }
  }
}

void dequantise(const int8_t* from, int64_t rows, int64_t columns, const float* scale, float* to) {
  for (int64_t r = 0; r < rows; ++r, from += columns, to += columns) {
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
      store(to + c, multiply(load_int8(from + c), load(scale + c)));
    }
    if (c < columns && columns >= kLanes) {
      c = columns - kLanes;
      store(to + c, multiply(load_int8(from + c), load(scale + c)));
    } else {
      for (; c < columns; ++c) to[c] = static_cast<float>(from[c]) * scale[c];
    }
  }
}

}  // namespace
}  // namespace message_simd
}  // namespace disco
