// A convolution of 16-bit numbers over runs of channels, all virtual nodes in one launch, on the
// tensor cores of compute capability 9.0.
//
// Of a block of channels a program copies the pixels around its outputs once, and every tap of the
// window reads them there: the copy engine fills what lies in the padding with zeros. Rows of the
// product are pixels of a padded grid in which a tap is nothing but a distance:
//
//   images one after the other, `spacing` rows each, rows of `pitch` pixels; output (n, y, x) is
//   row (n * spacing + y) * pitch + x, and tap (r, s) lies r * DH rows and s * DW pixels further.
//
// So of `pitch * spacing` rows of the product an image needs OH * OW, and the rest is left out when
// it is written. With strides the pixels of each parity (a class) have a grid of their own, and are
// copied one class after the other, each for its taps.
//
// tests/cuda/sm90 runs all of it on a CPU.
#pragma once

#include "sm90.cuh"

namespace disco_sm90 {

constexpr int kMostParts = 32;
constexpr int kMostMaps = 32;
constexpr int kMostNodes = 8;
constexpr int kMostTaps = 49;
constexpr int kMostClasses = 4;
constexpr int kMostStages = 8;
constexpr int kMostPatches = 8;
constexpr int kBarrierBytes = 2 * 8 * (kMostStages + kMostPatches);
constexpr int kBlockChannels = 64;  // 128 bytes, one line of the swizzled pattern
constexpr int kLineBytes = 128;

enum class Activation { kNone, kRelu, kGelu };

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

__device__ __forceinline__ float activate(float x, Activation activation) {
  if (activation == Activation::kRelu) return x < 0.0f ? 0.0f : x;  // NaN stays
  if (activation == Activation::kGelu) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  return x;
}

// A part is a run of input channels of one node. Its maps end where the run ends: beyond are zeros.
struct Conv2dArguments {
  // [image][row][column][channel], a box is a row of `pitch` pixels; with a stride of 2 there are
  // two for each part, of the columns with even and odd numbers.
  TensorMap x[kMostMaps];
  TensorMap weight[kMostParts];  // [tap][channel][column], a box is 64 channels x up to 64 columns
  TensorMap residual;            // as x, of output channels
  int channels[kMostParts];
  int first_part[kMostNodes + 1];
  int first_tile[kMostNodes + 1];  // of the output channels
  int num_weights[kMostNodes];     // boxes of a tile: blocks of channels times taps
  int columns[kMostNodes];
  int out_begin[kMostNodes];
  // Taps, class by class: their place in the weight, and the bytes from the pixel of a row of the
  // product to theirs.
  int tap[kMostTaps];
  int tap_offset[kMostTaps];
  int first_tap[kMostClasses + 1];
  int class_y[kMostClasses];  // of the class's first pixel, padding taken off
  int class_x[kMostClasses];
  int class_map[kMostClasses];  // which of a part's maps
  int classes;
  int pitch, spacing, stride, furthest;  // the furthest tap, in pixels
  int flat;  // one pixel to the window: all pixels are one row, and a box is a tile's
  int patch_bytes, patches, stages;
  int num_tiles;  // of the output channels, over all nodes
  int programs;   // tiles of rows times these
  int images, out_height, out_width;
  unsigned out_image, out_row, out_pixel;  // strides in vectors of 16 bytes
  void* out;
  const void* bias;  // [out_channels] or null
  int has_residual;
  Activation activation;
};

// Of four words of a lane, the one at a place that is known only at run time.
__device__ __forceinline__ unsigned pick(const unsigned (&words)[4], int place) {
  const unsigned low = place & 1 ? words[1] : words[0];
  const unsigned high = place & 1 ? words[3] : words[2];
  return place & 2 ? high : low;
}

// Four lanes hold a word of each of four vectors; afterwards each lane holds one vector.
__device__ __forceinline__ uint4 exchange_in_quad(const unsigned (&words)[4], int lane) {
  unsigned got[4];
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    got[step] = __shfl_xor_sync(0xFFFFFFFFu, pick(words, lane ^ step), step);
  }
  // got[step] came from lane ^ step.
  return make_uint4(pick(got, lane), pick(got, lane ^ 1), pick(got, lane ^ 2), pick(got, lane ^ 3));
}

// Where a thread's rows of the product lie in the output, in vectors.
template <int kRowBlocks>
struct Rows {
  unsigned target[2 * kRowBlocks];
  bool there[2 * kRowBlocks];
};

