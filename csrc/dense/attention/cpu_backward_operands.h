// What the backward CPU kernel packs: the queries of a head with the gradients of their outputs,
// and a chunk of its keys with their values.
#pragma once
#include "cpu/workspace.h"
#include "dense/attention/cpu_scores.h"

namespace tokenmill::TOKENMILL_ISA {

// Lengths of packed rows: in words where they are an A operand, in floats where they are a B or C
// operand; of q and k, and of v and dout.
template <class Op>
struct RowSizes {
  int64_t words_d, words_v, lda_d, lda_v, width_d, width_v;

  explicit RowSizes(const AttentionParams& p)
      : words_d(words_of<Op>(p.head_dim)),
        words_v(words_of<Op>(p.value_dim)),
        lda_d(round_up(words_d, kWidth)),
        lda_v(round_up(words_v, kWidth)),
        width_d(round_up(p.head_dim, kWidth)),
        width_v(round_up(p.value_dim, kWidth)) {}
};

template <class Op>
struct QueryOperands : RowSizes<Op> {
  using RowSizes<Op>::words_d, RowSizes<Op>::words_v, RowSizes<Op>::width_d, RowSizes<Op>::width_v;

  const AttentionBackwardParams& bp;
  float *qt, *gt;      // q and dout transposed, in panels of kPanel queries
  float *qr, *gr;      // q and dout as rows
  float *lse, *delta;  // of softmax

  explicit QueryOperands(const AttentionBackwardParams& bp) : RowSizes<Op>(bp.forward), bp(bp) {}

  int64_t size(int64_t padded) const {
    return padded * (words_d + words_v + (width_d + width_v) / Op::kPair + 2) + 6 * 16;
  }
  void place(cpu::Workspace& workspace, int64_t padded) {
    qt = workspace.take(padded * words_d);
    gt = workspace.take(padded * words_v);
    qr = workspace.take(padded / Op::kPair * width_d);
    gr = workspace.take(padded / Op::kPair * width_v);
    lse = workspace.take(padded);
    delta = workspace.take(padded);
  }

  // Queries of head h, and zeros up to `padded`; the transposed q times factor.
  void pack(const Sequence& s, int64_t b, int64_t h, int64_t padded, float factor) {
    const AttentionParams& p = bp.forward;
    for (int64_t i = 0; i < padded; i += kPanel) {
      const int64_t left = s.q_length - i;
      const int64_t rows = left < 0 ? 0 : left < kPanel ? left : kPanel;
      const char* q = row_of(p.q, p.dtype, b, s.q_start, i, h);
      const char* g = row_of(bp.dout, p.dtype, b, s.q_start, i, h);
      pack_transposed<Op>(q, p.dtype, p.q.seq, rows, p.head_dim, factor, qt + i * words_d);
      pack_transposed<Op>(g, p.dtype, bp.dout.seq, rows, p.value_dim, 1.f, gt + i * words_v);
      pack_reduced_rows<Op>(q, p.dtype, p.q.seq, rows, p.head_dim, qr + i / Op::kPair * width_d,
                            width_d);
      pack_reduced_rows<Op>(g, p.dtype, bp.dout.seq, rows, p.value_dim,
                            gr + i / Op::kPair * width_v, width_v);
    }
  }

  // lse in base 2 without `shift`, and delta = rowsum(dout out) - dlse.
  void pack_statistics(const Sequence& s, int64_t b, int64_t h, int64_t padded, float shift) {
    const AttentionParams& p = bp.forward;
    const float* lse_in = lse_of(p, p.lse, b, s.q_start, h);
    const float* dlse = bp.dlse ? lse_of(p, bp.dlse, b, s.q_start, h) : nullptr;
    for (int64_t i = 0; i < s.q_length; ++i) {
      // A row that saw nothing has P = 0.
      lse[i] = lse_in[i] == -kInf ? kInf : (lse_in[i] - shift) * kLog2e;
      const char* g = row_of(bp.dout, p.dtype, b, s.q_start, i, h);
      const char* o = row_of(p.out, p.dtype, b, s.q_start, i, h);
      vf dot = zero();
      visit_elements(p.dtype, [&](auto e) TM_LAMBDA {
        for (int64_t d = 0; d < p.value_dim; d += kWidth)
          dot = fma(e.load_n(g, d, p.value_dim - d), e.load_n(o, d, p.value_dim - d), dot);
      });
      delta[i] = sum_lanes(dot) - (dlse ? dlse[i] : 0);
    }
    for (int64_t i = s.q_length; i < padded; ++i) lse[i] = kInf, delta[i] = 0;
  }
};

template <class Op>
struct KeyOperands : RowSizes<Op> {
  using RowSizes<Op>::lda_d, RowSizes<Op>::lda_v, RowSizes<Op>::width_d;

  const AttentionParams& p;
  float *kr, *vr;  // k and v as A operands
  float* kb;       // k as B operand

  explicit KeyOperands(const AttentionParams& p) : RowSizes<Op>(p), p(p) {}

  int64_t size(int64_t keys) const { return keys * (lda_d + lda_v + width_d) + 3 * 16; }
  void place(cpu::Workspace& workspace, int64_t keys) {
    kr = workspace.take(keys * lda_d);
    vr = workspace.take(keys * lda_v);
    kb = Op::kPair == 1 ? kr : workspace.take(keys / Op::kPair * width_d);  // the same for float32
  }

  // Keys begin .. begin + count - 1 of KV head h.
  void pack(const Sequence& s, int64_t b, int64_t h, int64_t begin, int64_t count) {
    const int64_t padded = round_up(count, kTileRows);
    const char* k = row_of(p.k, p.dtype, b, s.k_start, begin, h);
    const char* v = row_of(p.v, p.dtype, b, s.k_start, begin, h);
    pack_rows<Op>(k, p.dtype, p.k.seq, count, padded, p.head_dim, 1.f, kr, lda_d);
    pack_rows<Op>(v, p.dtype, p.v.seq, count, padded, p.value_dim, 1.f, vr, lda_v);
    if constexpr (Op::kPair != 1)
      pack_reduced_rows<Op>(k, p.dtype, p.k.seq, count, p.head_dim, kb, width_d);
  }
};

}  // namespace tokenmill::TOKENMILL_ISA
