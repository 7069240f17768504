#include "arena.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace disco {
namespace {

struct Block {
  void* memory = nullptr;
  int64_t bytes = 0;
  ~Block() { std::free(memory); }
};

thread_local Block blocks[4];

}  // namespace

void* arena(ArenaSlot slot, int64_t bytes) {
  Block& block = blocks[static_cast<int>(slot)];
  if (bytes > block.bytes) {
    std::free(block.memory);
    block.bytes = 0;
    const int64_t rounded = (bytes + kCacheLineBytes - 1) / kCacheLineBytes * kCacheLineBytes;
    block.memory = std::aligned_alloc(kCacheLineBytes, static_cast<size_t>(rounded));
    if (block.memory == nullptr) throw std::bad_alloc();
    block.bytes = rounded;
  }
  return block.memory;
}

}  // namespace disco
