// Messages (gather_pack.h) that a convolution writes beside its output: what a thread has just
// written it also packs, a piece at a time, while it is in its caches. An exchange then does not
// read the activation again.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "channel_list.h"
#include "conv2d_plan.h"
#include "gather_pack.h"
#include "word_list.h"

namespace disco {

// What does not depend on the call: which channels of which message are whose outputs.
class FusedPack {
 public:
  // One list of the output tensor's channels a message. Throws std::invalid_argument for a channel
  // that no node writes.
  FusedPack(const std::vector<Node>& nodes, DataType dtype,
            const std::vector<std::vector<int32_t>>& lists);

  size_t num_messages() const { return lists_.size(); }

 private:
  friend class FusedMessages;

  // Places of a message that lie side by side, and the channels of the output that fill them.
  struct Part {
    size_t message;
    int64_t place;  // of the first one, in a pixel's row of the message
    ChannelList channels;
    WordList words;  // the same, for outputs of two bytes
  };
  struct Writer {
    int32_t node = -1;
    int64_t panel = 0;
  };
  using Range = std::tuple<int32_t, int64_t, int64_t>;  // node, first panel, panels

  // What these panels of a node hold of the messages. Threads may ask at the same time.
  const std::vector<Part>& parts(const Range& range) const;

  const MessageKernels& kernels_;
  const DataType dtype_;
  std::vector<std::vector<int32_t>> lists_;
  std::vector<Writer> writers_;  // of every channel
  std::vector<GatherPack> all_;  // of every message: all that it holds, in order
  mutable std::mutex mutex_;
  mutable std::map<Range, std::vector<Part>> parts_;
};

// The messages of one call.
class FusedMessages {
 public:
  // Throws std::invalid_argument for another number of messages, or for pixels that are no multiple
  // of the call's images.
  FusedMessages(const FusedPack& pack, const ConvPlan& plan);

  // Takes what the panels of a node have of the output's pixels [begin, end). Threads may do so at
  // the same time.
  void write(int32_t node, int64_t first_panel, int64_t num_panels, int64_t begin,
             int64_t end) const;

  // After the last pixel. int8 needs the largest value of a channel before it can write the first,
  // so it keeps the selected channels aside until here.
  void finish(int32_t num_threads) const;

 private:
  void write_float32(const FusedPack::Part& part, int64_t offset, int64_t count, int64_t first,
                     float* scratch) const;
  void write_bfloat16(const FusedPack::Part& part, int64_t offset, int64_t count, int64_t first,
                      float* scratch) const;
  void narrow(const FusedPack::Part& part, const float* values, int64_t count, int64_t first,
              uint16_t* scratch) const;
  int64_t row(const FusedPack::Part& part) const {
    return static_cast<int64_t>(pack_.lists_[part.message].size());
  }

  const FusedPack& pack_;
  const PixelGrid out_;
  const void* data_;
  const WireType wire_;
  const int64_t images_;
  const std::vector<void*> messages_;
  std::vector<std::unique_ptr<float[]>> kept_;  // int8: [pixels][channels] of every message
};

}  // namespace disco
