// Portable part of the convolution: tiles, borders and threads around the micro-kernels.

#include <algorithm>
#include <cstring>
#include <memory>

#include "arena.h"
#include "conv2d_plan.h"
#include "fused_pack.h"
#include "shares.h"
#include "staging.h"

namespace disco {
namespace {

// Up to here a node's weights stay in the second-level cache while the tiles go by, and every tile
// takes all panels; beyond, every panel takes all tiles. ResNet-50 for two nodes at density 0.2,
// whole pass, one thread, 2 MB cache: 46.4 ms with 0, 44.3 with 192 KB, 43.5 with 390 KB, 44.5 with
// 780 KB.
constexpr int64_t kNearWeightBytes = 384 * 1024;

// The inputs of so few tiles are near anyway, and panels that come from far away are better fetched
// over all tiles than during the first: 11.46 against 12.15 ms in bfloat16 (the same model, one
// thread of a Zen 5), 19.2 against 19.5 in float32.
constexpr int64_t kFewTiles = 16;

// Outputs of this many bytes are packed together: they still are in the second-level cache, and the
// last of them have left the store buffers, from which a load that wants parts of two stores cannot
// be served.
constexpr int64_t kPackBytes = 64 * 1024;

constexpr int kMostPixels = 64;  // of any ISA's tile

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One register tile of an item: built once, used for every panel.
struct TilePlan {
  int64_t num_pixels;
  int64_t num_passes;
  Pass* passes;
  char** residual;  // nullptr if there is none
  char** out;       // behind the residual's
};

// Where a tile's prefetches start and how far apart the rows' are.
struct Prefetch {
  const char* from;
  int64_t step_bytes;
};

// Of an output pixel. Carried from tile to tile: divisions would cost as much as the rest.
struct Position {
  int64_t n, h, w;
};

// What of a node a pass multiplies: one tap of a segment, or all of them.
struct PassTaps {
  int32_t segment;
  int32_t tap;  // kAllTaps inside the map
};
constexpr int32_t kAllTaps = -1;

// Tiles of one size that are set up and not done yet.
class TileQueue {
 public:
  // Where to set up a tile that this kernel is for.
  Tile& push(MicroKernel kernel) {
    if (kernel != kernel_ || num_tiles_ == kTiles) flush();
    kernel_ = kernel;
    return tiles_[num_tiles_++];
  }
  void flush() {
    if (num_tiles_ > 0) kernel_(tiles_, num_tiles_);
    num_tiles_ = 0;
  }

 private:
  static constexpr int64_t kTiles = 8;
  MicroKernel kernel_ = nullptr;
  int64_t num_tiles_ = 0;
  Tile tiles_[kTiles];
};

// Memory for the tiles of one item; the pointer tables of borders dominate. They hold for the next
// item, too, if it only takes other panels, and but for the passes' rows if it only takes another
// node that reads the same sources.
struct Scratch {
  int32_t node = -1;
  int64_t first_tile = -1, num_tiles = 0;
  std::unique_ptr<TilePlan[]> tiles;
  std::unique_ptr<Pass[]> passes;
  std::unique_ptr<PassTaps[]> taps;  // of every pass
  int64_t num_passes = 0;
  std::unique_ptr<const char*[]> pixels;
  std::unique_ptr<char*[]> rows;
  std::vector<char> scattered;  // [mr][panel width] for the output, then the same for the residual
  TileQueue queue;
};

class Runner {
 public:
  explicit Runner(const ConvPlan& plan) : plan_(plan) {}

  void execute() {
    if (plan_.items.empty()) return;
    Shares shares(plan_.homes);
    const int num_threads = shares.num_threads();
    // Items are independent and each output's sum has one order, so any schedule gives the same
    // bits.
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
      Scratch scratch = make_scratch();
      shares.work([&](int64_t i, int64_t end) {
        run_item(plan_.items[static_cast<size_t>(i)],
                 i + 1 < end ? &plan_.items[static_cast<size_t>(i + 1)] : nullptr, scratch);
      });
    }
  }

