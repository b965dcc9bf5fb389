// Forward of attention over lists, for any walk (sparse/cpu_walk.h). A worker owns a tile of rows
// (queries of a block, in the heads that share a list and keys) and streams the keys that they see
// past it, in vectors of kWidth keys. Fully visible vectors of consecutive keys are packed once per
// KV head; the remaining keys of small blocks and range ends are gathered per tile from contiguous
// copies of their rows: in a [B, S, H, D] tensor each row is on another memory page, and tiles read
// it repeatedly.
#pragma once
#include <cstring>
#include <optional>
#include <utility>

#include "attention/cpu_weights.h"
#include "core/knobs.h"
#include "cpu/parallel.h"
#include "sparse/cpu_key_vectors.h"

namespace tokenmill::TOKENMILL_ISA {

// Rows of a register tile, or of a tile of AMX.
template <class Op>
constexpr int kFullRows = kInTiles<Op> ? Op::kWords : kTileRows;
constexpr int64_t kRowsOfTile = 144;  // multiple of kFullRows

struct SparseRows : QueryRows {
  float* query;             // per row, relative to the block's first query
  float *lowest, *highest;  // query range of the register tile that starts at a row
};

// Softmax weights of S = Q K^T for kRows rows and kVectors vectors of keys, stored at `slot` of the
// step. tile: first row of the register tile that these rows are of.
template <class Op, bool kCoarse, bool kPlain, int kRows, int kVectors>
TM_INLINE void weigh(const SparseRows& t, int64_t tile, int64_t row, vf (&s)[kRows][kVectors],
                     const KeyVector* keys, int64_t slot) {
  if constexpr (!kPlain) {
    via_stack(s, [&](vf* z) TM_LAMBDA {
      for (int x = 0; x < kRows * kVectors; ++x) z[x] = t.score_mod->exponent(z[x], zero(), zero());
    });
  } else if constexpr (Op::kPair != 1) {  // otherwise q includes the factor
    const vf factor = set(t.score_mod->factor);
    TM_UNROLL(8)
    for (int r = 0; r < kRows; ++r) {
      TM_UNROLL(4)
      for (int j = 0; j < kVectors; ++j) s[r][j] = s[r][j] * factor;
    }
  }
  const vf hidden = set(hidden_exponent(Exponent::softmax));
  TM_UNROLL(4)
  for (int j = 0; j < kVectors; ++j) {
    if (keys[j].whole(t.lowest[tile], t.highest[tile])) [[likely]]
      continue;
    const vf from = load(keys[j].from), until = load(keys[j].until);
    TM_UNROLL(8)
    for (int r = 0; r < kRows; ++r) {
      const vf query = set(t.query[row + r]);
      s[r][j] = select(less(query, from), hidden, select(less(query, until), s[r][j], hidden));
    }
  }
  store_weights<Op, Exponent::softmax, kCoarse>(t, row, s, slot);
}

// S = Q K^T and softmax weights P of kRows rows and kVectors vectors of keys, stored at `slot` of
// the step.
template <class Op, bool kCoarse, bool kPlain, int kRows, int kVectors>
__attribute__((noinline)) void score_tile(const SparseRows& t, int64_t row, const KeyVector* keys,
                                          int64_t slot) {
  const float* panels[kVectors];
  for (int j = 0; j < kVectors; ++j) panels[j] = keys[j].k;
#if defined(__AMX_BF16__)
  if constexpr (kInTiles<Op>) {
    alignas(64) float scores[kRows][kPanel];
    multiply_panels_in_tiles(scores[0], kPanel, t.q + row * t.ldq, t.ldq, panels, t.words);
    TM_UNROLL(1)
    for (int r = 0; r < kRows; r += kShortRows) {
      vf s[kShortRows][kVectors];
      TM_UNROLL(8)
      for (int i = 0; i < kShortRows; ++i) {
        TM_UNROLL(4)
        for (int j = 0; j < kVectors; ++j) s[i][j] = load(scores[r + i] + j * kWidth);
      }
      weigh<Op, kCoarse, kPlain>(t, row, row + r, s, keys, slot);
    }
  } else
#endif
  {
    vf s[kRows][kVectors];
    clear(s);
    multiply_panels<Op>(s, t.q + row * t.ldq, t.ldq, panels, t.words);
    weigh<Op, kCoarse, kPlain>(t, row, row, s, keys, slot);
  }
}

using ScoreTile = void (*)(const SparseRows&, int64_t, const KeyVector*, int64_t);

// Instance of score_tile for 1 .. kTileVectors vectors.
template <class Op, bool kCoarse, bool kPlain, int kRows, int kVectors = kTileVectors>
ScoreTile score_tile_for(int64_t vectors) {
  if constexpr (kVectors > Op::kPair)
    if (vectors < kVectors)
      return score_tile_for<Op, kCoarse, kPlain, kRows, kVectors - Op::kPair>(vectors);
  return &score_tile<Op, kCoarse, kPlain, kRows, kVectors>;
}

// C[M, width] += P V over the vectors whose bit is set in `seen`. A weight of 0 masks its value.
template <class Op, int M, int N = kTileVectors>
__attribute__((noinline)) void add_values(float* c, int64_t ldc, const float* p, int64_t ldp,
                                          const KeyVector* keys, uint64_t seen, int64_t column,
                                          int64_t width) {
  constexpr int64_t kWords = kWidth / Op::kPair;
  const auto each = [&](const auto& product) TM_LAMBDA {
    for (uint64_t left = seen; left; left &= left - 1) {
      const int64_t j = __builtin_ctzll(left);
      product(p + j * kWords, keys[j].v);
    }
  };
  int64_t n = column;
  for (; n + N * kWidth <= width; n += N * kWidth) {
    vf acc[M][N];
    clear(acc);
    each([&](const float* weights, const float* v)
             TM_LAMBDA { multiply<Op, false>(acc, weights, ldp, v + n, width, kWords); });
    if (!finite(acc)) [[unlikely]] {
      vf shown[M][N];  // a separate accumulator, so that acc stays in registers
      clear(shown);
      each([&](const float* weights, const float* v)
               TM_LAMBDA { multiply_shown<Op>(shown, weights, ldp, v + n, width, kWords); });
      std::memcpy(acc, shown, sizeof acc);
    }
    TM_UNROLL(16)
    for (int i = 0; i < M; ++i) {
      TM_UNROLL(8)
      for (int j = 0; j < N; ++j) {
        float* out = c + i * ldc + n + j * kWidth;
        store(out, load(out) + acc[i][j]);
      }
    }
  }
  if constexpr (N > 1)
    if (n < width) add_values<Op, M, N - 1>(c, ldc, p, ldp, keys, seen, n, width);
}

#if defined(__AMX_BF16__)
// The same in tiles for 16 rows.
template <int N = 4>
__attribute__((noinline)) void add_values_in_tiles(float* c, int64_t ldc, const float* p,
                                                   int64_t ldp, const KeyVector* keys,
                                                   uint64_t seen, int64_t column, int64_t width) {
  constexpr int64_t kWords = kWidth / 2;
  constexpr int kRow = N * kTile;
  alignas(64) float sums[kTile][kRow], finite_values[kWords][kRow];
  const auto each = [&](const auto& product) TM_LAMBDA {
    for (uint64_t left = seen; left; left &= left - 1) {
      const int64_t j = __builtin_ctzll(left);
      product(p + j * kWords, keys[j].v);
    }
  };
  int64_t n = column;
  for (; n + kRow <= width; n += kRow) {
    clear_tiles<1, N>();
    each([&](const float* weights, const float* v)
             TM_LAMBDA { add_half_to_tiles<N>(weights, ldp, v + n, width); });
    store_tiles<1, N>(sums[0], kRow);
    vf nothing = zero();  // becomes NaN after an infinity or a NaN
    for (int i = 0; i < kTile; ++i) {
      TM_UNROLL(4)
      for (int j = 0; j < kRow; j += kWidth) nothing = fma(load(sums[i] + j), zero(), nothing);
    }
    if (sum_lanes(nothing) != 0) [[unlikely]] {
      clear_tiles<1, N>();
      each([&](const float* weights, const float* v) {
        for (int64_t w = 0; w < kWords; ++w)
          for (int j = 0; j < kRow; j += kWidth) {
            const vf x = load(v + w * width + n + j);
            store(finite_values[w] + j, only(~not_finite(x), x));
          }
        add_half_to_tiles<N>(weights, ldp, finite_values[0], kRow);
      });
      store_tiles<1, N>(sums[0], kRow);
      each([&](const float* weights, const float* v) {
        for (int i = 0; i < kTile; ++i)
          for (int j = 0; j < kRow; j += kWidth)
            store(sums[i] + j, load(sums[i] + j) +
                                   product_of_others(weights + i * ldp, v + n + j, width, kWords));
      });
    }
    for (int i = 0; i < kTile; ++i) {
      TM_UNROLL(4)
      for (int j = 0; j < kRow; j += kWidth) {
        float* out = c + i * ldc + n + j;
        store(out, load(out) + load(sums[i] + j));
      }
    }
  }
  if constexpr (N > 1)
    if (n < width) add_values_in_tiles<N - 1>(c, ldc, p, ldp, keys, seen, n, width);
}
#endif

template <class Op, int M>
constexpr auto* values_product() {
#if defined(__AMX_BF16__)
  if constexpr (kInTiles<Op>)
    return &add_values_in_tiles<>;
  else
#endif
    return &add_values<Op, M>;
}

template <class Op, bool kCoarse, class Walk>
class ForwardWorker {
 public:
  ForwardWorker(const Walk& walk, int64_t shares)
      : walk(walk),
        p(walk.d.attention),
        tiles(walk, kRowsOfTile, kFull),
        runs(walk.max_runs()),
        shares(shares),
        places(walk.key_places()),
        vectors(ceil_div(places, kWidth)),
        t(sparse_rows(p)),
        k_floats(t.words * kWidth),
        v_floats(t.width * kWidth / Op::kPair),
        k_bytes(round_up(p.head_dim * size_of(p.dtype), 64)),
        v_bytes(round_up(p.value_dim * size_of(p.dtype), 64)),
        workspace(floats_needed()) {
    head_k = workspace.take(vectors * k_floats);
    head_v = workspace.take(vectors * v_floats);
    done = reinterpret_cast<uint8_t*>(workspace.take(ceil_div(vectors, 4)));
    copy = reinterpret_cast<char*>(workspace.take(places * (k_bytes + v_bytes) / 4));
    copied = reinterpret_cast<uint8_t*>(workspace.take(ceil_div(places, 4)));
    own_k = workspace.take(kStepVectors * k_floats);
    own_v = workspace.take(kStepVectors * v_floats);
    runs.place(workspace.take(runs.floats()));
    now = reinterpret_cast<Step*>(workspace.take(kStepFloats));
    coming = reinterpret_cast<Step*>(workspace.take(kStepFloats));
    t.place(workspace, kRowsOfTile);
    t.query = workspace.take(kRowsOfTile);
    t.lowest = workspace.take(kRowsOfTile);
    t.highest = workspace.take(kRowsOfTile);
  }

