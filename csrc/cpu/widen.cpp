#include "widen.h"

#include <algorithm>
#include <string>

#include "arena.h"
#include "conv2d_plan.h"
#include "message_rows.h"
#include "pixel_runs.h"

namespace disco {
namespace {

// Bytes written below which a second thread costs more than it saves (as in gather_pack.cpp).
constexpr int64_t kParallelBytes = 128 * 1024;

// `count` pixels from pixel `first` on, whose channels start at element `offset`.
void widen_run(const MessageKernels& kernels, const SourceView& source, int64_t stride,
               int64_t offset, int64_t image, int64_t count, float* to) {
  const int64_t channels = source.channels;
  // Pixels with something between them are taken one by one.
  const int64_t rows = stride == channels ? count : 1;
  for (int64_t i = 0; i < count; i += rows, offset += rows * stride, to += rows * channels) {
    if (source.type == WireType::kInt8) {
      const float* scale = source.scale + image / source.images_per_scale * channels;
      dequantise_rows(kernels, static_cast<const int8_t*>(source.data) + offset, rows, channels,
                      scale, to);
    } else if (source.type == WireType::kFloat16) {
      kernels.widen_float16(static_cast<const uint16_t*>(source.data) + offset, rows * channels,
                            to);
    } else {
      kernels.widen_bfloat16(static_cast<const uint16_t*>(source.data) + offset, rows * channels,
                             to);
    }
  }
}

void widen_source(const MessageKernels& kernels, const SourceView& source, const Conv2dCall& call,
                  float* to) {
  const PixelGrid given = {call.batch,      call.in_h,       call.in_w,
                           source.stride_n, source.stride_h, source.stride_w};
  const PixelGrid grid = given.simplified();
  const int64_t pixels = grid.num_pixels(), image_pixels = call.in_h * call.in_w;
  const int64_t bytes = pixels * source.channels * static_cast<int64_t>(sizeof(float));
  const int32_t parts = bytes > kParallelBytes ? std::max(1, call.num_threads) : 1;
#pragma omp parallel for schedule(static, 1) num_threads(parts) if (parts > 1)
  for (int32_t part = 0; part < parts; ++part) {
    for_each_run(grid, pixels * part / parts, pixels * (part + 1) / parts, pixels, image_pixels,
                 [&](int64_t offset, int64_t first, int64_t count) {
                   widen_run(kernels, source, grid.stride_w, offset, first / image_pixels, count,
                             to + first * source.channels);
                 });
  }
}

}  // namespace

WidenedCall::WidenedCall(const Conv2dCall& from) : given_(from), call_(from) {
  std::vector<int64_t> begin(call_.sources.size(), -1);
  for (size_t s = 0; s < call_.sources.size(); ++s) {
    SourceView& source = call_.sources[s];
    if (source.type == WireType::kFloat32) continue;
    if (source.channels > 1 && source.stride_c != 1) {
      refuse("a segment in a wire type must have a channel stride of 1, given " +
             std::to_string(source.stride_c));
    }
    const int64_t row = call_.in_w * source.channels;
    const int64_t size = call_.batch * call_.in_h * row;
    if (source.type == WireType::kInt8 && size > 0 &&
        (source.scale == nullptr || source.images_per_scale < 1)) {
      refuse("an int8 segment needs scales");
    }
    begin[s] = bytes_;
    const int64_t bytes = size * static_cast<int64_t>(sizeof(float));
    bytes_ += (bytes + kCacheLineBytes - 1) / kCacheLineBytes * kCacheLineBytes;
    source = {nullptr, source.channels, call_.in_h * row, 1, row, source.channels};
  }
  memory_ = static_cast<char*>(arena(ArenaSlot::kWidened, bytes_));
  for (size_t s = 0; s < begin.size(); ++s) {
    copies_.push_back(begin[s] < 0 ? nullptr : reinterpret_cast<float*>(memory_ + begin[s]));
    if (copies_[s] != nullptr) call_.sources[s].data = copies_[s];
  }
}

bool WidenedCall::memory_moved() const { return arena(ArenaSlot::kWidened, bytes_) != memory_; }

void WidenedCall::widen() {
  for (size_t s = 0; s < copies_.size(); ++s) {
    if (copies_[s] != nullptr) {
      widen_source(active_message_kernels(), given_.sources[s], given_, copies_[s]);
    }
  }
}

}  // namespace disco
