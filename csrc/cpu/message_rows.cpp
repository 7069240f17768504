#include "message_rows.h"

#include <algorithm>
#include <cstring>

namespace disco {
namespace {

// Columns of a joined row: some vectors of the widest instruction set, so that the one that
// overlaps is a small part.
constexpr int64_t kJoinedColumns = 64;

// How many rows of `columns` make one, and the factors for that.
struct Joined {
  Joined(const MessageKernels& kernels, int64_t rows, int64_t columns)
      : length(columns < kernels.vector_length && columns > 0
                   ? std::min(rows, kJoinedColumns / columns)
                   : 1) {}

  int64_t length;
  float factors[kJoinedColumns];

  const float* repeat(const float* values, int64_t columns) {
    if (length <= 1) return values;
    for (int64_t i = 0; i < length * columns; ++i) factors[i] = values[i % columns];
    return factors;
  }
};

}  // namespace

void max_magnitude_rows(const MessageKernels& kernels, const float* from, int64_t rows,
                        int64_t columns, int32_t* magnitudes) {
  const Joined joined(kernels, rows, columns);
  const int64_t whole = joined.length > 1 ? rows / joined.length : 0;
  if (whole > 0) {
    int32_t wide[kJoinedColumns] = {};
    kernels.max_magnitude(from, whole, joined.length * columns, wide);
    for (int64_t i = 0; i < joined.length * columns; ++i) {
      magnitudes[i % columns] = std::max(magnitudes[i % columns], wide[i]);
    }
  }
  const int64_t done = whole * joined.length;
  kernels.max_magnitude(from + done * columns, rows - done, columns, magnitudes);
}

void quantise_rows(const MessageKernels& kernels, const float* from, int64_t rows, int64_t columns,
                   const float* inverse, int8_t* to) {
  Joined joined(kernels, rows, columns);
  const int64_t whole = joined.length > 1 ? rows / joined.length : 0;
  if (whole > 0) {
    kernels.quantise(from, whole, joined.length * columns, joined.repeat(inverse, columns), to);
  }
  const int64_t done = whole * joined.length;
  kernels.quantise(from + done * columns, rows - done, columns, inverse, to + done * columns);
}

void dequantise_rows(const MessageKernels& kernels, const int8_t* from, int64_t rows,
                     int64_t columns, const float* scale, float* to) {
  Joined joined(kernels, rows, columns);
  const int64_t whole = joined.length > 1 ? rows / joined.length : 0;
  if (whole > 0) {
    kernels.dequantise(from, whole, joined.length * columns, joined.repeat(scale, columns), to);
  }
  const int64_t done = whole * joined.length;
  kernels.dequantise(from + done * columns, rows - done, columns, scale, to + done * columns);
}

}  // namespace disco
