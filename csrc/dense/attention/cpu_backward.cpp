// Backward, five products per pair of tiles, on transposed scores: rows are keys, lanes are
// queries, so that row statistics of the queries are vectors.
//
//   S^T = K Q^T,  dP^T = V dO^T,  then in registers
//   sigmoid: dS = P (1 - P) dP;   softmax: dS = P (dP - delta), delta = rowsum(dO O) - dlse
//   with ALiBi decay F: dS = P (F dP - delta), with P F in place of P in dV
//   others: P = n f(z), dS = f'(z) (n dP - delta), n the factor of the row, delta by its sum
//   dV += P^T dO,  dK += dS^T Q,  dQ += dS K, in tiles dQ^T += K^T dS^T
//
// For softmax a row of dS adds up to dlse + P_sink delta. The gradient of score_bias is computed
// from that: the sum itself cancels, down to the errors of P and dP.
#include <algorithm>
#include <cstring>

#include "attention/cpu_backward_operands.h"
#include "attention/cpu_kinds.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "dense/attention/cpu_bias_backward.h"
#include "dense/attention/cpu_mask_backward.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

// 16 MiB: bound on the dQ of parts of heads that share dbias; at least one head per item.
constexpr int64_t kPartFloats = int64_t{1} << 22;

// Partial result of one part of one head.
struct Partials {
  float* dq;  // [Sq padded][width_d], in tiles [Sq padded / kQueryBlock][width_d][kQueryBlock]
  HeadSums sums;
};

template <class Op, Exponent kKind, bool kCoarse>
class Worker {
 public:
  Worker(const AttentionBackwardParams& bp, int64_t longest_q, int64_t longest_k, bool whole_head)
      : bp(bp),
        p(bp.forward),
        queries(bp),
        tile(p),
        mask(p),
        width_d(queries.width_d),
        width_v(queries.width_v),
        padded_q(round_up(longest_q, kQueryBlock)),
        max_keys(round_up(whole_head ? longest_k : Split(longest_k).keys, kKeyTile)),
        workspace(floats_needed()) {
    queries.place(workspace, padded_q);
    tile.place(workspace, kKeyTile);
    dq = workspace.take(padded_q * width_d);
    dq_total = workspace.take(padded_q * width_d);
    dk = workspace.take(max_keys * width_d);
    dv = workspace.take(max_keys * width_v);
    if (kInTiles<Op>) query_rows = workspace.take(kRowsAtOnce * width_d);
    scores.place(workspace, kKeyTile);
    mask.place(workspace, padded_q);
  }

  static int64_t padded(int64_t length_q) { return round_up(length_q, kQueryBlock); }

  // All parts of one KV head in succession.
  void run_head(int64_t b, int64_t kv_head) {
    enter(b, kv_head);
    const Split split(s->k_length);
    zero_key_sums(s->k_length);
    for (int64_t g = 0; g < group; ++g) {
      enter_query_head(kv_head * group + g);
      HeadSums total = row_sums();
      for (int64_t part = 0; part < split.count; ++part) {
        const int64_t begin = part * split.keys, end = begin + split.keys;
        total.add(run_part(begin, end, 0, part == 0 ? dq_total : dq));
        add_part(part == 0 ? dq_total : dq, queries_of(begin, end), part == 0);
      }
      finish_queries(dq_total, total);
    }
    store_keys(0, s->k_length, 0);
  }

  // One part of one KV head; `partials` has an entry per query head of the group.
  void run_split(int64_t b, int64_t kv_head, int64_t part, Partials* partials) {
    enter(b, kv_head);
    const Split split(s->k_length);
    if (part >= split.count) return;
    const int64_t begin = part * split.keys, end = (part + 1) * split.keys;
    zero_key_sums(end - begin);
    for (int64_t g = 0; g < group; ++g) {
      enter_query_head(kv_head * group + g);
      partials[g].sums = run_part(begin, end, begin, partials[g].dq);
      if (part == 0) partials[g].sums.add(row_sums());
    }
    store_keys(begin, end < s->k_length ? end : s->k_length, begin);
  }