  // Runs one share of the tiles of one KV head.
  void run(int64_t item) {
    kv = item / shares;
    const int64_t share = item % shares;
    next_tile = share * tiles.count / shares;
    end_tile = (share + 1) * tiles.count / shares;
    if (kv != packed) {
      std::memset(done, 0, vectors);
      std::memset(copied, 0, places);
      packed = kv;
    }
    find_next();
    while (next.rows > 0) {
      tile = next;
      sink = runs.sink;
      stored = RowCursor(tile);
      const ScoreMod score_mod(p, tile.b, tile.head, Sequence(p, tile.b));
      t.score_mod = &score_mod;
      t.rows = tile.rows;
      load_queries();
      score_mod.plain ? stream_keys<true>() : stream_keys<false>();
      store_rows();
    }
  }

 private:
  using Words = typename Op::Words;
  static constexpr int kFull = kFullRows<Op>, kShort = kInTiles<Op> ? kFull : kShortRows;
  static constexpr int64_t kStepFloats = sizeof(Step) / sizeof(float);

  static SparseRows sparse_rows(const AttentionParams& p) {
    SparseRows rows{};
    rows.set_sizes<Op>(p, kStepVectors * kWidth);
    return rows;
  }

  int64_t floats_needed() const {
    return (vectors + kStepVectors) * (k_floats + v_floats) + ceil_div(vectors, 4) +
           places * (k_bytes + v_bytes) / 4 + ceil_div(places, 4) + runs.floats() +
           2 * kStepFloats + t.size(kRowsOfTile) + 3 * kRowsOfTile + 12 * 16;
  }

