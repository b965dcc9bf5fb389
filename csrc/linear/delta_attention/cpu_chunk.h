// The operands of a chunk of n tokens, for the forward and backward CPU kernels. With G_i the sum
// of log_decay up to token i of the chunk, and S the state before it,
//
//   M_ij = scale q_i . e^(G_i - G_j) k_j  (j <= i)     q_in_i = scale e^(G_i) q_i
//   N_ij =      -k_i . e^(G_i - G_j) k_j  (j < i)      k_in_i =      -e^(G_i) k_i
//                                                      k_end_j = e^(G_n - G_j) k_j
//
//   y_i = v_i + k_in_i S + sum_j N_ij u_j              u_i = beta_i y_i
//   out = q_in S + M U                                 S after = e^(G_n) S + k_end^T U
//
// All exponents are at most 0. Decays per channel multiply inside the products of M and N: a tile
// of rows meets earlier keys that have decayed up to the tile, and keys of its own one by one.
// Without beta there is no correction: u = v, and neither N nor k_in exists.
#pragma once
#include <cmath>

#include "linear/cpu_features.h"
#include "linear/cpu_matrix.h"
#include "linear/delta_attention/params.h"

namespace tokenmill::TOKENMILL_ISA {

// e^-128 is 0 in float32, and sums of this bound are finite.
constexpr float kMinLogDecay = -128;

class Chunk {
 public:
  explicit Chunk(const DeltaAttentionParams& p)
      : p(p), corrects(p.beta.data), dim(p.head_dim), ld(round_up(dim, kWidth)) {}

  int64_t floats() const {
    return 5 * kRows * ld + ld * kBlock + 2 * ld + 3 * kRows * kBlock + 16 * 16;
  }
  void place(cpu::Workspace& workspace) {
    for (Matrix* m : {&q, &k, &q_in, &k_in, &decays}) *m = {workspace.take(kRows * ld), ld};
    k_end = {workspace.take(ld * kBlock), kBlock};
    total = workspace.take(ld);
    log_total = workspace.take(ld);
    for (Matrix* m : {&of_queries, &of_keys, &pair}) *m = {workspace.take(kRows * kBlock), kBlock};
    // Rows past the tokens of the last chunk are read, and must be finite.
    for (const Matrix& m : {q_in, k_in, decays}) std::memset(m.data, 0, kRows * ld * sizeof(float));
    for (const Matrix& m : {of_queries, of_keys, pair})
      std::memset(m.data, 0, kRows * kBlock * sizeof(float));
    if (!p.log_decay.data) decays_of_head(nullptr, 0, kBlock);
  }

  // Prefetches the tokens of a later load_tokens.
  void ask_for_tokens(int64_t b, int64_t first, int64_t h, int64_t n) const {
    const int64_t key_head = h / (p.heads / p.key_heads);
    ask_for(p.q, p.dtype, b, first, key_head, n, dim);
    ask_for(p.k, p.dtype, b, first, key_head, n, dim);
    if (p.per_channel) ask_for(gate(p.log_decay, b, first, h), p.log_decay.seq * 4, n, dim * 4);
  }

  // Loads n tokens from `first` of value head h.
  void load_tokens(int64_t b, int64_t first, int64_t h, int64_t n) {
    const int64_t key_head = h / (p.heads / p.key_heads);
    load_rows(q, q_norm, p.q, b, first, key_head, n);
    load_rows(k, k_norm, p.k, b, first, key_head, n);
    for (int64_t t = 0; corrects && t < n; ++t) beta[t] = *gate(p.beta, b, first + t, h);
    if (p.per_channel)
      return corrects ? channels<true>(b, first, h, n) : channels<false>(b, first, h, n);
    if (p.log_decay.data) decays_of_head(gate(p.log_decay, b, first, h), p.log_decay.seq, n);
    heads(n);
  }

  static float* gate(const TokenGates& g, int64_t b, int64_t token, int64_t h) {
    return g.data + b * g.batch + token * g.seq + h * g.head;
  }

  // y [n] holds v and becomes Y; returns U, in `u` if it differs from y.
  Matrix solve(const Matrix& y, const Matrix& u, const Matrix& state, int64_t n) const {
    if (!corrects) return y;
    product<false, false>(y, n, k_in, state, dim, y.ld);
    each_tile(n, [&]<int M>(int64_t row) TM_LAMBDA {
      multiply_rows<Float32, false, M, false>(y.row(row), y.ld, of_keys.row(row), kBlock, u.data,
                                              u.ld, row, y.ld);
      for (int64_t i = row; i < std::min(row + M, n); ++i)
        for (int64_t c = 0; c < y.ld; c += kWidth) {
          vf sum = load(y.row(i) + c);
          for (int64_t j = row; j < i; ++j)
            sum = fma(set(of_keys.row(i)[j]), load(u.row(j) + c), sum);
          store(y.row(i) + c, sum);
          store(u.row(i) + c, sum * set(beta[i]));
        }
    });
    return u;
  }

