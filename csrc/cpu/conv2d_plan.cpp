// Portable part of the convolution: checks, offsets, and the division into items.

#include "conv2d_plan.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "packed_header.h"

namespace disco {
namespace {

// Input bytes that one work item touches: they stay in a 1 MB second-level cache beside a panel of
// weights (K = 2,763 of a 3x3 layer with 512 + 51 channels is 354 KB) while the panels go by.
constexpr int64_t kInputBlockBytes = 256 * 1024;
// Tiles of the smallest block; fewer are not worth the planning.
constexpr int64_t kFewestTiles = 2;

// How much to hand out next, of what is `left` for all threads: less and less, so that they end at
// the same time although one of them may be held up.
int64_t guided(int64_t left, int64_t threads, int64_t fewest, int64_t most) {
  return std::min(left, std::max(fewest, std::min(most, left / (2 * threads))));
}

// Throws for parts of a sum that cannot be; returns whether the call leaves it unfinished.
bool check_parts(const Conv2dGeometry& geometry, const std::vector<Node>& nodes,
                 const Conv2dCall& call) {
  if (!call.in_parts()) return false;
  if (geometry.algorithm != Algorithm::kDirect || geometry.dtype != kFloat32 || nodes.size() != 1) {
    refuse("only direct sums of one node in float32 are made in parts");
  }
  const int64_t count = static_cast<int64_t>(nodes[0].segments.size());
  const int64_t end = call.end_segment < 0 ? count : call.end_segment;
  if (call.first_segment < 0 || call.first_segment > end || end > count) {
    refuse("segments " + std::to_string(call.first_segment) + " to " + std::to_string(end) +
           " are no part of " + std::to_string(count));
  }
  if (call.accumulate != (call.first_segment > 0)) {
    refuse("a part accumulates if and only if it is not the first one");
  }
  if (end == count) return false;
  if (call.residual != nullptr || !call.messages.empty()) {
    refuse("a residual and messages are for the last part of a sum");
  }
  return true;
}

}  // namespace

void check_window(const Conv2dGeometry& geometry) {
  if (geometry.kernel_h < 1 || geometry.kernel_w < 1 || geometry.stride_h < 1 ||
      geometry.stride_w < 1 || geometry.dilation_h < 1 || geometry.dilation_w < 1 ||
      geometry.padding_h < 0 || geometry.padding_w < 0) {
    refuse("kernel, stride and dilation must be at least 1 and padding at least 0");
  }
}

void check_activation(Activation activation) {
  if (activation < 0 || activation >= kNumActivations) {
    refuse("activation " + std::to_string(activation) + " is not one of the " +
           std::to_string(kNumActivations) + " of this build");
  }
}

OutputSize output_size(const Conv2dGeometry& geometry, int64_t in_h, int64_t in_w) {
  const int64_t span_h = geometry.dilation_h * (geometry.kernel_h - 1) + 1;
  const int64_t span_w = geometry.dilation_w * (geometry.kernel_w - 1) + 1;
  const int64_t room_h = in_h + 2 * geometry.padding_h - span_h;
  const int64_t room_w = in_w + 2 * geometry.padding_w - span_w;
  if (room_h < 0 || room_w < 0) {
    refuse("an input of " + std::to_string(in_h) + " x " + std::to_string(in_w) +
           " is smaller than the kernel's window of " + std::to_string(span_h) + " x " +
           std::to_string(span_w) + " less the padding");
  }
  return {room_h / geometry.stride_h + 1, room_w / geometry.stride_w + 1};
}

ConvPlan::ConvPlan(const Conv2dGeometry& geometry, const std::vector<Node>& nodes,
                   Activation activation, const Conv2dCall& call)
    : isa(active_isa()),
      geometry(geometry),
      activation(activation),
      call(call),
      element_bytes(geometry.element_bytes()),
      input_bytes(geometry.algorithm == Algorithm::kQuads ? 1 : element_bytes),
      unfinished(check_parts(geometry, nodes, call)) {
  if (geometry.algorithm == Algorithm::kQuads && isa.quads == nullptr) {
    refuse(std::string("8-bit integers are not multiplied on ") + isa.name);
  }
  const OutputSize size = output_size(geometry, call.in_h, call.in_w);
  out_h = size.h;
  out_w = size.w;
  num_pixels = call.batch * out_h * out_w;
  num_tiles = (num_pixels + isa.max_pixels - 1) / isa.max_pixels;
  plan_maps();
  plan_nodes(nodes);
  if (!is_winograd(geometry.algorithm)) plan_items();
}

void ConvPlan::plan_maps() {
  const int64_t bytes = element_bytes;
  int64_t most_channels = 0;
  for (const SourceView& source : call.sources) {
    if (source.channels > 1 && source.stride_c != 1) {
      refuse("a source of more than " + std::to_string(kFewChannels) +
             " channels must have a channel stride of 1, given " + std::to_string(source.stride_c));
    }
    most_channels = std::max(most_channels, source.channels);
    sources.push_back({static_cast<const char*>(source.data), source.channels,
                       source.stride_n * input_bytes, source.stride_h * input_bytes,
                       source.stride_w * input_bytes});
  }
  out = {static_cast<char*>(call.out.data), call.out_channels, call.out.stride_n * bytes,
         call.out.stride_h * bytes, call.out.stride_w * bytes};
  residual = {static_cast<const char*>(call.residual), call.out_channels,
              call.residual_stride_n * bytes, call.residual_stride_h * bytes,
              call.residual_stride_w * bytes};
  const bool quads = geometry.algorithm == Algorithm::kQuads;
  border_counts = quads && geometry.input.zero_point != 0;
  zeros.assign(static_cast<size_t>(most_channels * input_bytes),
               static_cast<char>(border_counts ? geometry.input.zero_point : 0));
}

bool neighbours(const Segment& segment, int64_t together) {
  const std::vector<int32_t>& channels = segment.channels;
  const int64_t count = static_cast<int64_t>(channels.size());
  if (count % together != 0) return false;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = i / together * together;
    if (channels[static_cast<size_t>(i)] != channels[static_cast<size_t>(first)] + i - first) {
      return false;
    }
  }
  return true;
}

