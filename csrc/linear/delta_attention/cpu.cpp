// Forward, chunk by chunk, with the state in cache. A worker owns a value head of a sequence.
#include "linear/delta_attention/cpu_chunk.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

class Worker {
 public:
  explicit Worker(const DeltaAttentionParams& p)
      : p(p),
        ldv(round_up(p.value_dim, kWidth)),
        chunk(p),
        workspace(chunk.floats() + (p.head_dim + kTileRows + 3 * kRows) * ldv + 4 * 16),
        state{workspace.take((p.head_dim + kTileRows) * ldv), ldv},
        y{workspace.take(kRows * ldv), ldv},
        solved{workspace.take(kRows * ldv), ldv},
        out{workspace.take(kRows * ldv), ldv} {
    chunk.place(workspace);
  }

  void run(int64_t item) {
    const int64_t b = item / p.heads, h = item % p.heads;
    const Sequence s(p, b);
    load_state(state, p.initial, b, h, p.head_dim, p.value_dim);
    for (int64_t t = 0; t < s.length; t += kBlock) {
      const int64_t n = std::min(kBlock, s.length - t), first = s.start + t;
      const int64_t ahead = std::min(kBlock, s.length - t - n);
      chunk.ask_for_tokens(b, first + n, h, ahead);
      ask_for(p.v, p.dtype, b, first + n, h, ahead, p.value_dim);
      ask_for<true>(p.out, p.dtype, b, first, h, n, p.value_dim);
      chunk.load_tokens(b, first, h, n);
      pack_rows<Float32>(row_of(p.v, p.dtype, b, first, h), p.dtype, p.v.seq, n, n, p.value_dim,
                         1.f, y.data, ldv);
      const Matrix u = chunk.solve(y, solved, state, n);
      product<false, true>(out, n, chunk.q_in, state, p.head_dim, ldv);
      product_lower(out, n, chunk.of_queries, u, ldv);
      for (int64_t i = 0; i < n; ++i)
        store_row(out.row(i), 1.f, row_of(p.out, p.dtype, b, first + i, h), p.dtype, p.value_dim);
      if (ahead > 0 || p.final.data) chunk.carry(state, state, u, n);
    }
    if (p.final.data) store_state(p.final, state, b, h, p.head_dim, p.value_dim);
  }

 private:
  const DeltaAttentionParams& p;
  const int64_t ldv;
  Chunk chunk;
  cpu::Workspace workspace;
  const Matrix state;  // [D][ldv]
  const Matrix y, solved, out;
};

}  // namespace

void delta_attention_forward(const DeltaAttentionParams& p) {
  run_items<Worker>(p, p, p.batch * p.heads, 8);
}

}  // namespace tokenmill::TOKENMILL_ISA
