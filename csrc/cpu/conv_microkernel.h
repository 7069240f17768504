// What the portable driver and the per-ISA micro-kernels agree on. Plain C types only: this header
// is compiled with different instruction sets, so it must not define anything that the linker could
// merge across them (no inline functions, no templates, no STL).
#pragma once

#include <cstdint>

namespace disco {

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

// Consecutive rows of the weight panel that read from one set of pixel pointers.
struct Pass {
  const float* const* pixels;  // [mr] start of each pixel's channels
  const int32_t* offsets;      // [k] element offset from a pixel pointer
  int64_t k;                   // rows of the panel, at least 1
  int64_t first_row;           // row of the panel that belongs to offsets[0]
};

// One register tile: mr pixels x up to nv * vector_length output channels.
struct Tile {
  const Pass* passes;
  int64_t num_passes;
  const float* panel;            // [K][nv * vector_length] packed weights
  const float* bias;             // [nv * vector_length], always given (zeros if the layer has none)
  float* const* out;             // [mr] start of each pixel's output channels
  const float* const* residual;  // [mr] likewise, or nullptr
  int64_t first_channel;         // of this panel, added to every out and residual pointer
  int64_t num_channels;          // valid output channels, 1 .. nv * vector_length
  // Weights that come next, fetched on the way: one line at `prefetch`, then `prefetch_step` bytes
  // further for every row of the panel.
  const char* prefetch;
  int64_t prefetch_step;
  bool accumulate;  // start from *out instead of from the bias
  Activation activation;
};

using MicroKernel = void (*)(const Tile&);

struct IsaKernels {
  const char* name;
  int32_t vector_length;       // float32 lanes
  int32_t max_vectors;         // output-channel vectors of the widest panel
  int32_t max_pixels;          // rows of the largest tile
  const MicroKernel* kernels;  // [max_pixels][max_vectors], index (mr - 1) * max_vectors + nv - 1
};

const IsaKernels& scalar_kernels();
#if defined(DISCO_HAVE_AVX2)
const IsaKernels& avx2_kernels();
#endif
#if defined(DISCO_HAVE_AVX512)
const IsaKernels& avx512_kernels();
#endif

}  // namespace disco