  // state = e^(G_n) from + k_end^T u
  void carry(const Matrix& state, const Matrix& from, const Matrix& u, int64_t n) const {
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t c = 0; c < state.ld; c += kWidth)
        store(state.row(d) + c, load(from.row(d) + c) * set(total[d]));
    product<false, false>(state, dim, k_end, u, n, state.ld);
  }

  const DeltaAttentionParams& p;
  const bool corrects;
  const int64_t dim, ld;
  Matrix q, k;                 // [n][ld]
  Matrix q_in, k_in;           // [n][ld]
  Matrix k_end;                // [D][kBlock]
  Matrix of_queries, of_keys;  // M and N, [n][kBlock]
  Matrix decays;               // per channel: of each token, [n][ld]
  Matrix pair;                 // per head: e^(G_i - G_j), 0 for j > i, [n][kBlock]
  float* total;                // [ld] e^(G_n)
  float* log_total;            // [ld] per channel: G_n
  float beta[kBlock], q_norm[kBlock], k_norm[kBlock];
  float from_start[kBlock + kWidth], to_end[kBlock + kWidth];  // per head: e^(G_i), e^(G_n - G_i)

 private:
  void load_rows(const Matrix& to, float* norm, const Rows& rows, int64_t b, int64_t first,
                 int64_t head, int64_t n) const {
    pack_rows<Float32>(row_of(rows, p.dtype, b, first, head), p.dtype, rows.seq, n,
                       std::min(n + kTileRows, kRows), dim, 1.f, to.data, ld);
    if (!p.l2norm) return;
    for (int64_t t = 0; t < n; ++t) {
      vf squares = zero();
      for (int64_t d = 0; d < ld; d += kWidth) {
        const vf x = load(to.row(t) + d);
        squares = fma(x, x, squares);
      }
      norm[t] = 1 / std::sqrt(sum_lanes(squares) + kL2NormEpsilon);
    }
    scale_rows(to, to, norm, n, ld);
  }

  // Factors of decays per head, `step` floats apart; null: none.
  void decays_of_head(const float* log_decay, int64_t step, int64_t n) {
    constexpr double kLog2eDouble = 1.4426950408889634;
    double prefix[kBlock], sum = 0;
    for (int64_t t = 0; t < n; ++t) {
      const float x = log_decay ? log_decay[t * step] : 0;
      prefix[t] = sum += kLog2eDouble * (x < kMinLogDecay ? kMinLogDecay : x);
    }
    // Differences as two floats each: a single float32 prefix sum is too coarse.
    float high[kBlock + kWidth] = {}, low[kBlock + kWidth] = {}, end[kBlock + kWidth] = {};
    for (int64_t t = 0; t < n; ++t) {
      high[t] = static_cast<float>(prefix[t]);
      low[t] = static_cast<float>(prefix[t] - static_cast<double>(high[t]));
      end[t] = static_cast<float>(sum - prefix[t]);
    }
    for (int64_t t = 0; t < n; t += kWidth) {
      store(from_start + t, exp2<5>(load(high + t)));
      store(to_end + t, exp2<5>(load(end + t)));
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < std::min(round_up(i + kTileRows, kWidth), kBlock); j += kWidth) {
        const vf x = (set(high[i]) - load(high + j)) + (set(low[i]) - load(low + j));
        store(pair.row(i) + j, select(lanes(0, i + 1 - j), exp2<5>(x), zero()));
      }
    all_tokens = static_cast<float>(std::exp2(sum));
  }

