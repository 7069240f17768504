#include "channel_list.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace disco {
namespace {

// From this mean length on, the scalar loop copies runs with memcpy instead of single channels.
// Half of 256 channels, 28 x 28 pixels: runs of 4 take twice as long in pieces as one by one (49
// us, 25), runs of 8 as long (23 us, 25), and runs of 16 half as long (13 us, 30).
constexpr int64_t kLongRun = 8;

}  // namespace

ChannelList::ChannelList(std::vector<int32_t> channels, int32_t vector_length)
    : channels_(std::move(channels)) {
  for (const int32_t channel : channels_) {
    if (channel < 0) {
      throw std::invalid_argument("channel " + std::to_string(channel) +
                                  " is listed; the first one is 0");
    }
    channels_needed_ = std::max<int64_t>(channels_needed_, int64_t{channel} + 1);
  }
  if (vector_length == 1) {
    plan_runs();
  } else {
    plan_windows(vector_length);
  }
}

bool ChannelList::is_prefix() const {
  for (size_t i = 0; i < channels_.size(); ++i) {
    if (channels_[i] != static_cast<int32_t>(i)) return false;
  }
  return true;
}

void ChannelList::plan_runs() {
  for (const int32_t channel : channels_) {
    if (!runs_.empty() && runs_.back().first + runs_.back().count == channel) {
      ++runs_.back().count;
    } else {
      runs_.push_back({channel, 1});
    }
  }
  if (static_cast<int64_t>(runs_.size()) * kLongRun > num_channels()) runs_.clear();
}

void ChannelList::plan_windows(int32_t vector_length) {
  load_length_ = static_cast<int32_t>(std::min<int64_t>(vector_length, channels_needed_));
  const int64_t vectors = (num_channels() + vector_length - 1) / vector_length;
  lanes_.assign(static_cast<size_t>(vectors * vector_length), 0);
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t first = v * vector_length;
    const int64_t valid = std::min<int64_t>(vector_length, num_channels() - first);
    uint32_t wanted = static_cast<uint32_t>((uint64_t{1} << valid) - 1);
    num_windows_.push_back(0);
    while (wanted != 0) {
      const Window window = next_window(first, wanted);
      for (int64_t lane = 0; lane < valid; ++lane) {
        if (window.lanes >> lane & 1u) {
          const size_t at = static_cast<size_t>(first + lane);
          lanes_[at] = channels_[at] - window.first;
        }
      }
      windows_.push_back(window);
      ++num_windows_.back();
      wanted &= ~window.lanes;
    }
  }
}

// A load for the lowest of the wanted channels: at a cache line's start, or at that channel if this
// gets more of them. No load goes beyond the last listed channel: there may be nothing behind it.
Window ChannelList::next_window(int64_t first, uint32_t wanted) const {
  int32_t lowest = std::numeric_limits<int32_t>::max();
  for (int64_t lane = 0; wanted >> lane != 0; ++lane) {
    if (wanted >> lane & 1u) {
      lowest = std::min(lowest, channels_[static_cast<size_t>(first + lane)]);
    }
  }
  const int32_t last = static_cast<int32_t>(channels_needed_) - load_length_;
  Window best = {0, 0};
  int most = 0;
  for (const int32_t start : {lowest / load_length_ * load_length_, lowest}) {
    Window window = {std::min(start, last), 0};
    int count = 0;
    for (int64_t lane = 0; wanted >> lane != 0; ++lane) {
      const int64_t offset = int64_t{channels_[static_cast<size_t>(first + lane)]} - window.first;
      if ((wanted >> lane & 1u) && offset >= 0 && offset < load_length_) {
        window.lanes |= 1u << lane;
        ++count;
      }
    }
    if (count > most) {
      best = window;
      most = count;
    }
  }
  return best;
}

ChannelListView ChannelList::view() const {
  return {channels_.data(),
          num_channels(),
          num_windows_.data(),
          windows_.data(),
          static_cast<int64_t>(windows_.size()),
          lanes_.data(),
          load_length_,
          runs_.empty() ? nullptr : runs_.data(),
          static_cast<int64_t>(runs_.size())};
}

}  // namespace disco
