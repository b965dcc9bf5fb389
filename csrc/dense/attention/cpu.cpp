// Forward. A worker owns a tile of queries of one head and streams the keys past it in steps; the
// score map is applied in the registers of S = Q K^T, and P goes to P V through L1.
#include <cstring>

#include "attention/cpu_weights.h"
#include "core/knobs.h"
#include "cpu/parallel.h"
#include "dense/attention/cpu_few_rows.h"
#include "dense/attention/cpu_kernels.h"
#include "dense/attention/cpu_mask_forward.h"
#include "dense/attention/cpu_packed_head.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

// Sequences of a call: of its tensors, or requests with keys in a KV cache.
struct Sequences {
  const AttentionParams& p;
  const DecodeParams* cached = nullptr;

  const KvCache* cache() const { return cached ? &cached->cache : nullptr; }
  int64_t count() const { return cached ? cached->num_requests : p.batch; }
  int64_t number(int64_t n) const { return cached && cached->requests ? cached->requests[n] : n; }
  // Sequence of request b.
  Sequence at(int64_t b) const {
    Sequence s(p, b);
    if (cached) s.k_length = cached->cache.length(b);
    return s;
  }
};

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
__attribute__((noinline)) void hide_pairs(const PairTest& cut, float hidden, vf* s, int rows,
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
    clear_tiles<kVectors>();
    add_to_tiles<kVectors>(q, t.ldq, panel, kPanel, 0, t.words);
    store_tiles<kVectors>(ahead.scores[ahead.now][0], kPanel);
  }
  const bool more = row + kTile < t.rows;
  ahead.q = more ? q + kTile * t.ldq : nullptr;
  ahead.panel = panel;
  ahead.vectors = kVectors;
  if (more) clear_tiles<kVectors>();
  // The sums are stored before the last rows are weighed, so that the next call does not wait.
  constexpr int kParts = kTile / kShortRows;
  const int64_t steps = t.words / kTile;
  TM_UNROLL(1)
  for (int64_t part = 0, word = 0; part < kParts; ++part) {
    if (more && part + 1 < kParts) {
      const int64_t until = ceil_div(steps * (part + 1), kParts - 1) * kTile;
      add_to_tiles<kVectors>(ahead.q, t.ldq, panel, kPanel, word, until);
      word = until;
    } else if (more) {
      store_tiles<kVectors>(ahead.scores[ahead.now ^ 1][0], kPanel);
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

struct Sizes {
  int64_t longest_q = 0, longest_k = 0;
  double pairs = 0;

  explicit Sizes(const Sequences& sequences) {
    const AttentionParams& p = sequences.p;
    const bool alike = !p.cu_seqlens_q && !sequences.cached;
    for (int64_t n = 0; n < (alike ? 1 : sequences.count()); ++n) {
      const Sequence s = sequences.at(sequences.number(n));
      longest_q = s.q_length > longest_q ? s.q_length : longest_q;
      longest_k = s.k_length > longest_k ? s.k_length : longest_k;
      pairs += static_cast<double>(s.q_length) * static_cast<double>(s.k_length);
    }
    if (alike) pairs *= static_cast<double>(p.batch);
  }
};

template <class Op, Exponent kKind, bool kCoarse>
class Worker {
 public:
  Worker(const Sequences& sequences, const Sizes& sizes, int64_t shares)
      : sequences(sequences),
        p(sequences.p),
        shares(shares),
        panels(ceil_div(sizes.longest_k, kPanel)),
        t(tile_of(p)),
        mask(p),
        workspace(floats_needed(sizes)) {
    head.p = &p;
    head.cache = sequences.cache();
    head.words = t.words;
    head.width = t.width;
    head.k = workspace.take(head.k_size(sizes.longest_k, p.head_dim));
    head.v = workspace.take(head.v_size(sizes.longest_k, t.width));
    head.done = reinterpret_cast<uint8_t*>(workspace.take(ceil_div(panels, 4)));
    head.place(workspace);
    t.place(workspace, kQueryTile);
    mask.place(workspace, sizes.longest_k);
  }

  // One share of the query tiles of one KV head, its query heads in succession.
  void run(int64_t item) {
    const Share tiles = share_of(item);
    for (int64_t n = tiles.begin; n < tiles.end; ++n) {
      place = place_of(item, n);
      // Prefetch target. The next item may go to another worker: its first tile is then prefetched
      // in vain.
      next =
          n + 1 < tiles.end ? place_of(item, n + 1) : place_of(item + 1, share_of(item + 1).begin);
      if (place.kv != packed) std::memset(head.done, 0, panels);
      packed = place.kv;
      head.s = place.s;
      head.b = place.b;
      head.h = place.kv % p.kv_heads;
      const ScoreMod score_mod(p, place.b, place.h, place.s);
      t.score_mod = &score_mod;
      t.band = place.band;
      t.first = place.first;
      t.rows = place.rows;
#if defined(__AMX_BF16__)
      scores_ahead.q = nullptr;
      t.ahead = &scores_ahead;
#endif
      if (mask.any()) mask.enter(place.s, place.b, place.h, place.first, place.rows);
      load_queries();
      stream_keys();
      store_rows();
    }
  }

 private:
  struct Share {
    int64_t begin, end;  // range of the KV head's tiles
  };

  // A query tile: rows from `first` on of query head h.
  struct Place {
    Sequence s;
    Band band;
    int64_t kv, b, h, first, rows;
  };

  Share share_of(int64_t item) const {
    if (item >= sequences.count() * p.kv_heads * shares) return {0, 0};
    const Sequence s = sequences.at(sequences.number(item / shares / p.kv_heads));
    const int64_t tiles = ceil_div(s.q_length, kQueryTile) * (p.heads / p.kv_heads);
    return {item % shares * tiles / shares, (item % shares + 1) * tiles / shares};
  }

  Place place_of(int64_t item, int64_t n) const {
    const int64_t kv = item / shares, n_th = kv / p.kv_heads, group = p.heads / p.kv_heads;
    if (n_th >= sequences.count()) return {place.s, place.band, kv, 0, 0, 0, 0};
    const int64_t b = sequences.number(n_th);
    const Sequence s = sequences.at(b);
    const int64_t tiles = ceil_div(s.q_length, kQueryTile);
    const int64_t h = kv % p.kv_heads * group + (tiles ? n / tiles : 0);
    const int64_t first = tiles ? n % tiles * kQueryTile : 0, left = s.q_length - first;
    return {s,
            Band::of_window(p.window_left, p.window_right, s.q_length, s.k_length),
            kv,
            b,
            h,
            first,
            left < kQueryTile ? left : kQueryTile};
  }

  static QueryTile tile_of(const AttentionParams& p) {
    QueryTile tile{};
    tile.set_sizes<Op>(p, kKeyStep);
    return tile;
  }

  int64_t floats_needed(const Sizes& sizes) const {
    return head.k_size(sizes.longest_k, p.head_dim) + head.v_size(sizes.longest_k, t.width) +
           ceil_div(panels, 4) + PackedHead<Op>::codes_size(sequences.cache(), t.words) +
           t.size(kQueryTile) + mask.size(sizes.longest_k) + 4 * 16;
  }

  char* row_at(const Rows& rows, const Place& at, int64_t row) const {
    return row_of(rows, p.dtype, at.b, at.s.q_start, at.first + row, at.h);
  }

  void load_queries() {
    const int64_t padded = round_up(t.rows, kFullRows);
    const float factor = t.score_mod->plain && Op::kPair == 1 ? t.score_mod->factor : 1;
    pack_rows<Op>(row_at(p.q, place, 0), p.dtype, p.q.seq, t.rows, padded, p.head_dim, factor, t.q,
                  t.ldq);
    t.clear<kKind>(padded);
  }

  void stream_keys() { t.score_mod->plain ? stream_keys<true>() : stream_keys<false>(); }

  template <bool kPlain>
  void stream_keys() {
    ScoreTile full[kTileVectors + 1], shorter[kTileVectors + 1];
    for (int n = 1; n <= kTileVectors; ++n) {
      full[n] = score_tile_for<Op, kKind, kCoarse, kPlain, kFullRows>(n);
      shorter[n] = score_tile_for<Op, kKind, kCoarse, kPlain, kFewerRows>(n);
    }
    const int64_t begin = t.band.begin(t.first) / kPanel * kPanel;
    const int64_t end = t.band.end(t.first + t.rows - 1);
    const bool masked = mask.any();
    bool first_panel = true;
    for (int64_t step = begin; step < end; step += kKeyStep) {
      const int64_t step_end = step + kKeyStep < end ? step + kKeyStep : end;
      if (masked && !mask.sees(step, step_end)) continue;
      uint64_t done[kQueryTile / kShortRows] =
          {};  // masked: computed vectors of P, per group of rows
      for (int64_t column = step; column < step_end; column += kPanel) {
        if (masked && !mask.enter_panel(column)) continue;
        head.ensure(column);
        for (int64_t row = 0, n, g = 0; row < t.rows; row += n, ++g) {
          n = rows_of_tile<Op>(t.rows - row);
          prefetch(row, n, column, first_panel);
          Vectors seen = t.seen(row, n, column, Op::kPair);
          if (masked) seen = seen.within(mask.vectors(g));
          if (seen.count <= 0) continue;
          const int64_t skip = seen.first * kWidth;
          if (masked) {
            t.cut = mask.pairs(g);
            const int64_t vector = (column - step) / kWidth + seen.first;
            done[g] |= bits_of(vector, vector + seen.count);
          }
          (n == kFullRows ? full : shorter)[seen.count](t, row, head.k_panel(column) + skip,
                                                        column + skip, column + skip - step);
        }
        first_panel = false;
      }
      for (int64_t row = 0, n, g = 0; row < t.rows; row += n, ++g) {
        n = rows_of_tile<Op>(t.rows - row);
        const int64_t i = t.first + row;
        int64_t from = t.band.begin(i), to = t.band.end(i + n - 1);
        from = (from < step ? step : from) / kUnit * kUnit;
        to = round_up(to > step_end ? step_end : to, kUnit);
        if (!masked) {
          add_values(row, n, step, from, to);
          continue;
        }
        for_each_run(done[g], [&](int64_t begin, int64_t end) {
          const int64_t at = step + begin * kWidth, behind = step + end * kWidth;
          add_values(row, n, step, at > from ? at : from, behind < to ? behind : to);
        });
      }
    }
  }

  // O += P V: weights of rows row .. row + n - 1 times values from .. to - 1.
  void add_values(int64_t row, int64_t n, int64_t step, int64_t from, int64_t to) {
    if (from >= to) return;
    const bool finite = head.finite(from, to);
    const auto product =
        n == kFullRows ? rows_product<Op, kFullRows>(finite) : rows_product<Op, kFewerRows>(finite);
    product(t.out + row * t.ldo, t.ldo, t.p + row * t.ldp + (from - step) / Op::kPair, t.ldp,
            head.v_rows(from), head.width, (to - from) / Op::kPair, t.width);
  }

  // Prefetches a share of what is needed soon: the next panel; during the first panel of a tile
  // also its output rows, the next query tile, and the first panel of the next head if it differs.
  void prefetch(int64_t row, int64_t count, int64_t column, bool first_panel) const {
    head.prefetch(column + kPanel, row, count, t.rows);
    if (mask.any()) head.prefetch_packed(column + kPanel, row, count, t.rows);
    if (!first_panel) return;
    for (int64_t r = row; r < row + count; ++r) {
      if (r < t.rows) prefetch_row<true>(row_at(p.out, place, r), p.value_dim * size_of(p.dtype));
      if (r < next.rows) prefetch_row<false>(row_at(p.q, next, r), p.head_dim * size_of(p.dtype));
    }
    if (next.rows > 0 && next.kv != place.kv) {
      PackedHead<Op> another = head;
      another.s = next.s;
      another.b = next.b;
      another.h = next.kv % p.kv_heads;
      another.prefetch_rows(next.band.begin(next.first) / kPanel * kPanel, row, count, t.rows);
    }
  }

  float visible(int64_t i) const {
    const int64_t begin = t.band.begin(i), end = t.band.end(i);
    return mask.any() ? mask.visible(*t.score_mod, i, begin, end)
                      : t.score_mod->visible(i, begin, end);
  }

  RowScale divide(int64_t r) const {
    if (p.normalize != Normalize::count) return {normalizer(p, t.divisor(r)), t.sum(r)};
    const float keys = visible(t.first + r);
    return {normalizer(p, keys), keys};
  }

  void store_rows() {
    for (int64_t r = 0; r < t.rows; ++r) {
      RowScale scale{1, 0};
      if (kKind == Exponent::softmax)
        scale = t.epilogue(r, p.sink ? p.sink + place.h : nullptr, p.lse);
      if (kKind == Exponent::logit) scale = divide(r);
      if (p.lse) lse_of(p, p.lse, place.b, place.s.q_start, place.h)[t.first + r] = scale.lse;
      store_row(t.out + r * t.ldo, scale.factor, row_at(p.out, place, r), p.dtype, p.value_dim);
    }
  }

  // Rows of a register tile.
  static constexpr int kFullRows = kInTiles<Op> ? Op::kWords : kTileRows;
  static constexpr int kFewerRows = kInTiles<Op> ? kFullRows : kShortRows;
  static constexpr int64_t kUnit = Op::kPair * Op::kWords;  // keys that a reduction takes at once

  const Sequences& sequences;
  const AttentionParams& p;
  int64_t shares, panels;
  QueryTile t;
#if defined(__AMX_BF16__)
  ScoresAhead scores_ahead;
#endif
  TileMask<Op> mask;
  cpu::Workspace workspace;
  PackedHead<Op> head{.s = Sequence(p, 0)};
  Place place{Sequence(p, 0), {}, 0, 0, 0, 0, 0}, next = place;
  int64_t packed = -1;
};

template <class Op, Exponent kKind, bool kCoarse>
void forward(const Sequences& sequences) {
  const AttentionParams& p = sequences.p;
  const Sizes sizes(sequences);
  // A parallel region costs about as much as 2 Mflop on one thread.
  const double work = 2 * sizes.pairs * static_cast<double>(p.heads * (p.head_dim + p.value_dim));
  const int threads = work < 2e6 ? 1 : cpu::num_threads();
  // An item is a share of the query tiles of one KV head; several per thread for balance.
  const int64_t tiles = p.heads / p.kv_heads * ceil_div(sizes.longest_q, kQueryTile);
  const int64_t per_thread = knob(Knob::attention_shares);
  int64_t shares =
      threads == 1 ? 1 : ceil_div(per_thread * threads, sequences.count() * p.kv_heads);
  if (shares > tiles) shares = tiles > 0 ? tiles : 1;
  const int64_t items = sequences.count() * p.kv_heads * shares;
  cpu::parallel_items(items, threads, [&](cpu::ItemCounter& counter) {
    FlushDenormals flush;
    typename Op::Unit unit;
    Worker<Op, kKind, kCoarse> worker(sequences, sizes, shares);
    for (int64_t item; (item = counter.next()) >= 0;) worker.run(item);
  });
}

template <class Op, bool kCoarse>
void forward(const Sequences& sequences) {
  switch (exponent_of(sequences.p)) {
    case Exponent::softmax:
      return forward<Op, Exponent::softmax, kCoarse>(sequences);
    case Exponent::sigmoid:
      return forward<Op, Exponent::sigmoid, kCoarse>(sequences);
    case Exponent::logit:
      return forward<Op, Exponent::logit, kCoarse>(sequences);
  }
}

void forward(const Sequences& sequences) {
#if defined(__AVX512BF16__)
  const bool codes = sequences.cached && holds_codes(sequences.cached->cache);
  if (sequences.p.dtype == DType::bfloat16 && !codes) return forward<FastBFloat16, true>(sequences);
#endif
  sequences.p.dtype == DType::float32 ? forward<Float32, false>(sequences)
                                      : forward<Float32, true>(sequences);
}

}  // namespace

void attention_forward(const AttentionParams& p) {
  if (has_few_rows(p)) return attend_few_rows(p);
  forward({p});
}
void attention_forward_in_tiles(const AttentionParams& p) { forward({p}); }
void attention_prefill(const DecodeParams& d) { forward({d.attention, &d}); }

}  // namespace tokenmill::TOKENMILL_ISA
