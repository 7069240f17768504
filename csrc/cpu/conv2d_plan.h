// What one call of a convolution comes down to: nodes with their offsets, and items of work.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "conv2d.h"

namespace disco {

[[noreturn]] inline void refuse(const std::string& message) {
  throw std::invalid_argument(message);
}

// An activation with strides in bytes: from here on the data type is the micro-kernels' affair.
template <typename Byte>
struct Map {
  Byte* data;
  int64_t channels;
  int64_t stride_n, stride_h, stride_w;

  Byte* at(int64_t n, int64_t h, int64_t w) const {
    return data + n * stride_n + h * stride_h + w * stride_w;
  }
};

struct OutputSize {
  int64_t h, w;
};

// Throw std::invalid_argument: for a kernel, stride, dilation, padding or activation that cannot
// be, and for a window that does not fit into the padded input.
void check_window(const Conv2dGeometry& geometry);
void check_activation(Activation activation);
OutputSize output_size(const Conv2dGeometry& geometry, int64_t in_h, int64_t in_w);

// One panel of a node's weights.
struct PanelPlan {
  Tile tile;                   // what all tiles of it share; the rest is not set
  const MicroKernel* kernels;  // of its width; those of a height are isa.max_vectors apart
};

// Everything about one node that does not depend on the pixel.
struct NodePlan {
  const Node* node;
  const char* panels;
  int64_t rows;                               // of the panel, all taps or points
  std::vector<std::vector<int32_t>> offsets;  // per segment [taps][rows]; not for Winograd
  std::vector<int64_t> tap_rows;              // per segment, rows of one tap
  std::vector<int64_t> first_row;             // per segment
  std::vector<float> bias;                    // padded to whole panels
  std::vector<float> scale;                   // of kQuads, likewise
  int64_t num_panels;
  std::vector<PanelPlan> panel_plans;  // not for Winograd
  int64_t first_out;  // the out channels are first_out, first_out + 1, ... unless scattered
  bool scattered;
};

// A run of tiles and panels of one node, done by one thread.
struct Item {
  int32_t node;
  int64_t first_tile, num_tiles;
  int64_t first_panel, num_panels;
};

// Everything that is decided before the first multiplication; the threads only read it.
struct ConvPlan {
  // Throws std::invalid_argument if sources, packed weights and output do not fit each other. Keeps
  // references: the arguments must outlive the plan.
  ConvPlan(const Conv2dGeometry& geometry, const std::vector<Node>& nodes, Activation activation,
           const Conv2dCall& call);

  int64_t panel_width() const { return int64_t{isa.vector_length} * isa.max_vectors; }
  int64_t panel_row_bytes() const { return 4 * panel_width(); }

  // Tiles of nearly equal height: a ragged last tile would run at a fraction of the speed. Which
  // pixels share a tile does not depend on the blocks, nor on the number of threads: it decides
  // which taps of a border are left out, and 0 * infinity and -0 + 0 would show that.
  int64_t tile_edge(int64_t t) const { return num_pixels * t / num_tiles; }

  const IsaKernels& isa;
  const Conv2dGeometry& geometry;
  const Activation activation;
  const Conv2dCall& call;
  const int64_t element_bytes;
  const int64_t input_bytes;  // of an element that the micro-kernels read
  const bool unfinished;      // the call ends before the last segment
  std::vector<Map<const char>> sources;
  Map<char> out;
  Map<const char> residual;  // data is nullptr if there is none
  int64_t out_h = 0, out_w = 0;
  int64_t num_pixels = 0, num_tiles = 0;
  int64_t most_tiles = 0;      // of an item
  int64_t most_panels = 0;     // of a node
  std::vector<char> zeros;     // what a border reads outside of the map
  bool border_counts = false;  // these are zeros that stand for no zero byte
  std::vector<NodePlan> nodes;
  std::vector<Item> items;
  bool by_panels = false;      // the threads share the panels of a node, not the pixels
  std::vector<int64_t> homes;  // where each thread's items begin, and where the last one's end
  // Set by the caller: where to gather channels from, an item's when it begins, for they then are
  // in the cache. Only if no two items share pixels of a node, and pixels are all that they share.
  const StagedCall* staged = nullptr;
  // Set by the caller: what takes the outputs' listed channels.
  const FusedMessages* messages = nullptr;
  bool gathers_by_item = false;

 private:
  void plan_maps();
  void plan_nodes(const std::vector<Node>& given);
  void plan_segments(const Node& node, NodePlan& plan) const;
  void plan_panels(NodePlan& plan) const;
  void plan_quads(const char* packed, const WeightShape& shape, NodePlan& plan) const;
  void plan_items();
};

// Whether a segment can be read in place by rows of so many channels: these lie side by side.
bool neighbours(const Segment& segment, int64_t together);

// The weights that a node must bring for this geometry.
WeightShape weight_shape(const Conv2dGeometry& geometry, const Node& node);

// Runs the plan, on as many threads as the call asks for.
void run_plan(const ConvPlan& plan);

// Plans of a Winograd algorithm; they have no items.
void run_winograd(const ConvPlan& plan);

}  // namespace disco
