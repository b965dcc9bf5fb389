// A warp-specialised GEMM of CUTLASS for sm_90a (TMA, mbarrier pipelines, wgmma, a cluster of 2 x 1
// blocks with multicast): prints a line "M N K wrong" per shape, with the number of wrong elements.
//
// It computes c += a b^T. By default a block has one tile. With PINGPONG two consumer warpgroups
// alternate between the tiles of a block, and one cluster has all tiles.
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <array>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

#include "cutlass_gemm.h"

using namespace cute;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;
using Cluster = Shape<_2, _1, _1>;
#ifdef PINGPONG
using BlockTile = Shape<_64, _64, _64>;
using Schedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized;
// k spans three tiles for two stages: an output tile starts in either stage, and in either phase.
constexpr std::array<int, 3> kShapes[] = {{200, 200, 136}};
#else
using BlockTile = Shape<_128, _64, _64>;
using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
constexpr std::array<int, 3> kShapes[] = {{256, 64, 64}, {200, 264, 136}};
#endif
constexpr int kMultiprocessors = 2;
using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, BlockTile, Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, float, RowMajor, 4, float,
    RowMajor, 4, EpilogueSchedule>::CollectiveOp;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Half, RowMajor, 8, Half, ColumnMajor, 8,
    float, BlockTile, Cluster, _2, Schedule>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

int wrong(int m, int n, int k) {
  const auto stride_a = cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {m, k, 1});
  const auto stride_b = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {n, k, 1});
  const auto stride_d = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, {m, n, 1});
  return count_wrong(m, n, k, true, [&](Half* a, Half* b, float* c) {
    typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                       {m, n, k, 1},
                                       {a, stride_a, b, stride_b},
                                       {{1.0f, 1.0f}, c, stride_d, c, stride_d},
                                       {0, kMultiprocessors}};
    return Gemm().run(arguments);
  });
}

int main() {
  for (auto [m, n, k] : kShapes) std::printf("%d %d %d %d\n", m, n, k, wrong(m, n, k));
}
