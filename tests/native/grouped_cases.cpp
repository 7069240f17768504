#include <algorithm>
#include <iterator>
#include <numeric>

#include "conv_cases.h"
#include "covering.h"

namespace selftest {
namespace {

// Those with kernels of their own, their neighbours, and paddings beyond the kernel's reach.
const Window kWindows[] = {
    {1, 1, 0, 1}, {2, 2, 1, 1}, {3, 1, 1, 1}, {3, 2, 1, 1}, {3, 1, 2, 2},
    {3, 3, 0, 1}, {3, 1, 5, 1}, {4, 1, 2, 1}, {5, 1, 2, 1}, {5, 2, 2, 1},
    {5, 1, 4, 2}, {7, 1, 3, 1}, {7, 2, 3, 1}, {7, 1, 9, 1}, {9, 1, 4, 1},
};
// More columns than a tile has pixels, too.
const int64_t kHeights[] = {1, 2, 3, 5, 9};
const int64_t kWidths[] = {1, 2, 3, 4, 5, 7, 8, 13, 14, 15, 17, 31};
const int64_t kGroupCounts[] = {1, 2, 3, 5, 8, 15, 16, 17, 33, 65};
// Inputs and outputs of a group: depthwise, multipliers, groups that share a vector of 4, 8 or 16
// lanes, such that do not divide it, and such that fill it.
struct PerGroup {
  int64_t inputs, outputs;
};
const PerGroup kPerGroup[] = {{1, 1},   {1, 2},  {1, 3},   {2, 1},   {2, 2},
                              {3, 2},   {4, 4},  {5, 7},   {8, 8},   {12, 12},
                              {16, 16}, {1, 40}, {17, 20}, {24, 24}, {3, 49}};
constexpr int64_t kMostChannels = 130;  // of a case: the plain loop takes its time
const Layout kLayouts[] = {Layout::kWhole, Layout::kSlice, Layout::kCrop};

enum Axis {
  kWindowH,
  kMapH,
  kWindowW,
  kMapW,
  kBatch,
  kCount,
  kGroup,
  kSourceLayout,
  kBias,
  kResidual,
  kActivation,
  kOutLayout,
  kSpecial,
  kType,
};

bool allowed(size_t a, size_t i, size_t b, size_t j) {
  const auto fits = [&](int64_t map) {
    return map + 2 * kWindows[i].padding >= kWindows[i].span();
  };
  if (a == kWindowH && b == kMapH) return fits(kHeights[j]);
  if (a == kWindowW && b == kMapW) return fits(kWidths[j]);
  if (a == kCount && b == kGroup) {
    return kGroupCounts[i] * std::max(kPerGroup[j].inputs, kPerGroup[j].outputs) <= kMostChannels;
  }
  return true;
}

std::vector<int32_t> run_of(int64_t first, int64_t count) {
  std::vector<int32_t> channels(static_cast<size_t>(count));
  std::iota(channels.begin(), channels.end(), static_cast<int32_t>(first));
  return channels;
}

// A node for each group is what the oracle reads.
ConvCase grouped_case(size_t number, const Window& h, const Window& w,
                      const disco::Groups& groups) {
  ConvCase conv = {};
  conv.name = "grouped " + std::to_string(number);
  conv.geometry = {h.kernel,  w.kernel,  h.stride,   w.stride,
                   h.padding, w.padding, h.dilation, w.dilation};
  conv.batch = 1;
  conv.groups = groups;
  for (int64_t g = 0; g < groups.count; ++g) {
    conv.nodes.push_back({{{0, run_of(g * groups.in_channels, groups.in_channels)}},
                          run_of(g * groups.out_channels, groups.out_channels)});
  }
  conv.out_channels = groups.count * groups.out_channels;
  conv.seed = static_cast<uint32_t>(number);
  return conv;
}

ConvCase chosen_case(size_t number, const Choice& chosen) {
  const PerGroup& one = kPerGroup[chosen[kGroup]];
  ConvCase conv = grouped_case(number, kWindows[chosen[kWindowH]], kWindows[chosen[kWindowW]],
                               {kGroupCounts[chosen[kCount]], one.inputs, one.outputs});
  conv.batch = static_cast<int64_t>(chosen[kBatch]);  // an empty batch, too
  conv.in_h = kHeights[chosen[kMapH]];
  conv.in_w = kWidths[chosen[kMapW]];
  conv.sources = {{conv.groups.count * one.inputs, kLayouts[chosen[kSourceLayout]]}};
  conv.bias = chosen[kBias] == 1;
  conv.residual = chosen[kResidual] > 0;
  if (conv.residual) conv.residual_layout = kLayouts[chosen[kResidual] - 1];
  conv.activation = kOracleActivations[chosen[kActivation]];
  conv.out_layout = kLayouts[chosen[kOutLayout]];
  conv.special = chosen[kSpecial] == 1;
  conv.geometry.dtype = chosen[kType] == 1 ? disco::kBFloat16 : disco::kFloat32;
  return conv;
}

// Every width of a tile with every remainder of a vector.
void add_remainders(CaseList& list) {
  const Window windows[] = {{3, 1, 1, 1}, {3, 2, 1, 1}, {5, 1, 2, 1},
                            {5, 2, 2, 1}, {7, 1, 3, 1}, {4, 1, 2, 1}};
  for (int64_t channels = 1; channels <= 2 * kMostLanes + 1; ++channels) {
    for (int64_t columns = 1; columns <= kMostTilePixels + 1; ++columns) {
      const size_t number = list.cases.size();
      const Window& window = windows[number % std::size(windows)];
      ConvCase conv = grouped_case(number, {3, 1, 1, 1}, window, {channels, 1, 1});
      conv.in_h = 2;
      conv.in_w = columns * window.stride;
      conv.sources = {{channels, Layout::kWhole}};
      conv.bias = conv.residual = number % 2 == 0;
      conv.geometry.dtype = number % 5 < 2 ? disco::kBFloat16 : disco::kFloat32;
      list.cases.push_back(std::move(conv));
    }
  }
}

}  // namespace

CaseList grouped_cases() {
  CaseList list = {};
  Axes axes(kType + 1, 2);
  axes[kWindowH] = axes[kWindowW] = std::size(kWindows);
  axes[kMapH] = std::size(kHeights);
  axes[kMapW] = std::size(kWidths);
  axes[kBatch] = 3;
  axes[kCount] = std::size(kGroupCounts);
  axes[kGroup] = std::size(kPerGroup);
  axes[kSourceLayout] = axes[kOutLayout] = std::size(kLayouts);
  axes[kResidual] = 1 + std::size(kLayouts);
  axes[kActivation] = std::size(kOracleActivations);
  for (const uint32_t seed : {1, 2}) {
    const Covering covering = pairwise(axes, allowed, seed);
    list.pairs_possible += covering.pairs_possible;
    list.pairs_covered += covering.pairs_covered;
    for (const Choice& chosen : covering.choices) {
      list.cases.push_back(chosen_case(list.cases.size(), chosen));
    }
  }
  add_remainders(list);
  // Pixels whose rows push each other out of the first-level cache are copied first; many channels
  // and rows are cut into several parts.
  for (const disco::DataType dtype : {disco::kFloat32, disco::kBFloat16}) {
    for (const disco::Groups& groups : {disco::Groups{1024, 1, 1}, disco::Groups{256, 4, 4}}) {
      ConvCase conv = grouped_case(list.cases.size(), {3, 1, 1, 1}, {3, 1, 2, 1}, groups);
      conv.geometry.dtype = dtype;
      conv.in_h = 6;
      conv.in_w = 17;
      conv.sources = {{1024, Layout::kCrop}};
      list.cases.push_back(std::move(conv));
    }
  }
  return list;
}

}  // namespace selftest
