// GEMMs of CUTLASS, unmodified, against double precision: operands are small multiples of 1/64, so
// that every sum is exact in f32, in any order.
#pragma once
#include <cuda_runtime.h>
#include <cutlass/cutlass.h>
#include <cutlass/half.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

extern "C" __attribute__((weak)) const char* ptxvm_last_report();  // of the stand-in runtime

using Half = cutlass::half_t;

inline void check(cudaError_t error) {
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

// Number of wrong elements of c = a b^T or, if it adds, c += a b^T. gemm(on_a, on_b, on_c) computes
// it on the device and returns the status. a [m, k], b [n, k], c [m, n].
template <typename Gemm>
int count_wrong(int m, int n, int k, bool adds, const Gemm& gemm) {
  std::vector<Half> a(size_t(m) * k), b(size_t(n) * k);
  for (size_t i = 0; i < a.size(); ++i) a[i] = Half(float(int(i * 37 % 101) - 50) / 64);
  for (size_t i = 0; i < b.size(); ++i) b[i] = Half(float(int(i * 53 % 97) - 48) / 64);
  const auto before = [&](size_t i) { return adds ? float(i % 13) : 0; };
  std::vector<float> c(size_t(m) * n, NAN);
  if (adds)
    for (size_t i = 0; i < c.size(); ++i) c[i] = before(i);
  Half *on_a = upload(a), *on_b = upload(b);
  float* on_c = upload(c);
  const cutlass::Status status = gemm(on_a, on_b, on_c);
  if (status != cutlass::Status::kSuccess) {
    std::fprintf(stderr, "%s: %s\n", cutlassGetStatusString(status), ptxvm_last_report());
    std::exit(1);
  }
  check(cudaDeviceSynchronize());
  check(cudaMemcpy(c.data(), on_c, c.size() * sizeof(float), cudaMemcpyDeviceToHost));
  int wrong = 0;
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      double sum = before(size_t(i) * n + j);
      for (int l = 0; l < k; ++l)
        sum += double(float(a[size_t(i) * k + l])) * double(float(b[size_t(j) * k + l]));
      wrong += !(double(c[size_t(i) * n + j]) == sum);
    }
  check(cudaFree(on_a));
  check(cudaFree(on_b));
  check(cudaFree(on_c));
  return wrong;
}
