// Memory between two pages that may not be touched.
#pragma once

#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

namespace selftest {

// Which end of the memory lies at a forbidden page: an access before the begin, or beyond the end,
// then ends the process. (The other end has the rest of its own page beside it.)
enum class Edge { kBegin, kEnd };

class GuardedBytes {
 public:
  GuardedBytes(size_t size, Edge edge);
  ~GuardedBytes();
  GuardedBytes(GuardedBytes&& other) noexcept;
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;
  GuardedBytes& operator=(GuardedBytes&&) = delete;

  // nullptr where there are no bytes, as a tensor without elements has it.
  void* data() const { return data_; }
  // From now on, writing ends the process too.
  void freeze();

 private:
  char* mapped_;
  size_t mapped_size_;
  void* data_;
};

template <typename T>
class Guarded {
 public:
  Guarded(size_t size, Edge edge) : bytes_(size * sizeof(T), edge), size_(size) {}
  Guarded(const std::vector<T>& values, Edge edge) : Guarded(values.size(), edge) {
    if (!values.empty()) std::memcpy(data(), values.data(), values.size() * sizeof(T));
  }

  // A copy that cannot be written to.
  static Guarded frozen(const std::vector<T>& values, Edge edge) {
    Guarded copy(values, edge);
    copy.bytes_.freeze();
    return copy;
  }

  T* data() const { return static_cast<T*>(bytes_.data()); }
  size_t size() const { return size_; }
  std::vector<T> values() const { return std::vector<T>(data(), data() + size_); }

 private:
  GuardedBytes bytes_;
  size_t size_;
};

// Tries what must be fatal in processes of their own. Returns what was not, or nothing.
std::string unguarded();

}  // namespace selftest
