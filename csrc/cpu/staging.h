// Copies of sources that a micro-kernel cannot read as they lie, or not at its speed: images of few
// channels, bfloat16 channels that are not listed in neighbouring pairs, pixels at distances that
// put all of a tile into the same few cache sets, and what is multiplied in 8-bit integers.
#pragma once

#include <cstdint>
#include <vector>

#include "conv2d.h"
#include "word_list.h"

namespace disco {

// The same convolution over staged copies. Memory is the calling thread's arena, so only one
// staged call is alive in a thread at a time; `memory_moved` tells a kept one that it is not.
class StagedCall {
 public:
  static bool needed(const Conv2dGeometry& geometry, const std::vector<Node>& nodes,
                     const Conv2dCall& call);

  StagedCall(const Conv2dGeometry& geometry, const std::vector<Node>& nodes,
             const Conv2dCall& call);

  // Fills the copies from what the sources hold now; without `gather`, the padded ones only.
  void copy(bool gather, bool by_rows) const;
  // For a 1 x 1 kernel: what a node's output pixels [first, end) read of gathered channels.
  void gather_pixels(int32_t node, int64_t first, int64_t end, int64_t out_h, int64_t out_w) const;
  bool memory_moved() const;

  const Conv2dGeometry& geometry() const { return geometry_; }
  const std::vector<Node>& nodes() const { return nodes_; }
  Conv2dCall& call() { return call_; }

 private:
  // One source, channels last, with zeros around and, up to an even number, behind its channels.
  struct Padded {
    SourceView from;
    size_t source;
    int64_t in_h, in_w, padding_h, padding_w;
    int64_t begin;  // in the memory, bytes
    bool is_read;   // by the segments of the call
  };
  // Listed channels of one source, one after the other: in pairs with zeros up to an even number,
  // as bytes with anything up to a multiple of four, for the weights there are zero.
  struct Gathered {
    int32_t node;
    size_t from, source;
    WordList words;
    int64_t begin;
  };

  int64_t words() const { return geometry_.element_bytes() / 2; }  // of a channel
  int64_t gathered_bytes() const;
  void pad_sources();
  bool read_from(size_t source) const;
  void gather_segments();
  int64_t reserve(int64_t bytes);
  template <typename Element>
  void copy_padded(const Padded& padded) const;
  void copy_gathered(bool by_rows) const;
  // `count` pixels of one row, `step` apart.
  void gather_row(const Gathered& gathered, int64_t n, int64_t h, int64_t w, int64_t count,
                  int64_t step) const;

  Conv2dGeometry geometry_;
  std::vector<Node> nodes_;
  Conv2dCall call_;
  std::vector<Padded> padded_;
  std::vector<Gathered> gathered_;
  int64_t bytes_ = 0;
  char* memory_ = nullptr;
};

}  // namespace disco
