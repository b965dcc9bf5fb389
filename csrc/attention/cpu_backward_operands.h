// Packed operands of the backward CPU kernel: Q and dO of a head, K and V of a key tile.
#pragma once
#include "attention/cpu_scores.h"
#include "cpu/workspace.h"

namespace tokenmill::TOKENMILL_ISA {

// Keys of a register tile of S^T; in tiles the keys of a reduction, so that a load serves two
// products.
template <class Op>
constexpr int kKeyRows = kInTiles<Op> ? Op::kPair * Op::kWords : kTileRows;
constexpr int64_t kKeyTile = 96;      // a multiple of kKeyRows
constexpr int64_t kQueryBlock = 128;  // a multiple of kPanel and of kQueryRows
constexpr int64_t kQueryRows = 4;     // rows of the register tile of dQ
constexpr int64_t kSplits = 8;
constexpr int64_t kSplitKeys = 480;  // min keys of a part, a multiple of kKeyTile

// Splits the keys into at most kSplits parts; dQ is the sum, in order, of one partial sum per part.
// Parts run in succession or on several threads, with the same bits.
struct Split {
  int64_t count, keys;  // number of parts of a sequence; keys of each but the last

  explicit Split(int64_t length) : keys(round_up(ceil_div(length, kSplits), kKeyTile)) {
    if (keys < kSplitKeys) keys = kSplitKeys;
    count = length > 0 ? ceil_div(length, keys) : 1;
  }
};

// Lengths of packed rows: words as an A operand (lda), floats as a B or C operand (width); d: q and
// k, v: v and dout.
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
  float *lse, *delta;  // softmax; for kinds that take the logit, the factor of a row and its delta

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

  // Packs the queries of head h, and zeros up to `padded`; the transposed q is multiplied by
  // factor.
  void pack(const Sequence& s, int64_t b, int64_t h, int64_t padded, float factor) {
    const AttentionParams& p = bp.forward;
    for (int64_t i = 0; i < padded; i += kPanel) {
      const int64_t left = s.q_length - i;
      const int64_t rows = left < 0 ? 0 : left < kPanel ? left : kPanel;
      pack_panel(i, rows, EvenRows{row_of(p.q, p.dtype, b, s.q_start, i, h), p.q.seq},
                 EvenRows{row_of(bp.dout, p.dtype, b, s.q_start, i, h), bp.dout.seq}, factor);
    }
  }
  // Rows i .. i + kPanel - 1, of which the first `rows` exist.
  template <class Source>
  void pack_panel(int64_t i, int64_t rows, const Source& q, const Source& g, float factor) {
    const AttentionParams& p = bp.forward;
    pack_transposed<Op>(q, p.dtype, rows, p.head_dim, factor, qt + i * words_d);
    pack_transposed<Op>(g, p.dtype, rows, p.value_dim, 1.f, gt + i * words_v);
    pack_reduced_rows<Op>(q, p.dtype, rows, p.head_dim, qr + i / Op::kPair * width_d, width_d);
    pack_reduced_rows<Op>(g, p.dtype, rows, p.value_dim, gr + i / Op::kPair * width_v, width_v);
  }

  // lse in base 2 without `shift`, and delta = rowsum(dout out) - dlse.
  void pack_statistics(const Sequence& s, int64_t b, int64_t h, int64_t padded, float shift) {
    const AttentionParams& p = bp.forward;
    const float* lse_in = lse_of(p, p.lse, b, s.q_start, h);
    const float* dlse = bp.dlse ? lse_of(p, bp.dlse, b, s.q_start, h) : nullptr;
    for (int64_t i = 0; i < s.q_length; ++i)
      pack_statistics(i, lse_in[i], dlse ? dlse[i] : 0, shift,
                      row_of(bp.dout, p.dtype, b, s.q_start, i, h),
                      row_of(p.out, p.dtype, b, s.q_start, i, h));
    for (int64_t i = s.q_length; i < padded; ++i) lse[i] = kInf, delta[i] = 0;
  }
  void pack_statistics(int64_t i, float lse_in, float dlse, float shift, const char* g,
                       const char* o) {
    // A row without visible keys has P = 0.
    lse[i] = lse_in == -kInf ? kInf : (lse_in - shift) * kLog2e;
    delta[i] = product(g, o) - dlse;
  }

