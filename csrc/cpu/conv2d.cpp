// Portable part of the convolution: blocking, borders and threads around the micro-kernels.

#include "conv2d.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>

#include "packed_header.h"

namespace disco {
namespace {

// Input bytes that one work item touches: they stay in a 1 MB second-level cache beside a panel of
// weights (K = 2,763 of a 3x3 layer with 512 + 51 channels is 354 KB) while the panels go by.
constexpr int64_t kInputBlockBytes = 256 * 1024;
// Up to here a node's weights stay in the second-level cache while the tiles go by, and every tile
// takes all panels; beyond, every panel takes all tiles. ResNet-50 for two nodes at density 0.2,
// whole pass, one thread, 2 MB cache: 46.4 ms with 0, 44.3 with 192 KB, 43.5 with 390 KB, 44.5 with
// 780 KB.
constexpr int64_t kNearWeightBytes = 384 * 1024;
// Work items per thread, so that one thread's delay leaves work for the others to take.
constexpr int64_t kItemsPerThread = 4;

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

// Everything about one node that does not depend on the pixel.
struct NodePlan {
  const Node* node;
  const float* panels;
  int64_t rows;                               // K of the panel
  std::vector<std::vector<int32_t>> offsets;  // per segment [taps][channels]
  std::vector<int64_t> first_row;             // per segment
  std::vector<float> bias;                    // padded to whole panels
  int64_t num_panels;
  int64_t first_out;  // the out channels are first_out, first_out + 1, ... unless scattered
  bool scattered;
};

// A run of tiles and panels of one node, done by one thread.
struct Item {
  int32_t node;
  int64_t first_tile, num_tiles;
  int64_t first_panel, num_panels;
};

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

class Run {
 public:
  Run(const Conv2dGeometry& geometry, const std::vector<Node>& nodes, Activation activation,
      const Conv2dCall& call)
      : isa_(active_isa()), geometry_(geometry), activation_(activation), call_(call) {
    const int64_t span_h = geometry.dilation_h * (geometry.kernel_h - 1) + 1;
    const int64_t span_w = geometry.dilation_w * (geometry.kernel_w - 1) + 1;
    const int64_t room_h = call.in_h + 2 * geometry.padding_h - span_h;
    const int64_t room_w = call.in_w + 2 * geometry.padding_w - span_w;
    if (room_h < 0 || room_w < 0) {
      refuse("an input of " + std::to_string(call.in_h) + " x " + std::to_string(call.in_w) +
             " is smaller than the kernel's window of " + std::to_string(span_h) + " x " +
             std::to_string(span_w) + " less the padding");
    }
    out_h_ = room_h / geometry.stride_h + 1;
    out_w_ = room_w / geometry.stride_w + 1;
    num_pixels_ = call.batch * out_h_ * out_w_;
    num_tiles_ = (num_pixels_ + isa_.max_pixels - 1) / isa_.max_pixels;
    int64_t most_channels = 0;
    for (const SourceView& source : call.sources) {
      most_channels = std::max(most_channels, source.channels);
      if (source.channels > 1 && source.stride_c != 1) {
        refuse("a source of more than " + std::to_string(kFewChannels) +
               " channels must have a channel stride of 1, given " +
               std::to_string(source.stride_c));
      }
    }
    zeros_.assign(static_cast<size_t>(most_channels), 0.0f);
    plan_nodes(nodes);
    plan_items();
  }

  void execute() {
    const int num_threads = std::max(1, std::min<int>(call_.num_threads, items_.size()));
    const int64_t count = static_cast<int64_t>(items_.size());
    // Items are independent and each output's sum has one order, so any schedule gives the same
    // bits.
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
      Scratch scratch = make_scratch();
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < count; ++i) {
        const int64_t next = i + num_threads;
        run_item(items_[static_cast<size_t>(i)],
                 next < count ? &items_[static_cast<size_t>(next)] : nullptr, scratch);
      }
    }
  }

 private:
  int64_t panel_width() const { return int64_t{isa_.vector_length} * isa_.max_vectors; }

