// Forward. A worker owns a tile of queries of one head and streams the keys past it in steps; the
// score map is applied in the registers of S = Q K^T, and P goes to P V through L1.
#include <cstring>

#include "core/knobs.h"
#include "cpu/parallel.h"
#include "dense/attention/cpu_few_rows.h"
#include "dense/attention/cpu_kernels.h"
#include "dense/attention/cpu_packed_head.h"
#include "dense/attention/cpu_score_tile.h"

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
      shorter[n] = score_tile_for<Op, kKind, kCoarse, kPlain, kOtherRows>(n);
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
        const KeyRange keys = keys_of(row, n, step, step_end);
        if (!masked) {
          if (kInTiles<Op> && row + n < t.rows && keys == keys_of(row + n, n, step, step_end))
            n *= 2;
          add_values(row, n, step, keys.begin, keys.end);
          continue;
        }
        for_each_run(done[g], [&](int64_t begin, int64_t end) {
          const int64_t at = step + begin * kWidth, behind = step + end * kWidth;
          add_values(row, n, step, at > keys.begin ? at : keys.begin,
                     behind < keys.end ? behind : keys.end);
        });
      }
    }
  }

  struct KeyRange {
    int64_t begin, end;
    bool operator==(const KeyRange&) const = default;
  };

  // Keys of a step that rows row .. row + n - 1 see, in units of a reduction.
  KeyRange keys_of(int64_t row, int64_t n, int64_t step, int64_t step_end) const {
    const int64_t i = t.first + row, from = t.band.begin(i), to = t.band.end(i + n - 1);
    return {(from < step ? step : from) / kUnit * kUnit,
            round_up(to > step_end ? step_end : to, kUnit)};
  }

  // O += P V: weights of rows row .. row + n - 1 times values from .. to - 1.
  void add_values(int64_t row, int64_t n, int64_t step, int64_t from, int64_t to) {
    if (from >= to) return;
    const bool finite = head.finite(from, to);
    const auto product =
        n == kFullRows ? rows_product<Op, kFullRows>(finite) : rows_product<Op, kOtherRows>(finite);
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

  // Rows of a register tile; in tiles P V may take two of them.
  static constexpr int kFullRows = kInTiles<Op> ? Op::kWords : kTileRows;
  static constexpr int kOtherRows = kInTiles<Op> ? 2 * kFullRows : kShortRows;
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