WeightShape weight_shape(const Conv2dGeometry& geometry, const Node& node) {
  std::vector<int64_t> counts;
  for (const Segment& segment : node.segments) {
    counts.push_back(static_cast<int64_t>(segment.channels.size()));
  }
  return {static_cast<int64_t>(node.out_channels.size()), std::move(counts), geometry.taps(),
          geometry.algorithm, geometry.dtype};
}

void ConvPlan::plan_nodes(const std::vector<Node>& given) {
  const char* packed = static_cast<const char*>(call.packed);
  int64_t left = call.packed_bytes;
  for (const Node& node : given) {
    NodePlan plan;
    plan.node = &node;
    const int64_t outputs = static_cast<int64_t>(node.out_channels.size());
    const WeightShape shape = weight_shape(geometry, node);
    const int64_t size = packed_bytes(isa, shape);
    const PackedHeader wanted = packed_header(isa, shape);
    if (size > left || std::memcmp(packed, &wanted, sizeof(wanted)) != 0) {
      const int points = static_cast<int>(geometry.algorithm);
      const std::string how =
          !is_winograd(geometry.algorithm) ? "off" : "f" + std::to_string(points);
      refuse(
          std::string("the packed weights are not those of this layer for ") + isa.name +
          (shape.product() == kInt8 ? ", 8-bit integers" : ", winograd " + how) +
          ": pack them again (prepack with the winograd of the call, or repack() of the module)");
    }
    const char* const begin = packed;
    plan.panels = packed + bytes_before_panels(isa, shape);
    packed += size;
    left -= size;
    plan.rows = shape.rows() * shape.points();
    plan_segments(node, plan);
    plan.num_panels = (outputs + panel_width() - 1) / panel_width();
    most_panels = std::max(most_panels, plan.num_panels);
    plan.bias.assign(static_cast<size_t>(plan.num_panels * panel_width()), 0.0f);
    plan.first_out = outputs > 0 ? node.out_channels[0] : 0;
    plan.scattered = false;
    for (int64_t o = 0; o < outputs; ++o) {
      const int32_t channel = node.out_channels[static_cast<size_t>(o)];
      plan.scattered |= channel != plan.first_out + o;
      if (channel < 0 || channel >= call.out_channels) {
        refuse("output channel " + std::to_string(channel) + " is not one of the output's " +
               std::to_string(call.out_channels));
      }
      if (call.bias != nullptr && !call.accumulate) {
        plan.bias[static_cast<size_t>(o)] = call.bias[channel];
      }
    }
    if (shape.product() == kInt8) plan_quads(begin, shape, plan);
    if (!is_winograd(geometry.algorithm)) plan_panels(plan);
    nodes.push_back(std::move(plan));
  }
  if (left != 0) refuse("the packed weights are longer than this layer's nodes need");
}

