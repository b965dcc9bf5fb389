// Asynchronous copies from global to shared memory that bypass registers (cp.async, sm_80).
#pragma once
#include <cstdint>

namespace tokenmill::cuda {

// 16 bytes, both ends aligned to 16 bytes.
template <int kOffset = 0>
__device__ __forceinline__ void cp_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0 + %1], [%2], 16;\n" ::"r"(to), "n"(kOffset),
               "l"(from));
}

// The first `bytes` of 16 bytes, then zeros. With 0 bytes nothing is read, but `from` must still be
// a global address.
template <int kOffset = 0>
__device__ __forceinline__ void cp_async_bytes(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0 + %1], [%2], 16, %3;\n" ::"r"(to),
               "n"(kOffset), "l"(from), "r"(bytes));
}

// All of 16 bytes, or 16 zeros.
__device__ __forceinline__ void cp_async_zfill(uint32_t to, const void* from, bool wanted) {
  cp_async_bytes(to, from, wanted ? 16 : 0);
}

// A 4-byte word, or 0.
__device__ __forceinline__ void cp_async_word_zfill(uint32_t to, const void* from, bool wanted) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(wanted ? 4 : 0));
}

// A 4-byte word, read by this thread after its wait.
__device__ __forceinline__ void cp_async_word(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n"); }

// Waits until at most the last kPending groups of this thread's copies are in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending));
}

}  // namespace tokenmill::cuda