  const char* k_row(int64_t x) const {
    return walk.key_row(walk.k(), kv / p.kv_heads, x, kv % p.kv_heads);
  }
  const char* v_row(int64_t x) const {
    return walk.key_row(walk.v(), kv / p.kv_heads, x, kv % p.kv_heads);
  }

  void load_queries() {
    const int64_t padded = round_up(t.rows, kFull);
    const float factor = t.score_mod->plain && Op::kPair == 1 ? t.score_mod->factor : 1;
    const char* q_rows[kRowsOfTile];
    RowCursor at(tile);
    for (int64_t r = 0; r < t.rows; ++r, at.next()) {
      q_rows[r] = walk.query_row(walk.q(), tile.b, at.query(), at.head());
      t.query[r] = static_cast<float>(at.query() - tile.query);
    }
    for (int64_t r = t.rows; r < padded; ++r) t.query[r] = t.query[t.rows - 1];
    pack_rows<Op>(ScatteredRows{q_rows}, p.dtype, t.rows, padded, p.head_dim, factor, t.q, t.ldq);
    t.clear<Exponent::softmax>(padded);
    for (int64_t row = 0, n; row < t.rows; row += n) {
      n = rows_of_tile<Op>(t.rows - row);
      t.lowest[row] = t.highest[row] = t.query[row];
      for (int64_t r = row + 1; r < row + n; ++r) {
        t.lowest[row] = t.query[r] < t.lowest[row] ? t.query[r] : t.lowest[row];
        t.highest[row] = t.query[r] > t.highest[row] ? t.query[r] : t.highest[row];
      }
    }
  }

