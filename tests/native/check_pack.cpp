#include <cstring>
#include <string>

#include "check.h"
#include "cpu/gather_pack.h"
#include "guarded.h"
#include "random.h"

namespace selftest {
namespace {

// What each destination of a case gets: everything, one channel, nothing, every other one, a run
// (which is copied as a piece from 16 channels on), any in mixed order, and one channel twice.
std::vector<std::vector<int32_t>> selections(int32_t channels, Random& random) {
  std::vector<int32_t> all, even, tail;
  for (int32_t c = 0; c < channels; ++c) {
    all.push_back(c);
    if (c % 2 == 0) even.push_back(c);
    if (c >= channels / 3) tail.push_back(c);
  }
  const size_t count = static_cast<size_t>(channels);
  return {all, {channels - 1}, {}, even, tail, random.some_of(count, (count + 1) / 2), {0, 0}};
}

void check_case(int32_t channels, int64_t map, Layout layout, Edge edge, int32_t num_threads,
                Tally& tally) {
  Random random(static_cast<uint32_t>(channels));
  Tensor x(2, map, map + 1, channels, layout);
  for (float& value : x.values) value = random.uniform();
  const Guarded<float> source = Guarded<float>::frozen(x.values, edge);
  const std::vector<std::vector<int32_t>> selected = selections(channels, random);
  std::vector<Guarded<float>> outs;
  std::vector<void*> messages;
  for (const std::vector<int32_t>& list : selected) {
    outs.emplace_back(static_cast<size_t>(x.n * x.h * x.w) * list.size(), edge);
    messages.push_back(outs.back().data());
  }
  const disco::PixelGrid grid = {x.n, x.h, x.w, x.stride_n, x.stride_h, x.stride_w};
  disco::GatherPack(selected).run({source.data(), channels, grid}, disco::WireType::kFloat32,
                                  messages, num_threads);
  ++tally.calls;
  for (size_t m = 0; m < selected.size(); ++m) {
    const float* found = outs[m].data();
    for (int64_t n = 0; n < x.n; ++n) {
      for (int64_t h = 0; h < x.h; ++h) {
        for (int64_t w = 0; w < x.w; ++w) {
          for (const int32_t c : selected[m]) {
            const float wanted = x.at(n, h, w, c);
            if (std::memcmp(found, &wanted, sizeof(wanted)) != 0) {
              throw CheckFailed("message " + std::to_string(m) + ", channel " + std::to_string(c) +
                                ": " + std::to_string(*found) + " instead of " +
                                std::to_string(wanted));
            }
            ++found;
            ++tally.outputs;
          }
        }
      }
    }
  }
}

}  // namespace

int64_t check_pack(Tally& tally) {
  int64_t cases = 0;
  for (const int32_t channels : {1, 2, 7, 16, 17, 33, 64}) {
    for (const Layout layout : {Layout::kWhole, Layout::kSlice, Layout::kCrop}) {
      for (const Edge edge : {Edge::kBegin, Edge::kEnd}) {
        // The larger map is worth a second thread.
        for (const int64_t map : {3, 15}) {
          for (const int32_t num_threads : {1, 2}) {
            check_case(channels, map, layout, edge, num_threads, tally);
            ++cases;
          }
        }
      }
    }
  }
  return cases;
}

}  // namespace selftest
