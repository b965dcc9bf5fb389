// Forward. A worker owns a tile of rows (queries of a block, in the heads that share a list and
// keys) and streams past it the keys that they see, in vectors of kWidth. Where a whole vector of
// neighbours is seen it is packed once for the KV head; what is left of small blocks and at the
// ends of ranges is gathered for the tile.
#include <cstring>

#include "cpu/parallel.h"
#include "dense/attention/cpu_weights.h"
#include "sparse/block_sparse_attention/cpu_keys.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kRowsOfTile = 144;  // a multiple of kTileRows
constexpr int64_t kStepVectors = 256 / kWidth;
static_assert(kStepVectors <= 64 && kStepVectors % kTileVectors == 0);

struct KeyVector {
  const float *k, *v;
  int64_t keys;                       // fewer than kWidth if gathered
  bool gathered;                      // else at[0] .. at[0] + kWidth - 1
  int64_t at[kWidth];                 // keys of the request
  float from[kWidth], until[kWidth];  // the queries that see them; unset if each sees all
  float first_from, last_from, first_until, last_until;

  bool seen(float first, float last) const { return first_from <= last && first < last_until; }
  bool whole(float first, float last) const { return last_from <= first && last < first_until; }

  void see(int64_t lane, SeenBy by) {
    from[lane] = static_cast<float>(by.from);
    until[lane] = static_cast<float>(by.until);
  }
  // Keys ascend in a run; those of several runs need not.
  void bound() {
    first_from = last_from = from[0];
    first_until = last_until = until[0];
    for (int64_t l = 1; l < keys; ++l) {
      if (from[l] < first_from) first_from = from[l];
      if (from[l] > last_from) last_from = from[l];
      if (until[l] < first_until) first_until = until[l];
      if (until[l] > last_until) last_until = until[l];
    }
    for (int64_t l = keys; l < kWidth; ++l) from[l] = SeenBy::kNever, until[l] = 0;
    if (keys < kWidth) last_from = SeenBy::kNever;
  }
};

struct Step {
  int64_t count;
  KeyVector vectors[kStepVectors];
};

struct SparseRows : QueryRows {
  float* query;             // of each row, relative to the block's first
  float *lowest, *highest;  // of the register tile that starts at a row
};

// Weights of kRows rows and kVectors vectors of keys, at `slot` of the step.
template <class Op, bool kCoarse, bool kPlain, int kRows, int kVectors>
__attribute__((noinline)) void score_tile(const SparseRows& t, int64_t row, const KeyVector* keys,
                                          int64_t slot) {
  vf s[kRows][kVectors];
  clear(s);
  const float* panels[kVectors];
  for (int j = 0; j < kVectors; ++j) panels[j] = keys[j].k;
  multiply_panels<Op>(s, t.q + row * t.ldq, t.ldq, panels, t.words);

  if constexpr (!kPlain) {
    TM_UNROLL(8)
    for (int r = 0; r < kRows; ++r) {
      TM_UNROLL(4)
      for (int j = 0; j < kVectors; ++j) s[r][j] = t.terms->exponent(s[r][j], zero(), zero());
    }
  } else if constexpr (Op::kPair != 1) {  // else q holds the factor
    const vf factor = set(t.terms->factor);
    TM_UNROLL(8)
    for (int r = 0; r < kRows; ++r) {
      TM_UNROLL(4)
      for (int j = 0; j < kVectors; ++j) s[r][j] = s[r][j] * factor;
    }
  }
  const vf hidden = set(hidden_exponent(ScoreMap::softmax));
  TM_UNROLL(4)
  for (int j = 0; j < kVectors; ++j) {
    if (keys[j].whole(t.lowest[row], t.highest[row])) [[likely]]
      continue;
    const vf from = load(keys[j].from), until = load(keys[j].until);
    TM_UNROLL(8)
    for (int r = 0; r < kRows; ++r) {
      const vf query = set(t.query[row + r]);
      s[r][j] = select(less(query, from), hidden, select(less(query, until), s[r][j], hidden));
    }
  }
  store_weights<Op, ScoreMap::softmax, kCoarse>(t, row, s, slot);
}

