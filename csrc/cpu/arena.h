// Working memory that a thread keeps between calls: a fresh allocation of this size costs a page
// fault for every 4 KB.
#pragma once

#include <cstdint>

namespace disco {

constexpr int64_t kCacheLineBytes = 64;

// At least `bytes` of uninitialised memory, aligned to a cache line, valid until this thread's next
// call for the same slot. Throws std::bad_alloc.
enum class ArenaSlot { kShared, kPrivate, kStaging, kWidened };
void* arena(ArenaSlot slot, int64_t bytes);

}  // namespace disco