 private:
  Scratch make_scratch() const {
    size_t segments = 0;
    for (const NodePlan& plan : plan_.nodes) segments = std::max(segments, plan.offsets.size());
    const size_t tiles = static_cast<size_t>(plan_.most_tiles);
    const size_t passes = tiles * segments * static_cast<size_t>(plan_.geometry.taps());
    const size_t mr = static_cast<size_t>(plan_.isa.max_pixels);
    Scratch scratch;
    // Uninitialised on purpose: interior tiles use a small part of it.
    scratch.tiles.reset(new TilePlan[tiles]);
    scratch.passes.reset(new Pass[passes]);
    scratch.taps.reset(new PassTaps[passes]);
    scratch.pixels.reset(new const char*[passes * mr]);
    scratch.rows.reset(new char*[2 * tiles * mr]);
    scratch.scattered.resize(2 * mr *
                             static_cast<size_t>(plan_.panel_width() * plan_.element_bytes));
    return scratch;
  }

  // `next` is what this thread most likely does afterwards, or nullptr.
  void run_item(const Item& item, const Item* next, Scratch& scratch) const {
    const NodePlan& plan = node_of(item);
    const int64_t num_tiles = item.num_tiles;
    if (plan_.staged != nullptr && plan_.gathers_by_item) {
      plan_.staged->gather_pixels(item.node, plan_.tile_edge(item.first_tile),
                                  plan_.tile_edge(item.first_tile + num_tiles), plan_.out_h,
                                  plan_.out_w);
    }
    take_tiles(item, scratch);
    const int64_t end = item.first_panel + item.num_panels;
    const int64_t row_bytes = plan_.panel_row_bytes();
    if (num_tiles > kFewTiles && item.num_panels * plan.rows * row_bytes <= kNearWeightBytes) {
      // All panels stay near, so a tile's inputs are read and its outputs written in one go. Only
      // the first tile finds the weights far away; the others fetch the inputs of the next one, a
      // part with each panel. The parts are those of the largest tile: few panels of few rows leave
      // no time for divisions.
      const int64_t channels = plan_.sources.empty() ? 0 : plan_.sources[0].channels;
      const int64_t largest = plan_.isa.max_pixels * channels * plan_.input_bytes;
      const int64_t part = divide_up(largest, item.num_panels);
      const int64_t step =
          std::max(kCacheLineBytes, divide_up(part, std::max<int64_t>(1, plan.rows)));
      const int64_t pixel_bytes = item.num_panels * plan_.panel_width() * plan_.element_bytes;
      const int64_t first = plan_.tile_edge(item.first_tile);
      int64_t packed = first, done = first;
      for (int64_t t = 0; t < num_tiles; ++t) {
        const TilePlan& tile = scratch.tiles[static_cast<size_t>(t)];
        const Span ahead =
            t + 1 < num_tiles ? span_of(scratch.tiles[static_cast<size_t>(t + 1)]) : Span{};
        int64_t begin = 0;
        for (int64_t p = item.first_panel; p < end; ++p, begin += part) {
          if (t == 0 && p + 1 < end) {
            run_tile(plan, p, tile, {panel_of(plan, p + 1), row_bytes}, scratch);
          } else {
            run_tile(plan, p, tile, {ahead.from + begin, begin < ahead.bytes ? step : 0}, scratch);
          }
        }
        done += tile.num_pixels;
        if (t + 1 == num_tiles || (done - packed) * pixel_bytes >= kPackBytes) {
          scratch.queue.flush();
          pack(item, packed, done);
          packed = done;
        }
      }
      return;
    }
    for (int64_t p = item.first_panel; p < end; ++p) {
      // Weights come from far away once a pass: while one panel is used, each tile fetches its part
      // of the next one, which belongs to the next item after the last panel.
      const char* upcoming = p + 1 < end       ? panel_of(plan, p + 1)
                             : next != nullptr ? panel_of(node_of(*next), next->first_panel)
                                               : panel_of(plan, p);
      const int64_t step = (row_bytes + num_tiles - 1) / num_tiles;
      for (int64_t t = 0; t < num_tiles; ++t) {
        const char* from = upcoming + t * step * plan.rows;
        run_tile(plan, p, scratch.tiles[static_cast<size_t>(t)], {from, step}, scratch);
      }
    }
    scratch.queue.flush();
    pack(item, plan_.tile_edge(item.first_tile), plan_.tile_edge(item.first_tile + num_tiles));
  }

