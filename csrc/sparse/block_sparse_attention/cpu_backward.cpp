#include "sparse/cpu_backward.h"

#include "sparse/block_sparse_attention/cpu_blocks.h"

namespace tokenmill::TOKENMILL_ISA {

namespace {

// -sum_i P_i,sink delta_i of the rows of a head, as the sink has no value.
float sink_gradient(const AttentionParams& p, int64_t head, const float* lse, const float* delta) {
  double sum = 0;
  for (int64_t i = 0; i < p.seqlen_q; ++i) {
    if (lse[i] == -kInf) continue;
    const float weight =
        p.sink[head] == lse[i] ? 1 : std::exp(p.sink[head] - lse[i]);  // also where both are inf
    sum -= weight * delta[i];
  }
  return static_cast<float>(sum);
}

}  // namespace

void block_sparse_attention_backward(const BlockSparseBackwardParams& g) {
  listed_backward<BlockWalk>(g);
  const AttentionParams& p = g.forward.attention;
  if (!g.dsink) return;
  for (int64_t head = 0; head < p.batch * p.heads; ++head)
    g.dsink[head] =
        sink_gradient(p, head % p.heads, p.lse + head * p.seqlen_q, g.delta + head * p.seqlen_q);
}

}  // namespace tokenmill::TOKENMILL_ISA
