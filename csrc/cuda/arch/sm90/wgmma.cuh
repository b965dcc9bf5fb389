// wgmma: asynchronous products of a warpgroup, 64 rows (16 per warp), float32 accumulators.
//
// Accumulators have the layout of mma_sm80.cuh: element 4 n + i of a lane is row g + 8 (i / 2),
// column 8 n + 2 c + i % 2 of the warp's rows, with g = lane / 4 and c = lane % 4. Packed into
// words as they are, they are the A operand of the next product. Tiles in shared memory have the
// layout of tma.cuh.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "cuda/arch/sm90/tensor_map.h"
#include "cuda/unroll.cuh"

namespace tokenmill::cuda {

namespace gmma = cute::SM90::GMMA;

// Rows: A [64, 16] and B [kColumns, 16] in shared memory, both K-major. Columns: A in registers, B
// [16, kColumns] MN-major.
template <typename T, int kColumns>
struct WgmmaAtoms;
template <>
struct WgmmaAtoms<__half, 64> {
  using Rows = gmma::MMA_64x64x16_F32F16F16_SS<gmma::Major::K, gmma::Major::K>;
  using Columns = gmma::MMA_64x64x16_F32F16F16_RS<gmma::Major::K, gmma::Major::MN>;
};
template <>
struct WgmmaAtoms<__half, 96> {
  using Rows = gmma::MMA_64x96x16_F32F16F16_SS<gmma::Major::K, gmma::Major::K>;
};
template <>
struct WgmmaAtoms<__half, 128> {
  using Rows = gmma::MMA_64x128x16_F32F16F16_SS<gmma::Major::K, gmma::Major::K>;
  using Columns = gmma::MMA_64x128x16_F32F16F16_RS<gmma::Major::K, gmma::Major::MN>;
};
template <>
struct WgmmaAtoms<__half, 192> {
  using Columns = gmma::MMA_64x192x16_F32F16F16_RS<gmma::Major::K, gmma::Major::MN>;
};
template <>
struct WgmmaAtoms<__half, 256> {
  using Columns = gmma::MMA_64x256x16_F32F16F16_RS<gmma::Major::K, gmma::Major::MN>;
};
template <>
struct WgmmaAtoms<__nv_bfloat16, 64> {
  using Rows = gmma::MMA_64x64x16_F32BF16BF16_SS<gmma::Major::K, gmma::Major::K>;
  using Columns = gmma::MMA_64x64x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::MN>;
};
template <>
struct WgmmaAtoms<__nv_bfloat16, 96> {
  using Rows = gmma::MMA_64x96x16_F32BF16BF16_SS<gmma::Major::K, gmma::Major::K>;
};
template <>
struct WgmmaAtoms<__nv_bfloat16, 128> {
  using Rows = gmma::MMA_64x128x16_F32BF16BF16_SS<gmma::Major::K, gmma::Major::K>;
  using Columns = gmma::MMA_64x128x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::MN>;
};
template <>
struct WgmmaAtoms<__nv_bfloat16, 192> {
  using Columns = gmma::MMA_64x192x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::MN>;
};
template <>
struct WgmmaAtoms<__nv_bfloat16, 256> {
  using Columns = gmma::MMA_64x256x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::MN>;
};

constexpr int kWgmmaDepth = 16;

// Shared-memory matrix descriptor, 128-byte swizzle: 8 rows of 128 bytes are 1024 bytes.
// block_bytes: from one 64-column block to the next, for MN-major operands.
__device__ __forceinline__ uint64_t wgmma_operand(uint32_t address, int block_bytes = 16) {
  cute::GmmaDescriptor d;
  d.bitfield.start_address_ = static_cast<uint16_t>(address >> 4);
  d.bitfield.leading_byte_offset_ = static_cast<uint16_t>(block_bytes >> 4);
  d.bitfield.stride_byte_offset_ = 1024 >> 4;
  d.bitfield.layout_type_ = static_cast<uint8_t>(gmma::LayoutType::B128);
  return d;
}

// Keeps the compiler from moving accesses to accumulators across this point.
template <int kCount>
__device__ __forceinline__ void fence_accumulators(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) cute::warpgroup_fence_operand(x[i]);
}

// Atom::fma(operands..., d[0], d[1], ..., scale)
template <typename Atom, int kCount, typename... Operands>
__device__ __forceinline__ void wgmma(float (&d)[kCount], bool adds, const Operands&... operands) {
  [&]<int... kIndices>(std::integer_sequence<int, kIndices...>) {
    Atom::fma(operands..., d[kIndices]..., adds ? gmma::ScaleOut::One : gmma::ScaleOut::Zero);
  }(std::make_integer_sequence<int, kCount>{});
}

// Starts S [64, kKeys] = Q [64, kHeadDim] K [kKeys, kHeadDim]^T, with the first kKeys keys of a
// tile of kTileKeys.
template <typename T, int kHeadDim, int kTileKeys, int kCount>
__device__ __forceinline__ void start_qk(float (&s)[kCount], uint32_t q, uint32_t k) {
  constexpr int kKeys = 2 * kCount;
  const uint64_t rows = wgmma_operand(q), columns = wgmma_operand(k);
  fence_accumulators(s);
  cute::warpgroup_arrive();
  unroll<kHeadDim / kWgmmaDepth>([&](auto i) {
    constexpr int block = i * kWgmmaDepth / kBoxColumns;
    constexpr int bytes = i * kWgmmaDepth % kBoxColumns * 2;
    wgmma<typename WgmmaAtoms<T, kKeys>::Rows>(
        s, i > 0, rows + (block * 64 * kBoxRowBytes + bytes) / 16,
        columns + (block * kTileKeys * kBoxRowBytes + bytes) / 16);
  });
  cute::warpgroup_commit_batch();
  fence_accumulators(s);
}

// Starts O [64, kHeadDim] += P [64, kKeys] V [kKeys, kHeadDim], with the first kKeys keys of a tile
// of kTileKeys. The words of P must not change until the product is done.
template <typename T, int kTileKeys, int kCount, int kWords>
__device__ __forceinline__ void start_pv(float (&o)[kCount], const uint32_t (&p)[kWords],
                                         uint32_t v) {
  constexpr int kKeys = 4 * kWords;
  const uint64_t values = wgmma_operand(v, kTileKeys * kBoxRowBytes);
  fence_accumulators(o);
  cute::warpgroup_arrive();
  unroll<kKeys / kWgmmaDepth>([&](auto i) {
    wgmma<typename WgmmaAtoms<T, 2 * kCount>::Columns>(
        o, true, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3],
        values + i * (kWgmmaDepth * kBoxRowBytes / 16));
  });
  cute::warpgroup_commit_batch();
  fence_accumulators(o);
}

// Waits until all but the last kPending products are done, `d` among them.
template <int kPending, int kCount>
__device__ __forceinline__ void wait_for_product(float (&d)[kCount]) {
  cute::warpgroup_wait<kPending>();
  fence_accumulators(d);
}

}  // namespace tokenmill::cuda
