// From exponents to weights, for forward CPU kernels: the state of a tile of query rows, and the
// score map applied in the registers of the first product.
#pragma once
#include <type_traits>

#include "attention/cpu_kinds.h"
#include "cpu/workspace.h"

namespace tokenmill::TOKENMILL_ISA {

constexpr int kShortRows = 4;  // rows of a register tile where kTileRows would include idle rows
// Padding: rows of P and of the accumulators start in different cache sets.
constexpr int64_t kRowPad = 16;
// log2 of the factor by which P may exceed 1 before row_max of a softmax row is updated.
constexpr float kHeadroom = 8;

// Prefetches one row of a tensor. Packing and storing wait for memory otherwise, above all where
// the rows of a head lie far apart ([B, S, H, D]). Reads go to L2: at such strides L1 has too few
// sets to hold them all.
template <bool kWrite>
TM_INLINE void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, kWrite, kWrite ? 3 : 1);
}

// Rows of the next register tile, with `left` rows to do.
template <class Op>
constexpr int64_t rows_of_tile(int64_t left) {
  if (kInTiles<Op>) return Op::kWords;
  const bool fits = left <= kShortRows || (left > kTileRows && left <= 2 * kShortRows);
  return fits ? kShortRows : kTileRows;
}

struct QueryRows {
  const ScoreMod* score_mod;
  int64_t rows;
  float* q;  // [max rows][ldq]
  int64_t words, ldq;
  float* p;  // weights of the current step, [max rows][ldp]
  int64_t ldp;
  float* out;  // accumulators, [max rows][ldo]
  int64_t ldo, width;
  bool adds_up;  // weights are added to sums, as for softmax
  // softmax, per row: exponents are relative to row_max, the first maximum, so that the only key of
  // a row has weight 1; it is updated when an exponent exceeds raise_above.
  float *row_max, *raise_above, *sums;
  // Other kinds: sums of the rounded weights that P V uses. A row is divided by them, so that its
  // only key gives exactly its value; equal to `sums` where weights stay float32.
  float* divisors;
  bool rounds;  // weights are rounded to 16 bits

  template <class Op>
  void set_sizes(const AttentionParams& p, int64_t step) {
    words = words_of<Op>(p.head_dim);
    width = round_up(p.value_dim, kWidth);
    ldq = round_up(words, kWidth);
    ldo = width + kRowPad;
    ldp = step / Op::kPair + kRowPad;
    adds_up = p.normalize == Normalize::sum;
    rounds = Op::kPair != 1;
  }
  int64_t size(int64_t maximum) const {
    return maximum * (ldq + ldo + ldp + 2 * kWidth + 2) + 7 * 16;
  }
  void place(cpu::Workspace& workspace, int64_t maximum) {
    q = workspace.take(maximum * ldq);
    out = workspace.take(maximum * ldo);
    p = workspace.take(maximum * ldp);
    sums = workspace.take(maximum * kWidth);
    row_max = workspace.take(maximum);
    raise_above = workspace.take(maximum);
    divisors = rounds ? workspace.take(maximum * kWidth) : sums;
  }

  template <Exponent kKind>
  void clear(int64_t padded) {
    std::memset(out, 0, padded * ldo * sizeof(float));
    if (kKind != Exponent::sigmoid) std::memset(sums, 0, padded * kWidth * sizeof(float));
    if (kKind == Exponent::logit) std::memset(divisors, 0, padded * kWidth * sizeof(float));
    if (kKind == Exponent::softmax) {
      for (int64_t r = 0; r < padded; ++r) row_max[r] = 0, raise_above[r] = -kInf;
    }
  }
  float sum(int64_t r) const { return sum_lanes(load(sums + r * kWidth)); }
  float divisor(int64_t r) const { return sum_lanes(load(divisors + r * kWidth)); }
  RowScale epilogue(int64_t r, const float* sink, bool needs_lse) const {
    return softmax_epilogue(sum(r), row_max[r], raise_above[r] > -kInf, sink, score_mod->shift,
                            needs_lse);
  }
};

template <class Op>
TM_INLINE vf scale_words(vf x, float factor) {
  if constexpr (Op::kPair == 1) return x * set(factor);
#if defined(__AVX512BF16__)
  const __m512i bits = _mm512_castps_si512(x);
  const vf hi = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000)));
  const vf lo = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  return pair_bfloat(lo * set(factor), hi * set(factor));
#endif
}

// Raises row_max of a softmax row to `top` and rescales P, O and sums, which are 0 before the first
// maximum.
template <class Op>
__attribute__((noinline)) void update_row_max(const QueryRows& t, int64_t row, float top,
                                              int64_t words_done) {
  if (!(top > t.raise_above[row])) return;
  const float old = t.raise_above[row] == -kInf ? -kInf : t.row_max[row];
  t.row_max[row] = top;
  t.raise_above[row] = top + kHeadroom;
  if (old == -kInf) return;
  const float factor = std::exp2(old - top);
  float* p = t.p + row * t.ldp;
  for (int64_t w = 0; w < words_done; w += kWidth)
    store(p + w, scale_words<Op>(load(p + w), factor));
  float* out = t.out + row * t.ldo;
  for (int64_t d = 0; d < t.width; d += kWidth) store(out + d, load(out + d) * set(factor));
  float* sums = t.sums + row * kWidth;
  store(sums, load(sums) * set(factor));
}

