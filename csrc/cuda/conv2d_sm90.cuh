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
// it is written. With strides the pixels of each parity (a class) have a grid of their own.
#pragma once

#include "sm90.cuh"

namespace disco_sm90 {

constexpr int kMostParts = 16;
constexpr int kMostMaps = 32;
constexpr int kMostNodes = 8;
constexpr int kMostTaps = 49;
constexpr int kMostClasses = 4;
constexpr int kMostStages = 8;
constexpr int kBlockChannels = 64;  // 128 bytes, one line of the swizzled pattern
constexpr int kLineBytes = 128;

enum class Activation { kNone, kRelu, kGelu };

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
  int channels[kMostParts];
  int first_part[kMostNodes + 1];
  int first_tile[kMostNodes + 1];  // of the output channels
  int columns[kMostNodes];
  int out_begin[kMostNodes];
  // Bytes from the pixel of a row of the product to that of a tap, its class's grid included.
  int tap_offset[kMostTaps];
  int taps;
  int class_offset[kMostClasses];
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
  long long out_image, out_row, out_pixel;  // strides in elements
  long long residual_image, residual_row, residual_pixel;
  void* out;
  const void* bias;      // [out_channels] or null
  const void* residual;  // or null
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

template <typename T, int kColumns, int kRowBlocks, int kGroups>
__device__ void write_tile(const Conv2dArguments& a, float (&sums)[kRowBlocks][kColumns / 2],
                           int first_row, int node, int first_column) {
  const int lane = threadIdx.x & 31, quad_lane = lane & 3;
  const int warp_row = (threadIdx.x / 32 % 4) * 16 + lane / 4;
  const int columns = a.columns[node];
  const unsigned short* bias = static_cast<const unsigned short*>(a.bias);
  const unsigned short* residual = static_cast<const unsigned short*>(a.residual);
  unsigned short* out = static_cast<unsigned short*>(a.out);
#pragma unroll
  for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + block * 64 + warp_row + half * 8;
      const int line = row / a.pitch, x = row - line * a.pitch;
      const int image = line / a.spacing, y = line - image * a.spacing;
      const bool there = x < a.out_width && y < a.out_height && image < a.images;
      const long long target = image * a.out_image + y * a.out_row + x * a.out_pixel;
      const long long added = image * a.residual_image + y * a.residual_row + x * a.residual_pixel;
#pragma unroll
      for (int part = 0; part < kColumns / 32; ++part) {
        // A lane's sums are two columns of each of four vectors, and what it reads and writes is
        // one vector.
        const int own = first_column + part * 32 + quad_lane * 8;
        unsigned words[4], others[4] = {0, 0, 0, 0};
        if (residual) {
          uint4 vector = make_uint4(0, 0, 0, 0);
          if (there && own < columns) {
            vector = *reinterpret_cast<const uint4*>(residual + added + a.out_begin[node] + own);
          }
          const unsigned given[4] = {vector.x, vector.y, vector.z, vector.w};
          vector = exchange_in_quad(given, quad_lane);
          others[0] = vector.x, others[1] = vector.y, others[2] = vector.z, others[3] = vector.w;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int column = first_column + part * 32 + j * 8 + quad_lane * 2;
          const int channel = a.out_begin[node] + column;
          float low = sums[block][(part * 4 + j) * 4 + half * 2];
          float high = sums[block][(part * 4 + j) * 4 + half * 2 + 1];
          if (bias && column < columns) {
            const float2 pair = widen_pair(T{}, *reinterpret_cast<const unsigned*>(bias + channel));
            low += pair.x, high += pair.y;
          }
          if (residual) {
            const float2 pair = widen_pair(T{}, others[j]);
            low += pair.x, high += pair.y;
          }
          low = activate(low, a.activation);
          high = activate(high, a.activation);
          words[j] = pack_pair(T{}, low, high);
        }
        const uint4 vector = exchange_in_quad(words, quad_lane);
        if (there && own < columns) {
          *reinterpret_cast<uint4*>(out + target + a.out_begin[node] + own) = vector;
        }
      }
    }
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

// kColumns output channels of 64 * kRowBlocks * kGroups rows at a time; kGroups warp groups
// multiply, one warp more gives the orders to copy, up to a tile ahead.
template <typename T, int kColumns, int kRowBlocks, int kGroups>
__device__ void conv2d(const Conv2dArguments& a) {
  constexpr int kRows = 64 * kRowBlocks * kGroups;
  constexpr int kBoxColumns = kColumns < 64 ? kColumns : 64;
  constexpr unsigned kWeightBytes = kColumns * kLineBytes;
  constexpr Swizzle kWeightSwizzle = kBoxColumns == 64 ? kSwizzle128 : kSwizzle64;
  constexpr unsigned kEightChannels = 8 * kBoxColumns * 2;  // of a weight's box

  extern __shared__ unsigned char memory[];
  __shared__ alignas(8) unsigned long long barriers[2 * kMostStages + 4];
  const unsigned weights = (shared_address(memory) + 1023) & ~1023u;
  const unsigned patches = weights + a.stages * kWeightBytes;
  const unsigned full = shared_address(barriers), empty = full + 8 * kMostStages;
  const unsigned patch_full = empty + 8 * kMostStages, patch_empty = patch_full + 16;
  const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);  // known to be one for all

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < a.stages; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, kGroups);
    }
    for (int patch = 0; patch < a.patches; ++patch) {
      barrier_init(patch_full + 8 * patch, 1);
      barrier_init(patch_empty + 8 * patch, kGroups);
    }
    fence_barrier_init();
  }
  __syncthreads();

  // Sums of 128 columns need more registers than an even share.
  constexpr bool kUneven = kColumns * kRowBlocks >= 256;
  if (warp >= 4 * kGroups) {
    if constexpr (kUneven) give_registers_back<40>();
    if (threadIdx.x != 128 * kGroups) return;
    Ring stage{0, a.stages, 1}, patch{0, a.patches, 1};
    for (int program = blockIdx.x; program < a.programs; program += gridDim.x) {
      const Place at = place_of(a, program, kRows, kColumns);
      const int lines = a.flat ? 0 : (at.begin + kRows - 1 + a.furthest) / a.pitch + 1;
      for (int part = a.first_part[at.node]; part < a.first_part[at.node + 1]; ++part) {
        for (int channel = 0; channel < a.channels[part]; channel += kBlockChannels) {
          barrier_wait(patch_empty + 8 * patch.place, patch.parity);
          const unsigned arrived = patch_full + 8 * patch.place;
          const unsigned pixels = patches + patch.place * a.patch_bytes;
          const TensorMap* map = &a.x[part * a.stride];
          if (a.flat) {
            barrier_expect(arrived, kRows * kLineBytes);
            copy_box_4d(pixels, map, arrived, channel, at.first_row, 0, 0);
          } else {
            barrier_expect(arrived, a.classes * lines * a.pitch * kLineBytes);
          }
          for (int c = 0; c < a.classes; ++c) {
            unsigned target = pixels + a.class_offset[c];
            int image = at.first_line / a.spacing, y = at.first_line - image * a.spacing;
            for (int line = 0; line < lines; ++line) {
              copy_box_4d(target, map + a.class_map[c], arrived, channel, a.class_x[c],
                          y * a.stride + a.class_y[c], image);
              target += a.pitch * kLineBytes;
              if (++y == a.spacing) y = 0, ++image;
            }
          }
          patch.step();
          for (int tap = 0; tap < a.taps; ++tap) {
            const unsigned ready = full + 8 * stage.place;
            barrier_wait(empty + 8 * stage.place, stage.parity);
            barrier_expect(ready, kWeightBytes);
#pragma unroll
            for (int box = 0; box < kColumns / kBoxColumns; ++box) {
              copy_box_3d(weights + stage.place * kWeightBytes + box * kBoxColumns * kLineBytes,
                          &a.weight[part], ready, at.first_column + box * kBoxColumns, channel,
                          tap);
            }
            stage.step();
          }
        }
      }
    }
    return;
  }

  if constexpr (kUneven) take_registers<232>();
  const int group = warp / 4;
  const bool speaks = threadIdx.x % 128 == 0;
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
    for (int part = a.first_part[at.node]; part < a.first_part[at.node + 1]; ++part) {
      for (int channel = 0; channel < a.channels[part]; channel += kBlockChannels) {
        const int left = a.channels[part] - channel;
        const int steps = left >= kBlockChannels ? 4 : (left + 15) / 16;
        barrier_wait(patch_full + 8 * patch.place, patch.parity);
        const unsigned pixels = patches + patch.place * a.patch_bytes + begin;
        unsigned done = 0;  // the barrier of the weights that the products before read
        for (int tap = 0; tap < a.taps; ++tap) {
          barrier_wait(full + 8 * stage.place, stage.parity);
          const unsigned rows = pixels + a.tap_offset[tap];
          const unsigned columns = weights + stage.place * kWeightBytes;
          products_begin();
          const auto add = [&](int step) {
            const unsigned long long b =
                operand(columns + step * 2 * kEightChannels, kBoxColumns * kLineBytes,
                        kEightChannels, kWeightSwizzle);
#pragma unroll
            for (int block = 0; block < kRowBlocks; ++block) {
              multiply(T{}, sums[block],
                       operand(rows + block * 64 * kLineBytes + step * 32, 16, 8 * kLineBytes,
                               kSwizzle128),
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
          if (speaks && done) barrier_arrive(done);
          done = empty + 8 * stage.place;
          stage.step();
        }
        // The next block of channels may need this patch's memory.
        products_wait<0>();
        if (speaks) {
          barrier_arrive(done);
          barrier_arrive(patch_empty + 8 * patch.place);
        }
        patch.step();
      }
    }
    write_tile<T, kColumns, kRowBlocks, kGroups>(a, sums, at.first_row + group * 64 * kRowBlocks,
                                                 at.node, at.first_column);
  }
}

}  // namespace disco_sm90