  void plan_nodes(const std::vector<Node>& nodes) {
    const int64_t taps = geometry_.taps();
    const float* packed = call_.packed;
    int64_t left = call_.packed_size;
    for (const Node& node : nodes) {
      NodePlan plan;
      plan.node = &node;
      const int64_t outputs = static_cast<int64_t>(node.out_channels.size());
      const int64_t size = disco::packed_size(isa_, outputs, node.num_in_channels(), taps);
      const PackedHeader wanted = packed_header(isa_, outputs, node.num_in_channels(), taps);
      if (size > left || std::memcmp(packed, &wanted, sizeof(wanted)) != 0) {
        refuse(std::string("the packed weights are not those of this layer for ") + isa_.name +
               ": pack them again (prepack, or repack() of the module)");
      }
      plan.panels = packed + kHeaderWords;
      packed += size;
      left -= size;
      plan.rows = node.num_in_channels() * taps;
      plan_segments(node, plan);
      plan.num_panels = (outputs + panel_width() - 1) / panel_width();
      plan.bias.assign(static_cast<size_t>(plan.num_panels * panel_width()), 0.0f);
      plan.first_out = outputs > 0 ? node.out_channels[0] : 0;
      plan.scattered = false;
      for (int64_t o = 0; o < outputs; ++o) {
        const int32_t channel = node.out_channels[static_cast<size_t>(o)];
        plan.scattered |= channel != plan.first_out + o;
        if (channel < 0 || channel >= call_.out_channels) {
          refuse("output channel " + std::to_string(channel) + " is not one of the output's " +
                 std::to_string(call_.out_channels));
        }
        if (call_.bias != nullptr && !call_.accumulate) {
          plan.bias[static_cast<size_t>(o)] = call_.bias[channel];
        }
      }
      nodes_.push_back(std::move(plan));
    }
    if (left != 0) refuse("the packed weights are longer than this layer's nodes need");
  }

  void plan_segments(const Node& node, NodePlan& plan) const {
    int64_t row = 0;
    for (const Segment& segment : node.segments) {
      const int64_t count = static_cast<int64_t>(segment.channels.size());
      if (segment.source < 0 || segment.source >= static_cast<int64_t>(call_.sources.size())) {
        refuse("segment " + std::to_string(plan.offsets.size()) + " reads source " +
               std::to_string(segment.source) + " of " + std::to_string(call_.sources.size()));
      }
      const SourceView& source = call_.sources[static_cast<size_t>(segment.source)];
      const int64_t furthest = (geometry_.kernel_h - 1) * geometry_.dilation_h * source.stride_h +
                               (geometry_.kernel_w - 1) * geometry_.dilation_w * source.stride_w +
                               source.channels;
      if (furthest > std::numeric_limits<int32_t>::max()) {
        refuse("the kernel's window spans more than 2^31 elements of the input");
      }
      std::vector<int32_t> offsets;
      offsets.reserve(static_cast<size_t>(count * geometry_.taps()));
      for (int64_t r = 0; r < geometry_.kernel_h; ++r) {
        for (int64_t s = 0; s < geometry_.kernel_w; ++s) {
          const int64_t tap = r * geometry_.dilation_h * source.stride_h +
                              s * geometry_.dilation_w * source.stride_w;
          for (const int32_t channel : segment.channels) {
            if (channel < 0 || channel >= source.channels) {
              refuse("channel " + std::to_string(channel) + " is not one of the segment's " +
                     std::to_string(source.channels));
            }
            offsets.push_back(static_cast<int32_t>(tap + channel));
          }
        }
      }
      plan.offsets.push_back(std::move(offsets));
      plan.first_row.push_back(row);
      row += count * geometry_.taps();
    }
  }

