// Products by a warpgroup with A in registers and B K-major (A B^T), see wgmma.cuh, and transposed
// stores of accumulators.
#pragma once
#include "cuda/arch/sm90/wgmma.cuh"

namespace tokenmill::cuda {

template <typename T>
struct WgmmaByRows;
template <>
struct WgmmaByRows<__half> {
  using Atom = gmma::MMA_64x64x16_F32F16F16_RS<gmma::Major::K, gmma::Major::K>;
};
template <>
struct WgmmaByRows<__nv_bfloat16> {
  using Atom = gmma::MMA_64x64x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::K>;
};

// Starts D [64, 64] = A B^T, or D += A B^T, with A [64, 4 kWords] and B [64, ...] from its
// 16-column step kFirst on. The words of A must not change until the product is done.
template <typename T, int kFirst, int kWords>
__device__ __forceinline__ void start_by_rows(float (&d)[32], bool adds,
                                              const uint32_t (&a)[kWords], uint32_t b) {
  constexpr int kBlockSteps = kBoxColumns / kWgmmaDepth;
  const uint64_t rows = wgmma_operand(b);
  fence_accumulators(d);
  cute::warpgroup_arrive();
  unroll<kWords / 4>([&](auto i) {
    constexpr int step = kFirst + i;
    constexpr int bytes =
        step / kBlockSteps * (64 * kBoxRowBytes) + step % kBlockSteps * (kWgmmaDepth * 2);
    wgmma<typename WgmmaByRows<T>::Atom>(d, adds || i > 0, a[4 * i], a[4 * i + 1], a[4 * i + 2],
                                         a[4 * i + 3], rows + bytes / 16);
  });
  cute::warpgroup_commit_batch();
  fence_accumulators(d);
}

// Stores packed accumulators of 16 rows and 16 columns transposed (stmatrix.trans). Lane i gives
// the address of column i / 16 * 8 + i % 8, rows i / 8 % 2 * 8 ...
template <int kOffset>
__device__ __forceinline__ void store_matrices_transposed(uint32_t address,
                                                          const uint32_t (&words)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0 + %1], {%2, %3, %4, %5};" ::"r"(address),
      "n"(kOffset), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
      : "memory");
}

}  // namespace tokenmill::cuda
