// The device code on the CPU, as a library: disco_emulate runs the blocks of a launch in turn.
#include "emulation.h"

#include <ucontext.h>

#include <cstdio>
#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernels.cuh"

Index threadIdx, blockIdx, gridDim;

namespace {

constexpr unsigned kThreads = disco::cuda::kThreads;
constexpr size_t kStackBytes = 64 << 10;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  bool done = false;
  int barriers = 0;
};

ucontext_t scheduler;
std::vector<Fiber> fibers(kThreads);
const std::function<void()>* running = nullptr;

void enter() {
  (*running)();
  fibers[threadIdx.x].done = true;
  swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

// Returns whether all threads met at every barrier.
bool run_block(const std::function<void()>& kernel) {
  running = &kernel;
  for (Fiber& fiber : fibers) {
    fiber.done = false, fiber.barriers = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (unsigned left = kThreads; left > 0;) {
    for (unsigned t = 0; t < kThreads; ++t) {
      if (fibers[t].done) continue;
      threadIdx.x = t;
      swapcontext(&scheduler, &fibers[t].context);
      left -= fibers[t].done;
    }
    for (const Fiber& fiber : fibers) {
      if (fiber.barriers != fibers[0].barriers || fiber.done != fibers[0].done) return false;
    }
  }
  return true;
}

template <typename Args>
std::function<void()> call_of(void (*kernel)(Args), const void* args) {
  return [=] { kernel(*static_cast<const Args*>(args)); };
}

}  // namespace

void __syncthreads() {
  Fiber& fiber = fibers[threadIdx.x];
  ++fiber.barriers;
  swapcontext(&fiber.context, &scheduler);
}

// 0, 1 for an unknown kernel, 2 for arguments of another size, 3 for a barrier that not all met.
extern "C" int disco_emulate(const char* name, unsigned blocks, const void* args, size_t bytes) {
  struct Kernel {
    size_t bytes;
    std::function<std::function<void()>(const void*)> call;
  };
#define DISCO_LIST(kernel, Args) \
  {#kernel, {sizeof(Args), [](const void* given) { return call_of<Args>(kernel, given); }}},
  static const std::unordered_map<std::string, Kernel> table = {DISCO_LIST_KERNELS()};
  const auto found = table.find(name);
  if (found == table.end()) return 1;
  if (bytes != found->second.bytes) return 2;
  const std::function<void()> kernel = found->second.call(args);
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    if (!run_block(kernel)) return 3;
  }
  return 0;
}
