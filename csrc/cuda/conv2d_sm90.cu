// The launch of conv2d_sm90.cuh.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <climits>
#include <stdexcept>

#include "cuda/conv2d_sm90.cuh"
#include "cuda/conv2d_sm90.h"

// Rows x columns of a program's tile, 64 rows of a group together, groups, and how many programs
// share a multiprocessor. Sums of 256 x 128 need more registers than an even share.
#define DISCO_TILES(DO) \
  DO(256, 32, 2, 2, 2)  \
  DO(128, 32, 2, 1, 4)  \
  DO(256, 64, 2, 2, 2)  \
  DO(256, 64, 2, 2, 1)  \
  DO(128, 64, 2, 1, 3)  \
  DO(256, 128, 2, 2, 1) \
  DO(128, 128, 2, 1, 2) \
  DO(64, 128, 1, 1, 3)

#define DISCO_UNEVEN(COLUMNS, BLOCKS) (COLUMNS == 128 && BLOCKS == 1)
#define DISCO_THREADS(COLUMNS, GROUPS, BLOCKS) \
  (128 * GROUPS + (DISCO_UNEVEN(COLUMNS, BLOCKS) ? 128 : 32))
#define DISCO_CONV2D(NAME, T, COLUMNS, ROW_BLOCKS, GROUPS, BLOCKS)                                 \
  extern "C" __global__ void __launch_bounds__(DISCO_THREADS(COLUMNS, GROUPS, BLOCKS), BLOCKS)     \
      NAME(const __grid_constant__ disco_sm90::Conv2dArguments arguments) {                        \
    disco_sm90::conv2d<disco_sm90::T, COLUMNS, ROW_BLOCKS, GROUPS, DISCO_UNEVEN(COLUMNS, BLOCKS)>( \
        arguments);                                                                                \
  }
#define DISCO_BOTH(ROWS, COLUMNS, ROW_BLOCKS, GROUPS, BLOCKS)                                    \
  DISCO_CONV2D(conv2d_bf16_##ROWS##x##COLUMNS##_##BLOCKS, BFloat16, COLUMNS, ROW_BLOCKS, GROUPS, \
               BLOCKS)                                                                           \
  DISCO_CONV2D(conv2d_f16_##ROWS##x##COLUMNS##_##BLOCKS, Float16, COLUMNS, ROW_BLOCKS, GROUPS,   \
               BLOCKS)
DISCO_TILES(DISCO_BOTH)

