// One chunk of a linear recurrence, for the forward and backward CPU kernels:
//
//   out_r = sum_{s <= r} pair(r, s) (x_r . y_s) z_s + from_start(r) x_r State
//   State = total State + sum_s to_end(s) y_s^T z_s
//
// x and y are rows of `features` numbers, z and out of `width`. There are three kinds of register
// tile, each in a separate function (see multiply_rows in cpu/tile.h).
#pragma once
#include <cstring>

#include "cpu/tile.h"
#include "cpu/workspace.h"
#include "linear/linear_attention/cpu_decay.h"

namespace tokenmill::TOKENMILL_ISA {

constexpr int kShortRows = 4;  // rows of a register tile where kTileRows would compute idle rows
// Tokens per chunk. Smaller chunks mean less work within the chunk and more state updates.
constexpr int64_t kChunk = 16;
constexpr int kTokenPanel = kPanel < kChunk ? kPanel : kChunk;
constexpr int64_t kPaddedRows = round_up(kMaxChunk + kTileRows, kWidth);  // rows of x: whole tiles

// Rows of the next register tile when `left` rows remain.
constexpr int64_t rows_of_tile(int64_t left) {
  const bool fits = left <= kShortRows || (left > kTileRows && left <= 2 * kShortRows);
  return fits ? kShortRows : kTileRows;
}
// Rows computed by the tiles of n rows.
constexpr int64_t rows_of_tiles(int64_t n) {
  int64_t rows = 0;
  while (rows < n) rows += rows_of_tile(n - rows);
  return rows;
}

struct ChunkOperands {
  int64_t features, width;
  int64_t score_features;  // the scores use this many features, from first_score on
  int64_t first_score;
  bool taylor;         // the weight of a pair is 1 + u + u^2/2
  bool transposed;     // layout of x
  int64_t state_rows;  // features, zero-padded to whole tiles
  int64_t ldx;
  float* x;  // [kPaddedRows][ldx], or transposed [features][ldx]; zero past the tokens
  float* y;  // [kChunk / kTokenPanel][state_rows][kTokenPanel]: transposed, zero past the tokens
  float* z;  // [panels of width][kChunk][kPanel]
  float* state;    // [panels of width][state_rows][kPanel]
  float* weights;  // [kPaddedRows][kChunk]

  ChunkOperands(int64_t features, int64_t width, bool transposed)
      : features(features),
        width(width),
        score_features(features),
        first_score(0),
        taylor(false),
        transposed(transposed),
        state_rows(round_up(features, kTileRows)),
        ldx(transposed ? kPaddedRows : round_up(features, kWidth)) {}

  int64_t width_panels() const { return ceil_div(width, kPanel); }
  int64_t x_size() const { return (transposed ? features : kPaddedRows) * ldx; }
  int64_t y_size() const { return state_rows * kChunk; }
  int64_t z_size() const { return width_panels() * kChunk * kPanel; }
  int64_t state_size() const { return width_panels() * state_rows * kPanel; }
  int64_t size() const {
    return x_size() + y_size() + z_size() + state_size() + kPaddedRows * kChunk + 5 * 16;
  }
  void place(cpu::Workspace& workspace) {
    x = zeros(workspace, x_size());
    y = zeros(workspace, y_size());
    z = zeros(workspace, z_size());
    state = zeros(workspace, state_size());
    weights = zeros(workspace, kPaddedRows * kChunk);
  }
  static float* zeros(cpu::Workspace& workspace, int64_t floats) {
    float* p = workspace.take(floats);
    std::memset(p, 0, floats * sizeof(float));
    return p;
  }

  float* y_panel(int64_t token) const { return y + token * state_rows; }
  float* z_panel(int64_t column) const { return z + column * kChunk; }
  float* state_panel(int64_t column) const { return state + column * state_rows; }
};

// Rows of tensors to prefetch during a chunk, before the next chunk packs or stores them: the rows
// of a head are far apart, which hardware prefetchers do not follow. Reads go to L2.
struct Ahead {
  struct Rows {
    const char* data = nullptr;
    int64_t step = 0, n = 0, bytes = 0;  // step and bytes per row
  };
  Rows scores, outputs, state, written;  // prefetched during the product of the same name