template <int kRowBlocks>
__device__ __forceinline__ Rows<kRowBlocks> rows_of(const Conv2dArguments& a, int first_row) {
  Rows<kRowBlocks> rows;
#pragma unroll
  for (int i = 0; i < 2 * kRowBlocks; ++i) {
    const int row = first_row + i / 2 * 64 + i % 2 * 8;
    if (a.flat) {
      rows.there[i] = row < a.out_width;
      rows.target[i] = row * a.out_pixel;
    } else {
      const int line = row / a.pitch, x = row - line * a.pitch;
      const int image = line / a.spacing, y = line - image * a.spacing;
      rows.there[i] = x < a.out_width && y < a.out_height && image < a.images;
      rows.target[i] = image * a.out_image + y * a.out_row + x * a.out_pixel;
    }
  }
  return rows;
}

// Writes 32 columns, kFirst the first of them. `added` is where the thread's first row of the
// residual lies in shared memory, from the first of these columns on.
template <typename T, int kFirst, int kColumns, int kRowBlocks>
__device__ __forceinline__ void write_columns(const Conv2dArguments& a,
                                              const float (&sums)[kRowBlocks][kColumns / 2],
                                              const Rows<kRowBlocks>& rows, int node,
                                              int first_column, unsigned added) {
  const int lane = threadIdx.x & 31, quad_lane = lane & 3;
  const int columns = a.columns[node], first = first_column + kFirst;
  float2 bias[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int column = first + j * 8 + quad_lane * 2;
    bias[j] = make_float2(0.0f, 0.0f);
    if (a.bias && column < columns) {
      const auto* pairs = static_cast<const unsigned short*>(a.bias) + a.out_begin[node] + column;
      bias[j] = widen_pair(T{}, *reinterpret_cast<const unsigned*>(pairs));
    }
  }
  // A lane's sums are two columns of each of four vectors, and what it reads and writes is one.
  const int own = first + quad_lane * 8;
  uint4* out = static_cast<uint4*>(a.out) + (a.out_begin[node] + own) / 8;
#pragma unroll
  for (int i = 0; i < 2 * kRowBlocks; ++i) {
    unsigned words[4], others[4] = {0, 0, 0, 0};
    if (a.has_residual) {
      const unsigned at = added + (i / 2 * 64 + i % 2 * 8) * kLineBytes + quad_lane * 16;
      const uint4 vector = read_shared(swizzle_128(at));
      const unsigned given[4] = {vector.x, vector.y, vector.z, vector.w};
      const uint4 pairs = exchange_in_quad(given, quad_lane);
      others[0] = pairs.x, others[1] = pairs.y, others[2] = pairs.z, others[3] = pairs.w;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int place = (kFirst / 8 + j) * 4 + i % 2 * 2;
      const float2 other = widen_pair(T{}, others[j]);
      const float low = sums[i / 2][place] + bias[j].x + other.x;
      const float high = sums[i / 2][place + 1] + bias[j].y + other.y;
      words[j] = pack_pair(T{}, activate(low, a.activation), activate(high, a.activation));
    }
    const uint4 vector = exchange_in_quad(words, quad_lane);
    if (rows.there[i] && own < columns) out[rows.target[i]] = vector;
  }
}

// Which rows of the product a program computes, and which output channels of which node.
struct Place {
  int node, first_column, first_row, first_line, begin;  // begin: of the rows, in the first line
};

__device__ __forceinline__ Place place_of(const Conv2dArguments& a, int program, int rows,
                                          int columns) {
  Place place;
  const int tile_m = program / a.num_tiles, tile_n = program - tile_m * a.num_tiles;
  place.node = 0;
  while (tile_n >= a.first_tile[place.node + 1]) ++place.node;
  place.first_column = (tile_n - a.first_tile[place.node]) * columns;
  place.first_row = tile_m * rows;
  place.first_line = a.flat ? 0 : place.first_row / a.pitch;
  place.begin = a.flat ? 0 : place.first_row - place.first_line * a.pitch;
  return place;
}

// A place in a ring of buffers, and the parity of the barrier that is waited for there.
struct Ring {
  int place, size;
  unsigned parity;

  __device__ __forceinline__ void step() {
    if (++place == size) place = 0, parity ^= 1;
  }
};

// Orders the pixels of `lines` rows of the grid.
__device__ __forceinline__ void copy_lines(const Conv2dArguments& a, unsigned target,
                                           const TensorMap* map, unsigned arrived, int channel,
                                           int line, int lines, int class_y, int class_x,
                                           int stride) {
  int image = line / a.spacing, y = line - image * a.spacing;
  for (; lines > 0; --lines) {
    copy_box_4d(target, map, arrived, channel, class_x, y * stride + class_y, image);
    target += a.pitch * kLineBytes;
    if (++y == a.spacing) y = 0, ++image;
  }
}