  // Reduces the parts of a KV head after all have finished; partials[part * group + g].
  void reduce(int64_t b, int64_t kv_head, const Partials* partials) {
    enter(b, kv_head);
    const Split split(s->k_length);
    for (int64_t g = 0; g < group; ++g) {
      h = kv_head * group + g;
      HeadSums total;
      for (int64_t part = 0; part < split.count; ++part) {
        const Partials& one = partials[part * group + g];
        total.add(one.sums);
        add_part(one.dq, queries_of(part * split.keys, (part + 1) * split.keys), part == 0);
      }
      finish_queries(dq_total, total);
    }
  }

 private:
  using Scores = ScoreOperands<Op, kQueryBlock>;
  static constexpr int kRows = kKeyRows<Op>;

  int64_t floats_needed() const {
    return queries.size(padded_q) + tile.size(kKeyTile) + 2 * padded_q * width_d +
           max_keys * (width_d + width_v) + kRowsAtOnce * width_d + scores.size(kKeyTile) +
           mask.size(padded_q) + 5 * 16;
  }

  void enter(int64_t batch, int64_t head) {
    b = batch;
    kv_head = head;
    sequence = Sequence(p, b);
    s = &sequence;
    group = p.heads / p.kv_heads;
    band = Band::of_window(p.window_left, p.window_right, s->q_length, s->k_length);
    seen_by = band.transposed(s->q_length);
  }

  char* row(const Rows& r, int64_t start, int64_t i, int64_t head) const {
    return row_of(r, p.dtype, b, start, i, head);
  }

  void enter_query_head(int64_t head) {
    h = head;
    score_mod = ScoreMod(p, b, h, *s);
    // The general path sums dS, and is the only one for kinds that take the logit.
    if (kKind == Exponent::logit || sums_pairs_for_score_bias()) score_mod.make_general();
    queries.pack(*s, b, h, padded(s->q_length),
                 score_mod.plain && Op::kPair == 1 ? score_mod.factor : 1);
    if (kKind == Exponent::softmax)
      queries.pack_statistics(*s, b, h, padded(s->q_length), score_mod.shift);
    if (kKind == Exponent::logit) queries.pack_factors(*s, b, h, padded(s->q_length));
    if (mask.any()) mask.enter(*s, b, h, padded(s->q_length));
  }

  bool sums_pairs_for_score_bias() const { return kKind != Exponent::softmax && bp.dscore_bias; }

  void zero_key_sums(int64_t keys) {
    const int64_t rows = round_up(keys, kKeyTile);
    std::memset(dk, 0, rows * width_d * sizeof(float));
    std::memset(dv, 0, rows * width_v * sizeof(float));
  }

  struct Range {
    int64_t begin, end;
  };

  // Queries that see keys [begin, end), in whole blocks.
  Range queries_of(int64_t begin, int64_t end) const {
    const int64_t from = seen_by.begin(begin), to = seen_by.end(lower(end, s->k_length) - 1);
    if (from >= to) return {0, 0};
    return {from / kQueryBlock * kQueryBlock, round_up(to, kQueryBlock)};
  }

  // Keys [begin, end) against all queries of head h: sets rows queries_of(begin, end) of dq_out,
  // adds to dk and dv, whose row 0 is key `origin`.
  HeadSums run_part(int64_t begin, int64_t end, int64_t origin, float* dq_out) {
    if (end > s->k_length) end = s->k_length;
    zero_rows(dq_out, queries_of(begin, end));
    HeadSums sums;
    for (int64_t j = begin; j < end; j += kKeyTile) {
      keys = end - j < kKeyTile ? end - j : kKeyTile;
      first_key = j;
      const int64_t from = seen_by.begin(j), to = seen_by.end(j + keys - 1);
      if (from >= to) continue;
      if (mask.any()) mask.enter_keys(j, keys);
      bool packed = false;
      for (int64_t i = from / kQueryBlock * kQueryBlock; i < to; i += kQueryBlock) {
        if (mask.any() && !mask.sees(i)) continue;
        if (!packed) tile.pack(*s, b, kv_head, j, keys);
        packed = true;
        run_block(i, dk + (j - origin) * width_d, dv + (j - origin) * width_v, dq_out + i * width_d,
                  sums);
      }
    }
    return sums;
  }

