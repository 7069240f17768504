// How fast cache lines of an activation can be read at all, for benchmarks: what a kernel that did
// nothing with them could reach.
#pragma once

#include <cstdint>
#include <vector>

namespace disco {

// Reads one float of every listed line of every pixel and returns the sum. lines: floats from the
// pixel's start, each multiple of 16; pixels are `stride` floats apart.
float read_lines(const float* x, int64_t stride, int64_t pixels, const std::vector<int32_t>& lines,
                 int32_t num_threads);

}  // namespace disco