// With w = scale * byte and x = (q - zero_point) * input scale, the sum of w x is
// scale * input scale * (sum of byte q - zero_point * sum of byte).
void ConvPlan::plan_quads(const char* packed, const WeightShape& shape, NodePlan& plan) const {
  const float* scales = reinterpret_cast<const float*>(packed + kHeaderBytes);
  const int32_t* sums = reinterpret_cast<const int32_t*>(scales + packed_outputs(isa, shape));
  plan.scale.assign(plan.bias.size(), 0.0f);
  for (size_t o = 0; o < plan.node->out_channels.size(); ++o) {
    const double scale = static_cast<double>(scales[o]) * geometry.input.scale;
    plan.scale[o] = static_cast<float>(scale);
    plan.bias[o] = static_cast<float>(plan.bias[o] - scale * geometry.input.zero_point * sums[o]);
  }
}

void ConvPlan::plan_panels(NodePlan& plan) const {
  const int64_t outputs = static_cast<int64_t>(plan.node->out_channels.size());
  for (int64_t panel = 0; panel < plan.num_panels; ++panel) {
    const int64_t first = panel * panel_width();
    Tile tile = {};
    tile.panel = plan.panels + panel * panel_row_bytes() * plan.rows;
    tile.bias = plan.bias.data() + first;
    tile.first_channel = plan.first_out + first;
    tile.num_channels = std::min(panel_width(), outputs - first);
    tile.accumulate = call.accumulate;
    tile.activation = unfinished ? kActivationNone : activation;
    const int64_t vectors = (tile.num_channels + isa.vector_length - 1) / isa.vector_length;
    const bool quads = geometry.algorithm == Algorithm::kQuads;
    if (quads) tile.scale = plan.scale.data() + first;
    const MicroKernel* const* kernels = quads ? isa.quads->kernels : isa.kernels;
    plan.panel_plans.push_back({tile, kernels[geometry.dtype] + vectors - 1});
  }
}

void ConvPlan::plan_segments(const Node& node, NodePlan& plan) const {
  int64_t row = 0;
  for (size_t s = 0; s < node.segments.size(); ++s) {
    const Segment& segment = node.segments[s];
    const int64_t count = static_cast<int64_t>(segment.channels.size());
    if (segment.source < 0 || segment.source >= static_cast<int64_t>(call.sources.size())) {
      refuse("segment " + std::to_string(plan.offsets.size()) + " reads source " +
             std::to_string(segment.source) + " of " + std::to_string(call.sources.size()));
    }
    const Map<const char>& source = sources[static_cast<size_t>(segment.source)];
    const int64_t furthest = (geometry.kernel_h - 1) * geometry.dilation_h * source.stride_h +
                             (geometry.kernel_w - 1) * geometry.dilation_w * source.stride_w +
                             source.channels * input_bytes;
    if (furthest > std::numeric_limits<int32_t>::max()) {
      refuse("the kernel's window spans more than 2^31 bytes of the input");
    }
    for (const int32_t channel : segment.channels) {
      if (channel < 0 || channel >= source.channels) {
        refuse("channel " + std::to_string(channel) + " is not one of the segment's " +
               std::to_string(source.channels));
      }
    }
    const int64_t together = channels_of_row(product_type(geometry.algorithm, geometry.dtype));
    if (!neighbours(segment, together)) {
      refuse("channels that are multiplied together must be neighbours");
    }
    plan.offsets.push_back({});
    if (is_winograd(geometry.algorithm)) continue;
    const int64_t rows = count / together;
    std::vector<int32_t>& offsets = plan.offsets.back();
    offsets.reserve(static_cast<size_t>(rows * geometry.taps()));
    for (int64_t r = 0; r < geometry.kernel_h; ++r) {
      for (int64_t s = 0; s < geometry.kernel_w; ++s) {
        const int64_t tap =
            r * geometry.dilation_h * source.stride_h + s * geometry.dilation_w * source.stride_w;
        for (int64_t i = 0; i < count; i += together) {
          const int64_t channel = segment.channels[static_cast<size_t>(i)];
          offsets.push_back(static_cast<int32_t>(tap + channel * input_bytes));
        }
      }
    }
    // Without rows a segment is left out.
    plan.tap_rows.push_back(call.reads(static_cast<int64_t>(s)) ? rows : 0);
    plan.first_row.push_back(row);
    row += rows * geometry.taps();
  }
}

