// Device probes of the benchmarks that torch has no call for: shared memory reads, the special
// function unit, a grid barrier. Free of torch.
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

// Returns null or an error message.
const char* launch_cuda(const ProbeParams&, void* stream);

}  // namespace tokenmill
