// Element types and small helpers shared by host and kernels. Free of torch.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define TOKENMILL_HOST_DEVICE __host__ __device__
#else
#define TOKENMILL_HOST_DEVICE
#endif

namespace tokenmill {

// float8_e4m3fn: only for KV caches, converted by cpu/float8.h and cuda/float8.cuh.
enum class DType : int32_t { float32, float16, bfloat16, float8_e4m3fn };

TOKENMILL_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
TOKENMILL_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

}  // namespace tokenmill
