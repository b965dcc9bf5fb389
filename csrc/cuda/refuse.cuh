// Errors for calls that pass all checks but exceed the index range or the grid of a CUDA kernel.
#pragma once
#include <cstdint>

namespace tokenmill::cuda {

// Formats "argument: rule; got value"; valid until the thread's next error.
const char* refuse(const char* argument, const char* rule, int64_t value);

constexpr const char* kMaxBlocks = "must fill at most 2^31 - 1 blocks of threads on CUDA";

}  // namespace tokenmill::cuda
