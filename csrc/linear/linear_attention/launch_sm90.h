// Launch conditions of the sm_90a forward, and its launch.
#pragma once
#include <cuda_runtime.h>

#include "cuda/arch/sm90/calls.h"
#include "linear/linear_attention/kernel_shape.cuh"

namespace tokenmill::cuda::linear_attention {

struct Sm90Tensors : MappedTensors {
  explicit Sm90Tensors(const Recurrence& p) : Sm90Tensors(p, p.cu_seqlens ? 1 : p.batch) {}

 private:
  Sm90Tensors(const Recurrence& p, int64_t batch)
      : MappedTensors{{p.q.rows, batch, p.seqlen, p.heads, p.q.dim},
                      {p.k.rows, batch, p.seqlen, p.heads / p.k.group, p.k.dim},
                      {p.v.rows, batch, p.seqlen, p.heads / p.v.group, p.v.dim},
                      {p.out, batch, p.seqlen, p.heads, p.columns}} {}
};

// Same rules as python/tokenmill/linear/linear_attention_kernels.py, for a recurrence that is a
// forward.
inline bool takes_sm90(const Recurrence& p) {
  const auto fits = [](int dim) { return dim == 128 || dim == 256; };
  if (p.dtype == DType::float32 || !fits(p.q.dim) || !fits(p.columns)) return false;
  if (p.taylor || p.normalize || p.q.map != FeatureMap::identity) return false;
  return has_sm90_tokens(p.seqlen, p.cu_seqlens, p.batch) && Sm90Tensors(p).can_be_mapped();
}

// null, kNotMapped, or an error message. Defined in a generated source for each element type.
template <typename T>
const char* launch_sm90(const Recurrence& p, const RecurrencePlan& plan, cudaStream_t stream);

}  // namespace tokenmill::cuda::linear_attention
