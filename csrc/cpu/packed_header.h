// The first words of packed weights: what layout they are in, so that weights packed for another
// instruction set or another layer are refused instead of read.
#pragma once

#include <cstdint>

#include "conv2d.h"

namespace disco {

constexpr int64_t kHeaderBytes = 64;
constexpr int32_t kPackedMagic = 0x44534331;  // "DSC1"

struct PackedHeader {
  int32_t magic;
  int32_t vector_length;
  int32_t max_vectors;
  int32_t out_channels;
  int32_t rows;
  int32_t taps;
  int32_t algorithm;
  int32_t dtype;
  int32_t reserved[8];
};
static_assert(sizeof(PackedHeader) == kHeaderBytes, "header must keep alignment");

PackedHeader packed_header(const IsaKernels& isa, const WeightShape& shape);

// Output channels in whole vectors.
int64_t packed_outputs(const IsaKernels& isa, const WeightShape& shape);
// Bytes before the panels: the header, and for kQuads [packed_outputs] scales, then as many sums.
int64_t bytes_before_panels(const IsaKernels& isa, const WeightShape& shape);

}  // namespace disco
