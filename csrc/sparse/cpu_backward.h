// Backward of attention over lists, for any walk: the five products of
// csrc/dense/attention/cpu_backward.cpp on transposed scores. The outer loop runs over row tiles,
// the inner loop over the keys that they see, gathered in tiles. dK and dV are summed in float32
// for the KV head, because the rows of a key tile may lie anywhere.
//
// Keys are split into parts as in the dense backward: the parts of a KV head sum dK and dV of their
// own keys over all rows in order, and dQ is the sum over the parts in order, independent of the
// assignment to threads.
#pragma once
#include <cstring>
#include <optional>

#include "attention/cpu_backward_operands.h"
#include "cpu/parallel.h"
#include "sparse/cpu_walk.h"

namespace tokenmill::TOKENMILL_ISA {

static_assert(kQueryBlock % kPanel == 0);

// Keys of one part that the rows of a tile see.
struct KeyTile {
  int64_t count;
  int64_t at[kKeyTile];
  float from[kKeyTile], until[kKeyTile];  // range of queries that see each key
};

template <class Op, bool kCoarse, class Walk>
class BackwardWorker {
 public:
  BackwardWorker(const Walk& walk, const typename Walk::BackwardParams& g, bool whole_head)
      : walk(walk),
        g(g),
        p(walk.d.attention),
        dense(like_dense(g)),
        queries(dense),
        tile(p),
        tiles(walk, kQueryBlock, kPanel),
        runs(walk.max_runs()),
        width_d(queries.width_d),
        width_v(queries.width_v),
        places(walk.key_places()),
        split(places),
        max_keys(whole_head ? places : split.keys),
        workspace(queries.size(kQueryBlock) + tile.size(kKeyTile) + scores.size(kKeyTile) +
                  runs.floats() + (2 * kQueryBlock + max_keys) * width_d + max_keys * width_v +
                  width_d + width_v + kQueryBlock + 10 * 16) {
    queries.place(workspace, kQueryBlock);
    tile.place(workspace, kKeyTile);
    scores.place(workspace, kKeyTile);
    runs.place(workspace.take(runs.floats()));
    dq = workspace.take(kQueryBlock * width_d);
    dq_total = workspace.take(kQueryBlock * width_d);
    dk = workspace.take(max_keys * width_d);
    dv = workspace.take(max_keys * width_v);
    spare_d = workspace.take(width_d);
    spare_v = workspace.take(width_v);
    query = workspace.take(kQueryBlock);
  }

  // Runs all parts of one KV head in order.
  void run_head(int64_t kv) {
    clear_keys(0, places);
    for (int64_t n = 0; n < tiles.count; ++n) {
      if (!enter(kv, n, true)) continue;
      for (int64_t part = 0; part < split.count; ++part) {
        run_part(part, part == 0 ? dq_total : dq);
        if (part > 0) add(dq, dq_total);
      }
      store_queries();
    }
    store_keys(kv);
  }

  // Runs one part of one KV head; dQ goes to `partial` [rows of the KV head][width_d].
  void run_split(int64_t kv, int64_t part, float* partial) {
    clear_keys(part * split.keys, (part + 1) * split.keys);
    for (int64_t n = 0, row = 0; n < tiles.count; ++n) {
      if (!enter(kv, n, part == 0)) continue;
      run_part(part, dq);
      std::memcpy(partial + row * width_d, dq, rows.rows * width_d * sizeof(float));
      row += rows.rows;
    }
    store_keys(kv);
  }

  // Sums dQ of a KV head over its finished parts: partials [parts][rows of the KV head][width_d].
  void reduce(int64_t kv, const float* partials, int64_t part_size) {
    for (int64_t n = 0, row = 0; n < tiles.count; ++n) {
      rows = tiles.at(kv, n);
      if (rows.rows <= 0) continue;
      for (int64_t part = 0; part < split.count; ++part) {
        const float* from = partials + part * part_size + row * width_d;
        if (part == 0)
          std::memcpy(dq_total, from, rows.rows * width_d * sizeof(float));
        else
          add(from, dq_total);
      }
      store_queries();
      row += rows.rows;
    }
  }

 private:
  using Scores = ScoreOperands<Op, kQueryBlock>;

  static AttentionBackwardParams like_dense(const typename Walk::BackwardParams& g) {
    AttentionBackwardParams dense{};
    dense.forward = g.forward.attention;
    dense.dout = g.dout;
    dense.dlse = g.dlse;
    return dense;
  }

