// What the benchmarks ask of a GPU and torch has no call for: reads of shared memory, the special
// function unit, a barrier of all blocks. Free of torch.
#pragma once
#include <cstdint>

namespace tokenmill {

struct ProbeParams {
  enum class Of : int32_t { shared, exp2, barrier } of;
  int64_t blocks, steps;
  const float* x;  // [kProbeWords]
  float* out;      // [blocks, kProbeThreads]
  void* workspace;
};

constexpr int kProbeThreads = 256;
constexpr int kProbeWords = 4 * kProbeThreads;

int64_t workspace_bytes(const ProbeParams&);

// null, or what went wrong
const char* launch_cuda(const ProbeParams&, void* stream);

}  // namespace tokenmill
