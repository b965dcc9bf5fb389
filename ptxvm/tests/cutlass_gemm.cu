// A multistage tensor-core GEMM of CUTLASS for sm_80: prints a line "M N K wrong" per shape, with
// the number of wrong elements.
#include <cutlass/gemm/device/gemm.h>

#include <array>

#include "cutlass_gemm.h"

using Gemm = cutlass::gemm::device::Gemm<
    Half, cutlass::layout::RowMajor, Half, cutlass::layout::ColumnMajor, float,
    cutlass::layout::RowMajor, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
    cutlass::gemm::GemmShape<128, 64, 32>, cutlass::gemm::GemmShape<64, 32, 32>,
    cutlass::gemm::GemmShape<16, 8, 16>,
    cutlass::epilogue::thread::LinearCombination<float, 4, float, float>,
    cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, 4>;

int wrong(int m, int n, int k) {
  return count_wrong(m, n, k, false, [=](Half* a, Half* b, float* c) {
    return Gemm()({{m, n, k}, {a, k}, {b, k}, {c, n}, {c, n}, {1.0f, 0.0f}});
  });
}

int main() {
  constexpr std::array<int, 3> shapes[] = {
      {128, 64, 32}, {256, 128, 512}, {128, 64, 264}, {200, 136, 264}, {1, 8, 8}};
  for (auto [m, n, k] : shapes) std::printf("%d %d %d %d\n", m, n, k, wrong(m, n, k));
}
