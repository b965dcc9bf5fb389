// Rules of the calls that the sm_90a kernels of block_sparse_attention take. Host code without CUDA
// headers.
#pragma once
#include "attention/rules_sm90.h"
#include "sparse/block_sparse_attention/kernels.h"

namespace tokenmill::cuda::block_sparse_attention {

const char* launch_on_sm90(const BlockSparseParams&, void* stream);
const char* launch_on_sm90(const BlockSparseBackwardParams&, void* stream);

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

// Both passes; out: the output, or in the backward dout.
inline bool check_lists(Rules& r, const BlockSparseParams& d, const Sm90Tensors& t) {
  const AttentionParams& p = d.attention;
  const int64_t block_q = int64_t{1} << d.log2_block_q, block_k = int64_t{1} << d.log2_block_k;
  return check_heads<HeadDimList<64, 128>>(r, p) &&
         r.check(block_q >= 64, "block_q", "must be 64 or more", block_q) &&
         r.check(block_k >= 64, "block_k", "must be 64 or more", block_k) &&
         r.check(!d.pages.table, "block_table", "must be None") && check_scale(r, p) &&
         check_tokens(r, p.seqlen_q, p.cu_seqlens_q, p.batch, p.seqlen_k) && check_tiles(r, p) &&
         check_layout(r, "q", t.q) && check_layout(r, "k", t.k) && check_layout(r, "v", t.v);
}

}  // namespace tokenmill::cuda::block_sparse_attention
