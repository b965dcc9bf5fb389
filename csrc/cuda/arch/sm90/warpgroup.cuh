// Warpgroup-wide operations (four warps).
#pragma once
#include <cutlass/arch/reg_reconfig.h>

#include <cstdint>

namespace tokenmill::cuda {

constexpr int kWarpgroupThreads = 128;

// Thread index within the warpgroup, 0 .. 127.
__device__ __forceinline__ int warpgroup_thread() { return threadIdx.x % kWarpgroupThreads; }
// Accumulator row, of 64, that this thread holds for h = 0 and 1.
__device__ __forceinline__ int warpgroup_row(int h) {
  return warpgroup_thread() / 32 * 16 + threadIdx.x % 32 / 4 + 8 * h;
}

// setmaxnreg: registers per thread from here on, a multiple of 8. A warpgroup that grows waits
// until others have released enough.
template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  cutlass::arch::warpgroup_reg_dealloc<kRegisters>();
}
template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  cutlass::arch::warpgroup_reg_alloc<kRegisters>();
}

// Barrier of the threads of warpgroup `number`; barrier 0 is __syncthreads().
__device__ __forceinline__ void sync_warpgroup(int number) {
  asm volatile("barrier.sync %0, %1;" ::"r"(number + 1), "n"(kWarpgroupThreads) : "memory");
}

// True if `holds` for any thread of warpgroup `number`, which also synchronises.
__device__ __forceinline__ bool any_in_warpgroup(int number, bool holds) {
  uint32_t any;
  asm volatile(
      "{ .reg .pred p, q; setp.ne.u32 p, %1, 0; barrier.red.or.pred q, %2, %3, p;"
      " selp.u32 %0, 1, 0, q; }"
      : "=r"(any)
      : "r"(static_cast<uint32_t>(holds)), "r"(number + 1), "n"(kWarpgroupThreads)
      : "memory");
  return any;
}

}  // namespace tokenmill::cuda