namespace disco::cuda {
namespace {

using disco_sm90::Conv2dArguments;
using disco_sm90::kLineBytes;

constexpr int kWidestBox = 256;
constexpr int kSharedBytes = 227 * 1024;  // of a multiprocessor, for programs
constexpr int kAlignment = 1024;          // of what the copy engine writes
// Of each program: to align, barriers, and the system's kilobyte.
constexpr int kReservedBytes = kAlignment + disco_sm90::kBarrierBytes + 1024;

struct Tile {
  const char* name;
  const void* kernels[2];  // by Half
  int rows, columns, threads, blocks;
};

#define DISCO_ROW(ROWS, COLUMNS, ROW_BLOCKS, GROUPS, BLOCKS)                  \
  {#ROWS "x" #COLUMNS "/" #BLOCKS,                                            \
   {reinterpret_cast<const void*>(conv2d_bf16_##ROWS##x##COLUMNS##_##BLOCKS), \
    reinterpret_cast<const void*>(conv2d_f16_##ROWS##x##COLUMNS##_##BLOCKS)}, \
   ROWS,                                                                      \
   COLUMNS,                                                                   \
   DISCO_THREADS(COLUMNS, GROUPS, BLOCKS),                                    \
   BLOCKS},
const Tile kTiles[] = {DISCO_TILES(DISCO_ROW)};
constexpr int kNumTiles = sizeof(kTiles) / sizeof(kTiles[0]);
constexpr int kSmallestTile = 1;

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// Asked of the driver, so that nothing is linked against it.
Encode encoder() {
  static const Encode found = [] {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult answer;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000,
                                           cudaEnableDefault, &answer),
          "cuTensorMapEncodeTiled");
    if (answer != cudaDriverEntryPointSuccess || address == nullptr) {
      throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled: update it");
    }
    return reinterpret_cast<Encode>(address);
  }();
  return found;
}

template <size_t kRank>
disco_sm90::TensorMap make_map(Half dtype, uintptr_t data,
                               const std::array<cuuint64_t, kRank>& sizes,
                               const std::array<int64_t, kRank - 1>& strides,
                               const std::array<cuuint32_t, kRank>& box) {
  std::array<cuuint64_t, kRank - 1> bytes;
  std::array<cuuint32_t, kRank> steps;
  steps.fill(1);
  for (size_t i = 0; i + 1 < kRank; ++i) bytes[i] = static_cast<cuuint64_t>(strides[i]) * 2;
  CUtensorMap map;
  static_assert(sizeof(map) == sizeof(disco_sm90::TensorMap), "the driver's type has 128 bytes");
  const CUresult status = encoder()(
      &map,
      dtype == Half::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      kRank, reinterpret_cast<void*>(data), sizes.data(), bytes.data(), box.data(), steps.data(),
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(status));
  }
  disco_sm90::TensorMap copied;
  std::copy_n(reinterpret_cast<const unsigned char*>(&map), sizeof(map),
              reinterpret_cast<unsigned char*>(&copied));
  return copied;
}

int up(int value, int step) { return (value + step - 1) / step * step; }

int out_size(int size, int kernel, int stride, int padding, int dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

// The padded grid of conv2d_sm90.cuh.
struct Grid {
  int out_h, out_w, pitch, spacing, furthest;
  bool flat;
};

bool one_pixel(const Window& w) {
  return w.kernel_h * w.kernel_w == 1 && w.stride == 1 && w.padding_h == 0 && w.padding_w == 0;
}

// Whether the pixels of all images lie at one distance from each other.
bool is_one_row(const Image& x, int height, int width) {
  return x.row == width * x.pixel && x.image == height * x.row;
}

Grid grid_of(const Window& w, int height, int width) {
  Grid grid;
  grid.out_h = out_size(height, w.kernel_h, w.stride, w.padding_h, w.dilation_h);
  grid.out_w = out_size(width, w.kernel_w, w.stride, w.padding_w, w.dilation_w);
  const int below = (w.kernel_h - 1) * w.dilation_h / w.stride;
  const int beside = (w.kernel_w - 1) * w.dilation_w / w.stride;
  grid.pitch = grid.out_w + beside;
  // Without strides, the padding below an image is that above the next.
  grid.spacing = grid.out_h + below;
  if (w.stride == 1) grid.spacing = std::min(grid.spacing, height + w.padding_h);
  grid.furthest = below * grid.pitch + beside;
  grid.flat = false;
  return grid;
}

int lines_of(const Grid& grid, int rows) {
  return (grid.pitch - 1 + rows - 1 + grid.furthest) / grid.pitch + 1;
}

void set_window(Conv2dArguments& a, const Window& w, const Grid& grid, int rows) {
  const int pixels = grid.flat ? rows : lines_of(grid, rows) * grid.pitch;
  a.patch_bytes = up(pixels * kLineBytes, kAlignment);
  a.classes = 0;
  int taps = 0;
  for (int odd_y = 0; odd_y < w.stride; ++odd_y) {
    for (int odd_x = 0; odd_x < w.stride; ++odd_x) {
      const int before = taps;
      for (int r = 0; r < w.kernel_h; ++r) {
        for (int s = 0; s < w.kernel_w; ++s) {
          const int y = r * w.dilation_h, x = s * w.dilation_w;
          if (y % w.stride != odd_y || x % w.stride != odd_x) continue;
          a.tap[taps] = r * w.kernel_w + s;
          a.tap_offset[taps++] = (y / w.stride * grid.pitch + x / w.stride) * kLineBytes;
        }
      }
      if (taps == before) continue;
      const int column = odd_x - w.padding_w;
      a.class_y[a.classes] = odd_y - w.padding_h;
      a.class_map[a.classes] = column & (w.stride - 1);
      a.class_x[a.classes] = (column - a.class_map[a.classes]) / w.stride;
      a.first_tap[a.classes++] = before;
    }
  }
  a.first_tap[a.classes] = taps;
  a.pitch = grid.pitch;
  a.spacing = grid.spacing;
  a.stride = w.stride;
  a.furthest = grid.furthest;
  a.flat = grid.flat;
}

// Shared memory for weights and patches under way, and how many programs have as much.
struct Memory {
  int bytes, blocks;  // 0 bytes if it is not enough for two patches
};

// Of a pixel's windows every patch has one weight. Of larger ones it has several, and a second
// patch is enough to copy while the first is multiplied.
Memory set_stages(Conv2dArguments& a, const Tile& tile) {
  const int weight_bytes = tile.columns * kLineBytes;
  const bool one_tap = a.first_tap[a.classes] == 1;
  const int most = one_tap ? disco_sm90::kMostPatches : 2;
  for (int blocks = tile.blocks; blocks > 0; --blocks) {
    const int budget = kSharedBytes / blocks - kReservedBytes;
    for (int patches = most; patches > 1; --patches) {
      const int stages = std::min(one_tap ? patches : disco_sm90::kMostStages,
                                  (budget - patches * a.patch_bytes) / weight_bytes);
      if (stages < (one_tap ? patches : 3)) continue;
      a.patches = patches;
      a.stages = stages;
      return {
          stages * weight_bytes + patches * a.patch_bytes + kAlignment + disco_sm90::kBarrierBytes,
          blocks};
    }
  }
  return {0, 0};
}

}  // namespace

std::string Conv2dSm90::refusal(const std::vector<Conv2dNode>& nodes, const Window& window) {
  size_t runs = 0;
  for (const Conv2dNode& node : nodes) {
    runs += node.runs.size();
    if (node.columns % 8 || node.out_begin % 8 || node.columns <= 0) {
      return "output channels of a node come in whole groups of 8";
    }
    for (const Run& run : node.runs) {
      if (run.first % 8 || run.count <= 0) return "runs of channels begin at multiples of 8";
    }
  }
  if (nodes.empty() || nodes.size() > disco_sm90::kMostNodes) return "1 to 8 nodes";
  if (window.kernel_h * window.kernel_w > disco_sm90::kMostTaps) return "windows of up to 49 taps";
  if (window.stride != 1 && window.stride != 2) return "strides of 1 or 2";
  if (runs * static_cast<size_t>(window.stride) > disco_sm90::kMostMaps) {
    return "up to 32 runs of channels, half as many with a stride";
  }
  return "";
}

std::string Conv2dSm90::refusal(int width, bool one_row, int number) const {
  if (number >= kNumTiles) return "tiles that there are";
  Grid grid = grid_of(window_, 64, width);
  grid.flat = one_row && one_pixel(window_);
  if (width < window_.stride) return "maps at least as wide as the stride";
  if (!grid.flat && grid.pitch > kWidestBox) return "rows of up to 256 pixels";
  Conv2dArguments arguments{};
  const Tile& tile = kTiles[number < 0 ? kSmallestTile : number];
  set_window(arguments, window_, grid, tile.rows);
  if (!set_stages(arguments, tile).bytes) return "windows that fit into shared memory";
  return "";
}

Conv2dSm90::Conv2dSm90(std::vector<Conv2dNode> nodes, Window window, Half dtype)
    : nodes_(std::move(nodes)), window_(window), dtype_(dtype) {
  const std::string reason = refusal(nodes_, window_);
  if (!reason.empty()) throw std::invalid_argument("the kernel takes " + reason);
}

std::vector<std::string> Conv2dSm90::tiles() {
  std::vector<std::string> names;
  for (const Tile& tile : kTiles) names.emplace_back(tile.name);
  return names;
}

int Conv2dSm90::choose_tile(int height, int width) const {
  int columns = 0;
  for (const Conv2dNode& node : nodes_) columns = std::max(columns, node.columns);
  const int wanted = columns > 64 ? 128 : columns > 32 ? 64 : 32;
  const Grid grid = grid_of(window_, height, width);
  for (int t = 0; t < kNumTiles; ++t) {
    if (kTiles[t].columns != wanted) continue;
    Conv2dArguments arguments{};
    set_window(arguments, window_, grid, kTiles[t].rows);
    if (set_stages(arguments, kTiles[t]).bytes) return t;
  }
  return kSmallestTile;
}

void Conv2dSm90::run(const Image& x, int images, int height, int width, uintptr_t weight,
                     uintptr_t bias, const Image& residual, const Image& out, int activation,
                     uintptr_t stream, int number) const {
  if (number < 0) number = choose_tile(height, width);
  if (number >= kNumTiles) throw std::invalid_argument("there is no such tile");
  const Tile& tile = kTiles[number];
  const bool flat = one_pixel(window_) && is_one_row(x, height, width) &&
                    is_one_row(out, height, width) &&
                    (!residual.data || is_one_row(residual, height, width));
  if (flat) {
    width *= images * height;
    images = height = 1;
  }
  Grid grid = grid_of(window_, height, width);
  grid.flat = flat;
  Conv2dArguments a{};
  set_window(a, window_, grid, tile.rows);
  const Memory memory = set_stages(a, tile);
  if (!memory.bytes) throw std::invalid_argument("the window does not fit into shared memory");
  const unsigned box = flat ? tile.rows : grid.pitch;
  const unsigned box_columns = std::min(tile.columns, 64);
  const int step = window_.stride, taps = window_.kernel_h * window_.kernel_w;
  int part = 0, tiles = 0, number_of_node = 0;
  for (const Conv2dNode& node : nodes_) {
    a.first_part[number_of_node] = part;
    a.first_tile[number_of_node] = tiles;
    a.columns[number_of_node] = node.columns;
    a.out_begin[number_of_node] = node.out_begin;
    tiles += (node.columns + tile.columns - 1) / tile.columns;
    for (const Run& run : node.runs) {
      a.channels[part] = run.count;
      a.num_weights[number_of_node] += taps * ((run.count + 63) / 64);
      for (int odd = 0; odd < step; ++odd) {
        const int columns = (width - odd + step - 1) / step;
        a.x[part * step + odd] = make_map<4>(
            dtype_, x.data + 2 * (run.first + odd * x.pixel),
            {cuuint64_t(run.count), cuuint64_t(columns), cuuint64_t(height), cuuint64_t(images)},
            {step * x.pixel, x.row, x.image}, {64, box, 1, 1});
      }
      const int64_t pitch = node.columns;
      a.weight[part] =
          make_map<3>(dtype_, weight + 2 * (node.weight_begin + run.before * pitch),
                      {cuuint64_t(node.columns), cuuint64_t(run.count), cuuint64_t(taps)},
                      {pitch, pitch * node.num_inputs}, {box_columns, 64, 1});
      ++part;
    }
    ++number_of_node;
  }
  a.first_part[number_of_node] = part;
  a.first_tile[number_of_node] = tiles;
  a.num_tiles = tiles;
  a.images = images;
  a.out_height = grid.out_h;
  a.out_width = grid.out_w;
  if (out.image % 8 || out.row % 8 || out.pixel % 8 || out.image > int64_t(UINT_MAX)) {
    throw std::invalid_argument("outputs come in whole groups of 8 channels");
  }
  a.out_image = static_cast<unsigned>(out.image / 8);
  a.out_row = static_cast<unsigned>(out.row / 8);
  a.out_pixel = static_cast<unsigned>(out.pixel / 8);
  a.out = reinterpret_cast<void*>(out.data);
  a.bias = reinterpret_cast<const void*>(bias);
  a.has_residual = residual.data != 0;
  if (a.has_residual) {
    int channels = 0;
    for (const Conv2dNode& node : nodes_)
      channels = std::max(channels, node.out_begin + node.columns);
    a.residual = make_map<4>(
        dtype_, residual.data,
        {cuuint64_t(channels), cuuint64_t(grid.out_w), cuuint64_t(grid.out_h), cuuint64_t(images)},
        {residual.pixel, residual.row, residual.image}, {64, box, 1, 1});
  }
  a.activation = static_cast<disco_sm90::Activation>(activation);

  const int64_t rows = int64_t(images - 1) * grid.spacing * grid.pitch + grid.out_h * grid.pitch;
  const int64_t programs = (rows + tile.rows - 1) / tile.rows * tiles;
  if (rows > INT_MAX / 2 || programs > INT_MAX) throw std::invalid_argument("too many pixels");
  a.programs = static_cast<int>(programs);
  const void* kernel = tile.kernels[static_cast<int>(dtype_)];
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, memory.bytes),
        "shared memory of a convolution");
  // Else the driver may leave room for a first-level cache, and fewer programs fit beside each
  // other.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared),
        "shared memory of a multiprocessor");
  int device = 0, processors = 0;
  check(cudaGetDevice(&device), "current device");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        "number of multiprocessors");
  void* given[] = {&a};
  const auto blocks =
      static_cast<unsigned>(std::min<int64_t>(programs, processors * memory.blocks));
  check(cudaLaunchKernel(kernel, dim3(blocks), dim3(unsigned(tile.threads)), given,
                         size_t(memory.bytes), reinterpret_cast<cudaStream_t>(stream)),
        "launch of a convolution");
}

}  // namespace disco::cuda
