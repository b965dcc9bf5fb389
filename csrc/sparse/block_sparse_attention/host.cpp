#include "dense/score_mod.h"
#include "select/checks.h"
#include "sparse/block_sparse_attention/params.h"
#include "sparse/checks.h"
#include "sparse/device_backward.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "block_sparse_attention";

// The checks are those of python/tokenmill/sparse/block_sparse.py, in its order and words.
BlockSparseParams make_params(const View& q, const View& k, const View& v, const View& indices,
                              const View& counts, int64_t block_q, int64_t block_k, bool causal,
                              int64_t num_sink, int64_t num_recent, double scale, double softcap,
                              const OptTensor& lengths) {
  check_qkv(kOp, q, k, v, 4);
  BlockSparseParams d{};
  d.log2_block_q = check_block(kOp, "block_q", block_q);
  d.log2_block_k = check_block(kOp, "block_k", block_k);
  check(num_sink >= 0, kOp, "num_sink", "must not be negative", num_sink);
  check(num_recent >= 0, kOp, "num_recent", "must not be negative", num_recent);
  check(num_recent == 0 || causal, kOp, "num_recent", "goes with causal alone", num_recent);
  check_scale(kOp, scale, softcap);
  const int64_t batch = q.size(0), heads = q.size(2), kv_heads = k.size(2);
  const int64_t rows = (q.size(1) + block_q - 1) / block_q;
  const bool fits =
      indices.dim() == 4 && indices.size(0) == batch && indices.size(2) == rows &&
      (indices.size(1) == 1 || indices.size(1) == kv_heads || indices.size(1) == heads);
  d.list = check_list(
      kOp, indices, counts,
      Rule("must have shape [", batch, ", 1, ", kv_heads, " or ", heads, ", ", rows, ", K]"), fits,
      "q", q);
  d.lengths = per_request(kOp, "lengths", lengths, batch, "q", q);
  d.causal = causal;
  const int64_t all = q.size(1) + k.size(1);  // sums with it stay in range
  d.num_sink = std::min(num_sink, all);
  d.num_recent = std::min(num_recent, all);
  AttentionParams& p = d.attention;
  p.batch = batch;
  p.seqlen_q = q.size(1);
  p.seqlen_k = k.size(1);
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head_dim = q.size(3);
  p.value_dim = v.size(3);
  p.dtype = to_dtype(q.dtype);
  p.map = ScoreMap::softmax;
  p.q = rows_of(q, false);
  p.k = rows_of(k, false);
  p.v = rows_of(v, false);
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.window_left = p.window_right = -1;
  return d;
}

void run_forward(const BlockSparseParams& d, const View& q) {
#if defined(TOKENMILL_WITH_CUDA)
  if (q.is_cuda) return launch_on_device(kOp, q, d);
#endif
  cpu::block_sparse_attention_forward(d);
}

std::tuple<Tensor, Tensor> block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor indices,
                                                  Tensor counts, int64_t block_q, int64_t block_k,
                                                  bool causal, int64_t num_sink, int64_t num_recent,
                                                  double scale, double softcap, OptTensor lengths) {
  const View qv(q);
  BlockSparseParams d = make_params(qv, View(k), View(v), View(indices), View(counts), block_q,
                                    block_k, causal, num_sink, num_recent, scale, softcap, lengths);
  AttentionParams& p = d.attention;
  Tensor out = empty({p.batch, p.seqlen_q, p.heads, p.value_dim}, q);
  Tensor lse = empty({p.batch, p.heads, p.seqlen_q}, q, ScalarType::Float);
  p.out = rows_of(View(out), false);
  p.lse = View(lse).mutable_data<float>();
  if (out.numel() > 0) run_forward(d, qv);
  return {out, lse};
}

void run_backward(BlockSparseBackwardParams& p, const View& q) {
#if defined(TOKENMILL_WITH_CUDA)
  if (q.is_cuda) return launch_with_transposed_lists(kOp, q, p, p.forward.key_blocks());
#endif
  cpu::block_sparse_attention_backward(p);
}

std::tuple<Tensor, Tensor, Tensor> block_sparse_attention_backward(
    Tensor dout, OptTensor dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
    Tensor indices, Tensor counts, int64_t block_q, int64_t block_k, bool causal, int64_t num_sink,
    int64_t num_recent, double scale, double softcap, OptTensor lengths) {
  const View qv(q), kv(k), vv(v);
  BlockSparseBackwardParams p{};
  p.forward = make_params(qv, kv, vv, View(indices), View(counts), block_q, block_k, causal,
                          num_sink, num_recent, scale, softcap, lengths);
  AttentionParams& f = p.forward.attention;
  const std::vector<int64_t> like_out{f.batch, f.seqlen_q, f.heads, f.value_dim};
  const std::vector<int64_t> like_lse{f.batch, f.heads, f.seqlen_q};
  const View dout_view(dout), out_view(out);
  check_like_out(kOp, "dout", dout_view, like_out, qv);
  check_like_out(kOp, "out", out_view, like_out, qv);
  p.dout = rows_of(dout_view, false);
  f.out = rows_of(out_view, false);
  f.lse = check_like_lse(kOp, "lse", lse, like_lse, qv);
  if (dlse) p.dlse = check_like_lse(kOp, "dlse", *dlse, like_lse, qv);
  Tensor dq = empty(qv.sizes, q), dk = empty(kv.sizes, q), dv = empty(vv.sizes, q);
  p.dq = rows_of(View(dq), false);
  p.dk = rows_of(View(dk), false);
  p.dv = rows_of(View(dv), false);
  if (q.numel() > 0 && k.numel() > 0)
    run_backward(p, qv);
  else
    fill(0, dq, dk, dv);
  return {dq, dk, dv};
}

}  // namespace

TOKENMILL_IMPL(CPU, m) {
  m.impl("block_sparse_attention", TOKENMILL_BOX(block_sparse_attention));
  m.impl("block_sparse_attention_backward", TOKENMILL_BOX(block_sparse_attention_backward));
}

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) {
  m.impl("block_sparse_attention", TOKENMILL_BOX(block_sparse_attention));
  m.impl("block_sparse_attention_backward", TOKENMILL_BOX(block_sparse_attention_backward));
}
#endif

}  // namespace tokenmill
