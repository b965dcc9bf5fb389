// S = Q K^T and its weights in the forward: a register tile, or 16 rows in tiles.
#pragma once
#include "attention/cpu_weights.h"
#include "dense/attention/cpu_mask_forward.h"

namespace tokenmill::TOKENMILL_ISA {

struct ScoresAhead;

struct QueryTile : QueryRows {
  Band band;
  int64_t first;        // queries first .. first + rows - 1
  const PairTest* cut;  // mask of the next register tile; null if it hides no pairs
  ScoresAhead* ahead;   // in tiles only

  // Vectors of the panel at `column` that one of `count` rows sees, in whole units of `pair`.
  Vectors seen(int64_t row, int64_t count, int64_t column, int64_t pair) const {
    const int64_t unit = kWidth * pair;
    const int64_t from = band.begin(first + row) - column;
    const int64_t to = band.end(first + row + count - 1) - column;
    const int64_t begin = from > 0 ? from / unit : 0;
    const int64_t end = to < kPanel ? ceil_div(to > 0 ? to : 0, unit) : kPanel / unit;
    return {begin * pair, (end - begin) * pair};
  }
};

// Masks of ranges and spans: hides pairs of a register tile.
__attribute__((noinline)) inline void hide_pairs(const PairTest& cut, float hidden, vf* s, int rows,
                                                 int vectors, int64_t i, int64_t column) {
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < vectors; ++j, ++s)
      *s = select(cut.seen(i + r, column + j * kWidth), *s, set(hidden));
}

// Weights of S = Q K^T for kRows queries and kVectors vectors of keys from `column` on, stored at
// `slot` of the step.
template <class Op, Exponent kKind, bool kCoarse, bool kPlain, int kRows, int kVectors>
TM_INLINE void weigh(const QueryTile& t, int64_t row, vf (&s)[kRows][kVectors], int64_t column,
                     int64_t slot) {
  const int64_t i = t.first + row;
  if constexpr (!kPlain) {
    via_stack(s, [&](vf* tile) TM_LAMBDA {
      apply_score_mod(*t.score_mod, tile, kRows, kVectors, i, column);
    });
  } else if constexpr (Op::kPair != 1) {  // otherwise q already holds the factor
    const vf factor = set(t.score_mod->factor);
    TM_UNROLL(8)
    for (int r = 0; r < kRows; ++r) {
      TM_UNROLL(4)
      for (int j = 0; j < kVectors; ++j) s[r][j] = s[r][j] * factor;
    }
  }
  // band mask
  if (column < t.band.begin(i + kRows - 1) || column + kVectors * kWidth > t.band.end(i))
      [[unlikely]] {
    TM_UNROLL(8)
    for (int r = 0; r < kRows; ++r) {
      const int64_t begin = t.band.begin(i + r) - column, end = t.band.end(i + r) - column;
      TM_UNROLL(4)
      for (int j = 0; j < kVectors; ++j)
        s[r][j] = select(lanes(begin - j * kWidth, end - j * kWidth), s[r][j],
                         set(hidden_exponent(kKind)));
    }
  }
  if (t.cut) [[unlikely]] {
    via_stack(s, [&](vf* tile) TM_LAMBDA {
      hide_pairs(*t.cut, hidden_exponent(kKind), tile, kRows, kVectors, i, column);
    });
  }

  if constexpr (!kPlain && kKind == Exponent::softmax) {
    if (t.score_mod->post_decay) {
      vf post_decay[kRows * kVectors];
      post_decay_of<kCoarse>(*t.score_mod, post_decay, kRows, kVectors, i, column);
      const auto fade = [&](int r, int j) TM_LAMBDA { return post_decay[r * kVectors + j]; };
      return store_weights<Op, kKind, kCoarse>(t, row, s, slot, fade);
    }
  }
  store_weights<Op, kKind, kCoarse>(t, row, s, slot);
}

