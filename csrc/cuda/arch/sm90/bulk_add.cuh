// Contiguous bytes from shared to global memory by the copy engine, stored or added as floats, and
// the order of blocks that add to the same ones. One thread issues and waits. CuTe has no such copy
// that adds; its store (SM90_BULK_COPY_S2G) takes generic pointers, not shared addresses.
#pragma once
#include <cute/arch/copy_sm90_tma.hpp>

#include "cuda/arch/shared_memory.cuh"

namespace tokenmill::cuda {

// A group of one copy, of a multiple of 16 bytes, which lie at multiples of 16. What other threads
// wrote to shared memory is behind a fence_stores of theirs.
__device__ __forceinline__ void store_bulk(float* to, uint32_t from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
  cute::tma_store_arrive();
}
__device__ __forceinline__ void add_bulk(float* to, uint32_t from, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
      "r"(from), "r"(bytes)
      : "memory");
  cute::tma_store_arrive();
}

// The thread's groups have written, too. wait_for_stores() of tma.cuh: they have read.
__device__ __forceinline__ void wait_for_bulk() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Between generic accesses of global memory and those of the copy engine.
__device__ __forceinline__ void fence_global_copies() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Blocks that add to the same floats take turns: turn n waits until n are over, and what those
// before it wrote is seen behind it.
__device__ __forceinline__ void await_turn(const unsigned* turns, unsigned turn) {
  unsigned over;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(over) : "l"(turns) : "memory");
  } while (over != turn);
  fence_global_copies();
}
__device__ __forceinline__ void end_turn(unsigned* turns, unsigned turn) {
  fence_global_copies();
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(turns), "r"(turn + 1) : "memory");
}

}  // namespace tokenmill::cuda
