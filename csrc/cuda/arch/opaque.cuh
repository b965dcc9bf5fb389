// What the compiler is not to see through: registers are what the kernels are short of.
#pragma once
#include <cstdint>

namespace tokenmill::cuda {

// Hides where x comes from: the compiler then neither computes x again in each iteration of a loop
// nor takes what follows from x out of the loop, where it would hold registers.
__device__ __forceinline__ void keep(uint32_t& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void keep(int& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void keep(int64_t& x) { asm volatile("" : "+l"(x)); }
template <typename T>
__device__ __forceinline__ void keep(T*& x) {
  asm volatile("" : "+l"(x));
}

// Read anew wherever they are used: what follows from them need not wait in registers.
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

// Ends a basic block. ptxas mixes what lies within one, and loads far ahead, until more is live
// than there are registers. The compiler cannot know that `positive` is; kNumber keeps it from
// joining two such ends.
template <int kNumber = 0>
__device__ __forceinline__ void end_block(int positive) {
  asm volatile("{ .reg .pred p; setp.eq.s32 p, %0, %1; @p exit; }" ::"r"(positive), "n"(-kNumber)
               : "memory");
}

}  // namespace tokenmill::cuda
