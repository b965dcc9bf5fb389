// A warp-specialised GEMM of CUTLASS for sm_90a (TMA, mbarrier pipelines, wgmma, a cluster of 2 x 1
// blocks with multicast), unmodified, against double precision: prints a line "M N K wrong" per
// shape, the number of wrong elements. Operands are small multiples of 1/64, so that every sum is
// exact in f32, whatever its order.
#include <cuda_runtime.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>
#include <vector>

extern "C" __attribute__((weak)) const char* ptxvm_last_report();  // of the stand-in runtime

using namespace cute;
using Half = cutlass::half_t;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;
using BlockTile = Shape<_128, _64, _64>;
using Cluster = Shape<_2, _1, _1>;
using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, BlockTile, Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, 4, float,
    RowMajor, 4, cutlass::epilogue::TmaWarpSpecialized>::CollectiveOp;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Half, RowMajor, 8, Half, ColumnMajor, 8,
    float, BlockTile, Cluster, _2, cutlass::gemm::KernelTmaWarpSpecialized>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

template <typename T>
T* upload(const std::vector<T>& values) {
  void* device = nullptr;
  check(cudaMalloc(&device, values.size() * sizeof(T)));
  check(cudaMemcpy(device, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return static_cast<T*>(device);
}

int count_wrong(int m, int n, int k) {
  std::vector<Half> a(size_t(m) * k), b(size_t(n) * k);
  for (size_t i = 0; i < a.size(); ++i) a[i] = Half(float(int(i * 37 % 101) - 50) / 64);
  for (size_t i = 0; i < b.size(); ++i) b[i] = Half(float(int(i * 53 % 97) - 48) / 64);
  std::vector<float> c(size_t(m) * n, NAN);
  Half *on_a = upload(a), *on_b = upload(b);
  float* on_c = upload(c);
  const auto stride_a = cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {m, k, 1});
  const auto stride_b = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {n, k, 1});
  const auto stride_d = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, {m, n, 1});
  typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                     {m, n, k, 1},
                                     {on_a, stride_a, on_b, stride_b},
                                     {{1.0f, 0.0f}, nullptr, {}, on_c, stride_d}};
  Gemm gemm;
  const cutlass::Status status = gemm.run(arguments);
  if (status != cutlass::Status::kSuccess) {
    std::fprintf(stderr, "%s: %s\n", cutlassGetStatusString(status), ptxvm_last_report());
    std::exit(1);
  }
  check(cudaDeviceSynchronize());
  check(cudaMemcpy(c.data(), on_c, c.size() * sizeof(float), cudaMemcpyDeviceToHost));
  int wrong = 0;
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      double sum = 0;
      for (int l = 0; l < k; ++l)
        sum += double(float(a[size_t(i) * k + l])) * double(float(b[size_t(j) * k + l]));
      wrong += !(double(c[size_t(i) * n + j]) == sum);
    }
  check(cudaFree(on_a));
  check(cudaFree(on_b));
  check(cudaFree(on_c));
  return wrong;
}

int main() {
  constexpr std::array<int, 3> shapes[] = {{256, 64, 64}, {200, 72, 200}};
  for (auto [m, n, k] : shapes) std::printf("%d %d %d %d\n", m, n, k, count_wrong(m, n, k));
}