  // Packs the queries of tile n; false if the tile is empty. Only one part of a KV head stores
  // delta (keeps_delta).
  bool enter(int64_t kv, int64_t n, bool keeps_delta) {
    rows = tiles.at(kv, n);
    if (rows.rows <= 0) return false;
    score_mod = ScoreMod(p, rows.b, rows.head, Sequence(p, rows.b));
    padded = round_up(rows.rows, kPanel);
    const float factor = score_mod.plain && Op::kPair == 1 ? score_mod.factor : 1;
    const char *q_rows[kQueryBlock], *g_rows[kQueryBlock];
    RowCursor at(rows);
    for (int64_t r = 0; r < rows.rows; ++r, at.next()) {
      const int64_t i = at.query(), h = at.head(), lse = walk.lse_at(rows.b, h, i);
      q_rows[r] = walk.query_row(walk.q(), rows.b, i, h);
      g_rows[r] = walk.query_row(walk.dout(g), rows.b, i, h);
      queries.pack_statistics(r, p.lse[lse], g.dlse ? g.dlse[lse] : 0, score_mod.shift, g_rows[r],
                              walk.query_row(walk.out(), rows.b, i, h));
      if (keeps_delta) walk.keep_delta(g, lse, queries.delta[r]);
      query[r] = static_cast<float>(i - rows.query);
    }
    for (int64_t i = 0; i < padded; i += kPanel) {
      const int64_t left = rows.rows - i, count = left < kPanel ? left : kPanel;
      queries.pack_panel(i, count, ScatteredRows{q_rows + i}, ScatteredRows{g_rows + i}, factor);
    }
    for (int64_t r = rows.rows; r < padded; ++r) {
      queries.lse[r] = kInf;
      queries.delta[r] = 0;
      query[r] = query[rows.rows - 1];
    }
    lowest = static_cast<float>(rows.first_query() - rows.query);
    highest = static_cast<float>(rows.last_query() - rows.query);
    walk.find(rows, runs);
    first_run = 0;
    return true;
  }

  // Adds one part's keys to dk and dv, and writes the current rows' dQ from these keys to dq_out.
  void run_part(int64_t part, float* dq_out) {
    const int64_t begin = part * split.keys, end = begin + split.keys;
    std::memset(dq_out, 0, rows.rows * width_d * sizeof(float));
    keys.count = 0;
    // Runs ascend, but the last one may begin before others end.
    while (first_run < runs.count() && runs[first_run].end <= begin) ++first_run;
    const int64_t last = runs.count() - 1;
    for (int64_t n = first_run; n <= last; ++n) {
      const KeyRun& run = runs[n];
      if (run.begin >= end && n < last) n = last;
      const int64_t to = runs[n].end < end ? runs[n].end : end;
      for (int64_t x = runs[n].begin > begin ? runs[n].begin : begin; x < to; ++x) {
        const SeenBy by = walk.seen_by(runs[n], x);
        keys.from[keys.count] = static_cast<float>(by.from);
        keys.until[keys.count] = static_cast<float>(by.until);
        keys.at[keys.count++] = x;
        if (keys.count == kKeyTile) run_keys(dq_out);
      }
    }
    if (keys.count > 0) run_keys(dq_out);
  }

  // Processes the gathered keys against the current rows.
  void run_keys(float* dq_out) {
    const char *k_rows[kKeyTile], *v_rows[kKeyTile];
    for (int64_t j = 0; j < keys.count; ++j) {
      k_rows[j] = walk.key_row(walk.k(), rows.b, keys.at[j], rows.kv_head);
      v_rows[j] = walk.key_row(walk.v(), rows.b, keys.at[j], rows.kv_head);
    }
    tile.pack(keys.count, ScatteredRows{k_rows}, ScatteredRows{v_rows});
    for (int64_t j = keys.count; j < round_up(keys.count, kTileRows); ++j)
      keys.from[j] = SeenBy::kNever, keys.until[j] = 0;
    const int64_t words = words_of<Op>(rows.rows);
    for (int64_t r = 0; r < keys.count; r += kTileRows) {
      for (int64_t c = 0; c < rows.rows; c += kPanel) {
        const int64_t vectors = ceil_div(rows.rows - c, kWidth);
        score_mod.plain ? score_tile_of<true>(vectors, r, c) : score_tile_of<false>(vectors, r, c);
      }
      float *dk_rows[kTileRows], *dv_rows[kTileRows];
      for (int64_t m = 0; m < kTileRows; ++m) {
        const bool there = r + m < keys.count;
        dk_rows[m] = there ? dk + (keys.at[r + m] - origin) * width_d : spare_d;
        dv_rows[m] = there ? dv + (keys.at[r + m] - origin) * width_v : spare_v;
      }
      add_to_rows<Op, false, kTileRows>(dv_rows, 0, scores.pt + r * Scores::kLdp, Scores::kLdp,
                                        queries.gr, width_v, words, width_v);
      add_to_rows<Op, false, kTileRows>(dk_rows, 0, scores.st + r * Scores::kLdp, Scores::kLdp,
                                        queries.qr, width_d, words, width_d);
    }
    for (int64_t q = 0; q < rows.rows; q += kQueryRows)
      multiply_rows<Op, true, kQueryRows, false>(
          dq_out + q * width_d, width_d, scores.gradient(0, q), Scores::gradient_ld(), tile.kb,
          width_d, words_of<Op>(keys.count), width_d);
    keys.count = 0;
  }

