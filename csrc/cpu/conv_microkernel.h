// What the portable driver and the per-ISA micro-kernels agree on. Plain C types only: this header
// is compiled with different instruction sets, so it must not define anything that the linker could
// merge across them (no inline functions, no templates, no STL).
#pragma once

#include <cstdint>

namespace disco {

// Of activations and weights; sums are float32, and so is the bias. Activations are never kInt8:
// that is what they are multiplied in (product_type() of conv2d.h).
enum DataType : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };

// What the epilogue applies last. The numbers are places in ACTIVATIONS of disco_kernels/spec.py.
// Up to relu6 they are comparisons, which a tile makes in its registers.
enum Activation : int32_t {
  kActivationNone = 0,
  kActivationRelu = 1,
  kActivationRelu6 = 2,
  kActivationSilu = 3,
  kActivationGelu = 4,
  kActivationGeluTanh = 5,
  kActivationHardswish = 6,
  kActivationHardsigmoid = 7,
  kActivationSigmoid = 8,
};
constexpr int32_t kNumActivations = 9;

// Consecutive rows of the weight panel that read from one set of pixel pointers. A row takes one
// float32 channel, two neighbouring bfloat16 channels or four neighbouring 8-bit ones.
struct Pass {
  const char* const* pixels;  // [mr] start of each pixel's channels
  const int32_t* offsets;     // bytes from a pixel pointer, one for every row of the panel
  const int32_t* end;         // of the offsets; at least one is given
  int64_t first_row;          // row of the panel that belongs to offsets[0]
};

// One register tile: mr pixels x up to nv * vector_length output channels.
struct Tile {
  const Pass* passes;
  int64_t num_passes;
  const char* panel;            // [K][nv * vector_length] packed weights, 4 bytes each
  const float* bias;            // [nv * vector_length], always given (zeros if the layer has none)
  const float* scale;           // [nv * vector_length] of the sums of 8-bit products, else nullptr
  char* const* out;             // [mr] start of each pixel's output channels
  const char* const* residual;  // [mr] likewise, or nullptr
  int64_t first_channel;        // of this panel, added to every out and residual pointer
  int64_t num_channels;         // valid output channels, 1 .. nv * vector_length
  // The rows that the epilogue reads and writes, at least one: fetched on the way from
  // first_channel on, one for every row of the panel.
  const char* const* touched;
  const char* const* last_touched;
  // Weights that come next, fetched on the way: one line at `prefetch`, then `prefetch_step` bytes
  // further for every row of the panel.
  const char* prefetch;
  int64_t prefetch_step;
  bool accumulate;  // start from *out instead of from the bias, which is zero then
  Activation activation;
};

// Tiles of one size, one after the other: callers set up some of them ahead. Setting up a tile
// writes memory, and writes that wait for the last tile's sums keep the next one from beginning.
// With fewer writes (PanelPlan, reread()) a tile of 14 x 32 and K = 38 takes a Zen 4 1190 cycles,
// not 1210.
using MicroKernel = void (*)(const Tile* tiles, int64_t num_tiles);

// One tile of (M + 2) x (M + 2) pixels, transformed for all listed channel groups.
struct WinogradInput {
  const char* const* pixels;  // [(M + 2)^2] start of each pixel's channels
  const int32_t* groups;      // [num_groups] first channels, vector_length of them each
  int64_t num_groups;
  int64_t channels;    // that a pixel has; beyond them nothing is read
  char* out;           // [point], whole vectors are written, in the data type of the products
  int64_t out_stride;  // bytes between points
};

// One tile of M x M pixels, transformed back, and the epilogue.
struct WinogradOutput {
  const float* products;        // [point][stride], whole vectors are read
  int64_t stride;               // floats between points
  const float* bias;            // [num_channels, whole vectors]
  char* const* out;             // [M^2], nullptr for a pixel outside of the map
  const char* const* residual;  // [M^2] likewise, or nullptr
  int64_t num_channels;
  bool accumulate;  // add what *out holds
  Activation activation;
};

