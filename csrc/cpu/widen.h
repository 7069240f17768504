// Segments that arrive in a wire type, as float32.
#pragma once

#include <vector>

#include "conv2d.h"

namespace disco {

// The same call over float32 copies of the sources that are not float32: a pass of its own, because
// every value is read once a panel of output channels and tap, and would be converted as often.
// Memory is the calling thread's arena, so only one widened call is alive in a thread at a time;
// `memory_moved` tells a kept one that it is not.
class WidenedCall {
 public:
  // Makes room for the copies. Throws std::invalid_argument for a source that does not say what
  // int8 needs.
  explicit WidenedCall(const Conv2dCall& from);

  // Fills the copies from what the sources hold now.
  void widen();
  bool memory_moved() const;

  const Conv2dCall& call() const { return call_; }

 private:
  const Conv2dCall given_;
  Conv2dCall call_;
  std::vector<float*> copies_;  // per source; nullptr where it is float32
  int64_t bytes_ = 0;
  char* memory_ = nullptr;
};

}  // namespace disco