void ConvPlan::plan_items() {
  if (num_pixels == 0) return;
  int64_t most_channels = 1, all_panels = 0;
  for (const NodePlan& plan : nodes) {
    most_channels = std::max(most_channels, plan.node->num_in_channels());
    all_panels += plan.num_panels;
  }
  const int64_t bytes_per_pixel =
      most_channels * geometry.stride_h * geometry.stride_w * input_bytes;
  const int64_t block_pixels =
      std::max<int64_t>(4 * isa.max_pixels, kInputBlockBytes / bytes_per_pixel);
  const int64_t largest = std::max<int64_t>(1, block_pixels / isa.max_pixels);
  const int64_t threads = std::max(1, call.num_threads);
  // Whatever is larger is shared out, since every thread reads its share of that and all of the
  // other: the map in blocks, or the weights in groups of panels.
  const int64_t weight_bytes =
      most_channels * geometry.taps() * most_panels * panel_width() * input_bytes;
  by_panels = threads > 1 && num_tiles <= largest &&
              (weight_bytes > num_pixels * bytes_per_pixel || num_tiles < 4 * threads);
  gathers_by_item =
      !by_panels && geometry.taps() == 1 && geometry.padding_h == 0 && geometry.padding_w == 0;
  homes.push_back(0);
  if (by_panels) {
    int64_t n = 0, first = 0;
    for (int64_t t = 0; t < threads; ++t) {
      int64_t left = all_panels * (t + 1) / threads - all_panels * t / threads;
      while (left > 0) {
        const int64_t panels = nodes[static_cast<size_t>(n)].num_panels;
        const int64_t count = std::min(panels - first, guided(left, 1, 1, all_panels));
        if (count > 0) items.push_back({static_cast<int32_t>(n), 0, num_tiles, first, count});
        first += count;
        left -= count;
        if (first == panels) {
          first = 0;
          ++n;
        }
      }
      homes.push_back(static_cast<int64_t>(items.size()));
    }
    most_tiles = num_tiles;
    return;
  }
  // A block's nodes one after the other: they read the same input, which then still is near.
  const int64_t num_blocks = (num_tiles + largest - 1) / largest;
  const int64_t even = (num_tiles + num_blocks - 1) / num_blocks;
  for (int64_t t = 0; t < threads; ++t) {
    const int64_t end = num_tiles * (t + 1) / threads;
    for (int64_t begin = num_tiles * t / threads; begin < end;) {
      const int64_t left = end - begin;
      const int64_t count =
          threads == 1 ? std::min(left, even) : guided(left, 1, kFewestTiles, largest);
      for (size_t n = 0; n < nodes.size(); ++n) {
        if (nodes[n].num_panels == 0) continue;
        items.push_back({static_cast<int32_t>(n), begin, count, 0, nodes[n].num_panels});
      }
      most_tiles = std::max(most_tiles, count);
      begin += count;
    }
    homes.push_back(static_cast<int64_t>(items.size()));
  }
}

}  // namespace disco
