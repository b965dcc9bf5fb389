// Packs the tokens selected by a mask. Free of torch.
#pragma once
#include "core/dtype.h"
#include "cpu/isa.h"

namespace tokenmill {

struct MaskPartitionParams {
  int64_t batch, tokens, size;  // size of indices
  const uint8_t* mask;          // [B, N]
  int64_t mask_batch;
  int32_t *indices, *cu_seqlens, *inverse;  // [size], [B + 1], [B, N]
  void* workspace;                          // CUDA
};

int64_t workspace_bytes(const MaskPartitionParams&);  // CUDA

// null, or an error message
const char* launch_cuda(const MaskPartitionParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(mask_partition, MaskPartitionParams)
