// The convolutions that the self-test runs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/conv2d.h"
#include "cpu/depthwise.h"
#include "tensor.h"

namespace selftest {

struct SourceCase {
  int64_t channels;
  Layout layout;
};

// A window in one dimension.
struct Window {
  int64_t kernel, stride, padding, dilation;

  int64_t span() const { return dilation * (kernel - 1) + 1; }
};

// Those that the oracle knows: none, one of comparisons, and one with code of its own.
constexpr disco::Activation kOracleActivations[] = {disco::kActivationNone, disco::kActivationRelu,
                                                    disco::kActivationRelu6,
                                                    disco::kActivationHardswish};

// One call of disco::Conv2d, or with groups of disco::DepthwiseConv2d. A property that a later
// kernel brings (an algorithm, a data type) is a field here, an axis of layer_cases(), a word of
// describe(), and whatever the oracle has to know.
struct ConvCase {
  std::string name;
  disco::Conv2dGeometry geometry;
  int64_t batch, in_h, in_w;
  std::vector<SourceCase> sources;
  std::vector<disco::Node> nodes;
  int64_t out_channels;  // of the output tensor; some may belong to no node
  Layout out_layout;
  bool bias, accumulate, residual;
  Layout residual_layout;
  disco::Activation activation;
  bool special;          // one value of each source is NaN, one infinity, one minus infinity
  uint32_t seed;         // of the values
  disco::Groups groups;  // one node each, in order; none if count is 0

  int64_t out_h() const;
  int64_t out_w() const;
};

std::string describe(const ConvCase& conv);

struct CaseList {
  std::vector<ConvCase> cases;
  // Of values of every two axes; both 0 for a list that is no covering array.
  size_t pairs_possible, pairs_covered;
};

// Every tile of a table of micro-kernels up to these sizes, with every remainder of its lanes, with
// everything in the epilogue and with nothing; pairs with float32 sums by Winograd.
constexpr int64_t kMostTilePixels = 15;
constexpr int64_t kMostTileChannels = 65;
CaseList tile_cases();

// Covering arrays over geometries, maps, layouts, segments, nodes and epilogues.
CaseList layer_cases();

// Grouped and depthwise convolutions: a covering array, every remainder of columns and channels up
// to tiles of kMostTilePixels and vectors of kMostLanes, and some that are cut into parts.
constexpr int64_t kMostLanes = 16;
CaseList grouped_cases();

// What is large enough for the blocks and the order of panels that small layers never need.
CaseList large_cases();

}  // namespace selftest
