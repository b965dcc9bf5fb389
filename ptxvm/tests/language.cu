// C++ constructs as compiled code: calls, branch tables, local arrays, initialised variables,
// assertions, printf.
#include <cuda_runtime.h>

#include <cassert>
#include <cstdio>

struct Four {
  float x[4];
};

__device__ int table[5] = {1, 2, 3, 4, 5};
__device__ int* into_table = &table[2];
__constant__ const char* names[2] = {"ab", "cd"};

__host__ __device__ __noinline__ float sum(Four four, int last) {
  float total = 0;
  for (int j = 0; j <= last; ++j) total += four.x[j & 3];
  return total;
}

__host__ __device__ __noinline__ Four multiples(float step, int start) {
  Four four;
  for (int j = 0; j < 4; ++j) four.x[j] = step * static_cast<float>(j) + static_cast<float>(start);
  return four;
}

__host__ __device__ float choose(int which, float x) {
  switch (which) {
    case 0:
      return x + 1;
    case 1:
      return x * 2;
    case 2:
      return x - 5;
    case 3:
      return x * x;
    case 4:
      return x / 3;
    case 5:
      return -x;
    default:
      return x;
  }
}

__host__ __device__ float element(int i, int n, int entry, char letter) {
  const auto x = static_cast<float>(i);
  float scattered[8];
  for (int j = 0; j < 8; ++j) scattered[(j * 3 + i) & 7] = static_cast<float>(j);
  return sum(multiples(x, n), i & 7) + scattered[i & 7] + static_cast<float>(entry) + letter +
         choose(i % 7, x);
}

__global__ void kernel(float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  out[i] = element(i, n, *into_table, names[i & 1][0]);
  if (i == 5) printf("%d\n", i);
  assert(i < 1000);
}

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int on_device(float* out, int n) {
  kernel<<<(n + 63) / 64, 64>>>(out, n);
  return cudaGetLastError();
}

EXPORT void on_host(float* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = element(i, n, 3, i & 1 ? 'c' : 'a');
}

EXPORT const char* text_of(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
