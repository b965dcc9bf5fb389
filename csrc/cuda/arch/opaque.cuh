// Barriers to compiler optimisations that cost registers.
#pragma once
#include <cstdint>

namespace tokenmill::cuda {

// Hides the origin of x: the compiler then neither recomputes x in each iteration of a loop nor
// hoists what is derived from x out of the loop, where it would hold registers.
__device__ __forceinline__ void opt_barrier(uint32_t& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void opt_barrier(int& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void opt_barrier(int64_t& x) { asm volatile("" : "+l"(x)); }
template <typename T>
__device__ __forceinline__ void opt_barrier(T*& x) {
  asm volatile("" : "+l"(x));
}

// Special registers, read anew at each use: what is derived from them need not stay in registers.
__device__ __forceinline__ unsigned thread_index() {
  unsigned x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}
__device__ __forceinline__ unsigned thread_count() {
  unsigned x;
  asm volatile("mov.u32 %0, %%ntid.x;" : "=r"(x));
  return x;
}
__device__ __forceinline__ unsigned block_index() {
  unsigned x;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
  return x;
}

// Ends a basic block. ptxas schedules freely within one and hoists loads until more is live than
// there are registers. `positive` is > 0, which the compiler cannot know; kNumber keeps it from
// merging two such ends.
template <int kNumber = 0>
__device__ __forceinline__ void end_block(int positive) {
  asm volatile("{ .reg .pred p; setp.eq.s32 p, %0, %1; @p exit; }" ::"r"(positive), "n"(-kNumber)
               : "memory");
}

}  // namespace tokenmill::cuda
