// Launch conditions of the sm_90a forward, and its launch.
#pragma once
#include "dense/attention/launch_sm90.h"
#include "sparse/block_sparse_attention/params.h"

namespace tokenmill::cuda::block_sparse_attention {

struct Sm90Tensors : MappedTensors {
  Sm90Tensors(const AttentionParams& p, const Rows& out)
      : Sm90Tensors(p, out, p.cu_seqlens_q ? 1 : p.batch, p.cu_seqlens_k ? 1 : p.batch) {}

 private:
  Sm90Tensors(const AttentionParams& p, const Rows& out, int64_t batch_q, int64_t batch_k)
      : MappedTensors{{p.q, batch_q, p.seqlen_q, p.heads, p.head_dim},
                      {p.k, batch_k, p.seqlen_k, p.kv_heads, p.head_dim},
                      {p.v, batch_k, p.seqlen_k, p.kv_heads, p.value_dim},
                      {out, batch_q, p.seqlen_q, p.heads, p.value_dim}} {}
};

// Number of 64-row units in the rows of a query block, see Sm90Launch.
inline int64_t sm90_units(const BlockSparseParams& d) {
  const int64_t block_q = int64_t{1} << d.log2_block_q, queries = d.attention.seqlen_q;
  return ceil_div(block_q < queries ? block_q : queries, 64) * d.heads_together();
}

// Same rules as python/tokenmill/sparse/block_sparse_kernels.py.
inline bool takes_sm90(const BlockSparseParams& d) {
  const AttentionParams& p = d.attention;
  if (p.dtype == DType::float32 || p.head_dim != p.value_dim) return false;
  if (p.head_dim != 64 && p.head_dim != 128) return false;
  if (d.log2_block_q < 6 || d.log2_block_k < 6 || d.pages.table || !has_sm90_scale(p)) return false;
  if (!has_sm90_tokens(p.seqlen_q, p.cu_seqlens_q, p.batch) || p.seqlen_k == 0) return false;
  const Sm90Tensors t(p, p.out);
  return has_sm90_tiles(p, t.q.batch) && t.can_be_mapped();
}

template <typename T>
const char* launch_block_sparse_sm90(const BlockSparseParams& d, cudaStream_t stream);

}  // namespace tokenmill::cuda::block_sparse_attention
