// Writes one contiguous range past the caches.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "message_kernels.h"

namespace disco {

// Takes blocks of bytes for one contiguous range and writes it in whole lines past the caches.
class Streamer {
 public:
  Streamer(const MessageKernels& kernels, void* to, int64_t longest_block)
      : kernels_(kernels),
        to_(static_cast<char*>(to)),
        memory_(new char[static_cast<size_t>(longest_block + 3 * kLine)]) {
    block_ = memory_.get() + bytes_to_line(memory_.get());
    head_ = bytes_to_line(to);
  }

  // Where the next block has to be put.
  void* block() { return block_ + kept_; }

  void take(int64_t bytes) {
    const int64_t have = kept_ + bytes;
    int64_t done = 0;
    if (head_ > 0) {  // up to the first line's start
      done = std::min(head_, have);
      std::copy(block_, block_ + done, to_);
      head_ -= done;
    }
    const int64_t lines = (have - done) / kLine;
    kernels_.stream(block_ + done, lines, to_ + done);
    done += lines * kLine;
    kept_ = have - done;
    // Less than a line is left, but to move a whole one takes no call.
    char rest[kLine];
    std::memcpy(rest, block_ + done, sizeof(rest));
    std::memcpy(block_, rest, sizeof(rest));
    to_ += done;
  }

  void finish() {
    std::copy(block_, block_ + kept_, to_);
    kernels_.finish_streams();
  }

 private:
  static constexpr int64_t kLine = 64;

  static int64_t bytes_to_line(const void* address) {
    return static_cast<int64_t>(-reinterpret_cast<uintptr_t>(address) % kLine);
  }

  const MessageKernels& kernels_;
  char* to_;
  std::unique_ptr<char[]> memory_;
  char* block_;
  int64_t head_;
  int64_t kept_ = 0;
};

}  // namespace disco
