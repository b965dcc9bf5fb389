#include "core/written.h"
#include "dense/score_mod.h"
#include "select/checks.h"
#include "sparse/block_sparse_attention/mass.h"
#include "sparse/checks.h"
#include "sparse/device_backward.h"
#include "sparse/gradients.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "block_sparse_attention";

struct BlockSparseAttentionArgs : Record {
  View q, k, v, indices, counts;
  int64_t block_q, block_k;
  bool causal;
  int64_t num_sink, num_recent;
  Optional<double> scale;
  double softcap;
  View seqlens_k, sink;
  bool return_mass;
};

// The checks are those of python/tokenmill/sparse/block_sparse_attention.py, in its order and
// words.
BlockSparseParams make_params(const BlockSparseAttentionArgs& a) {
  check_qkv(kOp, a.q, a.k, a.v, 4);
  BlockSparseParams d{};
  d.log2_block_q = check_block(kOp, "block_q", a.block_q);
  d.log2_block_k = check_block(kOp, "block_k", a.block_k);
  check(a.num_sink >= 0, kOp, "num_sink", "must not be negative", a.num_sink);
  check(a.num_recent >= 0, kOp, "num_recent", "must not be negative", a.num_recent);
  check(a.num_recent == 0 || a.causal, kOp, "num_recent", "goes with causal alone", a.num_recent);
  check_scale(kOp, scale_of(a), a.softcap);
  const int64_t batch = a.q.size(0), heads = a.q.size(2), kv_heads = a.k.size(2);
  const int64_t rows = (a.q.size(1) + a.block_q - 1) / a.block_q;
  const bool fits =
      a.indices.dim() == 4 && a.indices.size(0) == batch && a.indices.size(2) == rows &&
      (a.indices.size(1) == 1 || a.indices.size(1) == kv_heads || a.indices.size(1) == heads);
  d.list = check_list(
      kOp, a.indices, a.counts,
      Rule("must have shape [", batch, ", 1, ", kv_heads, " or ", heads, ", ", rows, ", K]"), fits,
      "q", a.q);
  d.lengths = per_request(kOp, "seqlens_k", a.seqlens_k, batch, "q", a.q);
  d.causal = a.causal;
  const int64_t all = a.q.size(1) + a.k.size(1);  // sums with it stay in range
  d.num_sink = std::min(a.num_sink, all);
  d.num_recent = std::min(a.num_recent, all);
  set_inputs(d.attention, a);
  d.attention.softcap = static_cast<float>(a.softcap);
  d.attention.sink = sink_of(kOp, d.attention, a.q, a.sink);
  return d;
}

void run_forward(const BlockSparseParams& d, const View& q) {
#if defined(TOKENMILL_WITH_CUDA)
  if (q.is_cuda) return launch_on_device(kOp, q, d);
#endif
  cpu::block_sparse_attention_forward(d);
}

// What the entries of lists got; of size 0 if it is not asked for.
Array mass_of(const BlockSparseParams& d, const BlockSparseAttentionArgs& a) {
  const std::vector<int64_t> sizes =
      a.return_mass ? std::vector<int64_t>(a.indices.sizes) : std::vector<int64_t>{0};
  Array mass = empty(sizes, a.q, ScalarType::Float);
  if (mass.numel() == 0) return mass;
  if (a.q.numel() == 0) {
    fill(0, mass);
    return mass;
  }
  const BlockSparseMass m{d, mass.mutable_data<float>()};
#if defined(TOKENMILL_WITH_CUDA)
  if (a.q.is_cuda) {
    launch_on_device(kOp, a.q, m);
    return mass;
  }
#endif
  cpu::block_sparse_attention_mass(m);
  return mass;
}

std::tuple<Array, Array, Array> block_sparse_attention(const BlockSparseAttentionArgs& a) {
  BlockSparseParams d = make_params(a);
  auto [out, lse] = forward_of(d.attention, a.q, [&] { run_forward(d, a.q); });
  return {out, lse, mass_of(d, a)};
}

struct BlockSparseAttentionOutArgs : Record {
  BlockSparseAttentionArgs forward;
  View out;
};

std::tuple<Array, Array> block_sparse_attention_out(const BlockSparseAttentionOutArgs& a) {
  const BlockSparseAttentionArgs& in = a.forward;
  BlockSparseParams d = make_params(in);
  check_like_out(kOp, "out", a.out, out_sizes(in), in.q);
  check_written(kOp, "out", a.out,
                {{"q", in.q},
                 {"k", in.k},
                 {"v", in.v},
                 {"indices", in.indices},
                 {"counts", in.counts},
                 {"seqlens_k", in.seqlens_k},
                 {"sink", in.sink}});
  Array lse = forward_into(d.attention, in.q, a.out, [&] { run_forward(d, in.q); });
  return {lse, mass_of(d, in)};
}

void run_backward(BlockSparseBackwardParams& p, const View& q) {
#if defined(TOKENMILL_WITH_CUDA)
  if (q.is_cuda) return launch_with_transposed_lists(kOp, q, p, p.forward.key_blocks());
#endif
  cpu::block_sparse_attention_backward(p);
}

struct BlockSparseAttentionBackwardArgs : Record {
  View dout, dlse, out, lse;
  bool needs_dsink;
  BlockSparseAttentionArgs forward;
};

// dsink is the sum of each request's rows, [B, H].
std::tuple<Array, Array, Array, Array> block_sparse_attention_backward(
    const BlockSparseAttentionBackwardArgs& a) {
  const View& q = a.forward.q;
  BlockSparseBackwardParams p{};
  p.forward = make_params(a.forward);
  const AttentionParams& f = p.forward.attention;
  const bool wants_sink = a.needs_dsink && f.sink;
  Array dsink = zeros(wants_sink ? std::vector<int64_t>{f.batch, f.heads} : std::vector<int64_t>{0},
                      q, ScalarType::Float);
  Array delta;
  if (wants_sink) {
    p.dsink = dsink.mutable_data<float>();
    delta = empty({q.is_cuda ? 0 : f.batch * f.heads * f.seqlen_q}, q, ScalarType::Float);
    p.delta = delta.mutable_data<float>();
  }
  auto [dq, dk, dv] = gradients_of(kOp, p, p.forward.attention, a, [&] { run_backward(p, q); });
  return {dq, dk, dv, dsink};
}

const Registration kOperators(
    {&implement<block_sparse_attention>("block_sparse_attention"),
     &implement<block_sparse_attention_out>("block_sparse_attention_out"),
     &implement<block_sparse_attention_backward>("block_sparse_attention_backward")});

}  // namespace
}  // namespace tokenmill