  template <bool kPlain>
  void stream_keys() {
    ScoreTile full[kTileVectors + 1], shorter[kTileVectors + 1];
    for (int n = 1; n <= kTileVectors; ++n) {
      full[n] = score_tile_for<Op, kCoarse, kPlain, kFull>(n);
      shorter[n] = score_tile_for<Op, kCoarse, kPlain, kShort>(n);
    }
    for (bool last = false; !last;) {
      std::swap(now, coming);
      fill(*coming);
      last = coming->count == 0;
      if (last) find_next();
      const int64_t rows_of_step = ceil_div(now->count, kTileVectors) * t.rows;
      int64_t rows_done = 0;
      for (int64_t c = 0; c < now->count; c += kTileVectors) {
        const int64_t end = c + kTileVectors < now->count ? c + kTileVectors : now->count;
        for (int64_t j = c; j < end; ++j) pack(now->vectors[j], j);
        for (int64_t row = 0, n; row < t.rows; row += n) {
          n = rows_of_tile<Op>(t.rows - row);
          prefetch(rows_done, rows_done + n, rows_of_step);
          if (last && c == 0) prefetch_rows(row, n);
          rows_done += n;
          int64_t count = end - c;
          while (count > 0 && !sees(now->vectors[c + count - 1], row)) --count;
          count = round_up(count, Op::kPair);
          if (count > 0) (n == kFull ? full : shorter)[count](t, row, now->vectors + c, c * kWidth);
        }
      }
      for (int64_t row = 0, n; row < t.rows; row += n) {
        n = rows_of_tile<Op>(t.rows - row);
        uint64_t seen = 0;
        for (int64_t j = 0; j < now->count; ++j) seen |= uint64_t{sees(now->vectors[j], row)} << j;
        if (!seen) continue;
        const auto product =
            n == kFull ? values_product<Op, kFull>() : values_product<Op, kShort>();
        product(t.out + row * t.ldo, t.ldo, t.p + row * t.ldp, t.ldp, now->vectors, seen, 0,
                t.width);
      }
    }
  }

  // Prefetches the share [from, to) of `all` of the rows that the next step packs.
  void prefetch(int64_t from, int64_t to, int64_t all) const {
    const int64_t keys = coming->count * kWidth, end = (to < all ? to : all) * keys / all;
    for (int64_t i = from * keys / all; i < end; ++i) {
      const KeyVector& of = coming->vectors[i / kWidth];
      const int64_t l = i % kWidth;
      if (of.gathered ? l >= of.keys : done[of.at[0] / kWidth]) continue;
      const int64_t x = of.gathered ? of.at[l] : of.at[0] + l;
      if (of.gathered && copied[x]) {
        prefetch_row<false>(copy_of(x), k_bytes + v_bytes);
      } else {
        prefetch_row<false>(k_row(x), p.head_dim * size_of(p.dtype));
        prefetch_row<false>(v_row(x), p.value_dim * size_of(p.dtype));
      }
    }
  }