  void plan_items() {
    if (num_pixels_ == 0) return;
    int64_t most_channels = 1, most_panels = 0;
    for (const NodePlan& plan : nodes_) {
      most_channels = std::max(most_channels, plan.node->num_in_channels());
      most_panels = std::max(most_panels, plan.num_panels);
    }
    const int64_t bytes_per_pixel = most_channels * geometry_.stride_h * geometry_.stride_w *
                                    static_cast<int64_t>(sizeof(float));
    const int64_t block =
        std::max<int64_t>(4 * isa_.max_pixels, kInputBlockBytes / bytes_per_pixel);
    int64_t num_blocks = (num_pixels_ + block - 1) / block;
    // Small maps first split by panels: every thread then reads only its share of the weights.
    const int64_t num_nodes = static_cast<int64_t>(nodes_.size());
    const int64_t wanted = call_.num_threads > 1
                               ? (kItemsPerThread * call_.num_threads + num_nodes - 1) / num_nodes
                               : 1;
    int64_t groups = 1;
    if (num_blocks < wanted) {
      groups = std::max<int64_t>(1, std::min(most_panels, (wanted + num_blocks - 1) / num_blocks));
      num_blocks = std::max(num_blocks, std::min(num_tiles_, (wanted + groups - 1) / groups));
    }
    // A block's nodes one after the other: they read the same input, which then still is near.
    for (int64_t b = 0; b < num_blocks; ++b) {
      const int64_t begin = num_tiles_ * b / num_blocks;
      const int64_t end = num_tiles_ * (b + 1) / num_blocks;
      most_tiles_ = std::max(most_tiles_, end - begin);
      for (size_t n = 0; n < nodes_.size() && begin < end; ++n) {
        const int64_t panels = nodes_[n].num_panels;
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t first = panels * g / groups;
          const int64_t count = panels * (g + 1) / groups - first;
          if (count > 0)
            items_.push_back({static_cast<int32_t>(n), begin, end - begin, first, count});
        }
      }
    }
  }

  // Tiles of nearly equal height: a ragged last tile would run at a fraction of the speed. Which
  // pixels share a tile does not depend on the blocks, nor on the number of threads: it decides
  // which taps of a border are left out, and 0 * infinity and -0 + 0 would show that.
  int64_t tile_edge(int64_t t) const { return num_pixels_ * t / num_tiles_; }

  Scratch make_scratch() const {
    size_t segments = 0;
    for (const NodePlan& plan : nodes_) segments = std::max(segments, plan.offsets.size());
    const size_t tiles = static_cast<size_t>(most_tiles_);
    const size_t passes = tiles * segments * static_cast<size_t>(geometry_.taps());
    const size_t mr = static_cast<size_t>(isa_.max_pixels);
    Scratch scratch;
    // Uninitialised on purpose: interior tiles use a small part of it.
    scratch.tiles.reset(new TilePlan[tiles]);
    scratch.passes.reset(new Pass[passes]);
    scratch.pixels.reset(new const float*[passes * mr]);
    scratch.out.reset(new float*[tiles * mr]);
    scratch.residual.reset(new const float*[tiles * mr]);
    scratch.scattered.resize(2 * mr * static_cast<size_t>(panel_width()));
    return scratch;
  }

  // `next` is what this thread most likely does afterwards, or nullptr.
  void run_item(const Item& item, const Item* next, Scratch& scratch) const {
    const NodePlan& plan = node_of(item);
    const int64_t num_tiles = item.num_tiles;
    Pass* pass = scratch.passes.get();
    const float** pixels = scratch.pixels.get();
    for (int64_t t = 0; t < num_tiles; ++t) {
      const int64_t begin = tile_edge(item.first_tile + t);
      const int64_t end = tile_edge(item.first_tile + t + 1);
      TilePlan& tile = scratch.tiles[static_cast<size_t>(t)];
      tile.out = scratch.out.get() + t * isa_.max_pixels;
      tile.residual = scratch.residual.get() + t * isa_.max_pixels;
      plan_tile(plan, begin, end - begin, tile, pass, pixels);
    }
    const int64_t end = item.first_panel + item.num_panels;
    const int64_t row_bytes = panel_width() * static_cast<int64_t>(sizeof(float));
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

  const NodePlan& node_of(const Item& item) const { return nodes_[static_cast<size_t>(item.node)]; }

  const float* panel_of(const NodePlan& plan, int64_t panel) const {
    return plan.panels + panel * panel_width() * plan.rows;
  }

  // Fills `tile` and advances `pass` and `pixels` past what it used.
  void plan_tile(const NodePlan& plan, int64_t first, int64_t count, TilePlan& tile, Pass*& pass,
                 const float**& pixels) const {
    int64_t image[64], y[64], x[64];
    int64_t n = first / (out_h_ * out_w_);
    int64_t oh = first / out_w_ % out_h_;
    int64_t ow = first % out_w_;
    bool inside = true;
    for (int64_t p = 0; p < count; ++p) {
      image[p] = n;
      y[p] = oh * geometry_.stride_h - geometry_.padding_h;
      x[p] = ow * geometry_.stride_w - geometry_.padding_w;
      inside &= y[p] >= 0 && x[p] >= 0 &&
                y[p] + (geometry_.kernel_h - 1) * geometry_.dilation_h < call_.in_h &&
                x[p] + (geometry_.kernel_w - 1) * geometry_.dilation_w < call_.in_w;
      const OutputView& out = call_.out;
      tile.out[p] = out.data + n * out.stride_n + oh * out.stride_h + ow * out.stride_w;
      if (call_.residual != nullptr) {
        tile.residual[p] = call_.residual + n * call_.residual_stride_n +
                           oh * call_.residual_stride_h + ow * call_.residual_stride_w;
      }
      if (++ow == out_w_) {
        ow = 0;
        if (++oh == out_h_) {
          oh = 0;
          ++n;
        }
      }
    }
    tile.num_pixels = count;
    tile.passes = pass;
    for (size_t s = 0; s < plan.offsets.size(); ++s) {
      const Segment& segment = plan.node->segments[s];
      const SourceView& source = call_.sources[static_cast<size_t>(segment.source)];
      const int64_t channels = static_cast<int64_t>(segment.channels.size());
      if (channels == 0) continue;
      if (inside) {
        for (int64_t p = 0; p < count; ++p) {
          pixels[p] = source.data + image[p] * source.stride_n + y[p] * source.stride_h +
                      x[p] * source.stride_w;
        }
        *pass++ = {pixels, plan.offsets[s].data(), channels * geometry_.taps(), plan.first_row[s]};
        pixels += count;
        continue;
      }
      // At a border every tap has its own pointers; taps that lie outside read zeros, and a tap
      // that is outside for the whole tile is left out.
      int64_t row = plan.first_row[s];
      for (int64_t r = 0; r < geometry_.kernel_h; ++r) {
        for (int64_t c = 0; c < geometry_.kernel_w; ++c, row += channels) {
          bool any = false;
          for (int64_t p = 0; p < count; ++p) {
            const int64_t ih = y[p] + r * geometry_.dilation_h;
            const int64_t iw = x[p] + c * geometry_.dilation_w;
            const bool valid = ih >= 0 && ih < call_.in_h && iw >= 0 && iw < call_.in_w;
            pixels[p] = valid ? source.data + image[p] * source.stride_n + ih * source.stride_h +
                                    iw * source.stride_w
                              : zeros_.data();
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
    const int64_t first = panel * panel_width();
    const int64_t valid = std::min(panel_width(), outputs - first);
    const int64_t vectors = (valid + isa_.vector_length - 1) / isa_.vector_length;
    Tile tile;
    tile.passes = planned.passes;
    tile.num_passes = planned.num_passes;
    tile.panel = panel_of(plan, panel);
    tile.bias = plan.bias.data() + first;
    tile.out = planned.out;
    tile.residual = call_.residual != nullptr ? planned.residual : nullptr;
    tile.first_channel = plan.first_out + first;
    tile.num_channels = valid;
    tile.prefetch = prefetch.from;
    tile.prefetch_step = prefetch.step_bytes;
    tile.accumulate = call_.accumulate;
    tile.activation = activation_;
    const MicroKernel kernel =
        isa_.kernels[(planned.num_pixels - 1) * isa_.max_vectors + vectors - 1];
    if (plan.scattered) {
      run_scattered(plan.node->out_channels.data() + first, kernel, tile, planned, scratch);
    } else {
      kernel(tile);
    }
  }

  // Output channels that are no run: the tile works on a dense copy of its outputs.
  void run_scattered(const int32_t* channels, MicroKernel kernel, Tile tile,
                     const TilePlan& planned, Scratch& scratch) const {
    const int64_t width = panel_width();
    float* out[64];
    const float* residual[64];
    for (int64_t p = 0; p < planned.num_pixels; ++p) {
      float* row = scratch.scattered.data() + p * width;
      float* added = row + isa_.max_pixels * width;
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

  const IsaKernels& isa_;
  const Conv2dGeometry& geometry_;
  const Activation activation_;
  const Conv2dCall& call_;
  int64_t out_h_ = 0, out_w_ = 0, num_pixels_ = 0, num_tiles_ = 0, most_tiles_ = 0;
  std::vector<float> zeros_;
  std::vector<NodePlan> nodes_;
  std::vector<Item> items_;
};

// The same convolution over copies of the sources, channels last, with zeros around them.
struct PaddedCall {
  PaddedCall(const Conv2dGeometry& original, const Conv2dCall& from)
      : geometry(original), call(from) {
    geometry.padding_h = geometry.padding_w = 0;
    call.in_h += 2 * original.padding_h;
    call.in_w += 2 * original.padding_w;
    for (SourceView& source : call.sources) {
      const int64_t row = call.in_w * source.channels;
      copies.emplace_back(new float[static_cast<size_t>(call.batch * call.in_h * row)]);
      copy(source, from, original, copies.back().get());
      source = {copies.back().get(), source.channels, call.in_h * row, 1, row, source.channels};
    }
  }

  Conv2dGeometry geometry;
  Conv2dCall call;

 private:
  void copy(const SourceView& source, const Conv2dCall& from, const Conv2dGeometry& original,
            float* to) const {
    const int64_t channels = source.channels, width = call.in_w;
    const int64_t rows = call.batch * call.in_h;
#pragma omp parallel for schedule(static) num_threads(call.num_threads) if (call.num_threads > 1)
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t n = i / call.in_h, h = i % call.in_h - original.padding_h;
      float* row = to + i * width * channels;
      std::fill(row, row + width * channels, 0.0f);
      if (h < 0 || h >= from.in_h) continue;
      for (int64_t c = 0; c < channels; ++c) {
        const float* x =
            source.data + n * source.stride_n + c * source.stride_c + h * source.stride_h;
        float* y = row + original.padding_w * channels + c;
        for (int64_t w = 0; w < from.in_w; ++w) y[w * channels] = x[w * source.stride_w];
      }
    }
  }

  std::vector<std::unique_ptr<float[]>> copies;
};

}  // namespace

int64_t Node::num_in_channels() const {
  int64_t count = 0;
  for (const Segment& segment : segments) count += static_cast<int64_t>(segment.channels.size());
  return count;
}

Conv2d::Conv2d(const Conv2dGeometry& geometry, std::vector<Node> nodes, Activation activation)
    : geometry_(geometry), nodes_(std::move(nodes)), activation_(activation) {
  if (geometry.kernel_h < 1 || geometry.kernel_w < 1 || geometry.stride_h < 1 ||
      geometry.stride_w < 1 || geometry.dilation_h < 1 || geometry.dilation_w < 1 ||
      geometry.padding_h < 0 || geometry.padding_w < 0) {
    refuse("kernel, stride and dilation must be at least 1 and padding at least 0");
  }
}

int64_t Conv2d::packed_size() const {
  int64_t size = 0;
  for (const Node& node : nodes_) {
    size += disco::packed_size(active_isa(), static_cast<int64_t>(node.out_channels.size()),
                               node.num_in_channels(), geometry_.taps());
  }
  return size;
}

void Conv2d::run(const Conv2dCall& call) const {
  bool few = true, plain = geometry_.taps() == 1;
  for (const SourceView& source : call.sources) {
    few &= source.channels <= kFewChannels;
    plain &= source.stride_c == 1;
  }
  if (few && !plain) {
    // With three channels a tap is over after three steps, and an image comes in planes: a copy
    // with the padding around it costs less than the borders and another layout would.
    const PaddedCall padded(geometry_, call);
    Run(padded.geometry, nodes_, activation_, padded.call).execute();
  } else {
    Run(geometry_, nodes_, activation_, call).execute();
  }
}

}  // namespace disco
