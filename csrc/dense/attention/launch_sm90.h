// Which calls the forward of compute capability 9.0a takes, and their launch.
#pragma once
#include <cuda_runtime.h>

#include "cuda/arch/sm90/tensor_map.h"
#include "cuda/attention/score_map.cuh"
#include "cuda/sequences.cuh"
#include "dense/attention/head_dim.cuh"

namespace tokenmill::cuda {

// out: what has the shape of the output, in the backward its gradient.
struct Sm90Tensors {
  MappedRows q, k, v, out;

  Sm90Tensors(const AttentionParams& p, const Rows& out)
      : Sm90Tensors(p, out, p.cu_seqlens_q ? 1 : p.batch) {}
  bool can_be_mapped() const { return can_map(q) && can_map(k) && can_map(v) && can_map(out); }

 private:
  Sm90Tensors(const AttentionParams& p, const Rows& out, int64_t batch)
      : q{p.q, batch, p.seqlen_q, p.heads, p.head_dim},
        k{p.k, batch, p.seqlen_k, p.kv_heads, p.head_dim},
        v{p.v, batch, p.seqlen_k, p.kv_heads, p.value_dim},
        out{out, batch, p.seqlen_q, p.heads, p.value_dim} {}
};

// With fewer queries of a sequence most of a tile of 64 rows would be idle.
constexpr int64_t kLeastSm90Queries = 32;

// Scales are normal numbers, and what one is divided by to give the argument of a tanh leaves
// something of it.
inline bool has_sm90_scale(const AttentionParams& p) {
  if (!(p.scale >= 0x1p-126f)) return false;
  return !(p.softcap > 0) || (p.softcap < 1e38f && p.scale >= 0x1p-64 * p.softcap);
}

// visit(Index<kDim>{}) with the head dimension of a forward, of those that have a kernel.
template <typename Visit>
auto visit_sm90_dim(int64_t head_dim, const Visit& visit) {
  return visit_least_dim<64, 96, 128, 192, 256>(head_dim, visit);
}
inline bool has_sm90_dim(int64_t head_dim) {
  return visit_sm90_dim(head_dim, [&](auto dim) { return dim == head_dim; });
}

// The rules of python/tokenmill/dense/attention_kernels.py: those of both passes.
inline bool is_sm90_attention(const AttentionParams& p) {
  if (p.dtype == DType::float32 || p.head_dim != p.value_dim) return false;
  if (weights_of(p) == Weights::elementwise) return false;
  if (p.mask.any() || p.bias || p.alibi_slopes) return false;
  const int64_t sequences = p.cu_seqlens_q && p.batch > 1 ? p.batch : 1;
  return p.seqlen_q >= kLeastSm90Queries * sequences && p.seqlen_k > 0;
}

// Those of the forward.
inline bool takes_sm90(const AttentionParams& p) {
  if (!is_sm90_attention(p) || !has_sm90_dim(p.head_dim) || !has_sm90_scale(p)) return false;
  const Sm90Tensors t(p, p.out);
  if (max_tiles(p.cu_seqlens_q, p.batch, p.seqlen_q, 64) * t.q.batch * p.heads > 1 << 30)
    return false;
  return t.can_be_mapped();
}

template <typename T, Weights kWeights>
const char* launch_forward_sm90(const AttentionParams& p, cudaStream_t stream);

}  // namespace tokenmill::cuda
