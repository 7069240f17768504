// Selected channels of an activation, written as one contiguous message per destination.
#pragma once

#include <cstdint>
#include <vector>

namespace disco {

struct Message {
  const int32_t* channels;  // selected channels of the activation
  int64_t num_channels;
  float* out;  // [pixels][num_channels]
};

// One pass over the activation for all destinations. x: [n][h][w] pixels, channel stride 1, strides
// in elements. Throws std::invalid_argument for a channel outside [0, channels).
void gather_pack(const float* x, int64_t channels, int64_t n, int64_t h, int64_t w,
                 int64_t stride_n, int64_t stride_h, int64_t stride_w,
                 const std::vector<Message>& messages, int32_t num_threads);

}  // namespace disco