#if defined(__AMX_BF16__)
// Scores of two register tiles: the product of the next rows runs while these rows are weighed.
struct ScoresAhead {
  alignas(64) float scores[2][kTile][kPanel];
  int now = 0;  // which of the two
  // Operands of the product that the other one holds, or null.
  const float *q = nullptr, *panel = nullptr;
  int vectors = 0;
};

// S = Q K^T of 16 rows in tiles, and its weights.
template <class Op, Exponent kKind, bool kCoarse, bool kPlain, int kVectors>
__attribute__((noinline)) void score_rows_in_tiles(const QueryTile& t, int64_t row,
                                                   const float* panel, int64_t column,
                                                   int64_t slot) {
  ScoresAhead& ahead = *t.ahead;
  const float* q = t.q + row * t.ldq;
  if (ahead.q == q && ahead.panel == panel && ahead.vectors == kVectors) {
    ahead.now ^= 1;
  } else {
    clear_tiles<1, kVectors>();
    add_to_tiles<1, kVectors>(q, t.ldq, panel, kPanel, 0, t.words);
    store_tiles<1, kVectors>(ahead.scores[ahead.now][0], kPanel);
  }
  const bool more = row + kTile < t.rows;
  ahead.q = more ? q + kTile * t.ldq : nullptr;
  ahead.panel = panel;
  ahead.vectors = kVectors;
  if (more) clear_tiles<1, kVectors>();
  // The sums are stored before the last rows are weighed, so that the next call does not wait.
  constexpr int kParts = kTile / kShortRows;
  const int64_t steps = t.words / kTile;
  TM_UNROLL(1)
  for (int64_t part = 0, word = 0; part < kParts; ++part) {
    if (more && part + 1 < kParts) {
      const int64_t until = ceil_div(steps * (part + 1), kParts - 1) * kTile;
      add_to_tiles<1, kVectors>(ahead.q, t.ldq, panel, kPanel, word, until);
      word = until;
    } else if (more) {
      store_tiles<1, kVectors>(ahead.scores[ahead.now ^ 1][0], kPanel);
    }
    const int64_t first = part * kShortRows;
    vf s[kShortRows][kVectors];
    TM_UNROLL(8)
    for (int r = 0; r < kShortRows; ++r) {
      TM_UNROLL(4)
      for (int j = 0; j < kVectors; ++j)
        s[r][j] = load(ahead.scores[ahead.now][first + r] + j * kWidth);
    }
    weigh<Op, kKind, kCoarse, kPlain>(t, row + first, s, column, slot);
  }
}
#endif

// S = Q K^T and its weights. panel: the first of the keys in its packed panel.
template <class Op, Exponent kKind, bool kCoarse, bool kPlain, int kRows, int kVectors>
__attribute__((noinline)) void score_tile(const QueryTile& t, int64_t row, const float* panel,
                                          int64_t column, int64_t slot) {
  vf s[kRows][kVectors];
  clear(s);
  multiply<Op, false>(s, t.q + row * t.ldq, t.ldq, panel, kPanel, t.words);
  weigh<Op, kKind, kCoarse, kPlain>(t, row, s, column, slot);
}

using ScoreTile = void (*)(const QueryTile&, int64_t, const float*, int64_t, int64_t);

// Instance of score_tile for 1 .. kTileVectors vectors.
template <class Op, Exponent kKind, bool kCoarse, bool kPlain, int kRows,
          int kVectors = kTileVectors>
ScoreTile score_tile_for(int64_t vectors) {
  if constexpr (kVectors > Op::kPair)
    if (vectors < kVectors)
      return score_tile_for<Op, kKind, kCoarse, kPlain, kRows, kVectors - Op::kPair>(vectors);
#if defined(__AMX_BF16__)
  if constexpr (kInTiles<Op>)
    return &score_rows_in_tiles<Op, kKind, kCoarse, kPlain, kVectors>;
  else
#endif
    return &score_tile<Op, kKind, kCoarse, kPlain, kRows, kVectors>;
}

}  // namespace tokenmill::TOKENMILL_ISA
