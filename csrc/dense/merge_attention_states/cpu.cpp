// out = sum_i w_i outs_i with w_i = exp(lse_i) / sum_j exp(lse_j), row by row. Weights are computed
// from differences to the largest lse: log sum_j exp(lse_j), once rounded, is too coarse.
#include <cmath>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/workspace.h"
#include "dense/merge_attention_states/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kRowsPerItem = 64;
constexpr float kNegInf = -__builtin_inff();

struct Row {
  int64_t b, s, h;
};

TM_INLINE Row row_at(const MergeParams& p, int64_t index) {
  return {index / (p.seqlen * p.heads), index / p.heads % p.seqlen, index % p.heads};
}
TM_INLINE int64_t outs_at(const MergeParams& p, int64_t i, const Row& r) {
  return i * p.outs_part + r.b * p.outs_batch + r.s * p.outs_seq + r.h * p.outs_head;
}
TM_INLINE int64_t lse_index(const MergeParams& p, const Row& r) {
  return (r.b * p.heads + r.h) * p.seqlen + r.s;
}

// Computes the weights of the parts; returns lse. An empty part has weight 0, whatever its out
// holds.
float write_weights(const MergeParams& p, const Row& r, float* weights) {
  if (!p.lses) {
    for (int64_t i = 0; i < p.parts; ++i) weights[i] = 1;
    return 0;
  }
  const float* lses = p.lses + r.b * p.lses_batch + r.h * p.lses_head + r.s * p.lses_seq;
  float top = kNegInf;
  for (int64_t i = 0; i < p.parts; ++i) top = std::fmax(top, lses[i * p.lses_part]);
  const float row_max = top == kNegInf ? 0 : top;
  float sum = 0;
  for (int64_t i = 0; i < p.parts; ++i)
    sum += weights[i] = std::exp(lses[i * p.lses_part] - row_max);
  for (int64_t i = 0; i < p.parts; ++i)
    weights[i] = lses[i * p.lses_part] == kNegInf ? 0 : weights[i] / sum;
  return row_max + std::log(sum);
}

// Calls visit(index, row, weights, lse) for each row.
template <typename Visit>
void for_each_row(const MergeParams& p, const Visit& visit) {
  const int64_t rows = p.batch * p.seqlen * p.heads;
  // Below about 64 Ki elements a parallel region costs more than it gains.
  const int threads = rows * p.dim * p.parts < (1 << 16) ? 1 : cpu::num_threads();
  cpu::parallel_items(ceil_div(rows, kRowsPerItem), threads, [&](cpu::ItemCounter& items) {
    cpu::Workspace memory(p.parts);
    float* const weights = memory.take(p.parts);
    for (int64_t item; (item = items.next()) >= 0;) {
      const int64_t end = (item + 1) * kRowsPerItem < rows ? (item + 1) * kRowsPerItem : rows;
      for (int64_t index = item * kRowsPerItem; index < end; ++index) {
        const Row row = row_at(p, index);
        const float lse = write_weights(p, row, weights);
        visit(index, row, weights, lse);
      }
    }
  });
}

}  // namespace

void merge_states(const MergeParams& p) {
  for_each_row(p, [&](int64_t index, const Row& r, const float* weights, float lse) {
    if (p.lses) p.lse[lse_index(p, r)] = lse;
    for (int64_t d = 0; d < p.dim; d += kWidth) {
      vf sum = zero();
      for (int64_t i = 0; i < p.parts; ++i) {
        if (const float w = weights[i]; w != 0)
          sum = fma(set(w), load_as_float_n(p.outs, p.dtype, outs_at(p, i, r) + d, p.dim - d), sum);
      }
      store_from_float_n(p.out, p.dtype, index * p.dim + d, sum, p.dim - d);
    }
  });
}

// With delta_i = dout.outs_i and delta = sum_i w_i delta_i:
//   douts_i = w_i dout,  dlses_i = w_i (delta_i - delta + dlse).
void merge_states_backward(const MergeBackwardParams& q) {
  const MergeParams& p = q.forward;
  const int64_t rows = p.batch * p.seqlen * p.heads;
  for_each_row(p, [&](int64_t index, const Row& r, const float* weights, float) {
    const int64_t from = r.b * q.dout_batch + r.s * q.dout_seq + r.h * q.dout_head;
    float delta = 0;
    for (int64_t i = 0; i < p.parts; ++i) {
      const float w = weights[i];
      vf dot = zero();
      for (int64_t d = 0; d < p.dim; d += kWidth) {
        const vf g = load_as_float_n(q.dout, p.dtype, from + d, p.dim - d);
        if (p.lses && w != 0)
          dot = fma(g, load_as_float_n(p.outs, p.dtype, outs_at(p, i, r) + d, p.dim - d), dot);
        store_from_float_n(q.douts, p.dtype, (i * rows + index) * p.dim + d,
                           w != 0 ? g * set(w) : zero(), p.dim - d);
      }
      if (!p.lses) continue;
      const float delta_i = sum_lanes(dot);
      if (w != 0) delta += w * delta_i;
      q.dlses[i * rows + lse_index(p, r)] = delta_i;
    }
    if (!p.lses) return;
    if (q.dlse) delta -= q.dlse[lse_index(p, r)];
    for (int64_t i = 0; i < p.parts; ++i) {
      const float w = weights[i];
      float& dlse = q.dlses[i * rows + lse_index(p, r)];
      dlse = w != 0 ? w * (dlse - delta) : 0;
    }
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
