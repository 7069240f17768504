// Launches of the device code that nvcc compiled into the extension. disco_kernels/cuda decides
// what is launched; it launches what NVRTC compiled in the same way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace disco {

// Puts a kernel of csrc/cuda/kernels.cuh on a stream; does not wait for it.
//
// `args` is the kernel's structure (csrc/cuda/arguments.cuh) of `bytes` bytes, copied by the call.
// Throws std::invalid_argument for a name or a size that the build does not have, and
// std::runtime_error with CUDA's own words where the launch fails.
void cuda_launch(const std::string& kernel, uint32_t blocks, const void* args, size_t bytes,
                 int device, void* stream);

std::vector<std::string> cuda_kernels();

}  // namespace disco
