#include "cuda/launch.cuh"
#include "cuda/probe/kernel.cuh"
#include "cuda/refuse.cuh"

namespace tokenmill {

// Workspace of the barrier probe: two rows of values, and the count of CTAs that arrived.
int64_t workspace_bytes(const ProbeParams& p) {
  if (p.of != ProbeParams::Of::barrier) return 0;
  return 2 * p.blocks * static_cast<int64_t>(sizeof(float)) +
         static_cast<int64_t>(sizeof(unsigned));
}

const char* launch_cuda(const ProbeParams& p, void* stream) {
  using namespace cuda;
  using namespace cuda::probe;
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.of == ProbeParams::Of::shared) return launch<read_shared>(p.blocks, kProbeThreads, 0, s, p);
  if (p.of == ProbeParams::Of::exp2) return launch<chain_exp2>(p.blocks, kProbeThreads, 0, s, p);
  if (p.blocks > multiprocessors())
    return refuse("blocks", "must be at most the number of multiprocessors", p.blocks);
  auto* const values = static_cast<float*>(p.workspace);
  auto* const arrived = reinterpret_cast<unsigned*>(values + 2 * p.blocks);
  if (const char* error = set_bytes(arrived, 0, sizeof(unsigned), s)) return error;
  return launch<meet>(p.blocks, kProbeThreads, 0, s, p, static_cast<volatile float*>(values),
                      arrived);
}

}  // namespace tokenmill
