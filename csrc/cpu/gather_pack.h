// Selected channels of an activation, written as one contiguous message per destination.
//
// Messages in float32, float16 and bfloat16 are [pixel][channel]. A message in int8 begins with its
// scales, so that a reader of a stream knows them before the first value:
//
//   float32 scale [images][channels]   bytes [0, 4 * images * channels)
//   int8    value [pixels][channels]   from there on
//   zero bytes up to a multiple of 4, so that a message may follow
//
// with value * scale for what was sent. Symmetric: scale = largest magnitude of the image's channel
// / 127, values -127 to 127, so the error is at most scale / 2 and zero stays zero. One scale an
// image and channel: channels of one map differ in range by powers of ten, and an image's result
// does not depend on what else is in the batch. It costs 4 bytes a channel beside h * w bytes.
// A channel whose magnitudes are all below 2^-100 is sent as zeros (scale 0). A channel that holds
// a NaN or an infinity has scale NaN: all of it arrives as NaN rather than as something plausible.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "channel_list.h"
#include "conv_microkernel.h"
#include "message_kernels.h"
#include "pixel_runs.h"
#include "word_list.h"

namespace disco {

// Channel stride 1, other strides in elements.
struct Activation2d {
  const void* data;
  int64_t channels;
  PixelGrid grid;
  DataType dtype = kFloat32;

  const float* floats() const { return static_cast<const float*>(data); }
  const uint16_t* words() const { return static_cast<const uint16_t*>(data); }
};

class GatherPack {
 public:
  // One list of channels a destination, for the instruction set in use. Throws
  // std::invalid_argument for a negative channel.
  explicit GatherPack(std::vector<std::vector<int32_t>> lists);

  // Writes every destination's message, reading the activation once; x.grid.n is the number of
  // images. Throws std::invalid_argument for a listed channel that x does not have.
  void run(const Activation2d& x, WireType wire, const std::vector<void*>& messages,
           int32_t num_threads) const;

 private:
  struct Work;

  Work plan(const Activation2d& x, WireType wire, int32_t num_threads) const;
  void gather(const Work& work, size_t list, int64_t offset, int64_t pixels, float* to) const;
  void gather_widened(size_t list, const uint16_t* x, int64_t stride, int64_t pixels,
                      uint16_t* words, float* to) const;
  void write_float32(const Work& work, const std::vector<void*>& messages) const;
  void write_streamed(const Work& work, const std::vector<void*>& messages) const;
  void write_halves(const Work& work, const std::vector<void*>& messages) const;
  void write_int8(const Work& work, const std::vector<void*>& messages) const;

  const MessageKernels& kernels_;
  std::vector<ChannelList> lists_;
  std::vector<WordList> words_;  // the same, for activations of two bytes
  // Cache lines of a pixel that hold a listed channel, if pixels are aligned.
  int64_t first_line_ = 0, last_line_ = -1, touched_lines_ = 0;
  std::vector<int64_t> before_;  // per list, channels of the lists before it
  int64_t num_channels_ = 0;     // of all messages
  int64_t most_channels_ = 0;    // of a message
};

// Bytes of a message.
int64_t message_bytes(WireType wire, int64_t images, int64_t pixels, int64_t channels);

}  // namespace disco
