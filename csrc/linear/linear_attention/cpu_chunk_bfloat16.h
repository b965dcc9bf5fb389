// A chunk whose operands are pairs of bfloat16 along each reduction: q, k and v as they are stored,
// weights and decayed keys rounded once for the products that take them, the state as a sum of two.
// Sums, and the state from chunk to chunk, are float32.
#pragma once
#include "linear/linear_attention/cpu_rows.h"

#if defined(__AVX512BF16__)
namespace tokenmill::TOKENMILL_ISA {

constexpr int64_t kPairChunk = 64;
static_assert(kPairChunk == kPanel);
constexpr int64_t kPairRows = kPairChunk + 2 * kWidth;

struct BFloat16Operands {
  const ChunkOperands& o;  // whose state it is
  float factor;            // of x
  int64_t words, ldx, ldk;
  float* x;        // [kPairRows][ldx], zero past the tokens
  float* y;        // [words][kPanel]
  float* keys;     // [kPairChunk / 2][ldk]: to_end y, pairs of tokens
  float* z;        // [panels of width][kPairChunk / 2][kPanel]: pairs of tokens
  float* state;    // [panels of width][2][words][kPanel]: pairs of features, and what they lack
  float* weights;  // [kPairRows][kPairChunk / 2]

  BFloat16Operands(const ChunkOperands& o, float factor)
      : o(o),
        factor(factor),
        words(words_of<BFloat16>(o.features)),
        ldx(round_up(words, kWidth)),
        ldk(round_up(o.state_rows, kWidth)) {}

  int64_t z_size() const { return o.width_panels() * kPairChunk / 2 * kPanel; }
  int64_t state_size() const { return o.width_panels() * 2 * words * kPanel; }
  int64_t size() const {
    return kPairRows * (ldx + kPairChunk / 2) + words * kPanel + kPairChunk / 2 * ldk + z_size() +
           state_size() + 6 * 16;
  }
  void place(cpu::Workspace& workspace) {
    x = ChunkOperands::zeros(workspace, kPairRows * ldx);
    y = ChunkOperands::zeros(workspace, words * kPanel);
    keys = ChunkOperands::zeros(workspace, kPairChunk / 2 * ldk);
    z = ChunkOperands::zeros(workspace, z_size());
    state = ChunkOperands::zeros(workspace, state_size());
    weights = ChunkOperands::zeros(workspace, kPairRows * kPairChunk / 2);
  }

  void pack(const Span& q, const Span& k, const Span& v, const ChunkDecay& decay, int64_t length,
            int64_t columns) const {
    pack_rows<BFloat16>(q.data, q.dtype, q.step, q.n, round_up(q.n, kTileRows) + kTileRows, length,
                        1.f, x, ldx);
    pack_transposed<BFloat16>(k.data, k.dtype, k.step, k.n, length, 1.f, y);
    const Elements<DType::bfloat16> e;
    for (int64_t t = 0; t < k.n; t += 2) {
      const vf even = set(decay.to_end[t]), odd = set(decay.to_end[t + 1]);
      const bool both = t + 1 < k.n;
      for (int64_t d = 0; d < length; d += kWidth) {
        const vf low = e.load_n(k.row(t), d, length - d) * even;
        const vf high = both ? e.load_n(k.row(t + 1), d, length - d) * odd : zero();
        store(keys + t / 2 * ldk + d, pair_bfloat(low, high));
      }
    }
    for (int64_t c = 0; c < columns; c += kPanel)
      for (int64_t t = 0; t < v.n; t += 2)
        for (int64_t w = 0; w < kPanel && c + w < columns; w += kWidth) {
          const int64_t left = columns - c - w;
          const vf low = e.load_n(v.row(t), c + w, left);
          const vf high = t + 1 < v.n ? e.load_n(v.row(t + 1), c + w, left) : zero();
          store(z_panel(c) + t / 2 * kPanel + w, pair_bfloat(low, high));
        }
  }

  // Splits the state for the next product.
  void split_state() const {
    for (int64_t c = 0; c < o.width; c += kPanel)
      for (int64_t f = 0; f < words; ++f) {
        const float* from = o.state_panel(c) + 2 * f * kPanel;
        float* to = state_panel(c) + f * kPanel;
        for (int64_t w = 0; w < kPanel; w += kWidth) {
          const vf even = load(from + w), odd = load(from + kPanel + w);
          const vf high = pair_bfloat(even, odd);
          store(to + w, high);
          store(to + words * kPanel + w,
                pair_bfloat(rest(even, _mm512_slli_epi32(_mm512_castps_si512(high), 16)),
                            rest(odd, _mm512_and_si512(_mm512_castps_si512(high),
                                                       _mm512_set1_epi32(0xffff0000)))));
        }
      }
  }
  // x - taken, 0 where that is inf - inf.
  static TM_INLINE vf rest(vf x, __m512i taken) {
    const vf r = x - _mm512_castsi512_ps(taken);
    return select(equal(r, r), r, zero());
  }

