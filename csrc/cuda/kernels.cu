#include <stdexcept>
#include <string>
#include <unordered_map>

#include "kernels.cuh"
#include "launch.h"

namespace disco {
namespace {

struct Kernel {
  const void* function;
  size_t bytes;
};

const std::unordered_map<std::string, Kernel>& table() {
#define DISCO_LIST(name, Args) {#name, {reinterpret_cast<const void*>(name), sizeof(Args)}},
  static const std::unordered_map<std::string, Kernel> kernels = {DISCO_LIST_KERNELS()};
#undef DISCO_LIST
  return kernels;
}

void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next call would report it again
  throw std::runtime_error(what + ": " + cudaGetErrorString(status));
}

}  // namespace

void cuda_launch(const std::string& kernel, uint32_t blocks, const void* args, size_t bytes,
                 int device, void* stream) {
  const auto found = table().find(kernel);
  if (found == table().end()) {
    throw std::invalid_argument("this build has no CUDA kernel " + kernel + ": build it again");
  }
  if (bytes != found->second.bytes) {
    throw std::invalid_argument(kernel + " takes " + std::to_string(found->second.bytes) +
                                " bytes of arguments in this build, given " +
                                std::to_string(bytes) + ": build it again");
  }
  int current = -1;
  check(cudaGetDevice(&current), "the current device");
  if (current != device) check(cudaSetDevice(device), "device " + std::to_string(device));
  void* arguments[] = {const_cast<void*>(args)};
  check(cudaLaunchKernel(found->second.function, dim3(blocks), dim3(cuda::kThreads), arguments, 0,
                         static_cast<cudaStream_t>(stream)),
        "launch of " + kernel);
}

std::vector<std::string> cuda_kernels() {
  std::vector<std::string> names;
  for (const auto& [name, kernel] : table()) names.push_back(name);
  return names;
}

}  // namespace disco
