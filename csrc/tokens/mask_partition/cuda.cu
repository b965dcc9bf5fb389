#include "cuda/launch.cuh"
#include "tokens/mask_partition/kernel.cuh"

namespace tokenmill {
namespace {

int64_t chunks_of(const MaskPartitionParams& p) {
  return ceil_div(p.batch * p.tokens, cuda::mask_partition::kMaskChunk);
}

}  // namespace

// Bits of the mask, then counts of chunks.
int64_t workspace_bytes(const MaskPartitionParams& p) {
  return chunks_of(p) *
         static_cast<int64_t>(cuda::mask_partition::kMaskChunk / 8 + sizeof(int32_t));
}

const char* launch_cuda(const MaskPartitionParams& p, void* stream) {
  using namespace cuda;
  using namespace cuda::mask_partition;
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t chunks = chunks_of(p);
  auto* const bits = static_cast<unsigned*>(p.workspace);
  auto* const counts = reinterpret_cast<int32_t*>(bits + chunks * (kMaskChunk / kWarpSize));
  const char* error = set_bytes(p.indices, 0xff, p.size * sizeof(int32_t), s);  // indices = -1
  if (error) return error;
  if (chunks == 0) return set_bytes(p.cu_seqlens, 0, (p.batch + 1) * sizeof(int32_t), s);
  error = launch<mask_count_kernel>(chunks, kMaskThreads, 0, s, p, bits, counts);
  if (!error)
    error =
        launch<mask_scan_kernel>(1, kMaskScanThreads, 0, s, p, counts, static_cast<int>(chunks));
  return error ? error : launch<mask_write_kernel>(chunks, kMaskThreads, 0, s, p, bits, counts);
}

}  // namespace tokenmill
