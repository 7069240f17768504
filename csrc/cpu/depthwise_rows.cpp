// Portable part of grouped convolutions: the division into items, borders and threads.

#include <algorithm>
#include <cstring>

#include "depthwise_plan.h"

namespace disco {
namespace {

// What an output row of a strip reads, inputs and weights: stays in the first-level cache from one
// row to the next. Sum over 17 layers of mobile networks, one thread, 48 KB cache: 735 us with 12
// KB, 663 with 24, 662 with 32, 659 with 48, 676 with 96.
constexpr int64_t kNearBytes = 32 * 1024;
// Input and output of a band of rows: stays in the second-level cache from one strip to the next.
// The same layers, 1 MB cache: 697 us with 256 KB, 663 with 512, 649 with 1,024, 652 with 4,096.
constexpr int64_t kBandBytes = 1024 * 1024;
// Work items per thread, so that one thread's delay leaves work for the others to take.
constexpr int64_t kItemsPerThread = 4;
// Rows of a band that is made for that, in kernel heights: the next band reads one less one of
// them. Two threads, with bands first and with vectors first: 72 channels on 56 x 56 23 us and 33,
// 32 on 112 x 112 38 and 45. Groups of several inputs, which have more weights, gain nothing.
constexpr int64_t kOwnRows = 2;

// Pixels so many bytes apart, and multiples, share few of a first-level cache's sets,
// which repeat every 4 KB, and push each other out: their rows are copied side by side first. 512
// channels on a 14x14 map: 20.7 us as they lie, 17.3 us copied; 1,024 channels with 5x5 taps: 113
// and 73. (Copied where nothing collides, 496 channels: 19.8 us against 13.2.)
constexpr int64_t kCollidingBytes = 2048;
constexpr int64_t kLineBytes = 64;

LaneWindow window_of(const Conv2dGeometry& geometry) {
  if (geometry.dilation_w != 1) return kWindowAny;
  if (geometry.stride_w == 1) {
    if (geometry.kernel_w == 3) return kWindow3;
    if (geometry.kernel_w == 5) return kWindow5;
    if (geometry.kernel_w == 7) return kWindow7;
  } else if (geometry.stride_w == 2) {
    if (geometry.kernel_w == 3) return kWindow3Stride2;
    if (geometry.kernel_w == 5) return kWindow5Stride2;
  }
  return kWindowAny;
}

// Rows of one image's output and vectors of channels that one thread does.
struct Item {
  int64_t image;
  int64_t first_row, end_row;
  int64_t first_vector, end_vector;
};

// Pointers to the input pixels under some output columns, row by row: to zeros where they are
// outside of the map. A row's are made once, when an output row first reads it.
class Columns {
 public:
  Columns(const LanePlan& plan, int64_t most)
      : plan_(plan),
        bytes_(plan.element_bytes()),
        zeros_(static_cast<size_t>(plan.source().channels * bytes_)),
        slots_((plan.geometry.kernel_h - 1) * plan.geometry.dilation_h + 1),
        window_(plan.window(most)),
        copied_(plan.source().stride_w * bytes_ % kCollidingBytes == 0),
        rows_(static_cast<size_t>(slots_)),
        pixels_(static_cast<size_t>(slots_ * window_)) {}

  void begin(const Item& item, int64_t first_ow, int64_t count) {
    image_ = static_cast<const char*>(plan_.source().data) +
             item.image * plan_.source().stride_n * bytes_;
    first_ = first_ow * plan_.geometry.stride_w - plan_.geometry.padding_w;
    count_ = plan_.window(count);
    std::fill(rows_.begin(), rows_.end(), -1);
    if (copied_) {
      const LaneVector& last = plan_.vectors[static_cast<size_t>(item.end_vector - 1)];
      first_in_ = plan_.vectors[static_cast<size_t>(item.first_vector)].first_in;
      num_in_ = last.first_in + last.num_in + plan_.in_per_group - 1 - first_in_;
      num_in_ = std::min(num_in_, plan_.source().channels - first_in_);
      memory_.resize(static_cast<size_t>(slots_ * window_ * num_in_ * bytes_ + kLineBytes));
      const uintptr_t start = reinterpret_cast<uintptr_t>(memory_.data()) + kLineBytes - 1;
      copies_ = reinterpret_cast<char*>(start / kLineBytes * kLineBytes);
    }
  }

