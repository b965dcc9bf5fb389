// Tensor maps of the sm_90a forward, and its launch.
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

// Compiled once for each element type (kernel_sm90.cu). Returns null, kNotMapped, or an error
// message.
template <typename T>
const char* launch_sm90(const Recurrence& p, const RecurrencePlan& plan, cudaStream_t stream);

}  // namespace tokenmill::cuda::linear_attention
