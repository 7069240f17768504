// Messages in int8; their layout and what they mean is in gather_pack.h.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "gather_pack_work.h"
#include "message_rows.h"

namespace disco {
namespace {

// Images are taken together until there is this much to keep between two barriers, a thread. Eight
// images of 1024 x 14 x 14 on two threads: 58 us with this or four times as much, 96 with a
// quarter.
constexpr int64_t kRoundBytes = 512 * 1024;
// Kept channels of this many pixels or bytes, whatever is more, are near when their magnitudes are
// taken. 12 channels of 256 x 56 x 56: 41 us with 4 KB, 33 with 16, 29 with 64.
constexpr int64_t kPiecePixels = 64;
constexpr int64_t kPieceBytes = 64 * 1024;

constexpr float kSmallestMagnitude = 0x1p-100f;
// The largest float whose 127-fold is finite.
constexpr float kLargestScale = 0x1.020406p+121f;

// What becomes of the bits of a channel's largest magnitude.
void find_scale(int32_t magnitude, float* scale, float* inverse) {
  float largest;
  std::memcpy(&largest, &magnitude, sizeof(largest));
  if (!std::isfinite(largest)) {
    *scale = std::numeric_limits<float>::quiet_NaN();
    *inverse = 0.0f;
  } else if (largest < kSmallestMagnitude) {
    *scale = *inverse = 0.0f;
  } else {
    *scale = std::min(largest / 127.0f, kLargestScale);
    *inverse = 127.0f / largest;
  }
}

}  // namespace

// Some images at a time: one pass over x finds the magnitudes and keeps the selected channels, one
// over these writes the values. Reading x twice would cost more at every density below one.
void GatherPack::write_int8(const Work& work, const std::vector<void*>& messages) const {
  const int64_t image_bytes = std::max<int64_t>(1, kFloatBytes * work.image_pixels * num_channels_);
  const int64_t together = std::clamp<int64_t>(work.parts * kRoundBytes / image_bytes, 1,
                                               std::max<int64_t>(1, work.images));
  const int64_t columns = together * num_channels_;  // of the magnitudes and factors
  const int64_t piece = std::max(kPiecePixels, kPieceBytes / (kFloatBytes * num_channels_));
  // One message of all channels lies in x as it would be kept.
  const bool in_place = work.x.dtype == kFloat32 && lists_.size() == 1 && lists_[0].is_prefix() &&
                        work.x.grid.stride_w == num_channels_ &&
                        work.x.grid.run_length() == work.pixels;
  std::unique_ptr<float[]> rows(
      in_place ? nullptr
               : new float[static_cast<size_t>(together * work.image_pixels * num_channels_)]);
  std::vector<int32_t> magnitudes(static_cast<size_t>(work.parts * columns));
  std::vector<float> inverse(static_cast<size_t>(columns));
  for (int64_t begin = 0; begin < work.images; begin += together) {
    const int64_t count = std::min(together, work.images - begin);
    const int64_t first_pixel = begin * work.image_pixels, pixels = count * work.image_pixels;
    std::fill(magnitudes.begin(), magnitudes.end(), 0);
    // The kept channels and the factors lie message by message, then image by image.
    const auto row_of = [&](size_t m, int64_t pixel) {
      return before_[m] * pixels + (pixel - first_pixel) * lists_[m].num_channels();
    };
    const float* base = in_place ? work.x.floats() + first_pixel * num_channels_ : rows.get();
    const auto kept = [&](size_t m, int64_t pixel) { return base + row_of(m, pixel); };
    const auto column_of = [&](size_t m, int64_t pixel) {
      return before_[m] * together + (pixel / work.image_pixels - begin) * lists_[m].num_channels();
    };
    // Calls visit(begin, end) for pieces of one image.
    const auto walk = [&](int32_t part, const auto& visit) {
      int64_t from = first_pixel + work.edge(pixels, part);
      const int64_t end = first_pixel + work.edge(pixels, part + 1);
      while (from < end) {
        const int64_t image_end = (from / work.image_pixels + 1) * work.image_pixels;
        const int64_t to = std::min({end, from + piece, image_end});
        visit(from, to);
        from = to;
      }
    };
#pragma omp parallel for schedule(static, 1) num_threads(work.parts) if (work.parts > 1)
    for (int32_t part = 0; part < work.parts; ++part) {
      walk(part, [&](int64_t from, int64_t to) {
        if (!in_place) {
          for_each_run(work.x.grid, from, to, work.block, work.pixels,
                       [&](int64_t offset, int64_t first, int64_t run) {
                         for (size_t m = 0; m < lists_.size(); ++m) {
                           gather(work, m, offset, run, rows.get() + row_of(m, first));
                         }
                       });
        }
        for (size_t m = 0; m < lists_.size(); ++m) {
          max_magnitude_rows(kernels_, kept(m, from), to - from, lists_[m].num_channels(),
                             magnitudes.data() + part * columns + column_of(m, from));
        }
      });
    }
    for (size_t m = 0; m < lists_.size(); ++m) {
      const int64_t channels = lists_[m].num_channels();
      float* scales = static_cast<float*>(messages[m]) + begin * channels;
      for (int64_t i = 0; i < count * channels; ++i) {
        const size_t column = static_cast<size_t>(before_[m] * together + i);
        int32_t largest = 0;
        for (int32_t part = 0; part < work.parts; ++part) {
          largest = std::max(largest, magnitudes[static_cast<size_t>(part * columns) + column]);
        }
        find_scale(largest, scales + i, inverse.data() + column);
      }
    }
#pragma omp parallel for schedule(static, 1) num_threads(work.parts) if (work.parts > 1)
    for (int32_t part = 0; part < work.parts; ++part) {
      walk(part, [&](int64_t from, int64_t to) {
        for (size_t m = 0; m < lists_.size(); ++m) {
          const int64_t channels = lists_[m].num_channels();
          int8_t* values = static_cast<int8_t*>(messages[m]) + kFloatBytes * work.images * channels;
          quantise_rows(kernels_, kept(m, from), to - from, channels,
                        inverse.data() + column_of(m, from), values + from * channels);
        }
      });
    }
  }
  for (size_t m = 0; m < lists_.size(); ++m) {
    const int64_t channels = lists_[m].num_channels();
    const int64_t used = channels * (kFloatBytes * work.images + work.pixels);
    const int64_t size = message_bytes(WireType::kInt8, work.images, work.pixels, channels);
    if (size > used) {
      std::memset(static_cast<char*>(messages[m]) + used, 0, static_cast<size_t>(size - used));
    }
  }
}

}  // namespace disco
