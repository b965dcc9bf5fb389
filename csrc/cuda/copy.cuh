// Copies between global memory, shared memory and registers.
//
// Shared memory is addressed by the 32-bit offsets of its own state space, and constant parts of an
// address are immediates: CuTe's copy atoms take references, which cost a conversion each.
#pragma once
#include <cstdint>

namespace tokenmill::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Hides where x comes from: the compiler then neither computes x again in each iteration of a loop
// nor takes what follows from x out of the loop, where it would hold registers.
__device__ __forceinline__ void keep(uint32_t& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void keep(int& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void keep(int64_t& x) { asm volatile("" : "+l"(x)); }
template <typename T>
__device__ __forceinline__ void keep(T*& x) {
  asm volatile("" : "+l"(x));
}

// 16 bytes from global to shared memory in the background, both ends aligned to 16 bytes.
template <int kOffset = 0>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0 + %1], [%2], 16;\n" ::"r"(to), "n"(kOffset),
               "l"(from));
}

// The same, or 16 zero bytes. Nothing is read then, but `from` must still be a global address.
__device__ __forceinline__ void copy_async_or_zero(uint32_t to, const void* from, bool wanted) {
  const int bytes = wanted ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from),
               "r"(bytes));
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n"); }

// Until at most the last kPending groups of this thread's copies are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending));
}

// Four 8x8 matrices of 16-bit elements; lane l points at row l % 8 of matrix l / 8. Word i of a
// lane holds elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix i.
template <int kOffset = 0>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address), "n"(kOffset));
}

// The same transposed: elements of rows 2 (l % 4) and 2 (l % 4) + 1, column l / 4.
template <int kOffset = 0>
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address), "n"(kOffset));
}

template <int kOffset = 0>
__device__ __forceinline__ void load_shared(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4 + %5];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address), "n"(kOffset));
}

template <int kOffset = 0>
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t word) {
  asm volatile("st.shared.b32 [%0 + %1], %2;\n" ::"r"(address), "n"(kOffset), "r"(word));
}

__device__ __forceinline__ void store_shared(uint32_t address, const uint32_t (&words)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3]));
}

// As one store: from assignments of uint4 the compiler makes four.
__device__ __forceinline__ void store_global(void* to, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(to), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}

}  // namespace tokenmill::cuda