  template <bool kPlain, int N = kTileVectors>
  void score_tile_of(int64_t vectors, int64_t r, int64_t c) {
    if constexpr (N > Op::kPair)
      if (vectors <= N - Op::kPair) return score_tile_of<kPlain, N - Op::kPair>(vectors, r, c);
    score_tile<kPlain, N>(r, c);
  }

  // P^T and dS^T [kTileRows keys from r on, N vectors of queries from c on].
  template <bool kPlain, int N>
  __attribute__((noinline)) void score_tile(int64_t r, int64_t c) {
    vf z[kTileRows][N];
    alignas(64) float dp[kTileRows][kPanel];
    multiply_scores<Op>(z, dp, tile, r, queries, c);

    bool masked = false;
    for (int m = 0; m < kTileRows; ++m)
      masked |= keys.from[r + m] > lowest || keys.until[r + m] <= highest;
    if constexpr (kPlain) {
      TM_UNROLL(8)
      for (int m = 0; m < kTileRows; ++m) score_row<true>(z[m], dp[m], r + m, c, masked);
      scores.store_pairs(r, c, z);
    } else {
      // A single copy of the row code: if z itself were indexed, it would leave its registers.
      vf rows_z[kTileRows][N];
      TM_UNROLL(8)
      for (int m = 0; m < kTileRows; ++m) {
        TM_UNROLL(4)
        for (int n = 0; n < N; ++n) rows_z[m][n] = z[m][n];
      }
      TM_UNROLL(1)
      for (int m = 0; m < kTileRows; ++m) score_row<false>(rows_z[m], dp[m], r + m, c, masked);
      scores.store_pairs(r, c, rows_z);
    }
  }

  // P^T of key r and N vectors of queries from c on; z becomes dS^T, the gradient of q.k.
  template <bool kPlain, int N>
  TM_INLINE void score_row(vf (&z)[N], const float* dp, int64_t r, int64_t c, bool masked) {
    const vf from = set(keys.from[r]), until = set(keys.until[r]), factor = set(score_mod.factor);
    vf w[N], dz[N];
    TM_UNROLL(4)
    for (int n = 0; n < N; ++n) {
      vf t = z[n];
      if constexpr (!kPlain) t = score_mod.exponent(t, zero(), zero());
      // with pairs, q is not prescaled; otherwise q includes the factor
      else if constexpr (Op::kPair != 1)
        t = t * factor;
      w[n] = power<kCoarse>(t - load(queries.lse + c + n * kWidth));
      dz[n] = w[n] * (load(dp + n * kWidth) - load(queries.delta + c + n * kWidth));
      if (masked) [[unlikely]] {
        const vf place = load(query + c + n * kWidth);
        const vm early = less(place, from), there = less(place, until);
        w[n] = select(early, zero(), select(there, w[n], zero()));
        dz[n] = select(early, zero(), select(there, dz[n], zero()));
      }
      if constexpr (!kPlain)
        if (score_mod.softcap > 0) dz[n] = dz[n] * score_mod.cap_slope(z[n]);
      z[n] = dz[n];
    }
    scores.store_key(r, c, w, dz);
  }

  void add(const float* from, float* to) const {
    for (int64_t i = 0; i < rows.rows * width_d; i += kWidth)
      store(to + i, load(to + i) + load(from + i));
  }

  // Selects the keys whose dk and dv are summed next, and zeroes the sums.
  void clear_keys(int64_t begin, int64_t end) {
    origin = begin;
    keys_end = end < places ? end : places;
    const int64_t count = keys_end - origin;
    if (count <= 0) return;
    std::memset(dk, 0, count * width_d * sizeof(float));
    std::memset(dv, 0, count * width_v * sizeof(float));
  }

  void store_queries() {
    RowCursor at(rows);
    for (int64_t r = 0; r < rows.rows; ++r, at.next())
      store_row(dq_total + r * width_d, p.scale,
                walk.query_row(walk.dq(g), rows.b, at.query(), at.head()), p.dtype, p.head_dim);
  }

  void store_keys(int64_t kv) {
    const int64_t b = kv / p.kv_heads, h = kv % p.kv_heads;
    for (int64_t j = origin; j < keys_end; ++j) {
      if (!walk.has_key(j)) continue;
      store_row(dk + (j - origin) * width_d, p.scale, walk.key_row(walk.dk(g), b, j, h), p.dtype,
                p.head_dim);
      store_row(dv + (j - origin) * width_v, 1.f, walk.key_row(walk.dv(g), b, j, h), p.dtype,
                p.value_dim);
    }
  }