// kColumns output channels of 64 * kRowBlocks * kGroups rows at a time; kGroups warp groups
// multiply, one warp more gives the orders to copy, as far ahead as there is memory: the pixels and
// weights of the next tile while this one is multiplied and written. The residual comes in the
// buffers of the pixels, after the last of them.
template <typename T, int kColumns, int kRowBlocks, int kGroups, bool kUneven>
__device__ void conv2d(const Conv2dArguments& a) {
  constexpr int kRows = 64 * kRowBlocks * kGroups;
  constexpr int kBoxColumns = kColumns < 64 ? kColumns : 64;
  constexpr unsigned kWeightBytes = kColumns * kLineBytes;
  constexpr Swizzle kWeightSwizzle = kBoxColumns == 64 ? kSwizzle128 : kSwizzle64;
  constexpr unsigned kEightChannels = 8 * kBoxColumns * 2;  // of a weight's box
  constexpr int kResiduals = (kColumns + 63) / 64;          // buffers that a tile's takes

  extern __shared__ unsigned char memory[];
  const unsigned weights = (shared_address(memory) + 1023) & ~1023u;
  const unsigned patches = weights + a.stages * kWeightBytes;
  const unsigned full = patches + a.patches * a.patch_bytes, empty = full + 8 * kMostStages;
  const unsigned patch_full = empty + 8 * kMostStages, patch_empty = patch_full + 8 * kMostPatches;
  const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);  // known to be one for all

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < a.stages; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, 4 * kGroups);
    }
    for (int patch = 0; patch < a.patches; ++patch) {
      barrier_init(patch_full + 8 * patch, 1);
      barrier_init(patch_empty + 8 * patch, 4 * kGroups);
    }
    fence_barrier_init();
  }
  __syncthreads();

  if (warp >= 4 * kGroups) {
    if constexpr (kUneven) give_registers_back<40>();
    if (threadIdx.x != 128 * kGroups) return;
    Ring stage{0, a.stages, 1}, patch{0, a.patches, 1};
    for (int program = blockIdx.x; program < a.programs; program += gridDim.x) {
      const Place at = place_of(a, program, kRows, kColumns);
      const int lines = a.flat ? 0 : (at.begin + kRows - 1 + a.furthest) / a.pitch + 1;
      for (int part = a.first_part[at.node]; part < a.first_part[at.node + 1]; ++part) {
        for (int channel = 0; channel < a.channels[part]; channel += kBlockChannels) {
          for (int c = 0; c < a.classes; ++c) {
            barrier_wait(patch_empty + 8 * patch.place, patch.parity);
            const unsigned arrived = patch_full + 8 * patch.place;
            const unsigned pixels = patches + patch.place * a.patch_bytes;
            const TensorMap* map = &a.x[part * a.stride + a.class_map[c]];
            if (a.flat) {
              barrier_expect(arrived, kRows * kLineBytes);
              copy_box_4d(pixels, map, arrived, channel, at.first_row, 0, 0);
            } else {
              barrier_expect(arrived, lines * a.pitch * kLineBytes);
              copy_lines(a, pixels, map, arrived, channel, at.first_line, lines, a.class_y[c],
                         a.class_x[c], a.stride);
            }
            patch.step();
            for (int tap = a.first_tap[c]; tap < a.first_tap[c + 1]; ++tap) {
              const unsigned ready = full + 8 * stage.place;
              barrier_wait(empty + 8 * stage.place, stage.parity);
              barrier_expect(ready, kWeightBytes);
#pragma unroll
              for (int box = 0; box < kColumns / kBoxColumns; ++box) {
                copy_box_3d(weights + stage.place * kWeightBytes + box * kBoxColumns * kLineBytes,
                            &a.weight[part], ready, at.first_column + box * kBoxColumns, channel,
                            a.tap[tap]);
              }
              stage.step();
            }
          }
        }
      }
      if (!a.has_residual) continue;
      for (int part = 0; part < kResiduals; ++part) {
        barrier_wait(patch_empty + 8 * patch.place, patch.parity);
        const unsigned arrived = patch_full + 8 * patch.place;
        const unsigned target = patches + patch.place * a.patch_bytes;
        const int channel = a.out_begin[at.node] + at.first_column + part * 64;
        if (a.flat) {
          barrier_expect(arrived, kRows * kLineBytes);
          copy_box_4d(target, &a.residual, arrived, channel, at.first_row, 0, 0);
        } else {
          const int rows = (at.begin + kRows - 1) / a.pitch + 1;
          barrier_expect(arrived, rows * a.pitch * kLineBytes);
          copy_lines(a, target, &a.residual, arrived, channel, at.first_line, rows, 0, 0, 1);
        }
        patch.step();
      }
    }
    return;
  }

  if constexpr (kUneven) take_registers<232>();
  const int group = warp / 4;
  // For its warp: that another warp's products are done says nothing about this one's.
  const bool speaks = threadIdx.x % 32 == 0;
  Ring stage{0, a.stages, 0}, patch{0, a.patches, 0};
  for (int program = blockIdx.x; program < a.programs; program += gridDim.x) {
    const Place at = place_of(a, program, kRows, kColumns);
    float sums[kRowBlocks][kColumns / 2];
#pragma unroll
    for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) sums[block][i] = 0.0f;
    }
    const unsigned begin = (at.begin + group * 64 * kRowBlocks) * kLineBytes;
    // Barriers of what the products before read: free once the next ones are under way.
    unsigned weights_done = 0, patch_done = 0;
    int part = a.first_part[at.node], channel = 0, c = 0, tap = 0;
    for (int weight = a.num_weights[at.node]; weight > 0; --weight) {
      const int left = a.channels[part] - channel;
      const int steps = left >= kBlockChannels ? 4 : (left + 15) / 16;
      barrier_wait(patch_full + 8 * patch.place, patch.parity);
      barrier_wait(full + 8 * stage.place, stage.parity);
      const unsigned rows = patches + patch.place * a.patch_bytes + begin + a.tap_offset[tap];
      const unsigned columns = weights + stage.place * kWeightBytes;
      products_begin();
      const auto add = [&](int step) {
        const unsigned long long b =
            operand(columns + step * 2 * kEightChannels, kBoxColumns * kLineBytes, kEightChannels,
                    kWeightSwizzle);
#pragma unroll
        for (int block = 0; block < kRowBlocks; ++block) {
          multiply(
              T{}, sums[block],
              operand(rows + block * 64 * kLineBytes + step * 32, 16, 8 * kLineBytes, kSwizzle128),
              b, 1);
        }
      };
      if (steps == 4) {
#pragma unroll
        for (int step = 0; step < 4; ++step) add(step);
      } else {
#pragma unroll 1
        for (int step = 0; step < steps; ++step) add(step);
      }
      products_commit();
      products_wait<1>();
      if (speaks && weights_done) barrier_arrive(weights_done);
      if (speaks && patch_done) barrier_arrive(patch_done);
      weights_done = empty + 8 * stage.place, patch_done = 0;
      stage.step();
      if (++tap == a.first_tap[c + 1]) {
        patch_done = patch_empty + 8 * patch.place;
        patch.step();
        if (++c == a.classes) {
          c = 0, tap = 0, channel += kBlockChannels;
          if (channel >= a.channels[part]) ++part, channel = 0;
        }
      }
    }
    products_wait<0>();
    if (speaks && weights_done) {
      barrier_arrive(weights_done);
      barrier_arrive(patch_done);
    }

    const int own_row = warp % 4 * 16 + (threadIdx.x & 31) / 4;
    const Rows<kRowBlocks> rows =
        rows_of<kRowBlocks>(a, at.first_row + group * 64 * kRowBlocks + own_row);
    const auto write = [&](auto first, unsigned added) {
      write_columns<T, decltype(first)::value, kColumns, kRowBlocks>(a, sums, rows, at.node,
                                                                     at.first_column, added);
    };
    const auto write_part = [&](auto part) {
      constexpr int kFirst = decltype(part)::value * 64;
      unsigned added = 0;
      if (a.has_residual) {
        barrier_wait(patch_full + 8 * patch.place, patch.parity);
        added = patches + patch.place * a.patch_bytes + begin + own_row * kLineBytes;
      }
      write(Constant<kFirst>{}, added);
      if constexpr (kColumns >= 64) write(Constant<kFirst + 32>{}, added + 64);
      __syncwarp();  // all lanes have read
      if (a.has_residual) {
        if (speaks) barrier_arrive(patch_empty + 8 * patch.place);
        patch.step();
      }
    };
    write_part(Constant<0>{});
    if constexpr (kColumns > 64) write_part(Constant<1>{});
  }
}

}  // namespace disco_sm90