  static int64_t lower(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t upper(int64_t a, int64_t b) { return a > b ? a : b; }

  // The current key tile against queries i .. i + kQueryBlock - 1.
  void run_block(int64_t i, float* dk_rows, float* dv_rows, float* dq_rows, HeadSums& sums) {
    const bool plain = kKind != Exponent::logit && score_mod.plain;
    // Visibility bits: per group of keys its queries, per kWidth queries their groups of keys. All
    // ones without a mask.
    uint64_t seen_keys[kQueryBlock / kWidth];
    for (uint64_t& groups : seen_keys) groups = mask.any() ? 0 : ~uint64_t{0};
    uint64_t computed[kQueryBlock / kPanel] = {};  // per panel of queries its groups of keys
    for (int64_t r = 0; r < keys; r += kRows) {
      const int64_t j = first_key + r;
      const int64_t from = seen_by.begin(j), to = seen_by.end(j + kRows - 1);
      uint64_t seen = ~uint64_t{0}, cuts = 0;
      if (mask.any()) {
        seen = mask.queries(r, i, &cuts);
        for (int64_t n = 0; n < kQueryBlock / kWidth; ++n)
          seen_keys[n] |= (seen >> n & 1) << r / kRows;
      }
      for (int64_t c = 0; c < kQueryBlock; c += kPanel) {
        const uint64_t panel = bits_of(c / kWidth, (c + kPanel) / kWidth);
        if (i + c >= to || i + c + kPanel <= from || !(seen & panel)) continue;
        cut = cuts & panel;
        computed[c / kPanel] |= uint64_t{1} << r / kRows;
        plain ? score_tile<true>(r, i, c, sums) : score_tile<false>(r, i, c, sums);
      }
      // dV += P^T dO and dK += dS^T Q over the words of the queries that these keys see.
      const int64_t begin = upper(from - i, 0) / kUnit * Op::kWords;
      const int64_t end = ceil_div(lower(to - i, kQueryBlock), kUnit) * Op::kWords;
      for_each_run(seen, [&](int64_t first, int64_t behind) {
        const int64_t word = upper(begin, first * kWidth / Op::kPair);
        const int64_t words = lower(end, behind * kWidth / Op::kPair) - word;
        if (words <= 0) return;
        const int64_t at = i / Op::kPair + word;
        const auto product = sum_product<Op, kRows>();
        product(dv_rows + r * width_v, width_v, scores.pt + r * Scores::kLdp + word, Scores::kLdp,
                queries.gr + at * width_v, width_v, words, width_v);
        product(dk_rows + r * width_d, width_d, scores.st + r * Scores::kLdp + word, Scores::kLdp,
                queries.qr + at * width_d, width_d, words, width_d);
      });
    }
    if constexpr (kInTiles<Op>)
      add_queries_in_tiles(computed, dq_rows);
    else
      add_queries(i, seen_keys, dq_rows);
  }

  // dQ += dS K
  void add_queries(int64_t i, const uint64_t (&seen_keys)[kQueryBlock / kWidth], float* dq_rows) {
    for (int64_t q = 0; q < kQueryBlock && i + q < s->q_length; q += kQueryRows) {
      const int64_t begin = upper(band.begin(i + q) - first_key, 0) / Op::kPair;
      const int64_t end =
          ceil_div(lower(band.end(i + q + kQueryRows - 1) - first_key, keys), Op::kPair);
      for_each_run(seen_keys[q / kWidth], [&](int64_t first, int64_t behind) {
        const int64_t from = upper(begin, first * kRows / Op::kPair);
        const int64_t to = lower(end, behind * kRows / Op::kPair);
        if (from >= to) return;
        multiply_rows<Op, true, kQueryRows, false>(
            dq_rows + q * width_d, width_d, scores.gradient(from, q), Scores::gradient_ld(),
            tile.kb + from * width_d, width_d, to - from, width_d);
      });
    }
  }

  // dQ^T += K^T dS^T
  void add_queries_in_tiles(const uint64_t (&computed)[kQueryBlock / kPanel], float* dq_block) {
    for (int64_t c = 0; c < kQueryBlock; c += kPanel)
      for_each_run(computed[c / kPanel], [&](int64_t first, int64_t behind) {
        const int64_t word = first * Op::kWords, words = (behind - first) * Op::kWords;
        for (int64_t d = 0; d < width_d; d += kRows) {
          const auto product =
              d + kRows <= width_d ? sum_product<Op, kRows>() : sum_product<Op, kWidth>();
          product(dq_block + d * kQueryBlock + c, kQueryBlock, tile.kt + d * tile.kLdk + word,
                  tile.kLdk, scores.sp + word * Scores::kLdsp + c, Scores::kLdsp, words, kPanel);
        }
      });
  }

#if defined(__AMX_BF16__)
  // P^T and dS^T of kRows keys (from row r of the tile) and kPanel queries (from i + c).
  template <bool kPlain>
  __attribute__((noinline)) void score_tile(int64_t r, int64_t i, int64_t c, HeadSums& sums)
    requires kInTiles<Op>
  {
    alignas(64) float scores_of[kRows][kPanel], dp[kRows][kPanel];
    multiply_scores(scores_of, dp, tile, r, queries, i + c);
    const int64_t query = i + c, key = first_key + r;
    const bool masked = cuts_band(query, key);
    const ScoreMod mod = score_mod;  // a local copy, which stores cannot alias
    LaneSums lane_sums;
    TM_UNROLL(1)
    for (int m = 0; m < kRows; m += 2) {
      vf z[2][kTileVectors];
      TM_UNROLL(2)
      for (int l = 0; l < 2; ++l) {
        TM_UNROLL(4)
        for (int n = 0; n < kTileVectors; ++n) z[l][n] = load(scores_of[m + l] + n * kWidth);
        score_row<kPlain>(mod, z[l], dp[m + l], r + m + l, query, c, masked, lane_sums);
      }
      scores.store_pairs(r + m, c, z);
    }
    if constexpr (!kPlain) add_lanes(lane_sums, sums);
  }
#endif

  // P^T and dS^T of kRows keys (from row r of the tile) and kPanel queries (from i + c).
  template <bool kPlain>
  __attribute__((noinline)) void score_tile(int64_t r, int64_t i, int64_t c, HeadSums& sums)
    requires(!kInTiles<Op>)
  {
    vf z[kTileRows][kTileVectors];
    alignas(64) float dp[kTileRows][kPanel];
    multiply_scores<Op>(z, dp, tile, r, queries, i + c);

    const int64_t query = i + c, key = first_key + r;
    const bool masked = cuts_band(query, key);
    const ScoreMod mod = score_mod;  // a local copy, which stores cannot alias
    LaneSums lane_sums;
    if constexpr (kPlain) {
      TM_UNROLL(8)
      for (int m = 0; m < kTileRows; ++m)
        score_row<true>(mod, z[m], dp[m], r + m, query, c, masked, lane_sums);
      scores.store_pairs(r, c, z);
    } else {
      // One copy of the row code: indexing z itself would move it out of registers.
      vf rows[kTileRows][kTileVectors];
      TM_UNROLL(8)
      for (int m = 0; m < kTileRows; ++m) {
        TM_UNROLL(4)
        for (int n = 0; n < kTileVectors; ++n) rows[m][n] = z[m][n];
      }
      TM_UNROLL(1)
      for (int m = 0; m < kTileRows; ++m)
        score_row<false>(mod, rows[m], dp[m], r + m, query, c, masked, lane_sums);
      scores.store_pairs(r, c, rows);
      add_lanes(lane_sums, sums);
    }
  }

  // True where the band hides a pair of kRows keys and kPanel queries.
  bool cuts_band(int64_t query, int64_t key) const {
    return query < seen_by.begin(key + kRows - 1) || query + kPanel > seen_by.end(key) ||
           key + kRows > s->k_length;
  }

  struct LaneSums {
    vf score_bias = zero(), alibi_slopes = zero();
  };
  static void add_lanes(const LaneSums& lane_sums, HeadSums& sums) {
    if constexpr (kKind != Exponent::softmax) sums.score_bias += sum_lanes(lane_sums.score_bias);
    sums.alibi_slopes -= sum_lanes(lane_sums.alibi_slopes);
  }

  // Weights of key r of the tile and kPanel queries from `query` on; z becomes the gradient of q.k.
  template <bool kPlain>
  TM_INLINE void score_row(const ScoreMod& mod, vf (&z)[kTileVectors], const float* dp, int64_t r,
                           int64_t query, int64_t c, bool masked, LaneSums& lane_sums) {
    const int64_t key = first_key + r;
    const vf odds = set(mod.odds), one = set(1.f), factor = set(mod.factor);
    vf w[kTileVectors], dz[kTileVectors];
    TM_UNROLL(4)
    for (int n = 0; n < kTileVectors; ++n) {
      vf t = z[n], distance = zero();
      if constexpr (!kPlain) {
        distance = mod.query_distances(query + n * kWidth, key);
        t = mod.exponent(t, mod.bias ? bias_column(mod, query + n * kWidth, key) : vf{}, distance);
      } else if constexpr (Op::kPair != 1) {  // otherwise qt already holds the factor
        t = t * factor;
      }
      const vf dpn = load(dp + n * kWidth);
      if constexpr (kKind == Exponent::softmax) {
        const vf fade = !kPlain && mod.post_decay ? mod.fade<kCoarse>(distance) : set(1.f);
        const vf dpd = dpn * fade - load(queries.delta + query + n * kWidth);
        w[n] = power<kCoarse>(t - load(queries.lse + query + n * kWidth));
        dz[n] = w[n] * dpd;
        w[n] = w[n] * fade;
      } else if constexpr (kKind == Exponent::logit) {
        const vf row_factor = load(queries.factor() + query + n * kWidth);
        const vf change = row_factor * dpn - load(queries.delta + query + n * kWidth);
        visit_map(mod.map, [&](auto map) TM_LAMBDA {
          const Weight f = weight_of<decltype(map)::value, kCoarse>(t);
          w[n] = f.value * row_factor;
          // slope 0 hides the pair, whose other factor may be NaN
          dz[n] = select(equal(f.slope, zero()), zero(), f.slope * change);
        });
      } else {
        const vf e = min_of(set(kMaxOdds), power<kCoarse>(t) * odds);
        w[n] = reciprocal<kCoarse>(one + e);
        dz[n] = w[n] * (e * w[n]) * dpn;
      }
      if (masked) [[unlikely]] {
        const int64_t from = seen_by.begin(key) - query - n * kWidth;
        const int64_t to = key < s->k_length ? seen_by.end(key) - query - n * kWidth : 0;
        const vm seen = lanes(from, to);
        w[n] = select(seen, w[n], zero());
        dz[n] = select(seen, dz[n], zero());
      }
      if (cut && key < s->k_length) [[unlikely]] {
        const vm seen = mask.seen(query + n * kWidth, key);
        w[n] = select(seen, w[n], zero());
        dz[n] = select(seen, dz[n], zero());
      }
      if constexpr (!kPlain) {
        lane_sums.score_bias = lane_sums.score_bias + dz[n];
        lane_sums.alibi_slopes =
            fma(mod.post_decay ? weighted(w[n], dpn) : dz[n], distance, lane_sums.alibi_slopes);
        if (bp.dbias) add_to_column(dz[n], mod, bp, b, h, query + n * kWidth, key);
        if (mod.softcap > 0) dz[n] = dz[n] * mod.cap_slope(z[n]);
      }
      z[n] = dz[n];
    }
    scores.store_key(r, c, w, dz);
  }

  void zero_rows(float* rows, Range r) const {
    std::memset(rows + r.begin * width_d, 0, (r.end - r.begin) * width_d * sizeof(float));
  }

  // Adds rows r of one part's dQ to dq_total. The first part sets it, and may already be there.
  void add_part(const float* part, Range r, bool first) const {
    if (first) {
      zero_rows(dq_total, {0, r.begin});
      zero_rows(dq_total, {r.end, padded(s->q_length)});
      if (part == dq_total) return;
    }
    for (int64_t i = r.begin * width_d; i < r.end * width_d; i += kWidth)
      store(dq_total + i, first ? load(part + i) : load(dq_total + i) + load(part + i));
  }

  void finish_queries(const float* total, const HeadSums& sums) {
    for (int64_t i = 0; i < s->q_length; i += kRowsAtOnce) {
      const float* rows = total + i * width_d;
      if constexpr (kInTiles<Op>) rows = transposed(total, i);
      for (int64_t n = 0; n < kRowsAtOnce && i + n < s->q_length; ++n)
        store_row(rows + n * width_d, p.scale, row(bp.dq, s->q_start, i + n, h), p.dtype,
                  p.head_dim);
    }
    if (bp.dscore_bias) bp.dscore_bias[b * p.heads + h] = static_cast<float>(sums.score_bias);
    if (bp.dalibi_slopes) bp.dalibi_slopes[b * p.heads + h] = static_cast<float>(sums.alibi_slopes);
    if (bp.dsink) bp.dsink[b * p.heads + h] = static_cast<float>(sums.sink);
  }

  // Rows of queries i .. i + kWidth - 1 of dQ^T.
  const float* transposed(const float* total, int64_t i) const {
    const float* block = total + i / kQueryBlock * kQueryBlock * width_d + i % kQueryBlock;
    for (int64_t d = 0; d < width_d; d += kWidth)
      transpose_words(block + d * kQueryBlock, kQueryBlock, query_rows + d, width_d);
    return query_rows;
  }

  // Softmax row sums: d loss / d sink = -sum_i P_i,sink delta_i, as the sink has no value, and d
  // loss / d score_bias = sum_i (dlse_i + P_i,sink delta_i).
  HeadSums row_sums() const {
    HeadSums sums;
    if (kKind != Exponent::softmax || !(bp.dsink || bp.dscore_bias)) return sums;
    const float* lse_in = lse_of(p, p.lse, b, s->q_start, h);
    const float* dlse = bp.dlse ? lse_of(p, bp.dlse, b, s->q_start, h) : nullptr;
    for (int64_t i = 0; i < s->q_length; ++i) {
      if (lse_in[i] == -kInf) continue;
      const float weight = !p.sink                  ? 0
                           : p.sink[h] == lse_in[i] ? 1  // equality covers inf
                                                    : std::exp(p.sink[h] - lse_in[i]);
      const double share = weight * queries.delta[i];
      sums.sink -= share;
      sums.score_bias += share + (dlse ? dlse[i] : 0);
    }
    return sums;
  }

  void store_keys(int64_t begin, int64_t end, int64_t origin) {
    for (int64_t j = begin; j < end; ++j) {
      store_row(dk + (j - origin) * width_d, p.scale, row(bp.dk, s->k_start, j, kv_head), p.dtype,
                p.head_dim);
      store_row(dv + (j - origin) * width_v, 1.f, row(bp.dv, s->k_start, j, kv_head), p.dtype,
                p.value_dim);
    }
  }

  static constexpr int64_t kUnit = Op::kPair * Op::kWords;  // rows that a reduction takes at once
  static constexpr int64_t kRowsAtOnce = kInTiles<Op> ? kWidth : 1;

  const AttentionBackwardParams& bp;
  const AttentionParams& p;
  QueryOperands<Op> queries;
  KeyOperands<Op> tile;
  BlockMask<Op> mask;
  int64_t width_d, width_v;  // of gradient rows
  int64_t padded_q, max_keys;
  cpu::Workspace workspace;
  float *dq, *dq_total, *dk, *dv;
  float* query_rows = nullptr;  // in tiles: rows on their way from dQ^T, [kWidth][width_d]
  Scores scores;

  int64_t b = 0, kv_head = 0, h = 0, group = 1;
  Sequence sequence{p, 0};
  const Sequence* s = &sequence;
  ScoreMod score_mod{p, 0, 0, sequence};
  Band band, seen_by;
  int64_t first_key = 0, keys = 0;
  bool cut = false;  // a mask hides some pairs of the next register tile
};

template <class Op, Exponent kKind, bool kCoarse>
void backward(const AttentionBackwardParams& bp) {
  const AttentionParams& p = bp.forward;
  int64_t longest_q = 0, longest_k = 0;
  for (int64_t b = 0; b < (p.cu_seqlens_q ? p.batch : 1); ++b) {
    const Sequence s(p, b);
    longest_q = s.q_length > longest_q ? s.q_length : longest_q;
    longest_k = s.k_length > longest_k ? s.k_length : longest_k;
  }
  const double pairs = static_cast<double>(p.seqlen_q) * static_cast<double>(longest_k);
  const int threads =
      pairs * static_cast<double>(p.heads * p.head_dim) < 5e5 ? 1 : cpu::num_threads();

  // Heads that add to the same elements of dbias belong to one item, which runs them in order.
  const bool share_batch = bp.dbias && bp.dbias_batch == 0,
             share_head = bp.dbias && bp.dbias_head == 0;
  const int64_t batches = share_batch ? 1 : p.batch, heads = share_head ? 1 : p.kv_heads;
  const int64_t heads_of_item = share_head ? p.kv_heads : 1;
  const int64_t of_item = heads_of_item * (share_batch ? p.batch : 1);
  const int64_t parts = Split(longest_k).count, group = p.heads / p.kv_heads;
  const bool whole_head =
      threads == 1 || parts == 1 || batches * heads >= 2 * threads || (bp.dbias && bp.dbias_k == 0);
  const int64_t parts_apart = whole_head ? 1 : parts;

  using W = Worker<Op, kKind, kCoarse>;
  const int64_t dq_size = W::padded(longest_q) * round_up(p.head_dim, kWidth);
  // Number of heads of an item whose parts are in memory at once.
  const int64_t one_of_each = batches * heads * parts * group * dq_size;
  const int64_t together =
      whole_head ? of_item : std::clamp<int64_t>(kPartFloats / (one_of_each + 1), 1, of_item);
  const int64_t in_flight = batches * heads * together;
  const int64_t entries = whole_head ? 0 : in_flight * parts * group;
  constexpr int64_t kEntryFloats = sizeof(Partials) / sizeof(float);
  cpu::Workspace shared(entries * (dq_size + kEntryFloats) + in_flight + 3 * 16);
  auto* partials = reinterpret_cast<Partials*>(shared.take(entries * kEntryFloats));
  float* dq = shared.take(entries * dq_size);
  for (int64_t i = 0; i < entries; ++i) partials[i] = {dq + i * dq_size, {}};
  auto* finished = reinterpret_cast<int32_t*>(shared.take(in_flight));

  for (int64_t first = 0; first < of_item; first += together) {
    const int64_t last = std::min(first + together, of_item);
    std::memset(finished, 0, in_flight * sizeof(int32_t));
    cpu::parallel_items(batches * heads * parts_apart, threads, [&](cpu::ItemCounter& items) {
      FlushDenormals flush;
      typename Op::Unit unit;
      W worker(bp, longest_q, longest_k, whole_head);
      for (int64_t item; (item = items.next()) >= 0;) {
        const int64_t part = item % parts_apart, own = item / parts_apart;
        for (int64_t n = first; n < last; ++n) {
          const int64_t b = own / heads + n / heads_of_item, h = own % heads + n % heads_of_item;
          if (whole_head) {
            worker.run_head(b, h);
            continue;
          }
          const int64_t head = own * together + n - first;
          Partials* all = partials + head * parts * group;
          worker.run_split(b, h, part, all + part * group);
          // The last part that finishes reduces all parts.
          if (__atomic_add_fetch(finished + head, 1, __ATOMIC_ACQ_REL) == parts)
            worker.reduce(b, h, all);
        }
      }
    });
  }
}

template <class Op, bool kCoarse>
void backward(const AttentionBackwardParams& p) {
  switch (exponent_of(p.forward)) {
    case Exponent::softmax:
      return backward<Op, Exponent::softmax, kCoarse>(p);
    case Exponent::sigmoid:
      return backward<Op, Exponent::sigmoid, kCoarse>(p);
    case Exponent::logit:
      return backward<Op, Exponent::logit, kCoarse>(p);
  }
}

}  // namespace

void attention_backward(const AttentionBackwardParams& p) {
#if defined(__AVX512BF16__)
  if (p.forward.dtype == DType::bfloat16) return backward<FastBFloat16, true>(p);
#endif
  p.forward.dtype == DType::float32 ? backward<Float32, false>(p) : backward<Float32, true>(p);
}

}  // namespace tokenmill::TOKENMILL_ISA