  float* z_panel(int64_t column) const { return z + column * (kPairChunk / 2); }
  float* state_panel(int64_t column) const { return state + column * 2 * words; }
};

template <int M, int N>
__attribute__((noinline)) void score_tile(const BFloat16Operands& b, const ChunkDecay& decay,
                                          int64_t row) {
  vf s[M][N];
  clear(s);
  multiply<BFloat16, false>(s, b.x + row * b.ldx, b.ldx, b.y, kPanel, b.words);
  const float* pair = decay.pair + row * decay.pair_step;
  float* to = b.weights + row * (kPairChunk / 2);
  const vf factor = set(b.factor);
  TM_UNROLL(16)
  for (int i = 0; i < M; ++i) {
    TM_UNROLL(8)
    for (int j = 0; j < N; ++j)
      s[i][j] = s[i][j] * factor * load(pair + i * decay.pair_step + j * kWidth);
    TM_UNROLL(8)
    for (int j = 0; j < N; j += 2)
      store(to + i * (kPairChunk / 2) + j / 2 * kWidth, narrow_bfloat(s[i][j], s[i][j + 1]));
  }
}

template <int M, int N>
__attribute__((noinline)) void out_tile(const BFloat16Operands& b, const ChunkDecay& decay,
                                        int64_t row, int64_t column, int64_t tokens, bool state,
                                        float* out, int64_t ldo) {
  vf acc[M][N];
  clear(acc);
  if (state) {
    const float* high = b.state_panel(column);
    multiply<BFloat16, false>(acc, b.x + row * b.ldx, b.ldx, high, kPanel, b.words);
    multiply<BFloat16, false>(acc, b.x + row * b.ldx, b.ldx, high + b.words * kPanel, kPanel,
                              b.words);
    TM_UNROLL(16)
    for (int i = 0; i < M; ++i) {
      const vf factor = set(decay.from_start[row + i] * b.factor);
      TM_UNROLL(8)
      for (int j = 0; j < N; ++j) acc[i][j] = acc[i][j] * factor;
    }
  }
  multiply<BFloat16, false>(acc, b.weights + row * (kPairChunk / 2), kPairChunk / 2,
                            b.z_panel(column), kPanel, words_of<BFloat16>(tokens));
  TM_UNROLL(16)
  for (int i = 0; i < M; ++i) {
    TM_UNROLL(8)
    for (int j = 0; j < N; ++j) store(out + i * ldo + j * kWidth, acc[i][j]);
  }
}

template <int M, int N>
__attribute__((noinline)) void state_tile(const BFloat16Operands& b, float total, int64_t row,
                                          int64_t column, int64_t n) {
  vf acc[M][N];
  clear(acc);
  multiply<BFloat16, true>(acc, b.keys + row, b.ldk, b.z_panel(column), kPanel,
                           words_of<BFloat16>(n));
  float* state = b.o.state_panel(column) + row * kPanel;
  const vf factor = set(total);
  TM_UNROLL(16)
  for (int i = 0; i < M; ++i) {
    TM_UNROLL(8)
    for (int j = 0; j < N; ++j) {
      float* at = state + i * kPanel + j * kWidth;
      store(at, fma(load(at), factor, acc[i][j]));
    }
  }
}

// out has whole tiles of rows.
inline void chunk_outputs(const BFloat16Operands& b, const ChunkDecay& decay, int64_t n, bool state,
                          float* out, int64_t ldo, const Ahead& ahead) {
  for (int64_t row = 0, rows; row < n; row += rows) {
    rows = rows_of_tile(n - row);
    const int64_t tokens = row + rows < n ? row + rows : n;
    Ahead::ask(ahead.scores, row, rows, n);
    with_tile(rows, 2 * ceil_div(tokens, 2 * kWidth), [&]<int M, int N>() TM_LAMBDA {
      if constexpr (N % 2 == 0) score_tile<M, N>(b, decay, row);
    });
  }
  if (state) b.split_state();
  for (int64_t column = 0; column < b.o.width; column += kPanel)
    for (int64_t row = 0, rows; row < n; row += rows) {
      rows = rows_of_tile(n - row);
      const int64_t tokens = row + rows < n ? row + rows : n;
      if (column == 0) Ahead::ask(ahead.outputs, row, rows, n);
      with_tile(rows, vectors_of(b.o.width - column), [&]<int M, int N>() TM_LAMBDA {
        out_tile<M, N>(b, decay, row, column, tokens, state, out + row * ldo + column, ldo);
      });
    }
}

inline void chunk_state(const BFloat16Operands& b, const ChunkDecay& decay, int64_t n,
                        const Ahead& ahead) {
  for (int64_t column = 0; column < b.o.width; column += kPanel)
    for (int64_t row = 0, rows; row < b.o.features; row += rows) {
      rows = rows_of_tile(b.o.features - row);
      if (column == 0) {
        Ahead::ask(ahead.state, row, rows, b.o.features);
        Ahead::ask<true>(ahead.written, row, rows, b.o.features);
      }
      with_tile(rows, vectors_of(b.o.width - column), [&]<int M, int N>() TM_LAMBDA {
        state_tile<M, N>(b, decay.total, row, column, n);
      });
    }
}

}  // namespace tokenmill::TOKENMILL_ISA
#endif
