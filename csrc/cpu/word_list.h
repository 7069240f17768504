// A list of channels made ready to be picked from pixels of 16-bit words, once per list.
#pragma once

#include <cstdint>
#include <vector>

#include "conv2d.h"

namespace disco {

class WordList {
 public:
  enum Use {
    kWords,      // for gather()
    kEvenWords,  // for gather(): a zero follows an odd number of words
    kBytes,      // for quantise()
  };
  // Any order, any repetition; nothing beyond the largest channel is read. Each channel is `words`
  // neighbouring words.
  WordList(const std::vector<int32_t>& channels, int64_t words, Use use);

  // Channels of `pixels` pixels, `stride` words apart, to rows of `out`, `out_stride` words apart.
  // Between the rows anything may be written: nobody else may use it.
  void gather(const uint16_t* x, int64_t stride, int64_t pixels, uint16_t* out,
              int64_t out_stride) const;

  // Likewise to unsigned bytes (QuadGather), of channels of float32 (2 words) or bfloat16 (1); the
  // strides are in words and in bytes. On instruction sets with quads only.
  void quantise(const uint16_t* x, int64_t stride, int64_t pixels, InputBytes input, uint8_t* out,
                int64_t out_stride) const;

  int64_t num_words() const { return static_cast<int64_t>(listed_.size()); }

 private:
  std::vector<int32_t> listed_;  // words
  std::vector<WordStep> steps_;
  int64_t words_of_channel_;
  int64_t words_;  // of a row, the zero included
};

}  // namespace disco
