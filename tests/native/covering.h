// Covering arrays: few cases that hold every pair of values of every two axes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace selftest {

// The number of values of each axis.
using Axes = std::vector<size_t>;
// The position of the value on each axis.
using Choice = std::vector<size_t>;
// Whether value i of axis a may meet value j of axis b; a < b.
using Allowed = std::function<bool(size_t a, size_t i, size_t b, size_t j)>;

struct Covering {
  std::vector<Choice> choices;
  size_t pairs_possible;
  size_t pairs_covered;  // counted again from the choices
};

// Found greedily. What is forbidden must leave a way out once two axes are fixed.
Covering pairwise(const Axes& axes, const Allowed& allowed, uint32_t seed);

}  // namespace selftest
