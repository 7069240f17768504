// A list of channels made ready to be picked from pixels of 16-bit words, once per list.
#pragma once

#include <cstdint>
#include <vector>

#include "conv_microkernel.h"

namespace disco {

class WordList {
 public:
  // Any order, any repetition; nothing beyond the largest channel is read. With `even`, a zero
  // follows an odd number of words.
  WordList(std::vector<int32_t> channels, bool even);

  // Channels of `pixels` pixels, `stride` words apart, to rows of `out`, `out_stride` words apart.
  // Between the rows anything may be written: nobody else may use it.
  void gather(const uint16_t* x, int64_t stride, int64_t pixels, uint16_t* out,
              int64_t out_stride) const;

  int64_t num_channels() const { return static_cast<int64_t>(channels_.size()); }

 private:
  std::vector<int32_t> channels_;
  std::vector<WordStep> steps_;
  int64_t words_;  // of a row, the zero included
};

}  // namespace disco