  // Factor and delta of kinds that are divided by the row sum s: d loss / d s is -factor
  // rowsum(dout out), with the sign of s where |s| divides, and 0 where 1 does.
  float* factor() const { return lse; }
  void pack_factors(const Sequence& s, int64_t b, int64_t h, int64_t padded) {
    const AttentionParams& p = bp.forward;
    const bool divides = p.normalize == Normalize::sum, either_sign = p.map == ScoreMap::linear;
    const float* statistic = p.lse ? lse_of(p, p.lse, b, s.q_start, h) : nullptr;
    const float* dsum = bp.dlse ? lse_of(p, bp.dlse, b, s.q_start, h) : nullptr;
    for (int64_t i = 0; i < s.q_length; ++i) {
      const float sum = statistic ? statistic[i] : 0;
      factor()[i] = normalizer(p, sum);
      delta[i] = 0;
      if (divides && !(either_sign && std::fabs(sum) <= 1)) {
        const float dot = product(row_of(bp.dout, p.dtype, b, s.q_start, i, h),
                                  row_of(p.out, p.dtype, b, s.q_start, i, h));
        delta[i] = factor()[i] * (either_sign && sum < 0 ? -dot : dot);
      }
      if (dsum) delta[i] -= dsum[i];
    }
    for (int64_t i = s.q_length; i < padded; ++i) factor()[i] = delta[i] = 0;
  }

 private:
  float product(const char* g, const char* o) const {
    const AttentionParams& p = bp.forward;
    vf dot = zero();
    visit_elements(p.dtype, [&](auto e) TM_LAMBDA {
      for (int64_t d = 0; d < p.value_dim; d += kWidth)
        dot = fma(e.load_n(g, d, p.value_dim - d), e.load_n(o, d, p.value_dim - d), dot);
    });
    return sum_lanes(dot);
  }
};

template <class Op>
struct KeyOperands : RowSizes<Op> {
  using RowSizes<Op>::lda_d, RowSizes<Op>::lda_v, RowSizes<Op>::width_d;

  static constexpr int64_t kLdk = kKeyTile / 2 + 16;  // rows start in different cache sets

  const AttentionParams& p;
  float *kr, *vr;  // k and v as A operands
  float* kb;       // k as B operand of dQ
  float* kt;       // in tiles: k transposed, as A operand of dQ^T, [width_d][kLdk]

  explicit KeyOperands(const AttentionParams& p) : RowSizes<Op>(p), p(p) {}

  int64_t size(int64_t keys) const {
    return keys * (lda_d + lda_v + width_d) + (kInTiles<Op> ? width_d * kLdk : 0) + 4 * 16;
  }
  void place(cpu::Workspace& workspace, int64_t keys) {
    kr = workspace.take(keys * lda_d);
    vr = workspace.take(keys * lda_v);
    // same layout for float32
    kb = Op::kPair == 1 ? kr : workspace.take(keys / Op::kPair * width_d);
    kt = kInTiles<Op> ? workspace.take(width_d * kLdk) : nullptr;
  }

  // Packs keys begin .. begin + count - 1 of KV head h.
  void pack(const Sequence& s, int64_t b, int64_t h, int64_t begin, int64_t count) {
    pack(count, EvenRows{row_of(p.k, p.dtype, b, s.k_start, begin, h), p.k.seq},
         EvenRows{row_of(p.v, p.dtype, b, s.k_start, begin, h), p.v.seq});
  }
  template <class Source>
  void pack(int64_t count, const Source& k, const Source& v) {
    const int64_t padded = round_up(count, kKeyRows<Op>);
    pack_rows<Op>(k, p.dtype, count, padded, p.head_dim, 1.f, kr, lda_d);
    pack_rows<Op>(v, p.dtype, count, padded, p.value_dim, 1.f, vr, lda_v);
    if constexpr (Op::kPair != 1) pack_reduced_rows<Op>(k, p.dtype, count, p.head_dim, kb, width_d);
    if constexpr (kInTiles<Op>)
      for (int64_t w = 0; w < words_of<Op>(count); w += kWidth)
        for (int64_t d = 0; d < width_d; d += kWidth)
          transpose_words(kb + w * width_d + d, width_d, kt + d * kLdk + w, kLdk);
  }
};

// z = S^T = K Q^T and dp = dP^T = V dO^T for kTileRows keys from row r of the tile on and N vectors
// of queries from i on.
template <class Op, int N>
TM_INLINE void multiply_scores(vf (&z)[kTileRows][N], float (&dp)[kTileRows][kPanel],
                               const KeyOperands<Op>& keys, int64_t r,
                               const QueryOperands<Op>& queries, int64_t i) {
  vf x[kTileRows][N];
  clear(x);
  multiply<Op, false>(x, keys.vr + r * keys.lda_v, keys.lda_v, queries.gt + i * queries.words_v,
                      kPanel, queries.words_v);
  for (int m = 0; m < kTileRows; ++m)
    for (int n = 0; n < N; ++n) store(dp[m] + n * kWidth, x[m][n]);
  clear(z);
  multiply<Op, false>(z, keys.kr + r * keys.lda_d, keys.lda_d, queries.qt + i * queries.words_d,
                      kPanel, queries.words_d);
}

