#include <cuda_runtime.h>

#include "tokens/mask_partition/kernel.cuh"

namespace tokenmill {
namespace {

int64_t chunks_of(const MaskPartitionParams& p) {
  return ceil_div(p.batch * p.tokens, cuda::kMaskChunk);
}

}  // namespace

// Bits of the mask, then counts of chunks.
int64_t workspace_bytes(const MaskPartitionParams& p) {
  return chunks_of(p) * static_cast<int64_t>(cuda::kMaskChunk / 8 + sizeof(int32_t));
}

const char* launch_cuda(const MaskPartitionParams& p, void* stream) {
  using namespace cuda;
  const auto s = static_cast<cudaStream_t>(stream);
  const unsigned chunks = static_cast<unsigned>(chunks_of(p));
  auto* const bits = static_cast<unsigned*>(p.workspace);
  auto* const counts = reinterpret_cast<int32_t*>(bits + chunks_of(p) * (kMaskChunk / kWarpSize));
  if (p.size > 0) cudaMemsetAsync(p.indices, 0xff, p.size * sizeof(int32_t), s);  // -1
  if (chunks == 0) {
    cudaMemsetAsync(p.cu_seqlens, 0, (p.batch + 1) * sizeof(int32_t), s);
  } else {
    mask_count_kernel<<<chunks, kMaskThreads, 0, s>>>(p, bits, counts);
    mask_scan_kernel<<<1, kMaskScanThreads, 0, s>>>(p, counts, static_cast<int>(chunks));
    mask_write_kernel<<<chunks, kMaskThreads, 0, s>>>(p, bits, counts);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tokenmill
