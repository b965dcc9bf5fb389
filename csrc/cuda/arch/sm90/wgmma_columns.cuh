// Products by a warpgroup of two MN-major operands in shared memory (A^T B), see wgmma.cuh.
#pragma once
#include "cuda/arch/sm90/wgmma.cuh"

namespace tokenmill::cuda {

template <typename T, int kColumns>
struct WgmmaByColumns;
template <>
struct WgmmaByColumns<__half, 128> {
  using Atom = gmma::MMA_64x128x16_F32F16F16_SS<gmma::Major::MN, gmma::Major::MN>;
};
template <>
struct WgmmaByColumns<__half, 192> {
  using Atom = gmma::MMA_64x192x16_F32F16F16_SS<gmma::Major::MN, gmma::Major::MN>;
};
template <>
struct WgmmaByColumns<__nv_bfloat16, 128> {
  using Atom = gmma::MMA_64x128x16_F32BF16BF16_SS<gmma::Major::MN, gmma::Major::MN>;
};
template <>
struct WgmmaByColumns<__nv_bfloat16, 192> {
  using Atom = gmma::MMA_64x192x16_F32BF16BF16_SS<gmma::Major::MN, gmma::Major::MN>;
};

// MN-major operand: blocks of 64 columns; a slab is 64 rows of all blocks. Bytes from one to the
// next.
struct ColumnOperand {
  uint32_t address;
  int block_bytes, slab_bytes;

  __device__ uint64_t slab(int i) const {
    return wgmma_operand(address + i * slab_bytes, block_bytes);
  }
};

// Starts D [64, 2 kCount] = A^T B over kSlabs slabs of A and B from `first` on.
template <typename T, int kSlabs, int kCount>
__device__ __forceinline__ void start_by_columns(float (&d)[kCount], const ColumnOperand& a,
                                                 const ColumnOperand& b, int first = 0) {
  constexpr int kSteps = 64 / kWgmmaDepth, kStepBytes = kWgmmaDepth * kBoxRowBytes;
  fence_accumulators(d);
  cute::warpgroup_arrive();
  unroll<kSlabs>([&](auto slab) {
    const uint64_t left = a.slab(first + slab), right = b.slab(first + slab);
    unroll<kSteps>([&](auto i) {
      wgmma<typename WgmmaByColumns<T, 2 * kCount>::Atom>(
          d, slab + i > 0, left + i * (kStepBytes / 16), right + i * (kStepBytes / 16));
    });
  });
  cute::warpgroup_commit_batch();
  fence_accumulators(d);
}

// Stores packed accumulators of 16 rows and 16 columns (stmatrix). Lane i gives the address of row
// i % 16, columns 8 (i / 16) ... CuTe's SM90_U32x4_STSM_N has no constant offset next to the
// address.
template <int kOffset>
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&words)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0 + %1], {%2, %3, %4, %5};" ::"r"(address),
      "n"(kOffset), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
      : "memory");
}

}  // namespace tokenmill::cuda
