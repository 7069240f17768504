// Weight layout of the micro-kernels.

#include <cfloat>
#include <cmath>
#include <cstring>

#include "conv2d.h"
#include "packed_header.h"

namespace disco {

int64_t packed_size(const IsaKernels& isa, int64_t out_channels, int64_t in_channels,
                    int64_t taps) {
  const int64_t vectors = (out_channels + isa.vector_length - 1) / isa.vector_length;
  const int64_t size = kHeaderWords + vectors * isa.vector_length * in_channels * taps;
  return (size + kHeaderWords - 1) / kHeaderWords * kHeaderWords;
}

PackedHeader packed_header(const IsaKernels& isa, int64_t out_channels, int64_t in_channels,
                           int64_t taps) {
  PackedHeader header = {};
  header.magic = kPackedMagic;
  header.vector_length = isa.vector_length;
  header.max_vectors = isa.max_vectors;
  header.out_channels = static_cast<int32_t>(out_channels);
  header.in_channels = static_cast<int32_t>(in_channels);
  header.taps = static_cast<int32_t>(taps);
  return header;
}

void pack_weights(const IsaKernels& isa, const float* weight, int64_t out_channels,
                  const std::vector<int64_t>& segment_channels, int64_t taps, float* packed) {
  int64_t in_channels = 0;
  for (int64_t channels : segment_channels) in_channels += channels;
  const int64_t total = packed_size(isa, out_channels, in_channels, taps);
  std::memset(packed, 0, sizeof(float) * static_cast<size_t>(total));
  const PackedHeader header = packed_header(isa, out_channels, in_channels, taps);
  std::memcpy(packed, &header, sizeof(header));

  const int64_t widest = isa.max_vectors * isa.vector_length;
  float* panel = packed + kHeaderWords;
  for (int64_t first = 0; first < out_channels; first += widest) {
    const int64_t valid = out_channels - first < widest ? out_channels - first : widest;
    const int64_t width = (valid + isa.vector_length - 1) / isa.vector_length * isa.vector_length;
    for (int64_t o = 0; o < valid; ++o) {
      const float* row = weight + (first + o) * in_channels * taps;
      float* to = panel + o;
      int64_t begin = 0;
      for (int64_t channels : segment_channels) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          for (int64_t c = 0; c < channels; ++c) {
            const float value = row[(begin + c) * taps + tap];
            *to = std::fabs(value) < FLT_MIN ? 0.0f : value;
            to += width;
          }
        }
        begin += channels;
      }
    }
    panel += width * in_channels * taps;
  }
}

}  // namespace disco
