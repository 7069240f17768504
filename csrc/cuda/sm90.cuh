// Hopper's instructions, by name: barriers in shared memory, the tensor copy engine, and products
// of a warp group. PTX ISA 8.0, sections on mbarrier, cp.async.bulk.tensor and wgmma.
#pragma once

#include "sm90_layout.cuh"

namespace disco_sm90 {

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(unsigned barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(unsigned barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(unsigned barrier, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ready;\n"
      "bra again;\n"
      "ready:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void copy_box_3d(unsigned target, const TensorMap* map, unsigned barrier,
                                            int x0, int x1, int x2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(target),
      "l"(map), "r"(barrier), "r"(x0), "r"(x1), "r"(x2)
      : "memory");
}

__device__ __forceinline__ void copy_box_4d(unsigned target, const TensorMap* map, unsigned barrier,
                                            int x0, int x1, int x2, int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
      "l"(map), "r"(barrier), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
}

__device__ __forceinline__ uint4 read_shared(unsigned address) {
  uint4 found;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
               : "r"(address));
  return found;
}

__device__ __forceinline__ void products_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kLeft>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// Registers a thread of this warp group has from here on; all its warps take part.
template <int kRegisters>
__device__ __forceinline__ void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

struct BFloat16 {};
struct Float16 {};

// 64 rows x kColumns += 64 x 16 times 16 x kColumns. A has its channels in a row, B its columns.
#define DISCO_FLOATS8(d, i)                                                                   \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define DISCO_FLOATS32(d, i) \
  DISCO_FLOATS8(d, i), DISCO_FLOATS8(d, i + 8), DISCO_FLOATS8(d, i + 16), DISCO_FLOATS8(d, i + 24)
#define DISCO_NAMES16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define DISCO_NAMES32                                                   \
  DISCO_NAMES16                                                         \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, " \
  "%29, %30, %31"
#define DISCO_NAMES64                                                                \
  DISCO_NAMES32                                                                      \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, "    \
  "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, " \
  "%63"

#define DISCO_PRODUCT(TYPE, COLUMNS, NAMES, A, B, KEEP, ...)                                   \
  asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, " KEEP                                  \
               ", 0;\n"                                                                        \
               "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "." TYPE " {" NAMES \
               "}, " A ", " B ", keep, 1, 1, 0, 1;\n}\n"                                       \
               : __VA_ARGS__                                                                   \
               : "l"(a), "l"(b), "r"(keep))

#define DISCO_PRODUCTS(TAG, TYPE)                                                        \
  __device__ __forceinline__ void multiply(TAG, float (&d)[16], unsigned long long a,    \
                                           unsigned long long b, int keep) {             \
    DISCO_PRODUCT(TYPE, "32", DISCO_NAMES16, "%16", "%17", "%18", DISCO_FLOATS8(d, 0),   \
                  DISCO_FLOATS8(d, 8));                                                  \
  }                                                                                      \
  __device__ __forceinline__ void multiply(TAG, float (&d)[32], unsigned long long a,    \
                                           unsigned long long b, int keep) {             \
    DISCO_PRODUCT(TYPE, "64", DISCO_NAMES32, "%32", "%33", "%34", DISCO_FLOATS32(d, 0)); \
  }                                                                                      \
  __device__ __forceinline__ void multiply(TAG, float (&d)[64], unsigned long long a,    \
                                           unsigned long long b, int keep) {             \
    DISCO_PRODUCT(TYPE, "128", DISCO_NAMES64, "%64", "%65", "%66", DISCO_FLOATS32(d, 0), \
                  DISCO_FLOATS32(d, 32));                                                \
  }

DISCO_PRODUCTS(BFloat16, "bf16")
DISCO_PRODUCTS(Float16, "f16")

__device__ __forceinline__ unsigned pack_pair(BFloat16, float low, float high) {
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ __forceinline__ unsigned pack_pair(Float16, float low, float high) {
  unsigned word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ __forceinline__ float2 widen_pair(BFloat16, unsigned word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u));
}

__device__ __forceinline__ float2 widen_pair(Float16, unsigned word) {
  float2 pair;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\n"
      "cvt.f32.f16 %1, high;\n}\n"
      : "=f"(pair.x), "=f"(pair.y)
      : "r"(word));
  return pair;
}

}  // namespace disco_sm90
