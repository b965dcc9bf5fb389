// Loads and stores of one instruction each.
//
// Shared memory is addressed by 32-bit offsets of its own state space, and constant parts of an
// address are immediates: CuTe's copy atoms take references, which cost a conversion each.
#pragma once
#include <cstdint>

namespace tokenmill::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

template <int kOffset = 0>
__device__ __forceinline__ void load_shared(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4 + %5];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address), "n"(kOffset));
}
template <int kOffset>
__device__ __forceinline__ void load_floats(float (&to)[4], uint32_t address) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
               : "r"(address), "n"(kOffset));
}
template <int kOffset>
__device__ __forceinline__ float2 load_float2(uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2 + %3];"
               : "=f"(x.x), "=f"(x.y)
               : "r"(address), "n"(kOffset));
  return x;
}
template <int kOffset>
__device__ __forceinline__ uint32_t load_word(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1 + %2];" : "=r"(word) : "r"(address), "n"(kOffset));
  return word;
}
template <int kOffset>
__device__ __forceinline__ int load_int(uint32_t address) {
  int x;
  asm volatile("ld.shared.s32 %0, [%1 + %2];" : "=r"(x) : "r"(address), "n"(kOffset));
  return x;
}
template <int kOffset>
__device__ __forceinline__ int64_t load_long(uint32_t address) {
  int64_t x;
  asm volatile("ld.shared.s64 %0, [%1 + %2];" : "=l"(x) : "r"(address), "n"(kOffset));
  return x;
}

template <int kOffset = 0>
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t word) {
  asm volatile("st.shared.b32 [%0 + %1], %2;\n" ::"r"(address), "n"(kOffset), "r"(word));
}
template <int kOffset = 0>
__device__ __forceinline__ void store_shared(uint32_t address, const uint32_t (&words)[4]) {
  asm volatile("st.shared.v4.b32 [%0 + %1], {%2, %3, %4, %5};" ::"r"(address), "n"(kOffset),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]));
}
template <int kOffset>
__device__ __forceinline__ void store_floats(uint32_t address, const float (&x)[4]) {
  asm volatile("st.shared.v4.f32 [%0 + %1], {%2, %3, %4, %5};" ::"r"(address), "n"(kOffset),
               "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]));
}
template <typename T>
__device__ __forceinline__ void store_element(uint32_t address, T x) {
  if constexpr (sizeof(T) == 4)
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x));
  else
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(address),
                 "h"(reinterpret_cast<const uint16_t&>(x)));
}

// One 16-byte store to global memory: from assignments of uint4 the compiler makes four.
__device__ __forceinline__ void store_global(void* to, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(to), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}

}  // namespace tokenmill::cuda