// Passes a register tile [kRows][kVectors] through memory, so that long code has one copy, in a
// loop; indexing s itself would move it out of registers.
template <int kRows, int kVectors, class Each>
TM_INLINE void via_stack(vf (&s)[kRows][kVectors], const Each& each) {
  vf tile[kRows * kVectors];
  TM_UNROLL(8)
  for (int r = 0; r < kRows; ++r) {
    TM_UNROLL(4)
    for (int j = 0; j < kVectors; ++j) tile[r * kVectors + j] = s[r][j];
  }
  each(tile);
  TM_UNROLL(8)
  for (int r = 0; r < kRows; ++r) {
    TM_UNROLL(4)
    for (int j = 0; j < kVectors; ++j) s[r][j] = tile[r * kVectors + j];
  }
}

// s = exponents of queries i .. i + rows - 1 and the keys from `column` on.
__attribute__((noinline)) inline void apply_score_mod(const ScoreMod& mod, vf* s, int rows,
                                                      int vectors, int64_t i, int64_t column) {
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < vectors; ++j, ++s) *s = mod.exponent(*s, i + r, column + j * kWidth);
}

// ALiBi decay of the weights of these pairs.
template <bool kCoarse>
__attribute__((noinline)) void post_decay_of(const ScoreMod& mod, vf* fade, int rows, int vectors,
                                             int64_t i, int64_t column) {
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < vectors; ++j, ++fade)
      *fade = mod.fade<kCoarse>(mod.key_distances(i + r, column + j * kWidth));
}

struct Unfaded {};

// Turns exponents s of rows `row` and on into weights, stored at `slot` of the step. fade(r, j):
// decay applied to a softmax weight after the row sum.
template <class Op, Exponent kKind, bool kCoarse, int kRows, int kVectors, class Fade = Unfaded>
TM_INLINE void store_weights(const QueryRows& t, int64_t row, vf (&s)[kRows][kVectors],
                             int64_t slot, const Fade& fade = {}) {
  const int64_t ldp = t.ldp;
  float* p = t.p + row * ldp + slot / Op::kPair;
  if constexpr (kKind == Exponent::softmax) {
    vm over{};
    vf top[kRows];
    TM_UNROLL(8)
    for (int r = 0; r < kRows; ++r) {
      top[r] = s[r][0];
      TM_UNROLL(4)
      for (int j = 1; j < kVectors; ++j) top[r] = max_of(top[r], s[r][j]);
      over = either(over, less(set(t.raise_above[row + r]), top[r]));
    }
    if (any(over)) [[unlikely]]
      for (int r = 0; r < kRows; ++r)
        update_row_max<Op>(t, row + r, max_lanes(top[r]), slot / Op::kPair);
  }
  if constexpr (kKind == Exponent::logit)
    visit_map(t.score_mod->map, [&](auto map) TM_LAMBDA {
      TM_UNROLL(8)
      for (int r = 0; r < kRows; ++r) {
        TM_UNROLL(4)
        for (int j = 0; j < kVectors; ++j)
          s[r][j] = weight_of<decltype(map)::value, kCoarse>(s[r][j]).value;
      }
    });
  const vf odds = set(t.score_mod->odds), one = set(1.f);
  TM_UNROLL(8)
  for (int r = 0; r < kRows; ++r) {
    if constexpr (kKind == Exponent::softmax) {
      const vf row_max = set(t.row_max[row + r]);
      float* sums = t.sums + (row + r) * kWidth;
      vf sum = load(sums);
      TM_UNROLL(4)
      for (int j = 0; j < kVectors; ++j) {
        s[r][j] = power<kCoarse>(s[r][j] - row_max);
        sum = sum + s[r][j];
        if constexpr (!std::is_same_v<Fade, Unfaded>) s[r][j] = s[r][j] * fade(r, j);
      }
      store(sums, sum);
    } else if constexpr (kKind == Exponent::logit) {
      if (t.adds_up) {
        vf sum = load(t.sums + (row + r) * kWidth);
        TM_UNROLL(4)
        for (int j = 0; j < kVectors; ++j) sum = sum + s[r][j];
        store(t.sums + (row + r) * kWidth, sum);
#if defined(__AVX512BF16__)
        if constexpr (Op::kPair != 1) {
          sum = load(t.divisors + (row + r) * kWidth);
          TM_UNROLL(4)
          for (int j = 0; j < kVectors; ++j) {
            s[r][j] = round_bfloat(s[r][j]);
            sum = sum + s[r][j];
          }
          store(t.divisors + (row + r) * kWidth, sum);
        }
#endif
      }
    } else {
      TM_UNROLL(4)
      for (int j = 0; j < kVectors; ++j)
        s[r][j] = reciprocal<kCoarse>(fma(power<kCoarse>(s[r][j]), odds, one));
    }
    if constexpr (Op::kPair == 1) {
      TM_UNROLL(4)
      for (int j = 0; j < kVectors; ++j) store(p + r * ldp + j * kWidth, s[r][j]);
    } else {
#if defined(__AVX512BF16__)
      TM_UNROLL(2)
      for (int j = 0; j < kVectors; j += 2)
        store(p + r * ldp + j / 2 * kWidth, narrow_bfloat(s[r][j], s[r][j + 1]));
#endif
    }
  }
}

}  // namespace tokenmill::TOKENMILL_ISA
