// Numbers that are the same on every platform, which std's distributions are not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

namespace selftest {

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}

  size_t below(size_t bound) { return engine_() % bound; }

  // In [-1, 1), a multiple of 2^-23.
  float uniform() { return (static_cast<float>(engine_() >> 8) - 0x1p23f) * 0x1p-23f; }

  std::vector<float> uniform(size_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = uniform();
    return values;
  }

  template <typename T>
  void shuffle(std::vector<T>& values) {
    for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[below(i)]);
  }

  // `count` of the channels 0 .. owned - 1, in mixed order.
  std::vector<int32_t> some_of(size_t owned, size_t count) {
    std::vector<int32_t> channels(owned);
    std::iota(channels.begin(), channels.end(), 0);
    shuffle(channels);
    channels.resize(count);
    return channels;
  }

 private:
  std::mt19937 engine_;
};

}  // namespace selftest
