// Portable part of the convolution: tiles, borders and threads around the micro-kernels.

#include <algorithm>
#include <memory>

#include "conv2d_plan.h"

namespace disco {
namespace {

// Up to here a node's weights stay in the second-level cache while the tiles go by, and every tile
// takes all panels; beyond, every panel takes all tiles. ResNet-50 for two nodes at density 0.2,
// whole pass, one thread, 2 MB cache: 46.4 ms with 0, 44.3 with 192 KB, 43.5 with 390 KB, 44.5 with
// 780 KB.
constexpr int64_t kNearWeightBytes = 384 * 1024;
// One register tile of an item: built once, used for every panel.
struct TilePlan {
  int64_t num_pixels;
  int64_t num_passes;
  Pass* passes;
  float** out;
  const float** residual;
};

// Where a tile's prefetches start and how far apart the rows' are.
struct Prefetch {
  const char* from;
  int64_t step_bytes;
};

// Memory for the tiles of one item; the pointer tables of borders dominate.
struct Scratch {
  std::unique_ptr<TilePlan[]> tiles;
  std::unique_ptr<Pass[]> passes;
  std::unique_ptr<const float*[]> pixels;
  std::unique_ptr<float*[]> out;
  std::unique_ptr<const float*[]> residual;
  std::vector<float> scattered;  // [mr][panel width] for the output, then the same for the residual
};

class Runner {
 public:
  explicit Runner(const ConvPlan& plan) : plan_(plan) {}

  void execute() {
    const int num_threads = std::max(1, std::min<int>(plan_.call.num_threads, plan_.items.size()));
    const int64_t count = static_cast<int64_t>(plan_.items.size());
    // Items are independent and each output's sum has one order, so any schedule gives the same
    // bits.
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
      Scratch scratch = make_scratch();
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < count; ++i) {
        const int64_t next = i + num_threads;
        run_item(plan_.items[static_cast<size_t>(i)],
                 next < count ? &plan_.items[static_cast<size_t>(next)] : nullptr, scratch);
      }
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
    scratch.pixels.reset(new const float*[passes * mr]);
    scratch.out.reset(new float*[tiles * mr]);
    scratch.residual.reset(new const float*[tiles * mr]);
    scratch.scattered.resize(2 * mr * static_cast<size_t>(plan_.panel_width()));
    return scratch;
  }

  // `next` is what this thread most likely does afterwards, or nullptr.
  void run_item(const Item& item, const Item* next, Scratch& scratch) const {
    const NodePlan& plan = node_of(item);
    const int64_t num_tiles = item.num_tiles;
    Pass* pass = scratch.passes.get();
    const float** pixels = scratch.pixels.get();
    for (int64_t t = 0; t < num_tiles; ++t) {
      const int64_t begin = plan_.tile_edge(item.first_tile + t);
      const int64_t end = plan_.tile_edge(item.first_tile + t + 1);
      TilePlan& tile = scratch.tiles[static_cast<size_t>(t)];
      tile.out = scratch.out.get() + t * plan_.isa.max_pixels;
      tile.residual = scratch.residual.get() + t * plan_.isa.max_pixels;
      plan_tile(plan, begin, end - begin, tile, pass, pixels);
    }
    const int64_t end = item.first_panel + item.num_panels;
    const int64_t row_bytes = plan_.panel_width() * static_cast<int64_t>(sizeof(float));
    if (item.num_panels * plan.rows * row_bytes <= kNearWeightBytes) {
      // All panels stay near, so a tile's inputs are read and its outputs written in one go. Only
      // the first tile finds the weights far away.
      for (int64_t t = 0; t < num_tiles; ++t) {
        for (int64_t p = item.first_panel; p < end; ++p) {
          const bool fetch = t == 0 && p + 1 < end;
          const char* from = reinterpret_cast<const char*>(panel_of(plan, fetch ? p + 1 : p));
          run_tile(plan, p, scratch.tiles[static_cast<size_t>(t)], {from, fetch ? row_bytes : 0},
                   scratch);
        }
      }
      return;
    }
    for (int64_t p = item.first_panel; p < end; ++p) {
      // Weights come from far away once a pass: while one panel is used, each tile fetches its part
      // of the next one, which belongs to the next item after the last panel.
      const float* upcoming = p + 1 < end       ? panel_of(plan, p + 1)
                              : next != nullptr ? panel_of(node_of(*next), next->first_panel)
                                                : panel_of(plan, p);
      const int64_t step = (row_bytes + num_tiles - 1) / num_tiles;
      for (int64_t t = 0; t < num_tiles; ++t) {
        const char* from = reinterpret_cast<const char*>(upcoming) + t * step * plan.rows;
        run_tile(plan, p, scratch.tiles[static_cast<size_t>(t)], {from, step}, scratch);
      }
    }
  }

  const NodePlan& node_of(const Item& item) const {
    return plan_.nodes[static_cast<size_t>(item.node)];
  }

  const float* panel_of(const NodePlan& plan, int64_t panel) const {
    return plan.panels + panel * plan_.panel_width() * plan.rows;
  }