  // Pixels [begin, end) of an item are complete.
  void pack(const Item& item, int64_t begin, int64_t end) const {
    if (plan_.messages == nullptr) return;
    plan_.messages->write(item.node, item.first_panel, item.num_panels, begin, end);
  }

  // Makes the scratch that of the item's tiles, with what it already knows of them.
  void take_tiles(const Item& item, Scratch& scratch) const {
    const NodePlan& plan = node_of(item);
    const bool same_tiles =
        item.first_tile == scratch.first_tile && item.num_tiles == scratch.num_tiles;
    if (same_tiles && item.node == scratch.node) return;
    if (same_tiles && reads_alike(plan, plan_.nodes[static_cast<size_t>(scratch.node)])) {
      scratch.node = item.node;
      for (int64_t i = 0; i < scratch.num_passes; ++i) {
        Pass& pass = scratch.passes[static_cast<size_t>(i)];
        pass = pass_of(plan, scratch.taps[static_cast<size_t>(i)], pass.pixels);
      }
      return;
    }
    plan_tiles(item, scratch);
  }

  void plan_tiles(const Item& item, Scratch& scratch) const {
    const NodePlan& plan = node_of(item);
    const bool adds = plan_.call.residual != nullptr;
    scratch.node = item.node;
    scratch.first_tile = item.first_tile;
    scratch.num_tiles = item.num_tiles;
    scratch.num_passes = 0;
    const char** pixels = scratch.pixels.get();
    int64_t begin = plan_.tile_edge(item.first_tile);
    Position at = {begin / (plan_.out_h * plan_.out_w), begin / plan_.out_w % plan_.out_h,
                   begin % plan_.out_w};
    for (int64_t t = 0; t < item.num_tiles; ++t) {
      const int64_t end = plan_.tile_edge(item.first_tile + t + 1);
      TilePlan& tile = scratch.tiles[static_cast<size_t>(t)];
      char** rows = scratch.rows.get() + 2 * t * plan_.isa.max_pixels;
      tile.residual = adds ? rows : nullptr;
      tile.out = rows + (adds ? end - begin : 0);
      plan_tile(plan, at, end - begin, tile, scratch, pixels);
      begin = end;
    }
  }

  // Whether pixel pointers of one node's tiles are those of the other's.
  static bool reads_alike(const NodePlan& a, const NodePlan& b) {
    if (a.offsets.size() != b.offsets.size()) return false;
    for (size_t s = 0; s < a.offsets.size(); ++s) {
      if (a.node->segments[s].source != b.node->segments[s].source) return false;
      if ((a.tap_rows[s] == 0) != (b.tap_rows[s] == 0)) return false;
    }
    return true;
  }

  Pass pass_of(const NodePlan& plan, const PassTaps& taps, const char* const* pixels) const {
    const size_t s = static_cast<size_t>(taps.segment);
    const int64_t rows = plan.tap_rows[s];
    const int32_t* offsets = plan.offsets[s].data();
    if (taps.tap == kAllTaps) {
      return {pixels, offsets, offsets + rows * plan_.geometry.taps(), plan.first_row[s]};
    }
    return {pixels, offsets, offsets + rows, plan.first_row[s] + taps.tap * rows};
  }

  // The memory that a tile reads, where that is one piece: a 1 x 1 window over neighbours.
  struct Span {
    const char* from = nullptr;
    int64_t bytes = 0;
  };

