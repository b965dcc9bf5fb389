// What the four warps of a warpgroup do together.
#pragma once
#include <cutlass/arch/reg_reconfig.h>

#include <cstdint>

namespace tokenmill::cuda {

constexpr int kWarpgroupThreads = 128;

// Of the warpgroup, 0 .. 127.
__device__ __forceinline__ int warpgroup_thread() { return threadIdx.x % kWarpgroupThreads; }
// Of the 64 rows of accumulators, those of a thread: h = 0 and 1.
__device__ __forceinline__ int warpgroup_row(int h) {
  return warpgroup_thread() / 32 * 16 + threadIdx.x % 32 / 4 + 8 * h;
}

// Registers that each thread has from here on, a multiple of 8. Those that one warpgroup gives back
// another may take, which waits for them.
template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  cutlass::arch::warpgroup_reg_dealloc<kRegisters>();
}
template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  cutlass::arch::warpgroup_reg_alloc<kRegisters>();
}

// The threads of warpgroup `number` meet; barrier 0 belongs to the block.
__device__ __forceinline__ void sync_warpgroup(int number) {
  asm volatile("barrier.sync %0, %1;" ::"r"(number + 1), "n"(kWarpgroupThreads) : "memory");
}

// Whether it holds for any thread of warpgroup `number`, which meet.
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