  // Input row `iy`, which is inside of the map: pointers that are to be moved by the channel less
  // first_in().
  const char* const* row(int64_t iy) {
    const int64_t slot = iy % slots_;
    const char** pixels = pixels_.data() + slot * window_;
    if (rows_[static_cast<size_t>(slot)] == iy) return pixels;
    rows_[static_cast<size_t>(slot)] = iy;
    const SourceView& source = plan_.source();
    const char* row = image_ + (iy * source.stride_h + first_in_) * bytes_;
    const int64_t begin = std::min(count_, std::max<int64_t>(0, -first_));
    const int64_t end = std::max(begin, std::min(count_, plan_.call.in_w - first_));
    for (int64_t c = 0; c < begin; ++c) pixels[c] = zeros_.data();
    for (int64_t c = begin; c < end; ++c) pixels[c] = row + (first_ + c) * source.stride_w * bytes_;
    for (int64_t c = end; c < count_; ++c) pixels[c] = zeros_.data();
    if (copied_) {
      const int64_t size = num_in_ * bytes_;
      char* copy = copies_ + slot * window_ * size;
      for (int64_t c = begin; c < end; ++c, copy += size) {
        std::memcpy(copy, pixels[c], static_cast<size_t>(size));
        pixels[c] = copy;
      }
    }
    return pixels;
  }

  int64_t first_in() const { return first_in_; }

 private:
  const LanePlan& plan_;
  const int64_t bytes_;  // of an element
  const std::vector<char> zeros_;
  const int64_t slots_, window_;
  const bool copied_;
  std::vector<int64_t> rows_;  // which row a slot holds
  std::vector<const char*> pixels_;
  std::vector<char> memory_;
  char* copies_ = nullptr;  // in memory_, on a cache line
  const char* image_ = nullptr;
  int64_t first_ = 0, count_ = 0;
  int64_t first_in_ = 0, num_in_ = 0;
};

class Runner {
 public:
  explicit Runner(const LanePlan& plan) : plan_(plan), window_(window_of(plan.geometry)) {
    plan_items();
  }

  void execute() const {
    const int64_t count = static_cast<int64_t>(items_.size());
    const int threads = static_cast<int>(std::min<int64_t>(plan_.call.num_threads, count));
    // Every output's sum has one order, so any schedule gives the same bits.
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      Columns columns(plan_, columns_);
      std::vector<LanePass> passes(
          static_cast<size_t>(plan_.geometry.kernel_h * plan_.in_per_group));
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < count; ++i) {
        run_item(items_[static_cast<size_t>(i)], columns, passes.data());
      }
    }
  }

 private:
  void plan_items() {
    const int64_t bytes = plan_.element_bytes();
    const int64_t vectors = static_cast<int64_t>(plan_.vectors.size());
    const int64_t window = plan_.window(plan_.max_strip());
    const int64_t per_vector = bytes * plan_.geometry.kernel_h * window * plan_.length +
                               static_cast<int64_t>(sizeof(float)) * plan_.panel_floats;
    // With a stride fewer output rows share an input row, so there is less to keep near.
    const int64_t near = std::max<int64_t>(1, plan_.geometry.stride_h * kNearBytes / per_vector);
    const int64_t row_bytes =
        bytes * (plan_.geometry.stride_h * plan_.call.in_w * plan_.source().channels +
                 plan_.out_w * plan_.call.out_channels);
    const int64_t band = std::max<int64_t>(plan_.geometry.kernel_h, kBandBytes / row_bytes);
    int64_t bands = (plan_.out_h + band - 1) / band;
    int64_t chunks = (vectors + near - 1) / near;
    if (plan_.call.num_threads > 1) {
      // Too few items for the threads: shorter bands where each has rows of its own and few
      // weights, then fewer vectors each, then any bands.
      const int64_t wanted = kItemsPerThread * plan_.call.num_threads;
      const auto missing = [&] {
        const int64_t items = plan_.call.batch * bands * chunks;
        return (wanted + items - 1) / items;
      };
      if (plan_.in_per_group == 1) {
        const int64_t own = plan_.out_h / (kOwnRows * plan_.geometry.kernel_h);
        bands = std::max(bands, std::min(own, bands * missing()));
      }
      chunks = std::max(chunks, std::min(vectors, chunks * missing()));
      bands = std::max(bands, std::min(plan_.out_h, bands * missing()));
    }
    plan_columns(vectors, chunks);
    for (int64_t n = 0; n < plan_.call.batch; ++n) {
      for (int64_t b = 0; b < bands; ++b) {
        for (int64_t c = 0; c < chunks; ++c) {
          items_.push_back({n, plan_.out_h * b / bands, plan_.out_h * (b + 1) / bands,
                            vectors * c / chunks, vectors * (c + 1) / chunks});
        }
      }
    }
  }

