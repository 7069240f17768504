#include "conv_cases.h"

#include <algorithm>
#include <iterator>
#include <numeric>
#include <sstream>

#include "covering.h"
#include "random.h"

namespace selftest {
namespace {

// Twice the widest panel's channels and one beyond: whole panels, then a remainder.
constexpr int64_t kMostOutChannels = 130;
static_assert(kMostOutChannels >= 2 * kMostTileChannels, "a second panel is wanted");

// Paddings beyond the kernel's reach included.
const Window kWindows[] = {
    {1, 1, 0, 1}, {1, 2, 0, 1}, {1, 1, 1, 1}, {2, 1, 0, 1}, {2, 2, 1, 2},
    {3, 1, 1, 1}, {3, 2, 1, 1}, {3, 1, 0, 1}, {3, 1, 2, 2}, {3, 1, 5, 1},
    {3, 2, 0, 3}, {4, 1, 3, 1}, {5, 1, 2, 1}, {5, 2, 7, 2}, {7, 2, 3, 1},
};
constexpr size_t kMaps = 15;  // 1 .. 15
// One of each kind of remainder of panels and vectors; every number is tile_cases()'s.
const int64_t kOutChannels[] = {1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 24, 31, 32, 33, 47, 65, 97, 130};
// How a layer is computed. Winograd takes 3 x 3 windows of stride and dilation 1 only.
struct Kernel {
  disco::Algorithm algorithm;
  disco::DataType dtype;
};
const Kernel kKernels[] = {
    {disco::Algorithm::kDirect, disco::kFloat32},
    {disco::Algorithm::kDirect, disco::kBFloat16},
    {disco::Algorithm::kWinograd2, disco::kFloat32},
    {disco::Algorithm::kWinograd4, disco::kFloat32},
    {disco::Algorithm::kWinograd2, disco::kBFloat16},
    {disco::Algorithm::kWinograd4, disco::kBFloat16},
    {disco::Algorithm::kQuads, disco::kFloat32},
    {disco::Algorithm::kQuads, disco::kBFloat16},
};
// Of these, so many that the instruction set has.
size_t num_kernels() {
  return std::size(kKernels) - (disco::active_isa().quads == nullptr ? 2 : 0);
}
const Kernel kByteKernels[] = {kKernels[6], kKernels[7]};
// What 8-bit inputs stand for: the inputs' range without and with its lower half, and a third of
// it.
const disco::InputBytes kInputBytes[] = {{1.0f / 255, 0}, {2.0f / 255, 127}, {0.6f / 255, 51}};
bool fits_winograd(const Window& window) {
  return window.kernel == 3 && window.stride == 1 && window.dilation == 1;
}
const int64_t kInChannels[] = {0, 1, 2, 3, 7, 16, 40};
// At most this many may come as planes (disco::kFewChannels counts what is not selected, too).
constexpr int64_t kMostPlanes = 7;
// A letter is a segment: w all channels of a source, r a run of them, i some in mixed order, d some
// twice, s none, e a source without channels.
const char* const kSegments[] = {"w",  "r",  "i",  "d",   "s",   "e",    "wi",
                                 "we", "ew", "dr", "wir", "wse", "wiii", "eess"};
const Layout kLayouts[] = {Layout::kWhole, Layout::kSlice, Layout::kCrop, Layout::kPlanes};
const Layout kRowLayouts[] = {Layout::kWhole, Layout::kSlice, Layout::kCrop};
// Who owns the output channels: runs; every n-th; any; any, but the last node has none; any, and
// some are nobody's.
enum Ownership { kRuns, kInterleaved, kShuffled, kLastEmpty, kSomeUnowned, kNumOwnerships };

std::vector<int32_t> run_of(int64_t first, int64_t count) {
  std::vector<int32_t> channels(static_cast<size_t>(count));
  std::iota(channels.begin(), channels.end(), static_cast<int32_t>(first));
  return channels;
}

// `count` channels of sources, segment by segment; adds the sources. Every node selects its own.
void add_segments(ConvCase& conv, const std::string& kinds, int64_t count, Layout layout,
                  Random& random) {
  const int64_t takers = std::count_if(kinds.begin(), kinds.end(),
                                       [](char kind) { return kind != 'e' && kind != 's'; });
  int64_t taken = 0;
  for (size_t s = 0; s < kinds.size(); ++s) {
    const char kind = kinds[s];
    const bool takes = kind != 'e' && kind != 's';
    const int64_t share = takes ? count * (taken + 1) / takers - count * taken / takers : 0;
    taken += takes ? 1 : 0;
    const bool planes = layout == Layout::kPlanes;
    const int64_t room = planes ? disco::kFewChannels - share : 9;
    const int64_t others = 1 + static_cast<int64_t>(random.below(static_cast<size_t>(room)));
    const int64_t owned = kind == 'e' ? 0 : kind == 'w' ? share : share + others;
    const Layout mixed = kRowLayouts[(static_cast<size_t>(layout) + s) % std::size(kRowLayouts)];
    conv.sources.push_back({owned, planes && s % 2 == 0 ? Layout::kPlanes : mixed});
    for (size_t n = 0; n < conv.nodes.size(); ++n) {
      // Nodes of one layer select different numbers of channels.
      const int64_t own =
          kind == 'w' ? share : std::max<int64_t>(0, share - static_cast<int64_t>(n));
      disco::Segment segment = {static_cast<int64_t>(s), {}};
      if (kind == 'w' || kind == 'r') {
        segment.channels = run_of(kind == 'w' ? 0 : owned - own, own);
      } else {
        segment.channels = random.some_of(static_cast<size_t>(owned), static_cast<size_t>(own));
        if (kind == 'd' && own > 1) segment.channels.front() = segment.channels.back();
      }
      conv.nodes[n].segments.push_back(std::move(segment));
    }
  }
}

// Gives the nodes `count` output channels together; the last ones may be nobody's.
void add_outputs(ConvCase& conv, Ownership ownership, int64_t count, Random& random) {
  const int64_t nodes = static_cast<int64_t>(conv.nodes.size());
  const int64_t owners = ownership == kLastEmpty ? std::max<int64_t>(1, nodes - 1) : nodes;
  conv.out_channels = count + (ownership == kSomeUnowned ? 4 : 0);
  std::vector<int32_t> order = run_of(0, conv.out_channels);
  if (ownership != kRuns && ownership != kInterleaved) random.shuffle(order);
  for (int64_t o = 0; o < count; ++o) {
    const int64_t owner = ownership == kInterleaved ? o % owners : o * owners / count;
    conv.nodes[static_cast<size_t>(owner)].out_channels.push_back(order[static_cast<size_t>(o)]);
  }
}

ConvCase plain_case(const std::string& name, const Window& window, int64_t map_h, int64_t map_w,
                    size_t nodes) {
  ConvCase conv = {};
  conv.name = name;
  conv.geometry = {window.kernel,  window.kernel,  window.stride,   window.stride,
                   window.padding, window.padding, window.dilation, window.dilation};
  conv.batch = 1;
  conv.in_h = map_h;
  conv.in_w = map_w;
  conv.nodes.resize(nodes);
  conv.bias = true;
  return conv;
}

enum Axis {
  kWindowH,
  kMapH,
  kWindowW,
  kMapW,
  kBatch,
  kSegmentKinds,
  kIn,
  kOut,
  kSourceLayout,
  kNodes,
  kOwnership,
  kBias,
  kAccumulate,
  kResidual,
  kActivation,
  kOutLayout,
  kSpecial,
  kKernel,
};

Axes layer_axes() {
  Axes axes(kKernel + 1, 2);
  axes[kWindowH] = axes[kWindowW] = std::size(kWindows);
  axes[kMapH] = axes[kMapW] = kMaps;
  axes[kBatch] = axes[kNodes] = 3;
  axes[kSegmentKinds] = std::size(kSegments);
  axes[kIn] = std::size(kInChannels);
  axes[kOut] = std::size(kOutChannels);
  axes[kSourceLayout] = std::size(kLayouts);
  axes[kOwnership] = kNumOwnerships;
  axes[kResidual] = 1 + std::size(kRowLayouts);
  axes[kActivation] = std::size(kOracleActivations);
  axes[kOutLayout] = std::size(kRowLayouts);
  axes[kKernel] = num_kernels();
  return axes;
}

bool layer_allowed(size_t a, size_t i, size_t b, size_t j) {
  if ((a == kWindowH && b == kMapH) || (a == kWindowW && b == kMapW)) {
    return static_cast<int64_t>(j) + 1 + 2 * kWindows[i].padding >= kWindows[i].span();
  }
  if (a == kIn && b == kSourceLayout) {
    return kLayouts[j] != Layout::kPlanes || kInChannels[i] <= kMostPlanes;
  }
  if (b == kKernel && disco::is_winograd(kKernels[j].algorithm)) {
    if (a == kWindowH || a == kWindowW) return fits_winograd(kWindows[i]);
    // A pixel that is no number spoils all outputs of its Winograd tile.
    if (a == kSpecial) return i == 0;
  }
  return true;
}

ConvCase layer_case(uint32_t number, const Choice& chosen) {
  Random random(number);
  const Window &h = kWindows[chosen[kWindowH]], &w = kWindows[chosen[kWindowW]];
  ConvCase conv = {};
  conv.name = "layer " + std::to_string(number);
  conv.geometry = {h.kernel,  w.kernel,  h.stride,   w.stride,
                   h.padding, w.padding, h.dilation, w.dilation};
  conv.geometry.algorithm = kKernels[chosen[kKernel]].algorithm;
  conv.geometry.dtype = kKernels[chosen[kKernel]].dtype;
  conv.geometry.input = kInputBytes[number % std::size(kInputBytes)];
  conv.batch = static_cast<int64_t>(chosen[kBatch]);  // an empty batch, too
  conv.in_h = static_cast<int64_t>(chosen[kMapH]) + 1;
  conv.in_w = static_cast<int64_t>(chosen[kMapW]) + 1;
  conv.nodes.resize(chosen[kNodes] + 1);
  add_segments(conv, kSegments[chosen[kSegmentKinds]], kInChannels[chosen[kIn]],
               kLayouts[chosen[kSourceLayout]], random);
  add_outputs(conv, static_cast<Ownership>(chosen[kOwnership]), kOutChannels[chosen[kOut]], random);
  conv.out_layout = kRowLayouts[chosen[kOutLayout]];
  conv.bias = chosen[kBias] == 1;
  conv.accumulate = chosen[kAccumulate] == 1;
  conv.residual = chosen[kResidual] > 0;
  if (conv.residual) conv.residual_layout = kRowLayouts[chosen[kResidual] - 1];
  conv.activation = kOracleActivations[chosen[kActivation]];
  conv.special = chosen[kSpecial] == 1;
  conv.seed = number;
  return conv;
}

}  // namespace

CaseList tile_cases() {
  CaseList list = {};
  for (int64_t outputs = 1; outputs <= kMostOutChannels; ++outputs) {
    for (int64_t pixels = 1; pixels <= kMostTilePixels; ++pixels) {
      for (const int kind : {0, 1, 2, 3, 4, 5}) {
        const bool full = kind > 0, winograd = kind == 3, bytes = kind > 3;
        if (bytes && disco::active_isa().quads == nullptr) continue;
        const uint32_t number = static_cast<uint32_t>(list.cases.size());
        Random random(number);
        const std::string name = "tile " + std::to_string(number);
        ConvCase conv = winograd ? plain_case(name, {3, 1, 1, 1}, 2, 2 * pixels, 1)
                                 : plain_case(name, {1, 1, 0, 1}, 1, pixels, 1);
        conv.seed = number;
        conv.geometry.dtype =
            kind == 2 || kind == 3 || kind == 5 ? disco::kBFloat16 : disco::kFloat32;
        if (winograd) conv.geometry.algorithm = disco::Algorithm::kWinograd2;
        if (bytes) conv.geometry.algorithm = disco::Algorithm::kQuads;
        conv.geometry.input = kInputBytes[1];
        add_segments(conv, "wi", 5, Layout::kWhole, random);
        add_outputs(conv, kRuns, outputs, random);
        conv.bias = conv.accumulate = conv.residual = full;
        conv.activation = full ? disco::kActivationRelu : disco::kActivationNone;
        list.cases.push_back(std::move(conv));
      }
    }
  }
  return list;
}

CaseList layer_cases() {
  CaseList list = {};
  // Each array has every pair; three have them in three different companies.
  for (const uint32_t seed : {1, 2, 3}) {
    const Covering covering = pairwise(layer_axes(), layer_allowed, seed);
    list.pairs_possible += covering.pairs_possible;
    list.pairs_covered += covering.pairs_covered;
    for (const Choice& chosen : covering.choices) {
      list.cases.push_back(layer_case(static_cast<uint32_t>(list.cases.size()), chosen));
    }
  }
  return list;
}

CaseList large_cases() {
  struct Large {
    const char* segments;
    int64_t in_channels, out_channels, map;
    Window window;
    size_t nodes;
    Ownership ownership;
    Layout layout;
    Kernel kernel;
  };
  // More input than one block; more weights than stay near; both with nodes that write scattered
  // channels; few channels with much padding; more Winograd tiles than are transformed at a time;
  // pixels 4096 bytes apart, which AVX-512 does not read where they are.
  const Kernel single = kKernels[0], half = kKernels[1];
  const Large larges[] = {
      {"w", 704, 5, 15, {1, 1, 0, 1}, 1, kRuns, Layout::kWhole, single},
      {"wi", 704, 37, 9, {1, 1, 0, 1}, 1, kRuns, Layout::kCrop, single},
      {"wi", 160, 130, 5, {3, 1, 1, 1}, 1, kRuns, Layout::kWhole, single},
      {"wir", 150, 130, 7, {3, 2, 1, 1}, 3, kShuffled, Layout::kSlice, single},
      {"r", 330, 121, 3, {3, 1, 1, 1}, 2, kSomeUnowned, Layout::kWhole, single},
      {"w", 3, 64, 15, {7, 2, 3, 1}, 2, kRuns, Layout::kPlanes, single},
      {"wi", 705, 37, 9, {1, 2, 0, 1}, 2, kRuns, Layout::kCrop, half},
      {"wir", 150, 130, 7, {3, 2, 1, 1}, 3, kShuffled, Layout::kSlice, half},
      {"w", 3, 64, 15, {7, 2, 3, 1}, 2, kRuns, Layout::kPlanes, half},
      {"wi", 330, 70, 31, {3, 1, 1, 1}, 2, kShuffled, Layout::kSlice, kKernels[2]},
      {"w", 330, 5, 41, {3, 1, 1, 1}, 1, kRuns, Layout::kCrop, kKernels[3]},
      {"wi", 330, 37, 41, {3, 1, 0, 1}, 1, kSomeUnowned, Layout::kWhole, kKernels[5]},
      {"w", 1024, 37, 9, {1, 1, 0, 1}, 2, kRuns, Layout::kWhole, single},
      {"wir", 512, 70, 9, {1, 2, 0, 1}, 2, kShuffled, Layout::kWhole, single},
      {"wi", 512, 33, 7, {3, 2, 1, 1}, 2, kRuns, Layout::kCrop, single},
      {"wi", 2048, 20, 5, {1, 1, 0, 1}, 2, kRuns, Layout::kWhole, half},
      {"wr", 1024, 35, 7, {1, 2, 0, 1}, 1, kSomeUnowned, Layout::kCrop, half},
      {"w", 704, 5, 15, {1, 1, 0, 1}, 1, kRuns, Layout::kWhole, kByteKernels[0]},
      {"wi", 705, 37, 9, {1, 2, 0, 1}, 2, kRuns, Layout::kCrop, kByteKernels[1]},
      {"wir", 150, 130, 7, {3, 2, 1, 1}, 3, kShuffled, Layout::kSlice, kByteKernels[1]},
      {"wi", 330, 121, 5, {3, 1, 1, 1}, 2, kSomeUnowned, Layout::kWhole, kByteKernels[0]},
      {"w", 3, 64, 15, {7, 2, 3, 1}, 2, kRuns, Layout::kPlanes, kByteKernels[1]},
      {"wr", 4096, 35, 7, {1, 1, 0, 1}, 1, kRuns, Layout::kWhole, kByteKernels[1]},
  };
  CaseList list = {};
  for (const Large& large : larges) {
    const bool bytes = large.kernel.algorithm == disco::Algorithm::kQuads;
    if (bytes && disco::active_isa().quads == nullptr) continue;
    const uint32_t number = static_cast<uint32_t>(list.cases.size());
    Random random(number);
    ConvCase conv = plain_case("large " + std::to_string(number), large.window, large.map,
                               large.map, large.nodes);
    conv.seed = number;
    conv.geometry.algorithm = large.kernel.algorithm;
    conv.geometry.dtype = large.kernel.dtype;
    conv.geometry.input = kInputBytes[number % std::size(kInputBytes)];
    conv.residual = number % 2 == 1;
    conv.activation = disco::kActivationRelu;
    add_segments(conv, large.segments, large.in_channels, large.layout, random);
    add_outputs(conv, large.ownership, large.out_channels, random);
    list.cases.push_back(std::move(conv));
  }
  return list;
}

int64_t ConvCase::out_h() const {
  const int64_t span = geometry.dilation_h * (geometry.kernel_h - 1) + 1;
  return (in_h + 2 * geometry.padding_h - span) / geometry.stride_h + 1;
}

int64_t ConvCase::out_w() const {
  const int64_t span = geometry.dilation_w * (geometry.kernel_w - 1) + 1;
  return (in_w + 2 * geometry.padding_w - span) / geometry.stride_w + 1;
}

std::string describe(const ConvCase& conv) {
  static const char* const kLayoutNames[] = {"whole", "slice", "crop", "planes"};
  const disco::Conv2dGeometry& g = conv.geometry;
  std::ostringstream text;
  text << conv.name << ": batch " << conv.batch << ", map " << conv.in_h << " x " << conv.in_w
       << ", kernel " << g.kernel_h << " x " << g.kernel_w << ", stride " << g.stride_h << " x "
       << g.stride_w << ", padding " << g.padding_h << " x " << g.padding_w << ", dilation "
       << g.dilation_h << " x " << g.dilation_w;
  if (g.algorithm == disco::Algorithm::kQuads) {
    text << ", in bytes of " << g.input.scale << " from " << g.input.zero_point;
  } else if (g.algorithm != disco::Algorithm::kDirect) {
    text << ", Winograd of " << static_cast<int>(g.algorithm);
  }
  if (g.dtype == disco::kBFloat16) text << ", bfloat16";
  if (conv.groups.count > 0) {
    text << ", " << conv.groups.count << " groups of " << conv.groups.in_channels << " -> "
         << conv.groups.out_channels;
  }
  text << "; sources";
  for (const SourceCase& source : conv.sources) {
    text << ' ' << source.channels << ' ' << kLayoutNames[static_cast<size_t>(source.layout)];
  }
  for (const disco::Node& node : conv.nodes) {
    if (conv.groups.count > 0) break;
    text << "; node of";
    for (const disco::Segment& segment : node.segments) text << ' ' << segment.channels.size();
    text << " -> " << node.out_channels.size();
  }
  text << "; of " << conv.out_channels << " in a "
       << kLayoutNames[static_cast<size_t>(conv.out_layout)] << (conv.bias ? ", bias" : "")
       << (conv.accumulate ? ", accumulate" : "");
  if (conv.residual) {
    text << ", residual " << kLayoutNames[static_cast<size_t>(conv.residual_layout)];
  }
  text << ", activation " << conv.activation << (conv.special ? ", NaN and infinities" : "");
  return text.str();
}

}  // namespace selftest