  // Prefetches `count` more rows of the output and of the next tile's queries.
  void prefetch_rows(int64_t row, int64_t count) {
    for (int64_t r = row; r < row + count; ++r) {
      if (r < t.rows) {
        prefetch_row<true>(walk.query_row(walk.out(), tile.b, stored.query(), stored.head()),
                           p.value_dim * size_of(p.dtype));
        stored.next();
      }
      if (r < next.rows) {
        prefetch_row<false>(walk.query_row(walk.q(), next.b, coming_row.query(), coming_row.head()),
                            p.head_dim * size_of(p.dtype));
        coming_row.next();
      }
    }
  }

  // Finds the next non-empty tile, if any, the key runs that it sees, and its first step.
  void find_next() {
    next.rows = 0;
    while (next_tile < end_tile && next.rows <= 0) next = tiles.at(kv, next_tile++);
    if (next.rows <= 0) {
      next.rows = 0;
      runs.clear();
    } else {
      walk.find(next, runs);
      coming_row = RowCursor(next);
    }
    next_run = next_key = 0;
    fill(*coming);
  }

  bool sees(const KeyVector& keys, int64_t row) const {
    return keys.seen(t.lowest[row], t.highest[row]);
  }

  // Fills a step with the next vectors of keys.
  void fill(Step& step) {
    step.count = 0;
    KeyVector* open = nullptr;
    for (; next_run < runs.count(); ++next_run, next_key = 0) {
      const KeyRun& run = runs[next_run];
      if (next_key < run.begin) next_key = run.begin;
      while (next_key < run.end) {
        const bool aligned = next_key % kWidth == 0 && next_key + kWidth <= run.end;
        KeyVector* to = aligned ? nullptr : open;
        if (!to || to->keys == kWidth) {
          if (step.count == kStepVectors) return close(step);
          to = &step.vectors[step.count++];
          to->open(!aligned);
          if (!aligned) open = to;
        }
        const int64_t to_border = kWidth - next_key % kWidth, room = kWidth - to->keys;
        int64_t n = to_border < room ? to_border : room;
        if (n > run.end - next_key) n = run.end - next_key;
        const SeenBy first = walk.seen_by(run, next_key),
                     last = walk.seen_by(run, next_key + n - 1);
        if (last.from == 0 && first.until >= next.queries) {
          to->see_all();
        } else {
          for (int64_t l = 0; l < n; ++l) to->see(to->keys + l, walk.seen_by(run, next_key + l));
        }
        for (int64_t l = 0; l < n; ++l) to->at[to->keys++] = next_key++;
      }
    }
    close(step);
  }

  static void close(Step& step) {
    for (int64_t j = 0; j < step.count; ++j) step.vectors[j].close();
    // Vectors are paired in words of P: an odd last one is padded with a fully masked vector.
    if (step.count % Op::kPair) {
      KeyVector& nothing = step.vectors[step.count++];
      nothing.open(true);
      nothing.close();
    }
  }

  // Address of the copied row of key x: K followed by V.
  char* copy_of(int64_t x) const { return copy + x * (k_bytes + v_bytes); }
  const char* copied_row(int64_t x) {
    char* to = copy_of(x);
    if (!copied[x]) {
      copied[x] = 1;
      std::memcpy(to, k_row(x), p.head_dim * size_of(p.dtype));
      std::memcpy(to + k_bytes, v_row(x), p.value_dim * size_of(p.dtype));
    }
    return to;
  }

  void pack(KeyVector& keys, int64_t slot) {
    const char *k_rows[kWidth], *v_rows[kWidth];
    if (!keys.gathered) {
      const int64_t n = keys.at[0] / kWidth;
      keys.k = head_k + n * k_floats;
      keys.v = head_v + n * v_floats;
      if (done[n]) return;
      done[n] = 1;
      for (int64_t l = 0; l < kWidth; ++l) {
        k_rows[l] = k_row(keys.at[l]);
        v_rows[l] = v_row(keys.at[l]);
      }
      return pack_rows_of(k_rows, v_rows, kWidth, head_k + n * k_floats, head_v + n * v_floats);
    }
    float *k = own_k + slot * k_floats, *v = own_v + slot * v_floats;
    for (int64_t l = 0; l < keys.keys; ++l) {
      k_rows[l] = copied_row(keys.at[l]);
      v_rows[l] = k_rows[l] + k_bytes;
    }
    pack_rows_of(k_rows, v_rows, keys.keys, k, v);
    const int64_t set = words_of<Words>(keys.keys) * t.width;
    std::memset(v + set, 0, (v_floats - set) * sizeof(float));
    keys.k = k;
    keys.v = v;
  }
  void pack_rows_of(const char* const* k_rows, const char* const* v_rows, int64_t count, float* k,
                    float* v) const {
    pack_transposed<Op, kWidth>(ScatteredRows{k_rows}, p.dtype, count, p.head_dim, 1.f, k);
    pack_reduced_rows<Words>(ScatteredRows{v_rows}, p.dtype, count, p.value_dim, v, t.width);
  }

