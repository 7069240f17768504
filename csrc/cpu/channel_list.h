// A list of channels made ready for MessageKernels::gather, once per list.
#pragma once

#include <cstdint>
#include <vector>

#include "message_kernels.h"

namespace disco {

// Any order, any repetition.
class ChannelList {
 public:
  // Throws std::invalid_argument for a negative channel.
  ChannelList(std::vector<int32_t> channels, int32_t vector_length);

  ChannelListView view() const;
  int64_t num_channels() const { return static_cast<int64_t>(channels_.size()); }
  // One more than the largest channel.
  int64_t channels_needed() const { return channels_needed_; }
  // Whether these are the first channels, in order.
  bool is_prefix() const;

 private:
  void plan_runs();
  void plan_windows(int32_t vector_length);
  Window next_window(int64_t first, uint32_t wanted) const;

  std::vector<int32_t> channels_;
  std::vector<ChannelRun> runs_;
  std::vector<int32_t> num_windows_;
  std::vector<Window> windows_;
  std::vector<int32_t> lanes_;
  int32_t load_length_ = 0;
  int64_t channels_needed_ = 0;
};

}  // namespace disco