  // Fills `tile` and advances `pass` and `pixels` past what it used.
  void plan_tile(const NodePlan& plan, int64_t first, int64_t count, TilePlan& tile, Pass*& pass,
                 const float**& pixels) const {
    int64_t image[64], y[64], x[64];
    int64_t n = first / (plan_.out_h * plan_.out_w);
    int64_t oh = first / plan_.out_w % plan_.out_h;
    int64_t ow = first % plan_.out_w;
    bool inside = true;
    for (int64_t p = 0; p < count; ++p) {
      image[p] = n;
      y[p] = oh * plan_.geometry.stride_h - plan_.geometry.padding_h;
      x[p] = ow * plan_.geometry.stride_w - plan_.geometry.padding_w;
      inside &=
          y[p] >= 0 && x[p] >= 0 &&
          y[p] + (plan_.geometry.kernel_h - 1) * plan_.geometry.dilation_h < plan_.call.in_h &&
          x[p] + (plan_.geometry.kernel_w - 1) * plan_.geometry.dilation_w < plan_.call.in_w;
      const OutputView& out = plan_.call.out;
      tile.out[p] = out.data + n * out.stride_n + oh * out.stride_h + ow * out.stride_w;
      if (plan_.call.residual != nullptr) {
        tile.residual[p] = plan_.call.residual + n * plan_.call.residual_stride_n +
                           oh * plan_.call.residual_stride_h + ow * plan_.call.residual_stride_w;
      }
      if (++ow == plan_.out_w) {
        ow = 0;
        if (++oh == plan_.out_h) {
          oh = 0;
          ++n;
        }
      }
    }
    tile.num_pixels = count;
    tile.passes = pass;
    for (size_t s = 0; s < plan.offsets.size(); ++s) {
      const Segment& segment = plan.node->segments[s];
      const SourceView& source = plan_.call.sources[static_cast<size_t>(segment.source)];
      const int64_t channels = static_cast<int64_t>(segment.channels.size());
      if (channels == 0) continue;
      if (inside) {
        for (int64_t p = 0; p < count; ++p) {
          pixels[p] = source.data + image[p] * source.stride_n + y[p] * source.stride_h +
                      x[p] * source.stride_w;
        }
        *pass++ = {pixels, plan.offsets[s].data(), channels * plan_.geometry.taps(),
                   plan.first_row[s]};
        pixels += count;
        continue;
      }
      // At a border every tap has its own pointers; taps that lie outside read zeros, and a tap
      // that is outside for the whole tile is left out.
      int64_t row = plan.first_row[s];
      for (int64_t r = 0; r < plan_.geometry.kernel_h; ++r) {
        for (int64_t c = 0; c < plan_.geometry.kernel_w; ++c, row += channels) {
          bool any = false;
          for (int64_t p = 0; p < count; ++p) {
            const int64_t ih = y[p] + r * plan_.geometry.dilation_h;
            const int64_t iw = x[p] + c * plan_.geometry.dilation_w;
            const bool valid = ih >= 0 && ih < plan_.call.in_h && iw >= 0 && iw < plan_.call.in_w;
            pixels[p] = valid ? source.data + image[p] * source.stride_n + ih * source.stride_h +
                                    iw * source.stride_w
                              : plan_.zeros.data();
            any |= valid;
          }
          if (!any) continue;
          *pass++ = {pixels, plan.offsets[s].data(), channels, row};
          pixels += count;
        }
      }
    }
    tile.num_passes = pass - tile.passes;
  }

  void run_tile(const NodePlan& plan, int64_t panel, const TilePlan& planned,
                const Prefetch& prefetch, Scratch& scratch) const {
    const int64_t outputs = static_cast<int64_t>(plan.node->out_channels.size());
    const int64_t first = panel * plan_.panel_width();
    const int64_t valid = std::min(plan_.panel_width(), outputs - first);
    const int64_t vectors = (valid + plan_.isa.vector_length - 1) / plan_.isa.vector_length;
    Tile tile;
    tile.passes = planned.passes;
    tile.num_passes = planned.num_passes;
    tile.panel = panel_of(plan, panel);
    tile.bias = plan.bias.data() + first;
    tile.out = planned.out;
    tile.residual = plan_.call.residual != nullptr ? planned.residual : nullptr;
    tile.first_channel = plan.first_out + first;
    tile.num_channels = valid;
    tile.prefetch = prefetch.from;
    tile.prefetch_step = prefetch.step_bytes;
    tile.accumulate = plan_.call.accumulate;
    tile.activation = plan_.activation;
    const MicroKernel kernel =
        plan_.isa.kernels[(planned.num_pixels - 1) * plan_.isa.max_vectors + vectors - 1];
    if (plan.scattered) {
      run_scattered(plan.node->out_channels.data() + first, kernel, tile, planned, scratch);
    } else {
      kernel(tile);
    }
  }

  // Output channels that are no run: the tile works on a dense copy of its outputs.
  void run_scattered(const int32_t* channels, MicroKernel kernel, Tile tile,
                     const TilePlan& planned, Scratch& scratch) const {
    const int64_t width = plan_.panel_width();
    float* out[64];
    const float* residual[64];
    for (int64_t p = 0; p < planned.num_pixels; ++p) {
      float* row = scratch.scattered.data() + p * width;
      float* added = row + plan_.isa.max_pixels * width;
      out[p] = row;
      residual[p] = added;
      for (int64_t o = 0; o < tile.num_channels; ++o) {
        if (tile.accumulate) row[o] = planned.out[p][channels[o]];
        if (tile.residual != nullptr) added[o] = planned.residual[p][channels[o]];
      }
    }
    tile.out = out;
    if (tile.residual != nullptr) tile.residual = residual;
    tile.first_channel = 0;
    kernel(tile);
    for (int64_t p = 0; p < planned.num_pixels; ++p) {
      for (int64_t o = 0; o < tile.num_channels; ++o) planned.out[p][channels[o]] = out[p][o];
    }
  }

  const ConvPlan& plan_;
};

}  // namespace

void run_plan(const ConvPlan& plan) { Runner(plan).execute(); }

}  // namespace disco