  Span span_of(const TilePlan& tile) const {
    if (plan_.geometry.taps() > 1 || tile.num_passes == 0) return {};
    const char* const* pixels = tile.passes[0].pixels;
    const int64_t pixel_bytes = plan_.sources[0].channels * plan_.input_bytes;
    const int64_t bytes = pixels[tile.num_pixels - 1] - pixels[0] + pixel_bytes;
    return bytes == tile.num_pixels * pixel_bytes ? Span{pixels[0], bytes} : Span{};
  }

  const NodePlan& node_of(const Item& item) const {
    return plan_.nodes[static_cast<size_t>(item.node)];
  }

  const char* panel_of(const NodePlan& plan, int64_t panel) const {
    return plan.panels + panel * plan_.panel_row_bytes() * plan.rows;
  }

  // Pixels of a tile that lie side by side in one row of the output.
  struct Run {
    int64_t image, y, x;  // of the first pixel's window, in the input
    int64_t first, count;
  };

  // Fills `tile`, adds its passes to the scratch's, and advances `at` and `pixels` past what it
  // used.
  void plan_tile(const NodePlan& plan, Position& at, int64_t count, TilePlan& tile,
                 Scratch& scratch, const char**& pixels) const {
    Pass* const first_pass = scratch.passes.get() + scratch.num_passes;
    Pass* pass = first_pass;
    PassTaps* taps = scratch.taps.get() + scratch.num_passes;
    const Conv2dGeometry& geometry = plan_.geometry;
    const Conv2dCall& call = plan_.call;
    Run runs[kMostPixels];
    int num_runs = 0;
    bool inside = true;
    for (int64_t p = 0; p < count;) {
      const int64_t side_by_side = std::min(count - p, plan_.out_w - at.w);
      const Run run = {at.n, at.h * geometry.stride_h - geometry.padding_h,
                       at.w * geometry.stride_w - geometry.padding_w, p, side_by_side};
      inside &= run.y >= 0 && run.x >= 0 &&
                run.y + (geometry.kernel_h - 1) * geometry.dilation_h < call.in_h &&
                run.x + (side_by_side - 1) * geometry.stride_w +
                        (geometry.kernel_w - 1) * geometry.dilation_w <
                    call.in_w;
      char* out = plan_.out.at(at.n, at.h, at.w);
      for (int64_t k = 0; k < side_by_side; ++k) tile.out[p + k] = out + k * plan_.out.stride_w;
      if (call.residual != nullptr) {
        char* residual = const_cast<char*>(plan_.residual.at(at.n, at.h, at.w));
        for (int64_t k = 0; k < side_by_side; ++k) {
          tile.residual[p + k] = residual + k * plan_.residual.stride_w;
        }
      }
      runs[num_runs++] = run;
      p += side_by_side;
      at.w += side_by_side;
      if (at.w < plan_.out_w) continue;
      at.w = 0;
      if (++at.h == plan_.out_h) {
        at.h = 0;
        ++at.n;
      }
    }
    tile.num_pixels = count;
    tile.passes = first_pass;
    for (size_t s = 0; s < plan.offsets.size(); ++s) {
      const Segment& segment = plan.node->segments[s];
      const Map<const char>& source = plan_.sources[static_cast<size_t>(segment.source)];
      if (plan.tap_rows[s] == 0) continue;
      const int64_t step = geometry.stride_w * source.stride_w;
      if (inside) {
        for (int r = 0; r < num_runs; ++r) {
          const Run& run = runs[r];
          const char* data = source.at(run.image, run.y, run.x);
          for (int64_t k = 0; k < run.count; ++k) pixels[run.first + k] = data + k * step;
        }
        *taps = {static_cast<int32_t>(s), kAllTaps};
        *pass++ = pass_of(plan, *taps++, pixels);
        pixels += count;
        continue;
      }
      // At a border every tap has its own pointers; taps that lie outside read zeros, and a tap
      // that is outside for the whole tile is left out.
      int32_t tap = 0;
      for (int64_t r = 0; r < geometry.kernel_h; ++r) {
        for (int64_t c = 0; c < geometry.kernel_w; ++c, ++tap) {
          bool any = false;
          for (int i = 0; i < num_runs; ++i) {
            const Run& run = runs[i];
            const int64_t ih = run.y + r * geometry.dilation_h;
            const int64_t iw = run.x + c * geometry.dilation_w;
            const bool in_map = ih >= 0 && ih < call.in_h;
            const char* data = source.at(run.image, ih, iw);
            for (int64_t k = 0; k < run.count; ++k) {
              const int64_t w = iw + k * geometry.stride_w;
              const bool valid = in_map && w >= 0 && w < call.in_w;
              pixels[run.first + k] = valid ? data + k * step : plan_.zeros.data();
              any |= valid;
            }
          }
          if (!any && !plan_.border_counts) continue;
          *taps = {static_cast<int32_t>(s), tap};
          *pass++ = pass_of(plan, *taps++, pixels);
          pixels += count;
        }
      }
    }
    tile.num_passes = pass - first_pass;
    scratch.num_passes += tile.num_passes;
  }