#if defined(__AMX_BF16__)
// The same in tiles for kKeyRows keys and kPanel queries.
template <int kRows>
void multiply_scores(float (&z)[kRows][kPanel], float (&dp)[kRows][kPanel],
                     const KeyOperands<BFloat16Tiles>& keys, int64_t r,
                     const QueryOperands<BFloat16Tiles>& queries, int64_t i) {
  constexpr int kColumns = 4 / (kRows / kTile);
  for (int64_t c = 0; c < kPanel; c += kColumns * kTile) {
    clear_tiles<kRows / kTile, kColumns>();
    add_to_tiles<kRows / kTile, kColumns>(keys.vr + r * keys.lda_v, keys.lda_v,
                                          queries.gt + i * queries.words_v + c, kPanel, 0,
                                          queries.words_v);
    store_tiles<kRows / kTile, kColumns>(dp[0] + c, kPanel);
    clear_tiles<kRows / kTile, kColumns>();
    add_to_tiles<kRows / kTile, kColumns>(keys.kr + r * keys.lda_d, keys.lda_d,
                                          queries.qt + i * queries.words_d + c, kPanel, 0,
                                          queries.words_d);
    store_tiles<kRows / kTile, kColumns>(z[0] + c, kPanel);
  }
}
#endif

// P^T and dS^T of a key tile (rows) and a block of queries, as operands of dV, dK and dQ.
template <class Op, int64_t kQueries>
struct ScoreOperands {
  static constexpr int64_t kRowPad = 16;  // rows start in different cache sets
  static constexpr int64_t kLdp = kQueries / Op::kPair + kRowPad;
  static constexpr int64_t kLdsp = kQueries + kRowPad;

  float *pt, *st, *sp;  // P^T, dS^T, and dS^T as pairs of keys

  static int64_t size(int64_t keys) { return keys * (2 * kLdp + kLdsp) + 3 * 16; }
  void place(cpu::Workspace& workspace, int64_t keys) {
    pt = workspace.take(keys * kLdp);
    st = workspace.take(keys * kLdp);
    sp = workspace.take(keys / 2 * kLdsp);
  }

  // Stores weights w and their gradients dz for key r and the queries from c on.
  template <int N>
  TM_INLINE void store_key(int64_t r, int64_t c, const vf (&w)[N], const vf (&dz)[N]) const {
    if constexpr (Op::kPair == 1) {
      TM_UNROLL(4)
      for (int n = 0; n < N; ++n) {
        store(pt + r * kLdp + c + n * kWidth, w[n]);
        store(st + r * kLdp + c + n * kWidth, dz[n]);
      }
    } else {
#if defined(__AVX512BF16__)
      TM_UNROLL(2)
      for (int n = 0; n < N; n += 2) {
        const int64_t at = r * kLdp + c / 2 + n / 2 * kWidth;
        store(pt + at, narrow_bfloat(w[n], w[n + 1]));
        store(st + at, narrow_bfloat(dz[n], dz[n + 1]));
      }
#endif
    }
  }
  // Stores dS^T of keys r .. r + M - 1 as pairs of keys, where words are pairs.
  template <int M, int N>
  TM_INLINE void store_pairs(int64_t r, int64_t c, const vf (&dz)[M][N]) const {
#if defined(__AVX512BF16__)
    if constexpr (Op::kPair == 2) {
      TM_UNROLL(4)
      for (int m = 0; m < M; m += 2) {
        TM_UNROLL(4)
        for (int n = 0; n < N; ++n)
          store(sp + (r + m) / 2 * kLdsp + c + n * kWidth, pair_bfloat(dz[m][n], dz[m + 1][n]));
      }
    }
#endif
  }
  // dS as the A operand of dQ: columns are queries.
  const float* gradient(int64_t key_word, int64_t query) const {
    return Op::kPair == 1 ? st + key_word * kLdp + query : sp + key_word * kLdsp + query;
  }
  static constexpr int64_t gradient_ld() { return Op::kPair == 1 ? kLdp : kLdsp; }
};

}  // namespace tokenmill::TOKENMILL_ISA