  // Columns that are taken together, row by row: as many as stay near. An item that takes at least
  // half of the vectors reads and writes nearly in order then (16 channels on 112 x 112: 36 us, and
  // 47 without); one that takes few would have its pixels in few of the cache's sets.
  void plan_columns(int64_t vectors, int64_t chunks) {
    columns_ = plan_.max_strip();
    if (chunks > 2) return;
    const int64_t taken = (vectors + chunks - 1) / chunks;
    const int64_t row = plan_.element_bytes() * plan_.geometry.kernel_h * plan_.length * taken;
    const int64_t panels = static_cast<int64_t>(sizeof(float)) * plan_.panel_floats * taken;
    const int64_t most = plan_.geometry.stride_h * kNearBytes - panels;
    while (columns_ < plan_.out_w && row * plan_.window(2 * columns_) <= most) columns_ *= 2;
    columns_ = std::min(columns_, plan_.out_w);
  }

  void run_item(const Item& item, Columns& columns, LanePass* passes) const {
    const Conv2dCall& call = plan_.call;
    LaneTile tile = {};
    tile.passes = passes;
    tile.kernel_w = plan_.geometry.kernel_w;
    tile.stride_w = plan_.geometry.stride_w;
    tile.dilation_w = plan_.geometry.dilation_w;
    tile.panel_floats = plan_.panel_floats;
    tile.bias = call.bias;
    tile.out_step = call.out.stride_w;
    tile.residual_step = call.residual_stride_w;
    tile.activation = plan_.activation;
    // Parts of nearly equal width, here and below: a ragged last one would leave units idle.
    const int64_t parts = (plan_.out_w + columns_ - 1) / columns_;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = plan_.out_w * part / parts;
      const int64_t width = plan_.out_w * (part + 1) / parts - first;
      const int64_t strips = (width + plan_.max_strip() - 1) / plan_.max_strip();
      columns.begin(item, first, width);
      tile.first_in = columns.first_in();
      for (int64_t oh = item.first_row; oh < item.end_row; ++oh) {
        tile.num_passes = plan_passes(oh, columns, passes);
        for (int64_t s = 0, begin = 0; s < strips; ++s) {
          const int64_t end = width * (s + 1) / strips;
          place(item, oh, first + begin, tile);
          run_tile(item, end - begin, tile);
          for (int64_t i = 0; i < tile.num_passes; ++i) {
            passes[i].columns += (end - begin) * plan_.geometry.stride_w;
          }
          begin = end;
        }
      }
    }
  }

  void place(const Item& item, int64_t oh, int64_t ow, LaneTile& tile) const {
    const Conv2dCall& call = plan_.call;
    const int64_t bytes = plan_.element_bytes();
    tile.out =
        static_cast<char*>(call.out.data) +
        bytes * (item.image * call.out.stride_n + oh * call.out.stride_h + ow * call.out.stride_w);
    if (call.residual == nullptr) return;
    tile.residual = static_cast<const char*>(call.residual) +
                    bytes * (item.image * call.residual_stride_n + oh * call.residual_stride_h +
                             ow * call.residual_stride_w);
  }

  // Rows of the kernel outside of the map are left out.
  int64_t plan_passes(int64_t oh, Columns& columns, LanePass* passes) const {
    const Conv2dGeometry& g = plan_.geometry;
    LanePass* pass = passes;
    for (int64_t r = 0; r < g.kernel_h; ++r) {
      const int64_t iy = oh * g.stride_h - g.padding_h + r * g.dilation_h;
      if (iy < 0 || iy >= plan_.call.in_h) continue;
      const char* const* pixels = columns.row(iy);
      for (int64_t k = 0; k < plan_.in_per_group; ++k) {
        const int64_t list = plan_.lane_lists > 1 ? k : 0;
        *pass++ = {pixels, k - list, (r * plan_.in_per_group + k) * g.kernel_w, list};
      }
    }
    return pass - passes;
  }

  void run_tile(const Item& item, int64_t count, LaneTile& tile) const {
    const auto run = [&](LaneInput input, int64_t first, int64_t end) {
      tile.vectors = plan_.vectors.data() + first;
      tile.lanes = plan_.lanes.data() + first * plan_.lane_lists * plan_.length;
      tile.lane_lists = plan_.lane_lists;
      tile.num_vectors = end - first;
      tile.panels = plan_.panels + first * plan_.panel_floats;
      const int64_t kernel = (input * kNumLaneWindows + window_) * plan_.kernels.max_pixels;
      plan_.kernels.kernels[plan_.geometry.dtype][kernel + count - 1](tile);
    };
    int64_t end = item.end_vector;
    const bool part = plan_.input == kInputWhole &&
                      plan_.vectors[static_cast<size_t>(end - 1)].num_out < plan_.length;
    if (part) --end;
    if (end > item.first_vector) run(plan_.input, item.first_vector, end);
    if (part) run(kInputPart, end, end + 1);
  }

  const LanePlan& plan_;
  const LaneWindow window_;
  std::vector<Item> items_;
  int64_t columns_ = 0;  // taken together
};

}  // namespace

void run_lanes(const LanePlan& plan) { Runner(plan).execute(); }

}  // namespace disco
