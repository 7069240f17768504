// Work that stays where it was: every thread has a share of the items, the same one whenever the
// shares are the same, and helps the others when it is through. A layer then finds most of what it
// reads in the cache of the core that wrote it; from another core's cache it takes several times as
// long.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace disco {

class Shares {
 public:
  // Thread t has items [begin[t], begin[t + 1]); begin has one more number than there are threads.
  explicit Shares(const std::vector<int64_t>& begin)
      : begin_(begin), next_(new Next[begin.size() - 1]) {
    for (size_t t = 0; t + 1 < begin.size(); ++t) next_[t].item.store(begin[t]);
  }

  int num_threads() const { return static_cast<int>(begin_.size()) - 1; }

  // Calls visit(item, end of the share that it is from) until nothing is left. For every thread of
  // a parallel region, or for fewer.
  template <typename Visit>
  void work(const Visit& visit) {
    const int threads = num_threads();
    const int me = omp_get_thread_num();
    for (int t = 0; t < threads; ++t) {
      const size_t share = static_cast<size_t>((me + t) % threads);
      const int64_t end = begin_[share + 1];
      for (;;) {
        const int64_t item = next_[share].item.fetch_add(1, std::memory_order_relaxed);
        if (item >= end) break;
        visit(item, end);
      }
    }
  }

 private:
  struct alignas(64) Next {
    std::atomic<int64_t> item;
  };

  const std::vector<int64_t>& begin_;
  std::unique_ptr<Next[]> next_;
};

}  // namespace disco
