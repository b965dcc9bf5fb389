// Element types and small helpers shared by host and kernels. Free of torch.
#pragma once
#include <cstdint>

namespace tokenmill {

enum class DType : int32_t { float32, float16, bfloat16 };

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace tokenmill
