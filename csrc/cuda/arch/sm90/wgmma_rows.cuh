// Products by a warpgroup of a left operand in registers and a right one whose rows are the columns
// of the product, see wgmma.cuh, and stores of transposed sums.
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

// Starts d [64, 64] = a b^T, or d += a b^T, of a [64, 4 kWords] and b [64, ...] from its step
// kFirst of 16 columns on. The words of a stay as they are until the product is done.
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

// Words of accumulators of 16 rows and 16 columns, rounded, whose columns become rows. Lane i gives
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
