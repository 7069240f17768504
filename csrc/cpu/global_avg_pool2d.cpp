#include "global_avg_pool2d.h"

#include <algorithm>

#include "conv2d_plan.h"

namespace disco {
namespace {

// Bytes read below which a second thread costs more than it saves.
constexpr int64_t kParallelBytes = 128 * 1024;
constexpr int64_t kLineBytes = 64;

}  // namespace

void global_avg_pool2d(const GlobalAvgPool2dCall& call) {
  if (call.in_h < 1 || call.in_w < 1) {
    refuse("a mean needs at least one pixel, given a map of " + std::to_string(call.in_h) + " x " +
           std::to_string(call.in_w));
  }
  const int64_t bytes = call.dtype == kFloat32 ? 4 : 2;
  const auto mean = active_isa().mean_pixel[call.dtype];
  const int64_t image_bytes = call.in_h * call.in_w * call.x.channels * bytes;
  const bool alone = call.batch * image_bytes <= kParallelBytes;
  const int64_t threads = alone ? 1 : std::max(1, call.num_threads);
  // Whole images, or the channels of each in pieces of whole cache lines.
  const int64_t line = kLineBytes / bytes;
  const int64_t lines = (call.x.channels + line - 1) / line;
  const int64_t pieces = std::max<int64_t>(1, std::min(lines, call.batch < threads ? threads : 1));
  const int64_t count = call.batch * pieces;
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads)) if (threads > 1)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = i / pieces, piece = i % pieces;
    const int64_t first = lines * piece / pieces * line;
    const int64_t end = std::min(call.x.channels, lines * (piece + 1) / pieces * line);
    mean({static_cast<const char*>(call.x.data) + (n * call.x.stride_n + first) * bytes, call.in_h,
          call.in_w, call.x.stride_h * bytes, call.x.stride_w * bytes, end - first,
          static_cast<char*>(call.out) + (n * call.out_stride_n + first) * bytes});
  }
}

}  // namespace disco