  void heads(int64_t n) {
    transpose_into(k_end, k, n, dim);
    product_pairs(of_queries, n, q, k_end, dim);
    product_pairs(of_keys, n, k, k_end, dim);
    float in[kBlock];
    for (int64_t i = 0; i < n; ++i) {
      in[i] = p.scale * from_start[i];
      for (int64_t j = 0; j < std::min(round_up(i + kTileRows, kWidth), kBlock); j += kWidth) {
        // Pairs without weight are 0, even if their product is not finite.
        const vf weight = load(pair.row(i) + j);
        const vm hidden = equal(weight, zero());
        const vf m = load(of_queries.row(i) + j) * (weight * set(p.scale));
        const vf k_pair = zero() - load(of_keys.row(i) + j) * weight;
        store(of_queries.row(i) + j, select(hidden, zero(), m));
        store(of_keys.row(i) + j, select(either(hidden, lanes(i - j, i + 1 - j)), zero(), k_pair));
      }
    }
    scale_rows(q_in, q, in, n, ld);
    for (int64_t i = 0; i < n; ++i) in[i] = -from_start[i];
    scale_rows(k_in, k, in, n, ld);
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t j = 0; j < n; j += kWidth)
        store(k_end.row(d) + j, load(k_end.row(d) + j) * load(to_end + j));
    for (int64_t d = 0; d < ld; d += kWidth) store(total + d, set(all_tokens));
  }

  template <bool kCorrects>
  void channels(int64_t b, int64_t first, int64_t h, int64_t n) {
    std::memset(log_total, 0, ld * sizeof(float));
    for (int64_t t = 0; t < n; ++t) {
      const float* from = gate(p.log_decay, b, first + t, h);
      for (int64_t d = 0; d < ld; d += kWidth) {
        const vf x = max_of(set(kMinLogDecay), Elements<DType::float32>::load_n(from, d, dim - d));
        store(decays.row(t) + d, decay_of(x));
        store(log_total + d, load(log_total + d) + x);
      }
    }
    for (int64_t d = 0; d < ld; d += kWidth) store(total + d, set(1.f));
    std::memset(k_end.data, 0, dim * kBlock * sizeof(float));
    each_tile(n, [&]<int M>(int64_t row) TM_LAMBDA {
      const int64_t last = std::min(row + M, n);
      for (int64_t d = 0; d < ld; d += kWidth) {
        vf decay = set(1.f);
        for (int64_t i = row; i < last; ++i) {
          decay = decay * load(decays.row(i) + d);
          store(q_in.row(i) + d, load(q.row(i) + d) * (decay * set(p.scale)));
          if constexpr (kCorrects) store(k_in.row(i) + d, zero() - load(k.row(i) + d) * decay);
        }
      }
      const int64_t width = std::min(round_up(row + M, kWidth), kBlock);
      multiply_rows<Float32, false, M, true>(of_queries.row(row), kBlock, q_in.row(row), ld,
                                             k_end.data, kBlock, dim, width);
      if constexpr (kCorrects)
        multiply_rows<Float32, false, M, true>(of_keys.row(row), kBlock, k_in.row(row), ld,
                                               k_end.data, kBlock, dim, width);
      own_pairs<M, kCorrects>(row, last);
      decay_to<kCorrects>(row, last);
    });
    // A product of decays near 1 is biased by 4e-9 for each token, which a long memory would show.
    for (int64_t d = 0; d < ld; d += kWidth) store(total + d, decay_of(load(log_total + d)));
  }

  // M and N of key row + kKey, and of those after it, with the M tokens from `row` on; a tile may
  // extend past `last`.
  template <int M, bool kCorrects, int kKey = 0>
  void own_pairs(int64_t row, int64_t last) {
    const int64_t j = row + kKey;
    if (j >= last) return;
    vf queries[M - kKey], keys[M - kKey];
    TM_UNROLL(8)
    for (int i = 0; i < M - kKey; ++i) queries[i] = keys[i] = zero();
    for (int64_t d = 0; d < ld; d += kWidth) {
      vf key = load(k.row(j) + d);
      TM_UNROLL(8)
      for (int i = 0; i < M - kKey; ++i) {
        if (i > 0) key = key * load(decays.row(j + i) + d);
        queries[i] = fma(load(q.row(j + i) + d), key, queries[i]);
        if (kCorrects && i > 0) keys[i] = fma(load(k.row(j + i) + d), key, keys[i]);
      }
    }
    for (int i = 0; i < M; ++i) {
      of_queries.row(row + i)[j] =
          i < kKey ? 0 : p.scale * sum_lanes(queries[std::max(i - kKey, 0)]);
      if constexpr (kCorrects)
        of_keys.row(row + i)[j] = i <= kKey ? 0 : -sum_lanes(keys[std::max(i - kKey, 0)]);
    }
    if constexpr (kKey + 1 < M) own_pairs<M, kCorrects, kKey + 1>(row, last);
  }

  // Lets keys decay to the end of the tile, and what entered the chunk to its rows.
  template <bool kCorrects>
  void decay_to(int64_t row, int64_t last) {
    for (int64_t d = 0; d < ld; d += kWidth) {
      const vf before = load(total + d);
      for (int64_t i = row; i < last; ++i) {
        store(q_in.row(i) + d, load(q_in.row(i) + d) * before);
        if constexpr (kCorrects) store(k_in.row(i) + d, load(k_in.row(i) + d) * before);
      }
      vf decay = set(1.f);
      for (int64_t j = last; j-- > row;) {
        float key[kWidth];
        store(key, load(k.row(j) + d) * decay);
        for (int64_t c = 0; c < kWidth && d + c < dim; ++c) k_end.row(d + c)[j] = key[c];
        decay = decay * load(decays.row(j) + d);
      }
      float tile[kWidth];
      store(tile, decay);
      store(total + d, before * decay);
      for (int64_t c = 0; c < kWidth && d + c < dim; ++c)
        for (int64_t j = 0; j < row; j += kWidth) {
          float* const to = k_end.row(d + c) + j;
          store(to, select(lanes(0, row - j), load(to) * set(tile[c]), load(to)));
        }
    }
  }

  float all_tokens = 1;  // per head: e^(G_n)
};

}  // namespace tokenmill::TOKENMILL_ISA
