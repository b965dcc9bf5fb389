// Which calls the forward of compute capability 9.0a takes, and its launch.
#pragma once
#include <cuda_runtime.h>

#include "cuda/arch/sm90/tensor_map.h"
#include "linear/linear_attention/kernel_shape.cuh"

namespace tokenmill::cuda::linear_attention {

struct Sm90Tensors {
  MappedRows q, k, v, out;

  explicit Sm90Tensors(const Recurrence& p) : Sm90Tensors(p, p.cu_seqlens ? 1 : p.batch) {}
  bool can_be_mapped() const { return can_map(q) && can_map(k) && can_map(v) && can_map(out); }

 private:
  Sm90Tensors(const Recurrence& p, int64_t batch)
      : q{p.q.rows, batch, p.seqlen, p.heads, p.q.dim},
        k{p.k.rows, batch, p.seqlen, p.heads / p.k.group, p.k.dim},
        v{p.v.rows, batch, p.seqlen, p.heads / p.v.group, p.v.dim},
        out{p.out, batch, p.seqlen, p.heads, p.columns} {}
};

// With fewer tokens of a sequence most of a chunk of 64 would be idle.
constexpr int64_t kLeastSm90Tokens = 32;

// The rules of python/tokenmill/linear/linear_attention_kernels.py, for a recurrence that is a
// forward.
inline bool takes_sm90(const Recurrence& p) {
  const auto fits = [](int dim) { return dim == 128 || dim == 256; };
  if (p.dtype == DType::float32 || !fits(p.q.dim) || !fits(p.columns)) return false;
  if (p.taylor || p.normalize || p.q.map != FeatureMap::identity) return false;
  const int64_t sequences = p.cu_seqlens && p.batch > 1 ? p.batch : 1;
  return p.seqlen >= kLeastSm90Tokens * sequences && Sm90Tensors(p).can_be_mapped();
}

// null, kNotMapped, or what went wrong. Defined in a generated source for each element type.
template <typename T>
const char* launch_sm90(const Recurrence& p, const RecurrencePlan& plan, cudaStream_t stream);

}  // namespace tokenmill::cuda::linear_attention
