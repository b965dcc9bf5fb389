// A multistage tensor-core GEMM of CUTLASS for sm_80, unmodified, against double precision: prints
// a line "M N K wrong" per shape, the number of wrong elements. Operands are small multiples of
// 1/64, so that every sum is exact in f32, whatever its order.
#include <cuda_runtime.h>
#include <cutlass/gemm/device/gemm.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

extern "C" __attribute__((weak)) const char* ptxvm_last_report();  // of the stand-in runtime

using Half = cutlass::half_t;
using Gemm = cutlass::gemm::device::Gemm<
    Half, cutlass::layout::RowMajor, Half, cutlass::layout::ColumnMajor, float,
    cutlass::layout::RowMajor, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
    cutlass::gemm::GemmShape<128, 64, 32>, cutlass::gemm::GemmShape<64, 32, 32>,
    cutlass::gemm::GemmShape<16, 8, 16>,
    cutlass::epilogue::thread::LinearCombination<float, 4, float, float>,
    cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, 4>;

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
  Gemm gemm;
  const cutlass::Status status =
      gemm({{m, n, k}, {on_a, k}, {on_b, k}, {on_c, n}, {on_c, n}, {1.0f, 0.0f}});
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
  constexpr std::array<int, 3> shapes[] = {
      {128, 64, 32}, {256, 128, 512}, {128, 64, 264}, {200, 136, 264}, {1, 8, 8}};
  for (auto [m, n, k] : shapes) std::printf("%d %d %d %d\n", m, n, k, count_wrong(m, n, k));
}