  // Prefetches the share [part, part + count) of `parts`.
  template <bool kWrite = false>
  static TM_INLINE void ask(const Rows& r, int64_t part, int64_t count, int64_t parts) {
    const int64_t end = (part + count < parts ? part + count : parts) * r.n / parts;
    for (int64_t i = part * r.n / parts; i < end; ++i)
      for (int64_t b = 0; b < r.bytes; b += 64)
        __builtin_prefetch(r.data + i * r.step + b, kWrite, kWrite ? 3 : 1);
  }
};

// Decayed score: 0 for a later token, even if its key is not finite.
TM_INLINE vf pair_weight(vf score, vf pair) {
  return select(equal(pair, zero()), zero(), score * pair);
}

template <bool kTransposedX, int M, int N>
__attribute__((noinline)) void score_tile(const ChunkOperands& o, const ChunkDecay& decay,
                                          int64_t row, int64_t column) {
  vf s[M][N];
  clear(s);
  const float* x = kTransposedX ? o.x + o.first_score * o.ldx + row : o.x + row * o.ldx;
  const float* y = o.y_panel(column) + o.first_score * kTokenPanel;
  multiply<Float32, kTransposedX>(s, x, o.ldx, y, kTokenPanel, o.score_features);
  if (kTransposedX && o.taylor) {
    TM_UNROLL(16)
    for (int i = 0; i < M; ++i) {
      TM_UNROLL(8)
      for (int j = 0; j < N; ++j)
        s[i][j] = fma(fma(s[i][j], set(0.5f), set(1.f)), s[i][j], set(1.f));
    }
  }
  const float* pair = decay.pair + row * decay.pair_step + column;
  float* to = o.weights + row * kChunk + column;
  TM_UNROLL(16)
  for (int i = 0; i < M; ++i) {
    TM_UNROLL(8)
    for (int j = 0; j < N; ++j)
      store(to + i * kChunk + j * kWidth,
            pair_weight(s[i][j], load(pair + i * decay.pair_step + j * kWidth)));
  }
}

// Register tile at `row` and `column`: contribution of the state plus `words` words of pairs. Later
// tokens have weight 0 and are masked even if z is not finite.
template <class Op, bool kTransposedX, int M, int N>
TM_INLINE void add_up(vf (&acc)[M][N], const ChunkOperands& o, const ChunkDecay& decay, int64_t row,
                      int64_t column, bool state, const float* weights, int64_t ldw, const float* z,
                      int64_t words) {
  const auto from_state = [&](vf(&sums)[M][N]) TM_LAMBDA {
    clear(sums);
    if (!state) return;
    const float* x = kTransposedX ? o.x + row : o.x + row * o.ldx;
    multiply<Float32, kTransposedX>(sums, x, o.ldx, o.state_panel(column), kPanel, o.features);
    TM_UNROLL(16)
    for (int i = 0; i < M; ++i) {
      const vf factor = set(decay.from_start[row + i]);
      TM_UNROLL(8)
      for (int j = 0; j < N; ++j) sums[i][j] = sums[i][j] * factor;
    }
  };
  from_state(acc);
  multiply<Op, false>(acc, weights, ldw, z, kPanel, words);
  if (!finite(acc)) [[unlikely]] {
    vf shown[M][N];  // a separate accumulator, so that acc stays in registers
    from_state(shown);
    for (int i = 0; i < M; ++i)
      for (int64_t k = 0; k < words && k * Op::kPair <= row + i; ++k)
        for (int j = 0; j < N; ++j) {
          const vf b = Op::first(row + i + 1 - k * Op::kPair, load(z + k * kPanel + j * kWidth));
          shown[i][j] = Op::madd(shown[i][j], set(weights[i * ldw + k]), b);
        }
    std::memcpy(acc, shown, sizeof acc);
  }
}

// The first `tokens` tokens of the chunk have weights in these rows; without a state, x is not
// read.
template <bool kTransposedX, int M, int N>
__attribute__((noinline)) void out_tile(const ChunkOperands& o, const ChunkDecay& decay,
                                        int64_t row, int64_t column, int64_t tokens, bool state,
                                        float* out, int64_t ldo) {
  vf acc[M][N];
  add_up<Float32, kTransposedX>(acc, o, decay, row, column, state, o.weights + row * kChunk, kChunk,
                                o.z_panel(column), tokens);
  TM_UNROLL(16)
  for (int i = 0; i < M; ++i) {
    TM_UNROLL(8)
    for (int j = 0; j < N; ++j) store(out + i * ldo + j * kWidth, acc[i][j]);
  }
}

// y already includes to_end. The chunk is summed from zero, as a second level of accumulation.
template <int M, int N>
__attribute__((noinline)) void state_tile(const ChunkOperands& o, float total, int64_t row,
                                          int64_t column, int64_t n) {
  vf acc[M][N];
  clear(acc);
  for (int64_t t = 0; t < n; t += kTokenPanel)
    multiply<Float32, false>(acc, o.y_panel(t) + row * kTokenPanel, kTokenPanel,
                             o.z_panel(column) + t * kPanel, kPanel,
                             n - t < kTokenPanel ? n - t : kTokenPanel);
  float* state = o.state_panel(column) + row * kPanel;
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

// Calls fn.template operator()<M, N>() for a tile of `rows` (kTileRows or kShortRows) and
// `vectors`.
template <int N = kTileVectors, typename Fn>
TM_INLINE void with_tile(int64_t rows, int64_t vectors, const Fn& fn) {
  if (vectors == N)
    return rows == kTileRows ? fn.template operator()<kTileRows, N>()
                             : fn.template operator()<kShortRows, N>();
  if constexpr (N > 1) with_tile<N - 1>(rows, vectors, fn);
}

TM_INLINE int64_t vectors_of(int64_t columns) {
  return columns >= kPanel ? kTileVectors : ceil_div(columns, kWidth);
}

inline void scale_keys(const ChunkOperands& o, const ChunkDecay& decay, int64_t n) {
  for (int64_t t = 0; t < n; t += kTokenPanel) {
    float* y = o.y_panel(t);
    for (int64_t f = 0; f < o.features; ++f) {
      TM_UNROLL(8)
      for (int64_t c = 0; c < kTokenPanel; c += kWidth)
        store(y + f * kTokenPanel + c, load(y + f * kTokenPanel + c) * load(decay.to_end + t + c));
    }
  }
}

// Computes the weights of pairs.
template <bool kTransposedX>
inline void chunk_scores(const ChunkOperands& o, const ChunkDecay& decay, int64_t n,
                         const Ahead& ahead) {
  for (int64_t row = 0, rows; row < n; row += rows) {
    rows = rows_of_tile(n - row);
    const int64_t tokens = row + rows < n ? row + rows : n;
    Ahead::ask(ahead.scores, row, rows, n);
    for (int64_t column = 0; column < tokens; column += kTokenPanel)
      with_tile(rows, vectors_of(tokens - column), [&]<int M, int N>() TM_LAMBDA {
        score_tile<kTransposedX, M, N>(o, decay, row, column);
      });
  }
}

// Sums the contributions of pairs, whose weights must have been computed, and of the state, or only
// one of them. If the last tile has rows past n, all its rows are written to `spare`, and the valid
// ones are copied to `out`. The width, and rows of out, are rounded up to vectors; spare has
// kTileRows rows.
template <bool kTransposedX>
inline void chunk_products(const ChunkOperands& o, const ChunkDecay& decay, int64_t n, bool pairs,
                           bool state, float* out, int64_t ldo, float* spare, const Ahead& ahead) {
  const int64_t ld_spare = round_up(o.width, kWidth);
  for (int64_t column = 0; column < o.width; column += kPanel)
    for (int64_t row = 0, rows; row < n; row += rows) {
      rows = rows_of_tile(n - row);
      const bool whole = row + rows <= n;
      const int64_t seen = whole ? row + rows : n, tokens = pairs ? seen : 0;
      const int64_t vectors = vectors_of(o.width - column);
      float* to = whole ? out + row * ldo + column : spare + column;
      const int64_t ld = whole ? ldo : ld_spare;
      if (column == 0) Ahead::ask(ahead.outputs, row, rows, n);
      with_tile(rows, vectors, [&]<int M, int N>() TM_LAMBDA {
        out_tile<kTransposedX, M, N>(o, decay, row, column, tokens, state, to, ld);
      });
      if (!whole)
        for (int64_t i = 0; i < n - row; ++i)
          for (int64_t c = 0; c < vectors * kWidth; c += kWidth)
            store(out + (row + i) * ldo + column + c, load(to + i * ld + c));
    }
}

template <bool kTransposedX>
inline void chunk_outputs(const ChunkOperands& o, const ChunkDecay& decay, int64_t n, bool state,
                          float* out, int64_t ldo, float* spare, const Ahead& ahead) {
  chunk_scores<kTransposedX>(o, decay, n, ahead);
  chunk_products<kTransposedX>(o, decay, n, true, state, out, ldo, spare, ahead);
}

// Overwrites y.
inline void chunk_state(const ChunkOperands& o, const ChunkDecay& decay, int64_t n,
                        const Ahead& ahead) {
  if (!decay.none()) scale_keys(o, decay, n);
  for (int64_t column = 0; column < o.width; column += kPanel)
    for (int64_t row = 0, rows; row < o.features; row += rows) {
      rows = rows_of_tile(o.features - row);
      if (column == 0) {
        Ahead::ask(ahead.state, row, rows, o.features);
        Ahead::ask<true>(ahead.written, row, rows, o.features);
      }
      with_tile(rows, vectors_of(o.width - column), [&]<int M, int N>() TM_LAMBDA {
        state_tile<M, N>(o, decay.total, row, column, n);
      });
    }
}

}  // namespace tokenmill::TOKENMILL_ISA
