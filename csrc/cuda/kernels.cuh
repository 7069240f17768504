// All kernels, by the names that disco_kernels/cuda asks for. This file and what it includes is the
// whole device code: nvcc compiles it into the extension (kernels.cu), NVRTC at first use, and the
// tests for the CPU. So it includes no header of the host, of CUDA or of C++.
#pragma once

#include "pack.cuh"
#include "quantise.cuh"
#include "widen.cuh"

// Formats, and channels a load: as many as make 16 bytes on the wider side, 4, or 1.
#define DISCO_PACK_KERNELS(DO) \
  DO(f32, f32, 4)              \
  DO(f32, f32, 1)              \
  DO(f32, f16, 4)              \
  DO(f32, f16, 1)              \
  DO(f32, bf16, 4)             \
  DO(f32, bf16, 1)             \
  DO(f16, f32, 4)              \
  DO(f16, f32, 1)              \
  DO(bf16, f32, 4)             \
  DO(bf16, f32, 1)             \
  DO(f16, bf16, 8)             \
  DO(f16, bf16, 4)             \
  DO(f16, bf16, 1)             \
  DO(bf16, f16, 8)             \
  DO(bf16, f16, 4)             \
  DO(bf16, f16, 1)             \
  DO(b16, b16, 8)              \
  DO(b16, b16, 4)              \
  DO(b16, b16, 1)

#define DISCO_INT8_KERNELS(DO) \
  DO(f32, 4)                   \
  DO(f32, 1)                   \
  DO(f16, 8)                   \
  DO(f16, 4)                   \
  DO(f16, 1)                   \
  DO(bf16, 8)                  \
  DO(bf16, 4)                  \
  DO(bf16, 1)

#define DISCO_WIDEN_KERNELS(DO) \
  DO(i8, f32, 4)                \
  DO(i8, f32, 1)                \
  DO(i8, f16, 8)                \
  DO(i8, f16, 1)                \
  DO(i8, bf16, 8)               \
  DO(i8, bf16, 1)               \
  DO(f32, f32, 4)               \
  DO(f32, f32, 1)               \
  DO(f32, f16, 4)               \
  DO(f32, f16, 1)               \
  DO(f32, bf16, 4)              \
  DO(f32, bf16, 1)              \
  DO(f16, f32, 4)               \
  DO(f16, f32, 1)               \
  DO(bf16, f32, 4)              \
  DO(bf16, f32, 1)              \
  DO(f16, bf16, 8)              \
  DO(f16, bf16, 1)              \
  DO(bf16, f16, 8)              \
  DO(bf16, f16, 1)              \
  DO(b16, b16, 8)               \
  DO(b16, b16, 1)

#define DISCO_KERNEL(name, Args, call)                                                        \
  extern "C" __global__ void __launch_bounds__(256) name(const __grid_constant__ Args args) { \
    call(args);                                                                               \
  }

#define DISCO_DEFINE_PACK(x, wire, count)                                \
  DISCO_KERNEL(disco_pack_##x##_##wire##_##count, disco::cuda::PackArgs, \
               (disco::cuda::pack<disco::cuda::x, disco::cuda::wire, count>))
#define DISCO_DEFINE_INT8(x, count)                                        \
  DISCO_KERNEL(disco_magnitudes_##x##_##count, disco::cuda::MagnitudeArgs, \
               (disco::cuda::magnitudes<disco::cuda::x, count>))           \
  DISCO_KERNEL(disco_quantise_##x##_##count, disco::cuda::QuantiseArgs,    \
               (disco::cuda::quantise<disco::cuda::x, count>))
#define DISCO_DEFINE_WIDEN(wire, out, count)                                 \
  DISCO_KERNEL(disco_widen_##wire##_##out##_##count, disco::cuda::WidenArgs, \
               (disco::cuda::widen<disco::cuda::wire, disco::cuda::out, count>))

DISCO_PACK_KERNELS(DISCO_DEFINE_PACK)
DISCO_INT8_KERNELS(DISCO_DEFINE_INT8)
DISCO_WIDEN_KERNELS(DISCO_DEFINE_WIDEN)

// A table of them, for whoever defines DISCO_LIST(name, arguments).
#define DISCO_LIST_PACK(x, wire, count) \
  DISCO_LIST(disco_pack_##x##_##wire##_##count, disco::cuda::PackArgs)
#define DISCO_LIST_INT8(x, count)                                        \
  DISCO_LIST(disco_magnitudes_##x##_##count, disco::cuda::MagnitudeArgs) \
  DISCO_LIST(disco_quantise_##x##_##count, disco::cuda::QuantiseArgs)
#define DISCO_LIST_WIDEN(wire, out, count) \
  DISCO_LIST(disco_widen_##wire##_##out##_##count, disco::cuda::WidenArgs)
#define DISCO_LIST_KERNELS()          \
  DISCO_PACK_KERNELS(DISCO_LIST_PACK) \
  DISCO_INT8_KERNELS(DISCO_LIST_INT8) \
  DISCO_WIDEN_KERNELS(DISCO_LIST_WIDEN)
