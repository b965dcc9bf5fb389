// A chunk with operands as pairs of bfloat16 along each reduction: q, k and v as stored, weights
// and decayed keys rounded once for their products. The state, its product with the queries and all
// sums are float32: rounded once, the state would lose exact counts; as a sum of two bfloat16 it
// would take as many multiply-adds.
#pragma once
#include "linear/linear_attention/cpu_rows.h"

#if defined(TM_DOTS)
namespace tokenmill::TOKENMILL_ISA {

constexpr int64_t kPairChunk = 2 * kWidth;  // tokens
static_assert(kPairChunk <= kMaxChunk);

struct BFloat16Operands {
  const ChunkOperands& o;  // provides the state and x as float32 rows
  int64_t words, ldx, ldk;
  const float* x;  // [kPaddedRows][step_x]: packed_x, or the tensor itself
  int64_t step_x;
  float* packed_x;  // [kPaddedRows][ldx], zero past the tokens
  float* y;         // [words][kPairChunk]
  float* keys;      // [kPairChunk / 2][ldk]: to_end y, pairs of tokens
  float* z;         // [panels of width][kPairChunk / 2][kPanel]: pairs of tokens
  float* weights;   // [kPaddedRows][kPairChunk / 2]

  explicit BFloat16Operands(const ChunkOperands& o)
      : o(o),
        words(words_of<BFloat16>(o.features)),
        ldx(round_up(words, kWidth)),
        ldk(round_up(o.state_rows, kWidth)) {}

  int64_t z_size() const { return o.width_panels() * kPairChunk / 2 * kPanel; }
  int64_t size() const {
    return kPaddedRows * (ldx + kPairChunk / 2) + words * kPairChunk + kPairChunk / 2 * ldk +
           z_size() + 5 * 16;
  }
  void place(cpu::Workspace& workspace) {
    packed_x = ChunkOperands::zeros(workspace, kPaddedRows * ldx);
    y = ChunkOperands::zeros(workspace, words * kPairChunk);
    keys = ChunkOperands::zeros(workspace, kPairChunk / 2 * ldk);
    z = ChunkOperands::zeros(workspace, z_size());
    weights = ChunkOperands::zeros(workspace, kPaddedRows * kPairChunk / 2);
  }

  void pack(const Span& q, const Span& k, const Span& v, const ChunkDecay& decay, int64_t length,
            int64_t columns, bool state) {
    if (state) pack_x(o, q, FeatureMap::identity, 1, length);
    const bool in_place = q.n == kPairChunk && length % 2 == 0 && q.step % 2 == 0;
    x = in_place ? reinterpret_cast<const float*>(q.data) : packed_x;
    step_x = in_place ? q.step / 2 : ldx;
    if (!in_place)
      pack_rows<BFloat16>(q.data, q.dtype, q.step, q.n, rows_of_tiles(q.n), length, 1.f, packed_x,
                          ldx);
    pack_transposed<BFloat16, kPairChunk>(k.data, k.dtype, k.step, k.n, length, 1.f, y);
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
      pack_reduced_rows<BFloat16>(v.columns(c).data, v.dtype, v.step, v.n, columns - c, z_panel(c),
                                  kPanel);
  }

  float* z_panel(int64_t column) const { return z + column * (kPairChunk / 2); }
};

template <int M, int N>
__attribute__((noinline)) void score_tile(const BFloat16Operands& b, const ChunkDecay& decay,
                                          int64_t row) {
  vf s[M][N];
  clear(s);
  multiply<BFloat16, false>(s, b.x + row * b.step_x, b.step_x, b.y, kPairChunk, b.words);
  const float* pair = decay.pair + row * decay.pair_step;
  float* to = b.weights + row * (kPairChunk / 2);
  TM_UNROLL(16)
  for (int i = 0; i < M; ++i) {
    TM_UNROLL(8)
    for (int j = 0; j < N; ++j)
      s[i][j] = pair_weight(s[i][j], load(pair + i * decay.pair_step + j * kWidth));
    store(to + i * (kPairChunk / 2), narrow_bfloat(s[i][0], N > 1 ? s[i][N - 1] : zero()));
  }
}

TM_INLINE void store_out(float* to, vf x) { store(to, x); }
TM_INLINE void store_out(uint16_t* to, vf x) { store_narrow(to, x); }

template <int M, int N, typename Out>
__attribute__((noinline)) void out_tile(const BFloat16Operands& b, const ChunkDecay& decay,
                                        int64_t row, int64_t column, int64_t tokens, bool state,
                                        Out* out, int64_t ldo) {
  vf acc[M][N];
  add_up<BFloat16, false>(acc, b.o, decay, row, column, state, b.weights + row * (kPairChunk / 2),
                          kPairChunk / 2, b.z_panel(column), words_of<BFloat16>(tokens));
  TM_UNROLL(16)
  for (int i = 0; i < M; ++i) {
    TM_UNROLL(8)
    for (int j = 0; j < N; ++j) store_out(out + i * ldo + j * kWidth, acc[i][j]);
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

// out must have whole tiles of rows.
template <typename Out>
inline void chunk_outputs(const BFloat16Operands& b, const ChunkDecay& decay, int64_t n, bool state,
                          Out* out, int64_t ldo, const Ahead& ahead) {
  for (int64_t row = 0, rows; row < n; row += rows) {
    rows = rows_of_tile(n - row);
    const int64_t tokens = row + rows < n ? row + rows : n;
    Ahead::ask(ahead.scores, row, rows, n);
    with_tile<2>(rows, vectors_of(tokens),
                 [&]<int M, int N>() TM_LAMBDA { score_tile<M, N>(b, decay, row); });
  }
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
