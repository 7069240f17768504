#include "gather_pack.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace disco {
namespace {

struct ChannelRun {
  int32_t first;
  int32_t count;
};

// Consecutive channels are copied as one piece.
std::vector<ChannelRun> runs_of(const Message& message, int64_t channels) {
  std::vector<ChannelRun> runs;
  for (int64_t i = 0; i < message.num_channels; ++i) {
    const int32_t channel = message.channels[i];
    if (channel < 0 || channel >= channels) {
      throw std::invalid_argument("channel " + std::to_string(channel) +
                                  " is not one of the activation's " + std::to_string(channels));
    }
    if (!runs.empty() && runs.back().first + runs.back().count == channel) {
      ++runs.back().count;
    } else {
      runs.push_back({channel, 1});
    }
  }
  return runs;
}

// Bytes below which a second thread costs more than it saves.
constexpr int64_t kParallelBytes = 64 * 1024;

}  // namespace

void gather_pack(const float* x, int64_t channels, int64_t n, int64_t h, int64_t w,
                 int64_t stride_n, int64_t stride_h, int64_t stride_w,
                 const std::vector<Message>& messages, int32_t num_threads) {
  std::vector<std::vector<ChannelRun>> runs;
  int64_t bytes_per_pixel = 0;
  for (const Message& message : messages) {
    runs.push_back(runs_of(message, channels));
    bytes_per_pixel += message.num_channels * static_cast<int64_t>(sizeof(float));
  }
  const int64_t rows = n * h;
  const bool parallel = num_threads > 1 && rows * w * bytes_per_pixel > kParallelBytes;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (parallel)
  for (int64_t row = 0; row < rows; ++row) {
    const float* pixel = x + row / h * stride_n + row % h * stride_h;
    for (int64_t i = 0; i < w; ++i, pixel += stride_w) {
      for (size_t m = 0; m < messages.size(); ++m) {
        float* out = messages[m].out + (row * w + i) * messages[m].num_channels;
        for (const ChannelRun& run : runs[m]) {
          const float* from = pixel + run.first;
          if (run.count >= 16) {
            std::memcpy(out, from, sizeof(float) * static_cast<size_t>(run.count));
          } else {
            for (int32_t c = 0; c < run.count; ++c) out[c] = from[c];
          }
          out += run.count;
        }
      }
    }
  }
}

}  // namespace disco