  const Walk& walk;
  const typename Walk::BackwardParams& g;
  const AttentionParams& p;
  const AttentionBackwardParams dense;  // interface expected by QueryOperands
  QueryOperands<Op> queries;
  KeyOperands<Op> tile;
  RowTiles<Walk> tiles;
  KeyRuns runs;
  int64_t width_d, width_v, places;
  Split split;
  int64_t max_keys;
  Scores scores;
  cpu::Workspace workspace;
  float *dq, *dq_total, *dk, *dv;
  float *spare_d, *spare_v;  // dk and dv rows for padding keys
  float* query;              // per row, relative to the block's first query

  RowTile rows{};
  ScoreMod score_mod{p, 0, 0, Sequence(p, 0)};
  float lowest = 0, highest = 0;  // range of queries of the current rows
  KeyTile keys{};
  int64_t padded = 0, first_run = 0, origin = 0, keys_end = 0;
};

// Split of a walk's keys into parts, and the partial dQ of its KV heads.
template <class Walk>
struct KeyParts {
  int64_t count, part_size;  // part_size: floats per part

  explicit KeyParts(const Walk& walk) : count(Split(walk.key_places()).count) {
    const AttentionParams& p = walk.d.attention;
    part_size = walk.query_places() * (p.kv_heads ? p.heads / p.kv_heads : 0) *
                round_up(p.head_dim, kWidth);
  }
  int64_t floats() const { return count * part_size; }
};

template <class Op, bool kCoarse, class Walk>
void backward_on(const Walk* walks, const typename Walk::BackwardParams* each, int64_t count) {
  const AttentionParams& p = walks[0].d.attention;
  const int64_t heads = p.batch * p.kv_heads;
  double pairs = 0;
  int64_t max_parts = 1, floats = 0;
  for (int64_t r = 0; r < count; ++r) {
    const KeyParts<Walk> parts(walks[r]);
    max_parts = parts.count > max_parts ? parts.count : max_parts;
    floats += heads * parts.floats();
    pairs += walks[r].d.max_pairs();
  }
  const int threads = pairs * static_cast<double>(p.head_dim) < 5e5 ? 1 : cpu::num_threads();
  const bool whole_head = threads == 1 || max_parts == 1 || heads * count >= 2 * threads;
  cpu::Workspace shared(whole_head ? 0 : floats + heads * count + 2 * 16);
  float* partials = shared.take(whole_head ? 0 : floats);
  auto* finished = reinterpret_cast<int32_t*>(shared.take(whole_head ? 0 : heads * count));
  if (!whole_head) std::memset(finished, 0, heads * count * sizeof(int32_t));

  const auto items_of = [&](int64_t r) {
    return whole_head ? heads : heads * KeyParts<Walk>(walks[r]).count;
  };
  int64_t all_items = 0;
  for (int64_t r = 0; r < count; ++r) all_items += items_of(r);
  cpu::parallel_items(all_items, threads, [&](cpu::ItemCounter& items) {
    FlushDenormals flush;
    std::optional<BackwardWorker<Op, kCoarse, Walk>> worker;
    float* of_walk = partials;
    // Items come in ascending order.
    for (int64_t next, r = 0, first = 0; (next = items.next()) >= 0;) {
      for (; next - first >= items_of(r); worker.reset()) {
        of_walk += whole_head ? 0 : heads * KeyParts<Walk>(walks[r]).floats();
        first += items_of(r++);
      }
      if (!worker) worker.emplace(walks[r], each[r], whole_head);
      const int64_t item = next - first;
      if (whole_head) {
        worker->run_head(item);
        continue;
      }
      const KeyParts<Walk> parts(walks[r]);
      const int64_t kv = item / parts.count, part = item % parts.count;
      float* of_head = of_walk + kv * parts.floats();
      worker->run_split(kv, part, of_head + part * parts.part_size);
      // The last part to finish adds up all parts.
      if (__atomic_add_fetch(finished + r * heads + kv, 1, __ATOMIC_ACQ_REL) == parts.count)
        worker->reduce(kv, of_head, parts.part_size);
    }
  });
}

// Runs `count` walks, as listed_forward does.
template <class Walk>
void listed_backward(const Walk* walks, const typename Walk::BackwardParams* each, int64_t count) {
  if (count == 0) return;
  const DType dtype = walks[0].d.attention.dtype;
#if defined(TM_DOTS)
  if (dtype == DType::bfloat16) return backward_on<BFloat16, true>(walks, each, count);
#endif
  dtype == DType::float32 ? backward_on<Float32, false>(walks, each, count)
                          : backward_on<Float32, true>(walks, each, count);
}

}  // namespace tokenmill::TOKENMILL_ISA
