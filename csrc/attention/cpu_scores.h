// score_mod: from q.k to the exponent of the score map, for the forward and backward CPU kernels.
//
// Exponents are in base 2: t = z log2(e) for softmax, P = 2^(t - row_max) / sum; t = -z log2(e) for
// sigmoid, P = 1 / (1 + 2^t). Nothing cancels, so small weights keep their relative accuracy. Other
// kinds, and a normalised sigmoid, take the logit: t = z.
#pragma once
#include <cmath>
#include <limits>

#include "attention/band.h"
#include "attention/cpu_epilogue.h"
#include "attention/params.h"
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace tokenmill::TOKENMILL_ISA {

constexpr float kMax = std::numeric_limits<float>::max();

// Upper clamp on e^-z, so that P (1 - P) is 0 and not 0 * inf.
constexpr float kMaxOdds = 1e37f;

enum class Exponent { softmax, sigmoid, logit };

inline Exponent exponent_of(const AttentionParams& p) {
  if (p.map == ScoreMap::softmax) return Exponent::softmax;
  const bool plain = p.map == ScoreMap::sigmoid && p.normalize == Normalize::none;
  return plain ? Exponent::sigmoid : Exponent::logit;
}
// hidden_exponent: exponent of a masked pair; exponent_unit: factor from logit to exponent.
constexpr float hidden_exponent(Exponent t) { return t == Exponent::sigmoid ? kInf : -kInf; }
constexpr float exponent_unit(Exponent t) {
  return t == Exponent::softmax ? kLog2e : t == Exponent::sigmoid ? -kLog2e : 1;
}

struct Sequence {
  int64_t q_start, k_start, q_length, k_length;

  Sequence(const AttentionParams& p, int64_t b)
      : q_start(p.cu_seqlens_q ? p.cu_seqlens_q[b] : 0),
        k_start(p.cu_seqlens_k ? p.cu_seqlens_k[b] : 0),
        q_length(p.cu_seqlens_q ? p.cu_seqlens_q[b + 1] - q_start : p.seqlen_q),
        k_length(p.cu_seqlens_k ? p.cu_seqlens_k[b + 1] - k_start : p.seqlen_k) {}
};

TM_INLINE int64_t size_of(DType t) { return t == DType::float32 ? 4 : 2; }

// Row `seq`, relative to the sequence, in head h of batch entry b.
TM_INLINE char* row_of(const Rows& r, DType t, int64_t b, int64_t start, int64_t seq, int64_t h) {
  return static_cast<char*>(r.data) +
         (b * r.batch + (start + seq) * r.seq + h * r.head) * size_of(t);
}

TM_INLINE float* lse_of(const AttentionParams& p, const float* lse, int64_t b, int64_t start,
                        int64_t h) {
  const int64_t at = p.cu_seqlens_q ? h * p.seqlen_q + start : (b * p.heads + h) * p.seqlen_q;
  return const_cast<float*>(lse) + at;
}

// 2^t, kCoarse: with the accuracy of 16-bit results, else of float32.
template <bool kCoarse>
TM_INLINE vf power(vf t) {
  return exp2<kCoarse ? 3 : 5>(t);
}
template <bool kCoarse>
TM_INLINE vf reciprocal(vf x) {
  return kCoarse ? reciprocal_approx(x) : set(1.f) / x;
}

// w x, or 0 where w is 0: x may be NaN there.
TM_INLINE vf weighted(vf w, vf x) { return select(equal(w, zero()), zero(), w * x); }

// score_mod of one head of one sequence: everything between scale q.k and the score map.
struct ScoreMod {
  ScoreMod(const AttentionParams& p, int64_t b, int64_t h, const Sequence& s)
      : map(p.map),
        kind(exponent_of(p)),
        scale(p.scale),
        softcap(p.softcap),
        slope(p.alibi_slopes ? p.alibi_slopes[b * p.alibi_batch + h] : 0),
        grid(p.grid),
        constant(p.score_bias_value),
        diagonal(s.k_length - s.q_length),
        rows(s.q_length),
        columns(s.k_length),
        bias(p.bias ? static_cast<const char*>(p.bias) +
                          (b * p.bias_batch + h * p.bias_head) * size_of(p.bias_dtype)
                    : nullptr),
        bias_dtype(p.bias_dtype),
        bias_q(p.bias_q),
        bias_k(p.bias_k) {
    if (p.score_bias) constant += p.score_bias[b * p.score_bias_batch + h];
    if (p.score_bias_neg_log_n && columns > 0)
      constant -= static_cast<float>(std::log(static_cast<double>(columns)));
    post_decay = p.post_decay;
    has_slope = p.alibi_slopes && !post_decay;
    plain = softcap == 0 && !bias && !p.alibi_slopes;
    factor = exponent_unit(kind) * scale;
    if (kind == Exponent::softmax) {
      // Softmax is invariant to a shift of its row: only lse and the sink depend on it.
      shift = std::isfinite(constant) ? constant : 0;
      constant -= shift;
      if (constant != 0 || std::isnan(constant)) plain = false;
    } else if (kind == Exponent::logit) {
      if (!(constant == 0)) plain = false;
    } else {
      // e^-constant as a factor of 2^t, as long as neither overflows nor underflows by itself.
      if (!(std::fabs(constant) < 20)) plain = false;
      odds = plain ? std::exp(-constant) : 1;
    }
  }

  // Moves the constant back into the exponent.
  void make_general() {
    plain = false;
    odds = 1;
  }

  // Exponents of kWidth keys from `column` on, for query `row`.
  TM_INLINE vf exponent(vf qk, int64_t row, int64_t column) const {
    vf b = zero(), distance = zero();
    if (bias) b = bias_lanes(row, column);
    if (has_slope) distance = key_distances(row, column);
    return exponent(qk, b, distance);
  }

  // Distances of query `row` to kWidth keys from `column` on.
  TM_INLINE vf key_distances(int64_t row, int64_t column) const {
    if (grid.width == 0) return abs_of(set(static_cast<float>(row + diagonal - column)) - iota());
    return cell_distance(set(static_cast<float>(row)), set(static_cast<float>(column)) + iota());
  }
  // Distances of kWidth queries from `row` on to key `column`.
  TM_INLINE vf query_distances(int64_t row, int64_t column) const {
    if (grid.width == 0) return abs_of(iota() + set(static_cast<float>(row + diagonal - column)));
    return cell_distance(set(static_cast<float>(row)) + iota(), set(static_cast<float>(column)));
  }
  TM_INLINE vf cell_distance(vf i, vf j) const {
    const vf width = set(static_cast<float>(grid.width));
    const vf yi = row_of_cell(i, width), yj = row_of_cell(j, width);
    const vf dy = abs_of(yi - yj), dx = abs_of((i - yi * width) - (j - yj * width));
    return grid.manhattan ? dy + dx : max_of(dy, dx);
  }
  // i / width, rounded down. Adding 1.5 * 2^23 rounds to an integer.
  static TM_INLINE vf row_of_cell(vf i, vf width) {
    const vf shift = set(12582912.f), half = set(0.5f);
    return ((i + half) / width - half + shift) - shift;
  }

  TM_INLINE vf exponent(vf qk, vf b, vf distance) const {
    vf z = cap(qk * set(scale));
    // +inf counts as the largest finite logit; min_of keeps a NaN in its second operand.
    if (bias) z = min_of(set(kMax), z + b);
    if (has_slope) z = fma(set(-slope), distance, z);
    z = z + set(constant);
    vf t = z * set(exponent_unit(kind));
    // A finite logit has a finite exponent (-FLT_MAX log2(e) would not); -inf hides the pair.
    if (bias && kind == Exponent::softmax)
      t = select(less(z, set(-kMax)), t, max_of(set(-kMax), min_of(set(kMax), t)));
    if (has_slope && grid.window >= 0)
      t = select(less(set(static_cast<float>(grid.window)), distance), set(hidden_exponent(kind)),
                 t);
    return t;
  }

  // ALiBi decay of a weight at this distance.
  template <bool kCoarse>
  TM_INLINE vf fade(vf distance) const {
    const vf f = power<kCoarse>(distance * set(-slope * kLog2e));
    if (grid.window < 0) return f;
    return select(less(set(static_cast<float>(grid.window)), distance), zero(), f);
  }

  TM_INLINE vf cap(vf z) const {
    return softcap > 0 ? set(softcap) * tanh(z * set(1 / softcap)) : z;
  }
  // d cap(z) / dz at z = scale q.k.
  TM_INLINE vf cap_slope(vf qk) const {
    const vf th = tanh(qk * set(scale / softcap));
    return fma(th * set(-1.f), th, set(1.f));
  }

  TM_INLINE vf bias_lanes(int64_t row, int64_t column) const {
    const int64_t at = (row < rows ? row : rows - 1) * bias_q;
    if (bias_k == 0) return set(scalar_as_float(bias, bias_dtype, at));
    if (column >= columns) return zero();
    return load_as_float_n(bias, bias_dtype, at + column, columns - column);
  }

  // Number of keys in [begin, end) that neither a bias of -inf nor the grid window hides from query
  // `row`. shown(key): lane mask of the kWidth keys to count.
  float visible(int64_t row, int64_t begin, int64_t end) const {
    if (!bias && grid.window < 0) return begin < end ? static_cast<float>(end - begin) : 0;
    return visible(row, begin, end, [](int64_t) TM_LAMBDA { return lanes(0, kWidth); });
  }
  template <typename Shown>
  float visible(int64_t row, int64_t begin, int64_t end, const Shown& shown) const {
    const vf window = set(static_cast<float>(grid.window));
    vf count = zero();
    for (int64_t j = begin; j < end; j += kWidth) {
      vf one = select(lanes(0, end - j), select(shown(j), set(1.f), zero()), zero());
      if (bias) one = select(less(bias_lanes(row, j), set(-kMax)), zero(), one);
      if (grid.window >= 0) one = select(less(window, key_distances(row, j)), zero(), one);
      count = count + one;
    }
    return sum_lanes(count);
  }

  ScoreMap map;
  Exponent kind;
  float scale, softcap, slope;
  Grid grid;
  float constant;
  int64_t diagonal, rows, columns;
  const void* bias;
  DType bias_dtype;
  int64_t bias_q, bias_k;
  bool has_slope, post_decay;  // slopes act on logits (has_slope) or on weights (post_decay)
  bool plain;                  // t = factor q.k, and odds or shift hold the constant
  float factor, shift = 0, odds = 1;
};

}  // namespace tokenmill::TOKENMILL_ISA
