// Segments that arrive in a wire type, as float32.
#pragma once

#include <memory>
#include <vector>

#include "conv2d.h"

namespace disco {

// The same call over float32 copies of the sources that are not float32: a pass of its own, because
// every value is read once a panel of output channels and tap, and would be converted as often.
class WidenedCall {
 public:
  // Makes room for the copies. Throws std::invalid_argument for a source that does not say what
  // int8 needs.
  explicit WidenedCall(const Conv2dCall& from);

  // Fills the copies from what the sources hold now.
  void widen();

  const Conv2dCall& call() const { return call_; }

 private:
  const Conv2dCall given_;
  Conv2dCall call_;
  std::vector<std::unique_ptr<float[]>> copies_;  // per source; nullptr where it is float32
};

}  // namespace disco