using ScoreTile = void (*)(const SparseRows&, int64_t, const KeyVector*, int64_t);

// The copy of score_tile for 1 .. kTileVectors vectors.
template <class Op, bool kCoarse, bool kPlain, int kRows, int kVectors = kTileVectors>
ScoreTile score_tile_for(int64_t vectors) {
  if constexpr (kVectors > Op::kPair)
    if (vectors < kVectors)
      return score_tile_for<Op, kCoarse, kPlain, kRows, kVectors - Op::kPair>(vectors);
  return &score_tile<Op, kCoarse, kPlain, kRows, kVectors>;
}

// C[M][width] += P V over the vectors of the step that `seen` has bits of, summed in registers
// first.
template <class Op, int M, int N = kTileVectors>
__attribute__((noinline)) void add_values(float* c, int64_t ldc, const float* p, int64_t ldp,
                                          const KeyVector* keys, uint64_t seen, int64_t column,
                                          int64_t width) {
  constexpr int64_t kWords = kWidth / Op::kPair;
  int64_t n = column;
  for (; n + N * kWidth <= width; n += N * kWidth) {
    vf acc[M][N];
    clear(acc);
    for (uint64_t left = seen; left; left &= left - 1) {
      const int64_t j = __builtin_ctzll(left);
      multiply<Op, false>(acc, p + j * kWords, ldp, keys[j].v + n, width, kWords);
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

template <class Op, bool kCoarse>
class Worker {
 public:
  Worker(const BlockSparseParams& d, int64_t shares)
      : d(d),
        p(d.attention),
        tiles(d, kRowsOfTile, kTileRows),
        runs(d),
        shares(shares),
        vectors(ceil_div(p.seqlen_k, kWidth)),
        t(sparse_rows(p)),
        k_floats(t.words * kWidth),
        v_floats(t.width * kWidth / Op::kPair),
        workspace(floats_needed()) {
    head_k = workspace.take(vectors * k_floats);
    head_v = workspace.take(vectors * v_floats);
    done = reinterpret_cast<uint8_t*>(workspace.take(ceil_div(vectors, 4)));
    own_k = workspace.take(kStepVectors * k_floats);
    own_v = workspace.take(kStepVectors * v_floats);
    runs.place(workspace.take(runs.floats()));
    steps = reinterpret_cast<Step*>(workspace.take(2 * kStepFloats));
    t.place(workspace, kRowsOfTile);
    t.query = workspace.take(kRowsOfTile);
    t.lowest = workspace.take(kRowsOfTile);
    t.highest = workspace.take(kRowsOfTile);
  }

  // One share of the tiles of one KV head.
  void run(int64_t item) {
    const int64_t kv = item / shares, share = item % shares;
    std::memset(done, 0, vectors);
    for (int64_t n = share * tiles.count / shares; n < (share + 1) * tiles.count / shares; ++n) {
      tile = tiles.at(kv, n);
      if (tile.rows <= 0) continue;
      length = d.length(tile.b);
      const ScoreTerms terms(p, tile.b, tile.head, Sequence(p, tile.b));
      t.terms = &terms;
      t.rows = tile.rows;
      load_queries();
      terms.plain ? stream_keys<true>() : stream_keys<false>();
      store_rows();
    }
  }

 private:
  static constexpr int64_t kStepFloats = sizeof(Step) / sizeof(float);

  static SparseRows sparse_rows(const AttentionParams& p) {
    SparseRows rows{};
    rows.set_sizes<Op>(p, kStepVectors * kWidth);
    return rows;
  }

  int64_t floats_needed() const {
    return (vectors + kStepVectors) * (k_floats + v_floats) + ceil_div(vectors, 4) + runs.floats() +
           2 * kStepFloats + t.size(kRowsOfTile) + 3 * kRowsOfTile + 10 * 16;
  }

  char* row_at(const Rows& rows, int64_t r) const {
    return row_of(rows, p.dtype, tile.b, 0, tile.query_of(r), tile.head_of(r));
  }
  const char* k_row(int64_t x) const { return row_of(p.k, p.dtype, tile.b, 0, x, tile.kv_head); }
  const char* v_row(int64_t x) const { return row_of(p.v, p.dtype, tile.b, 0, x, tile.kv_head); }

  void load_queries() {
    const int64_t padded = round_up(t.rows, kTileRows);
    const float factor = t.terms->plain && Op::kPair == 1 ? t.terms->factor : 1;
    tile.for_each_head([&](int64_t r, int64_t n) {
      pack_rows<Op>(row_at(p.q, r), p.dtype, p.q.seq, n, n, p.head_dim, factor, t.q + r * t.ldq,
                    t.ldq);
    });
    std::memset(t.q + t.rows * t.ldq, 0, (padded - t.rows) * t.ldq * sizeof(float));
    t.clear<ScoreMap::softmax>(padded);
    for (int64_t r = 0; r < padded; ++r)
      t.query[r] = static_cast<float>(tile.query_of(r < t.rows ? r : t.rows - 1) - tile.query);
    for (int64_t row = 0, n; row < t.rows; row += n) {
      n = rows_of_tile(t.rows - row);
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
      full[n] = score_tile_for<Op, kCoarse, kPlain, kTileRows>(n);
      shorter[n] = score_tile_for<Op, kCoarse, kPlain, kShortRows>(n);
    }
    runs.find(tile);
    next_run = 0;
    next_key = runs.count() > 0 ? runs[0].begin : 0;
    Step *now = steps, *next = steps + 1;
    for (fill(*now); now->count > 0; std::swap(now, next)) {
      fill(*next);
      for (int64_t c = 0; c < now->count; c += kTileVectors) {
        const int64_t end = c + kTileVectors < now->count ? c + kTileVectors : now->count;
        for (int64_t j = c; j < end; ++j) pack(now->vectors[j], j);
        for (int64_t row = 0, n; row < t.rows; row += n) {
          n = rows_of_tile(t.rows - row);
          int64_t count = end - c;
          while (count > 0 && !sees(now->vectors[c + count - 1], row)) --count;
          count = round_up(count, Op::kPair);
          if (count > 0)
            (n == kTileRows ? full : shorter)[count](t, row, now->vectors + c, c * kWidth);
        }
      }
      for (int64_t row = 0, n; row < t.rows; row += n) {
        n = rows_of_tile(t.rows - row);
        uint64_t seen = 0;
        for (int64_t j = 0; j < now->count; ++j) seen |= uint64_t{sees(now->vectors[j], row)} << j;
        if (!seen) continue;
        const auto product =
            n == kTileRows ? &add_values<Op, kTileRows> : &add_values<Op, kShortRows>;
        product(t.out + row * t.ldo, t.ldo, t.p + row * t.ldp, t.ldp, now->vectors, seen, 0,
                t.width);
      }
    }
  }

  bool sees(const KeyVector& keys, int64_t row) const {
    return keys.seen(t.lowest[row], t.highest[row]);
  }

  // The next vectors of keys, as many as a step takes.
  void fill(Step& step) {
    step.count = 0;
    KeyVector* open = nullptr;
    while (next_run < runs.count()) {
      const KeyRun& from = runs[next_run];
      if (next_key == from.end) {
        if (++next_run < runs.count()) next_key = runs[next_run].begin;
        continue;
      }
      const bool aligned = next_key % kWidth == 0 && next_key + kWidth <= from.end;
      if (aligned || !open || open->keys == kWidth) {
        if (step.count == kStepVectors) break;
        KeyVector& made = step.vectors[step.count++];
        made.gathered = !aligned;
        made.keys = aligned ? kWidth : 0;
        if (!aligned) open = &made;
        if (aligned) {
          made.at[0] = next_key;
          for (int64_t l = 0; l < kWidth; ++l) made.see(l, runs.seen_by(from, next_key + l));
          next_key += kWidth;
          continue;
        }
      }
      open->see(open->keys, runs.seen_by(from, next_key));
      open->at[open->keys++] = next_key++;
    }
    // Pairs of vectors share words of P: a last one that nobody sees fills up.
    for (int64_t j = 0; j < step.count; ++j) step.vectors[j].bound();
    if (step.count % Op::kPair) {
      KeyVector& nothing = step.vectors[step.count++];
      nothing.keys = 0;
      nothing.gathered = true;
      nothing.see(0, {SeenBy::kNever, 0});
      nothing.bound();
    }
  }

  void pack(KeyVector& keys, int64_t slot) {
    float *k = own_k + slot * k_floats, *v = own_v + slot * v_floats;
    if (!keys.gathered) {
      const int64_t n = keys.at[0] / kWidth;
      k = head_k + n * k_floats;
      v = head_v + n * v_floats;
      if (!done[n]) {
        done[n] = 1;
        pack_transposed<Op, kWidth>(k_row(keys.at[0]), p.dtype, p.k.seq, kWidth, p.head_dim, 1.f,
                                    k);
        pack_reduced_rows<Op>(v_row(keys.at[0]), p.dtype, p.v.seq, kWidth, p.value_dim, v, t.width);
      }
    } else {
      const char *k_rows[kWidth], *v_rows[kWidth];
      for (int64_t l = 0; l < keys.keys; ++l)
        k_rows[l] = k_row(keys.at[l]), v_rows[l] = v_row(keys.at[l]);
      pack_transposed<Op, kWidth>(ScatteredRows{k_rows}, p.dtype, keys.keys, p.head_dim, 1.f, k);
      pack_reduced_rows<Op>(ScatteredRows{v_rows}, p.dtype, keys.keys, p.value_dim, v, t.width);
      const int64_t set = words_of<Op>(keys.keys) * t.width;
      std::memset(v + set, 0, (v_floats - set) * sizeof(float));
    }
    keys.k = k;
    keys.v = v;
  }

  void store_rows() {
    for (int64_t r = 0; r < t.rows; ++r) {
      const RowScale scale = t.finish(r, nullptr);
      lse_of(p, p.lse, tile.b, 0, tile.head_of(r))[tile.query_of(r)] = scale.lse;
      store_row(t.out + r * t.ldo, scale.factor, row_at(p.out, r), p.dtype, p.value_dim);
    }
  }

  const BlockSparseParams& d;
  const AttentionParams& p;
  RowTiles tiles;
  KeyRuns runs;
  int64_t shares, vectors;
  SparseRows t;
  int64_t k_floats, v_floats;  // of a packed vector of keys
  cpu::Workspace workspace;
  float *head_k, *head_v;  // of the KV head, vectors packed when first needed
  uint8_t* done;
  float *own_k, *own_v;  // of the step
  Step* steps;           // the current one and the next

  RowTile tile{};
  int64_t length = 0;
  int64_t next_run = 0, next_key = 0;  // the next key that no step has
};

template <class Op, bool kCoarse>
void forward(const BlockSparseParams& d) {
  const AttentionParams& p = d.attention;
  const RowTiles tiles(d, kRowsOfTile, kTileRows);
  // A parallel region costs about as much as 2 Mflop on one thread.
  const double work = 2 * d.most_pairs() * static_cast<double>(p.head_dim + p.value_dim);
  const int threads = work < 2e6 ? 1 : cpu::num_threads();
  // An item is a share of the tiles of one KV head; at least four per thread for balance.
  const int64_t heads = p.batch * p.kv_heads;
  int64_t shares = threads == 1 ? 1 : ceil_div(4 * threads, heads);
  if (shares > tiles.count) shares = tiles.count > 0 ? tiles.count : 1;
  cpu::parallel_items(heads * shares, threads, [&](cpu::ItemCounter& items) {
    FlushDenormals flush;
    Worker<Op, kCoarse> worker(d, shares);
    for (int64_t item; (item = items.next()) >= 0;) worker.run(item);
  });
}

}  // namespace

void block_sparse_attention_forward(const BlockSparseParams& d) {
#if defined(__AVX512BF16__)
  if (d.attention.dtype == DType::bfloat16) return forward<BFloat16, true>(d);
#endif
  d.attention.dtype == DType::float32 ? forward<Float32, false>(d) : forward<Float32, true>(d);
}

}  // namespace tokenmill::TOKENMILL_ISA
