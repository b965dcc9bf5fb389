// Calls that every rule allows, but that are too large for the numbers or grids of a CUDA kernel.
#pragma once
#include <cstdint>

namespace tokenmill::cuda {

// What a launch returns then: "argument: rule; got value", good until the next error of the thread.
const char* refuse(const char* argument, const char* rule, int64_t value);

constexpr const char* kMostBlocks = "must fill at most 2^31 - 1 blocks of threads on CUDA";

}  // namespace tokenmill::cuda
