// The row loops of MessageKernels for rows of any length: short rows are joined to longer ones.
#pragma once

#include <cstdint>

#include "message_kernels.h"

namespace disco {

void max_magnitude_rows(const MessageKernels& kernels, const float* from, int64_t rows,
                        int64_t columns, int32_t* magnitudes);
void quantise_rows(const MessageKernels& kernels, const float* from, int64_t rows, int64_t columns,
                   const float* inverse, int8_t* to);
void dequantise_rows(const MessageKernels& kernels, const int8_t* from, int64_t rows,
                     int64_t columns, const float* scale, float* to);

}  // namespace disco
