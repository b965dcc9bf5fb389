// ldmatrix and movmatrix, executed by all lanes of a warp.
#pragma once
#include <cstdint>

namespace tokenmill::cuda {

// Four 8x8 matrices of 16-bit elements; lane l points at row l % 8 of matrix l / 8. Word i of a
// lane holds elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix i.
template <int kOffset = 0>
__device__ __forceinline__ void ldmatrix(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address), "n"(kOffset));
}

// The same transposed: elements of rows 2 (l % 4) and 2 (l % 4) + 1, column l / 4.
template <int kOffset = 0>
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address), "n"(kOffset));
}

// Transposes an 8 by 8 matrix of 16-bit elements, two of a row per lane.
__device__ __forceinline__ uint32_t transpose(uint32_t word) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(y) : "r"(word));
  return y;
}

}  // namespace tokenmill::cuda
