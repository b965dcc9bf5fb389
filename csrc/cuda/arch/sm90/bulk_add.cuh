// Bulk copies and float reductions from shared to global memory (cp.async.bulk,
// cp.reduce.async.bulk), and the order of CTAs that add to the same floats. One thread issues and
// waits. CuTe has no such reduction; its store (SM90_BULK_COPY_S2G) takes generic pointers, not
// shared addresses.
#pragma once
#include <cute/arch/copy_sm90_tma.hpp>

#include "cuda/arch/shared_memory.cuh"

namespace tokenmill::cuda {

// One bulk group per copy; size and addresses are multiples of 16 bytes. Threads that wrote the
// source in shared memory must have called fence_stores() before.
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

// Waits until the thread's groups have written. wait_for_stores() of tma.cuh: until they have read.
__device__ __forceinline__ void wait_for_bulk() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Proxy fence between generic and async accesses to global memory.
__device__ __forceinline__ void fence_global_copies() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// CTAs that add to the same floats take turns: turn n waits for turns 0 .. n - 1 to end, and sees
// what they wrote.
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