  // At once, or when the queue is flushed.
  void run_tile(const NodePlan& plan, int64_t panel, const TilePlan& planned,
                const Prefetch& prefetch, Scratch& scratch) const {
    const PanelPlan& shared = plan.panel_plans[static_cast<size_t>(panel)];
    const MicroKernel kernel = shared.kernels[(planned.num_pixels - 1) * plan_.isa.max_vectors];
    Tile& tile = scratch.queue.push(kernel);
    tile = shared.tile;
    tile.passes = planned.passes;
    tile.num_passes = planned.num_passes;
    tile.out = planned.out;
    tile.residual = planned.residual;
    tile.touched = planned.residual != nullptr ? planned.residual : planned.out;
    tile.last_touched = planned.out + planned.num_pixels - 1;
    tile.prefetch = prefetch.from;
    tile.prefetch_step = prefetch.step_bytes;
    if (plan.scattered) run_scattered(plan, panel, tile, planned, scratch);
  }

  // Output channels that are no run: the tile works on a dense copy of its outputs.
  void run_scattered(const NodePlan& plan, int64_t panel, Tile& tile, const TilePlan& planned,
                     Scratch& scratch) const {
    const int32_t* channels = plan.node->out_channels.data() + panel * plan_.panel_width();
    const size_t bytes = static_cast<size_t>(plan_.element_bytes);
    const int64_t width = plan_.panel_width() * plan_.element_bytes;
    char* out[kMostPixels];
    const char* residual[kMostPixels];
    for (int64_t p = 0; p < planned.num_pixels; ++p) {
      char* row = scratch.scattered.data() + p * width;
      char* added = row + plan_.isa.max_pixels * width;
      out[p] = row;
      residual[p] = added;
      for (int64_t o = 0; o < tile.num_channels; ++o) {
        const int64_t from = channels[o] * plan_.element_bytes, to = o * plan_.element_bytes;
        if (tile.accumulate) std::memcpy(row + to, planned.out[p] + from, bytes);
        if (tile.residual != nullptr) std::memcpy(added + to, planned.residual[p] + from, bytes);
      }
    }
    tile.out = out;
    tile.touched = out;
    tile.last_touched = out;
    if (tile.residual != nullptr) tile.residual = residual;
    tile.first_channel = 0;
    const int64_t num_channels = tile.num_channels;
    scratch.queue.flush();
    for (int64_t p = 0; p < planned.num_pixels; ++p) {
      for (int64_t o = 0; o < num_channels; ++o) {
        std::memcpy(planned.out[p] + channels[o] * plan_.element_bytes,
                    out[p] + o * plan_.element_bytes, bytes);
      }
    }
  }

  const ConvPlan& plan_;
};

}  // namespace

void run_plan(const ConvPlan& plan) {
  if (is_winograd(plan.geometry.algorithm)) {
    run_winograd(plan);
  } else {
    Runner(plan).execute();
  }
}

}  // namespace disco
