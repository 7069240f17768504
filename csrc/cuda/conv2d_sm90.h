// Convolutions of 16-bit numbers on the tensor cores of compute capability 9.0; conv2d_sm90.cuh
// says how. Nothing here needs CUDA's headers.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace disco::cuda {

// A run of a node's input channels, and how many of its channels come before it.
struct Run {
  int first, count, before;
};

struct Conv2dNode {
  std::vector<Run> runs;
  int columns;           // output channels, neighbours in the output
  int out_begin;         // the first of them
  int num_inputs;        // rows of a tap of its weight
  int64_t weight_begin;  // elements
};

struct Window {
  int kernel_h, kernel_w, stride, padding_h, padding_w, dilation_h, dilation_w;
};

// [image][row][column][channel], strides in elements; a channel's is 1.
struct Image {
  uintptr_t data;
  int64_t image, row, pixel;
};

enum class Half { kBFloat16, kFloat16 };

class Conv2dSm90 {
 public:
  // Throws std::invalid_argument for what the kernel cannot do; `refusal` asks first.
  Conv2dSm90(std::vector<Conv2dNode> nodes, Window window, Half dtype);

  // Why the kernel cannot compute this, or empty.
  static std::string refusal(const std::vector<Conv2dNode>& nodes, const Window& window);
  // Likewise for maps of this width. `one_row`: of everything that is read and written, the pixels
  // of all images lie at one distance. `tile`: one of `tiles()`, or -1 for whether there is any.
  std::string refusal(int width, bool one_row, int tile) const;

  // `weight` as the Triton backend packs it: per node [tap][input][columns, padded to 8].
  // bias, residual: 0 if there is none. `activation`: none, relu, gelu. `tile`: -1, or one of
  // `tiles()`. Throws std::runtime_error with CUDA's message.
  void run(const Image& x, int images, int height, int width, uintptr_t weight, uintptr_t bias,
           const Image& residual, const Image& out, int activation, uintptr_t stream,
           int tile) const;

  static std::vector<std::string> tiles();
  int choose_tile(int height, int width) const;

 private:
  std::vector<Conv2dNode> nodes_;
  Window window_;
  Half dtype_;
};

}  // namespace disco::cuda
