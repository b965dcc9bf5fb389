// Kernels over csrc/cuda/float8.cuh, for test_float8_codes.py.
#include "cuda/float8.cuh"

using tokenmill::cuda::Float8;

// Four elements per thread, stored as one word; the remaining ones one by one.
extern "C" __global__ void codes_of(const float* x, Float8* to, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * 4;
  if (i + 4 <= n) {
    const float four[4] = {x[i], x[i + 1], x[i + 2], x[i + 3]};
    tokenmill::cuda::store_floats(to + i, four);
  } else {
    for (int j = i; j < n; ++j) to[j] = Float8(x[j]);
  }
}

extern "C" __global__ void values_of(const Float8* codes, float* to, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) to[i] = static_cast<float>(codes[i]);
}