// Up to kWindow words of a row, taken from kWindow neighbours.
constexpr int kWordWindow = 32;
struct WordStep {
  int32_t first_from, first_to;
  uint32_t readable;           // lanes of the window that belong to the row
  uint32_t written;            // lanes that are written
  uint16_t lane[kWordWindow];  // lane i comes from this one of the window
};

// Every pixel's steps, one after the other.
struct WordGather {
  const uint16_t* from;
  uint16_t* to;
  int64_t from_stride, to_stride;  // words between pixels
  int64_t num_pixels;
  int64_t to_words;  // that may be written, from `to` on
  const WordStep* steps;
  int64_t num_steps;
};

// Likewise, each value to an unsigned byte: the nearest whole number (ties to even) of value *
// inverse_scale, computed in float32, plus zero_point, within 0 and 255. NaN gives 0. Of every
// eight words of bfloat16, words 0, 2, 4, 6 go to the first four bytes and 1, 3, 5, 7 to the
// others.
struct QuadGather {
  const uint16_t* from;
  uint8_t* to;
  int64_t from_stride;  // words between pixels
  int64_t to_stride;    // bytes
  int64_t num_pixels;
  int64_t to_bytes;  // that may be written, from `to` on
  const WordStep* steps;
  int64_t num_steps;
  float inverse_scale;
  int32_t zero_point;
};

// Pixels of one map; the channels of all of them give one of `out`.
struct PixelList {
  const char* const* pixels;
  int64_t num_pixels;  // at least 1
  int64_t channels;
  char* out;
};

// The pixels of one map; the mean of each channel goes to `out`.
struct PixelMap {
  const char* first;
  int64_t h, w;                // at least 1
  int64_t stride_h, stride_w;  // bytes
  int64_t channels;
  char* out;
};

struct WinogradKernels {
  int32_t m;
  // By data type of the activations; product_type() of conv2d.h says what `input` writes.
  void (*input[2])(const WinogradInput&);
  void (*output[2])(const WinogradOutput&);
};

struct LaneKernels;

// Products of 8-bit integers, by data type of the activations.
struct QuadKernels {
  const MicroKernel* kernels[2];           // as those of IsaKernels
  void (*quantise[2])(const QuadGather&);  // nullptr: no faster than one by one
};

struct IsaKernels {
  const char* name;
  int32_t vector_length;  // float32 lanes
  int32_t max_vectors;    // output-channel vectors of the widest panel
  int32_t max_pixels;     // rows of the largest tile
  // [max_pixels][max_vectors], index (mr - 1) * max_vectors + nv - 1, by data type.
  const MicroKernel* kernels[2];
  const MicroKernel* pair_sums;  // bfloat16 that is multiplied and not rounded: float32 tiles
  const WinogradKernels* winograd2;
  const WinogradKernels* winograd4;
  void (*largest_pixel[2])(const PixelList&);  // by data type
  void (*mean_pixel[2])(const PixelMap&);
  void (*gather_words)(const WordGather&);  // nullptr: no faster than word by word
  const LaneKernels& (*lane_kernels)();     // of grouped convolutions
  bool pair_products = false;               // of bfloat16, by an instruction of their own
  const QuadKernels* quads = nullptr;       // if products of 8-bit integers pay
};

const IsaKernels& scalar_kernels();
#if defined(DISCO_HAVE_AVX2)
const IsaKernels& avx2_kernels();
#endif
#if defined(DISCO_HAVE_AVX512)
const IsaKernels& avx512_kernels();
#endif
#if defined(DISCO_HAVE_AVX512BF16)
const IsaKernels& avx512bf16_kernels();
#endif
#if defined(DISCO_HAVE_AVX512VNNI)
const QuadKernels& avx512vnni_kernels();
#endif
#if defined(DISCO_HAVE_NEON)
const IsaKernels& neon_kernels();
#endif

}  // namespace disco