  void store_rows() {
    RowCursor at(tile);
    for (int64_t r = 0; r < t.rows; ++r, at.next()) {
      const float* logit = p.sink ? p.sink + at.head() : sink > -kInf ? &sink : nullptr;
      const RowScale scale = t.epilogue(r, logit, true);
      p.lse[walk.lse_at(tile.b, at.head(), at.query())] = scale.lse;
      store_row(t.out + r * t.ldo, scale.factor,
                walk.query_row(walk.out(), tile.b, at.query(), at.head()), p.dtype, p.value_dim);
    }
  }

  const Walk& walk;
  const AttentionParams& p;
  RowTiles<Walk> tiles;
  KeyRuns runs;
  int64_t shares, places, vectors;
  SparseRows t;
  int64_t k_floats, v_floats;  // per packed vector of keys
  int64_t k_bytes, v_bytes;    // per copied row
  cpu::Workspace workspace;
  float *head_k, *head_v;  // vectors of the KV head, packed on first use
  uint8_t* done;
  char* copy;  // rows for gathered keys
  uint8_t* copied;
  float *own_k, *own_v;  // vectors of the step
  Step *now, *coming;    // current and next step of keys

  int64_t kv = 0, packed = -1;  // KV heads: the current one, and the owner of the packed vectors
  int64_t next_tile = 0, end_tile = 0;
  RowTile tile{}, next{};
  float sink = -kInf;
  RowCursor stored, coming_row;        // next rows to prefetch: of the output, and of `next`
  int64_t next_run = 0, next_key = 0;  // first key that is not yet in a step
};

template <class Op, bool kCoarse, class Walk>
void forward_on(const Walk* walks, int64_t count) {
  const AttentionParams& p = walks[0].d.attention;
  double pairs = 0;
  int64_t max_tiles = 1;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t tiles = RowTiles<Walk>(walks[r], kRowsOfTile, kFullRows<Op>).count;
    max_tiles = tiles > max_tiles ? tiles : max_tiles;
    pairs += walks[r].d.max_pairs();
  }
  // A parallel region costs about as much as 2 Mflop on one thread.
  const double work = 2 * pairs * static_cast<double>(p.head_dim + p.value_dim);
  const int threads = work < 2e6 ? 1 : cpu::num_threads();
  // A work item is a share of the tiles of one KV head; several items per thread, for load balance.
  const int64_t heads = p.batch * p.kv_heads;
  const int64_t per_thread = knob(Knob::block_sparse_attention_shares);
  int64_t shares = threads == 1 ? 1 : ceil_div(per_thread * threads, heads * count);
  if (shares > max_tiles) shares = max_tiles;
  cpu::parallel_items(count * heads * shares, threads, [&](cpu::ItemCounter& items) {
    FlushDenormals flush;
    typename Op::Unit unit;
    std::optional<ForwardWorker<Op, kCoarse, Walk>> worker;
    for (int64_t item, walk = -1; (item = items.next()) >= 0;) {
      if (item / (heads * shares) != walk) {
        walk = item / (heads * shares);
        worker.emplace(walks[walk], shares);
      }
      worker->run(item % (heads * shares));
    }
  });
}

// Runs `count` walks that have batch, heads, head dimensions and dtype in common.
template <class Walk>
void listed_forward(const Walk* walks, int64_t count) {
  if (count == 0) return;
  const DType dtype = walks[0].d.attention.dtype;
#if defined(__AVX512BF16__)
  if (dtype == DType::bfloat16) return forward_on<FastBFloat16Vectors, true>(walks, count);
#endif
  dtype == DType::float32 ? forward_on<Float32, false>(walks, count)
                          : forward_on<Float32, true>(walks, count);
}

}  // namespace tokenmill::TOKENMILL_ISA
