// mbarrier: counts arrivals of threads and bytes of TMA copies.
//
// Waits and arrivals order accesses to shared memory. CUTLASS's wrappers do not tell the compiler
// (no "memory" clobber), which might move an access across one.
#pragma once
#include "cuda/arch/shared_memory.cuh"

namespace tokenmill::cuda {

// A phase completes when all expected arrivals and bytes are in. Phase n has parity n % 2; a wait
// for the parity of the phase before the first one returns at once.
class Mbarrier {
 public:
  __device__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals));
  }
  __device__ void arrive() {
    asm volatile(
        "{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(address())
        : "memory");
  }
  // Arrives and adds `bytes` of copies that name this barrier to the expected transaction count.
  __device__ void arrive_expecting(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()),
                 "r"(bytes)
                 : "memory");
  }
  __device__ void wait(unsigned parity) {
    while (!has_ended(parity)) continue;
  }
  // Operand of TMA copies.
  __device__ uint64_t* word() { return &word_; }

 private:
  __device__ uint32_t address() const { return shared_address(&word_); }
  __device__ bool has_ended(unsigned parity) {
    uint32_t ended;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
        " selp.u32 %0, 1, 0, p; }"
        : "=r"(ended)
        : "r"(address()), "r"(parity)
        : "memory");
    return ended;
  }

  uint64_t word_;
};

// Consumer release: one arrival per warp on the `empty` barrier.
__device__ __forceinline__ void release(Mbarrier& empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) empty.arrive();
}

// Waits as a whole warp: the next phase cannot complete before all lanes have seen this one
// complete.
__device__ __forceinline__ void wait_as_warp(Mbarrier& barrier, unsigned parity) {
  barrier.wait(parity);
  __syncwarp();
}

// Makes initialised barriers visible to the async proxy. A __syncthreads() must follow.
__device__ inline void publish_mbarriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Pipeline stage of tile `number` in a ring of Shape::kStages, and the parity of its phase.
template <typename Shape>
struct Stage {
  int index;
  unsigned parity;

  __device__ explicit Stage(unsigned number)
      : index(number % Shape::kStages), parity(number / Shape::kStages % 2) {}
};

}  // namespace tokenmill::cuda
