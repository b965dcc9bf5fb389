#include "sparse/cpu_backward.h"

#include "sparse/block_sparse_attention/cpu_blocks.h"

namespace tokenmill::TOKENMILL_ISA {

namespace {

// Gradient of a head's sink logit: -sum_i P_i,sink delta_i over its rows. The sink has no value.
float sink_gradient(const AttentionParams& p, int64_t head, const float* lse, const float* delta) {
  double sum = 0;
  for (int64_t i = 0; i < p.seqlen_q; ++i) {
    if (lse[i] == -kInf) continue;
    const float weight = p.sink[head] == lse[i]
                             ? 1
                             : std::exp(p.sink[head] - lse[i]);  // 1 also if both are infinite
    sum -= weight * delta[i];
  }
  return static_cast<float>(sum);
}

}  // namespace

void block_sparse_attention_backward(const BlockSparseBackwardCalls& calls) {
  std::vector<BlockWalk> walks;
  walks.reserve(calls.count);
  for (int64_t r = 0; r < calls.count; ++r) walks.emplace_back(calls.each[r].forward);
  listed_backward(walks.data(), calls.each, calls.count);
  for (int64_t r = 0; r < calls.count; ++r) {
    const BlockSparseBackwardParams& g = calls.each[r];
    const AttentionParams& p = g.forward.attention;
    for (int64_t head = 0; g.dsink && head < p.batch * p.heads; ++head) {
      const int64_t lse = head * g.forward.lse_rows;
      g.dsink[head] = sink_gradient(p, head % p.heads, p.lse + lse, g.delta + lse);
    }
  }
}

}  // namespace tokenmill::TOKENMILL_ISA
