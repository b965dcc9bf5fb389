// Panels of keys times rows of queries and heads. The heads of a query are summed as the products
// leave the registers, so that only one panel of scores per query reaches memory. A query keeps the
// scores above a threshold; when it has too many, the best topk determine a new threshold.
#include <algorithm>

#include "core/knobs.h"
#include "cpu/element_bytes.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "select/cpu_rows.h"
#include "select/indexer_topk_select/cpu_candidates.h"
#include "select/indexer_topk_select/cpu_pack.h"
#include "select/indexer_topk_select/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kFewRows = 64;  // at this many rows, packing the keys takes a sixth of the time
constexpr int64_t kMaxQueries = 128;         // per item
constexpr int64_t kMaxCandidates = 1 << 20;  // per item
constexpr int64_t kPartKeys = 4096;          // minimum per item
constexpr int64_t kKeysOfHint = 16;  // minimum keys per hint and thread: a hint costs one more key

// An item is a tile of queries of a sequence and a part of its keys. A tile has so few rows, of
// queries and heads (Knob::indexer_rows), that its words stay in L2.
struct IndexerPlan {
  int64_t list;   // maximum length of a list
  int64_t limit;  // candidates of a query before they are cut to the list
  int64_t room;   // capacity for the candidates of a query
  int64_t tile_queries, tiles;
  int64_t part_keys, parts;
  int64_t hints;  // hints used per query

  IndexerPlan(const IndexerParams& p, int threads) {
    list = std::min(p.topk, indexer_blocks(p));
    limit = list + std::max<int64_t>(list, 512);
    room = limit + kPanel + kWidth;
    const int64_t maximum = std::max<int64_t>(kMaxCandidates / room, 1);
    const int64_t balanced = ceil_div(p.tokens, 4 * threads), few = ceil_div(kFewRows, p.heads);
    tile_queries = std::min(knob(Knob::indexer_rows) / p.heads, std::max(balanced, few));
    tile_queries = std::clamp<int64_t>(tile_queries, 1, std::min(maximum, kMaxQueries));
    tiles = 0;
    for (int64_t b = 0; b < p.batch; ++b) tiles += tiles_of(p, b);
    part_keys = p.k.rows;
    if (tiles > 0 && tiles < 2 * threads && threads > 1) {
      const int64_t keys = std::max(ceil_div(p.k.rows * tiles, 4 * threads), kPartKeys);
      part_keys = round_up(keys, p.block_k == 1 ? kPanel : p.block_k);
    }
    parts = ceil_div(p.k.rows, part_keys);
    hints = p.previous.data && p.block_k == 1 ? std::min(p.hints, limit) : 0;
    if (hints < list || hints * kKeysOfHint * (parts > 1 ? threads : 1) > p.k.rows) hints = 0;
  }

  int64_t tiles_of(const IndexerParams& p, int64_t b) const {
    return ceil_div(indexer_sequence(p, b).queries, tile_queries);
  }
};

// Adds M rows of a product with a panel to scores: row i belongs to head `head` + i modulo `heads`,
// and to the query of the previous row or, at head 0, to the next query.
template <class Op, int M, bool kRelu>
__attribute__((noinline)) void add_heads(float* scores, const float* weights, int64_t head,
                                         int64_t heads, int64_t rows, const float* a, int64_t lda,
                                         const float* keys, int64_t words) {
  constexpr int N = kTileVectors;
  vf product[M][N], sum[N];
  clear(product);
  multiply<Op, false>(product, a, lda, keys, kPanel, words);
  TM_UNROLL(8)
  for (int j = 0; j < N; ++j) sum[j] = head > 0 ? load(scores + j * kWidth) : zero();
  TM_UNROLL(16)
  for (int i = 0; i < M; ++i) {
    if (i == rows) break;
    const vf weight = set(weights[i]);
    TM_UNROLL(8)
    for (int j = 0; j < N; ++j)
      sum[j] = fma(weight, kRelu ? max_of(zero(), product[i][j]) : product[i][j], sum[j]);
    const bool last = ++head == heads;
    if (!last && i + 1 < rows) continue;
    TM_UNROLL(8)
    for (int j = 0; j < N; ++j) store(scores + j * kWidth, sum[j]);
    if (!last) continue;
    TM_UNROLL(8)
    for (int j = 0; j < N; ++j) sum[j] = zero();
    scores += kPanel;
    head = 0;
  }
}

// Lists of the parts of a tile, until the last part is done.
struct PartLists {
  float* scores;  // [tiles, tile_queries, parts, list]
  int32_t* ids;
  int64_t* counts;  // [tiles, tile_queries, parts]
  int32_t* done;    // [tiles]
  float* hinted;    // [tiles], with several parts: thresholds

  static int64_t entries(const IndexerPlan& plan) {
    return plan.parts == 1 ? 0 : plan.tiles * plan.tile_queries * plan.parts;
  }
  static int64_t floats(const IndexerPlan& plan) {
    return entries(plan) * (2 * plan.list + 2) + 2 * plan.tiles + 5 * 16;
  }
  PartLists(cpu::Workspace& memory, const IndexerPlan& plan) {
    const int64_t lists = entries(plan);
    scores = memory.take(lists * plan.list);
    ids = reinterpret_cast<int32_t*>(memory.take(lists * plan.list));
    counts = reinterpret_cast<int64_t*>(memory.take(2 * lists));
    done = reinterpret_cast<int32_t*>(memory.take(plan.tiles));
    hinted = memory.take(plan.tiles);
    std::fill(done, done + plan.tiles, 0);
  }
};

template <class Op>
class Indexer {
 public:
  Indexer(const IndexerParams& p, const IndexerPlan& plan, const PartLists& shared)
      : p(p),
        plan(plan),
        shared(shared),
        words(words_of<Op>(p.head_dim)),
        ldq(round_up(words, kWidth)),
        element_size(element_bytes(p.dtype)),
        key_size(element_bytes(p.key_dtype)),
        rows(plan.tile_queries * p.heads),
        memory((rows + kTileRows) * ldq + rows + kWidth + words * kPanel +
               plan.tile_queries * (kPanel + 2 * plan.room + kCandidateFloats + 5) + kPanel +
               2 * plan.room + 3 * kPanel + 16 * 16) {
    queries = memory.take((rows + kTileRows) * ldq);
    weights = memory.take(rows + kWidth);
    keys = memory.take(words * kPanel);
    scores = memory.take(plan.tile_queries * kPanel);
    blocks = memory.take(kPanel);
    open = memory.take(plan.tile_queries);
    open_ids = reinterpret_cast<int64_t*>(memory.take(2 * plan.tile_queries));
    ends = reinterpret_cast<int64_t*>(memory.take(2 * plan.tile_queries));
    scales = memory.take(kPanel);
    offsets = reinterpret_cast<const char**>(memory.take(2 * kPanel));
    candidates = reinterpret_cast<Candidates*>(memory.take(kCandidateFloats * plan.tile_queries));
    float* const all = memory.take(2 * plan.tile_queries * plan.room);
    for (int64_t i = 0; i < plan.tile_queries; ++i) {
      float* const own = all + 2 * i * plan.room;
      candidates[i] = {own, reinterpret_cast<int32_t*>(own + plan.room), 0, kNegInf};
    }
    b = p.batch;
    tiles_before = plan.tiles;
    order = reinterpret_cast<uint32_t*>(memory.take(plan.room));
    sorted = reinterpret_cast<uint32_t*>(memory.take(plan.room));
    // Product tiles extend up to kTileRows - 1 rows past the last one.
    std::fill(queries, queries + (rows + kTileRows) * ldq, 0.f);
  }

  // A threshold just below the smallest score of the list, or lower, from the keys on the previous
  // list; -inf for several queries, or if the hints are too few.
  float hinted_threshold(int64_t tile) {
    if (tile != loaded) load_tile(tile);
    if (count > 1) return kNegInf;
    const int32_t* const hint = static_cast<const int32_t*>(p.previous.data) +
                                query_offset(p, p.previous, sequence, b, first_query);
    int32_t* const ids = candidates[0].ids;
    int64_t found = 0, highest = p.num_sink - 1;
    for (int64_t h = 0; h < plan.hints; ++h)
      if (hint[h] > highest && hint[h] < ends[0]) ids[found++] = highest = hint[h];
    if (found < plan.list) return kNegInf;
    ahead = ahead_end = nullptr;
    for (int64_t c = 0; c < found; c += kPanel) {
      const int64_t n = std::min<int64_t>(kPanel, found - c);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t key = sequence.k_start + ids[c + i];
        offsets[i] = key_at(key_run(p.k, b, key), 0);
        if (key_size == 1) copy_scales(i, key, 1);
      }
      pack_rows_of(ScatteredRows{offsets}, n);
      multiply_all(0);
      scale_scores(scores, n);
      for (int64_t i = 0; i < n; ++i) order[c + i] = key_of(scores[i]);
    }
    return just_below(score_of(nth_largest(order, found, plan.list)));
  }

  // Later queries see more keys, so the last tiles come first.
  void run(int64_t item) {
    const int64_t tile = plan.tiles - 1 - item / plan.parts, part = item % plan.parts;
    if (tile != loaded) load_tile(tile);
    const int64_t first = std::max(part * plan.part_keys, p.num_sink / p.block_k * p.block_k);
    const int64_t last = std::min((part + 1) * plan.part_keys, ends[count - 1]);
    for (int64_t i = 0; i < count; ++i) {
      candidates[i].count = 0;
      candidates[i].threshold = open[i] = kNegInf;
    }
    if (plan.hints > 0)
      candidates[0].threshold = plan.parts > 1 ? shared.hinted[tile] : hinted_threshold(tile);
    int64_t query = 0;  // first query that sees a key of the panel
    for (int64_t row = first; row < last; row += kPanel) {
      const int64_t n = std::min<int64_t>(kPanel, last - row);
      while (ends[query] <= row) ++query;
      pack_keys(row, n);
      find_next(row + kPanel, last);
      multiply_all(query);
      for (int64_t i = query; i < count; ++i) take_scores(i, row, n);
    }
    for (int64_t i = 0; i < count; ++i) {
      close_block(i);
      candidates[i].cut(plan.list, order, sorted);
    }
    if (plan.parts == 1) return write_lists();
    keep_lists(tile, part);
    if (__atomic_add_fetch(&shared.done[tile], 1, __ATOMIC_ACQ_REL) < plan.parts) return;
    merge_lists(tile);
    write_lists();
  }

 private:
  static constexpr int64_t kCandidateFloats = sizeof(Candidates) / sizeof(float);

  void load_tile(int64_t tile) {
    loaded = tile;
    // Starts at the sequence of the previous tile: a worker's tiles ascend.
    while (tile < tiles_before) tiles_before -= plan.tiles_of(p, --b);
    for (int64_t own; tile >= tiles_before + (own = plan.tiles_of(p, b)); ++b) tiles_before += own;
    sequence = indexer_sequence(p, b);
    first_query = (tile - tiles_before) * plan.tile_queries;
    count = std::min(plan.tile_queries, sequence.queries - first_query);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t query = first_query + i;
      ends[i] = seen_keys(p, sequence, query).end;
      const char* const q = static_cast<const char*>(p.q.data) +
                            query_offset(p, p.q, sequence, b, query) * element_size;
      pack_rows<Op>(q, p.dtype, p.q.head, p.heads, p.heads, p.head_dim, 1,
                    queries + i * p.heads * ldq, ldq);
      const int64_t at = query_offset(p, p.weights, sequence, b, query);
      for (int64_t h = 0; h < p.heads; ++h)
        weights[i * p.heads + h] = scalar_as_float(p.weights.data, p.weight_dtype, at + h);
    }
  }

  const char* key_at(const KeyRun& run, int64_t t) const {
    return static_cast<const char*>(p.k.data) + (run.offset + t * p.k.seq) * key_size;
  }
  // Packs a panel, transposed.
  void pack_keys(int64_t row, int64_t n) {
    const int64_t first = sequence.k_start + row;
    if (key_size == 1) copy_scales(0, first, n);
    KeyRun run = key_run(p.k, b, first);
    if (run.end >= first + n) return pack_rows_of(EvenRows{key_at(run, 0), p.k.seq}, n);
    for (int64_t i = 0, begin = 0; i < n; ++i) {
      if (first + i == run.end) run = key_run(p.k, b, first + (begin = i));
      offsets[i] = key_at(run, i - begin);
    }
    pack_rows_of(ScatteredRows{offsets}, n);
  }
  // Copies scales of keys `first` .. first + n - 1 to the scales of a panel from index `at` on.
  void copy_scales(int64_t at, int64_t first, int64_t n) {
    const float* const all = static_cast<const float*>(p.k_scale.data);
    if (!all) std::fill(scales + at, scales + at + n, 1.f);
    for (int64_t i = 0; all && i < n;) {
      const KeyRun run = key_run(p.k_scale, b, first + i);
      const int64_t until = std::min(n, run.end - first);
      const float* from = all + run.offset;
      if (p.k_scale.seq == 1) {
        std::copy(from, from + until - i, scales + at + i);
        i = until;
      }
      for (; i < until; ++i, from += p.k_scale.seq) scales[at + i] = *from;
    }
  }
  template <class Source>
  void pack_rows_of(const Source from, int64_t n) {
    if (key_size == 1) {
      // A scale that is not finite makes its key NaN.
      std::fill(scales + n, scales + kPanel, 0.f);
      for (int64_t i = 0; i < kPanel; i += kWidth) {
        const vf x = load(scales + i);
        store(scales + i, x + (x - x));
      }
      return pack_codes<Op>(from, n, p.head_dim, scales, keys);
    }
    if constexpr (Op::kPair == 1)
      if (p.dtype == DType::bfloat16) return pack_pairs(from, n, p.head_dim, keys);
    pack_transposed<Op>(from, p.dtype, n, p.head_dim, 1, keys);
  }

  // Selects rows of the next panel to prefetch while panels are multiplied, if they are contiguous.
  // Transposing reads 32 bytes of a row at a time, which hardware prefetchers do not follow.
  void find_next(int64_t row, int64_t last) {
    ahead = ahead_end = nullptr;
    if (row >= last || p.k.seq != p.head_dim) return;
    const int64_t first = sequence.k_start + row;
    const KeyRun run = key_run(p.k, b, first);
    const int64_t n = std::min({kPanel + int64_t{0}, last - row, run.end - first});
    ahead = static_cast<const char*>(p.k.data) + run.offset * key_size;
    ahead_end = ahead + n * p.head_dim * key_size;
  }
  TM_INLINE void prefetch(int64_t bytes) {
    const char* const end = std::min(ahead + bytes, ahead_end);
    for (; ahead < end; ahead += 64) __builtin_prefetch(ahead, 0, 2);
  }

  void multiply_all(int64_t query) {
    if (p.relu)
      multiply_from<true>(query);
    else
      multiply_from<false>(query);
  }
  template <bool kRelu>
  void multiply_from(int64_t query) {
    const int64_t first = query * p.heads, end = count * p.heads;
    const int64_t share = round_up((ahead_end - ahead) / ceil_div(end - first, kTileRows), 64) + 64;
    each_tile(end - first, [&](int64_t r, auto m) TM_LAMBDA {
      const int64_t row = first + r, i = row / p.heads;
      prefetch(share);
      add_heads<Op, decltype(m)::value, kRelu>(
          scores + i * kPanel, weights + row, row - i * p.heads, p.heads,
          std::min<int64_t>(end - row, decltype(m)::value), queries + row * ldq, ldq, keys, words);
    });
  }

  // Applies the part of the scales that pack_codes leaves.
  TM_INLINE void scale_scores(float* z, int64_t n) const {
    if (Op::kPair == 2 && key_size == 1)
      for (int64_t j = 0; j < n; j += kWidth) store(z + j, load(z + j) * load(scales + j));
  }

  // Takes the scores of query i and n keys from `row` on.
  TM_INLINE void take_scores(int64_t i, int64_t row, int64_t n) {
    float* const z = scores + i * kPanel;
    scale_scores(z, n);
    const int64_t from = p.num_sink - row, to = ends[i] - row;
    if (from > 0 || to < n) {
      for (int64_t j = 0; j < n; j += kWidth)
        store(z + j, select(lanes(from - j, to - j), load(z + j), set(kNegInf)));
    }
    if (p.block_k == 1) {
      candidates[i].add(z, n, row);
    } else {
      const int64_t block = row / p.block_k, closed = reduce_blocks(i, z, row, n);
      candidates[i].add(blocks, closed, block);
    }
    if (candidates[i].count > plan.limit) candidates[i].cut(plan.list, order, sorted);
  }

  // Writes maxima of the blocks that end among these keys to `blocks`. Returns their number.
  int64_t reduce_blocks(int64_t i, const float* z, int64_t row, int64_t n) {
    int64_t closed = 0;
    float maximum = open[i];
    for (int64_t j = 0, block = row / p.block_k; j < n; ++block) {
      const int64_t end = (block + 1) * p.block_k - row, until = std::min(end, n);
      for (; j < until; ++j) maximum = maximum != maximum || maximum > z[j] ? maximum : z[j];
      open_ids[i] = block;
      if (until < end) break;
      blocks[closed++] = maximum;
      maximum = kNegInf;
    }
    open[i] = maximum;
    return closed;
  }

  // Closes a block that extends past the last key.
  void close_block(int64_t i) {
    if (open[i] == kNegInf) return;
    blocks[0] = open[i];
    candidates[i].add(blocks, 1, open_ids[i]);
  }

  void keep_lists(int64_t tile, int64_t part) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t list = (tile * plan.tile_queries + i) * plan.parts + part;
      const Candidates& c = candidates[i];
      std::copy(c.scores, c.scores + c.count, shared.scores + list * plan.list);
      std::copy(c.ids, c.ids + c.count, shared.ids + list * plan.list);
      shared.counts[list] = c.count;
    }
  }

  // Merges parts in order, so that ids ascend.
  void merge_lists(int64_t tile) {
    for (int64_t i = 0; i < count; ++i) {
      Candidates& c = candidates[i];
      c.count = 0;
      for (int64_t part = 0; part < plan.parts; ++part) {
        const int64_t list = (tile * plan.tile_queries + i) * plan.parts + part;
        const int64_t more = shared.counts[list], at = list * plan.list;
        std::copy(shared.scores + at, shared.scores + at + more, c.scores + c.count);
        std::copy(shared.ids + at, shared.ids + at + more, c.ids + c.count);
        c.count += more;
        c.cut(plan.list, order, sorted);
      }
    }
  }

  void write_lists() const {
    for (int64_t i = 0; i < count; ++i) {
      const Candidates& c = candidates[i];
      const int64_t row = sequence.q_start + first_query + i;
      int32_t* const ids = p.indices + row * p.topk;
      std::copy(c.ids, c.ids + c.count, ids);
      std::fill(ids + c.count, ids + p.topk, -1);
      p.counts[row] = static_cast<int32_t>(c.count);
      if (!p.values) continue;
      float* const values = p.values + row * p.topk;
      std::copy(c.scores, c.scores + c.count, values);
      std::fill(values + c.count, values + p.topk, kNegInf);
    }
  }

  const IndexerParams& p;
  const IndexerPlan& plan;
  const PartLists& shared;
  int64_t words, ldq, element_size, key_size, rows;
  cpu::Workspace memory;
  float *queries, *weights, *keys;  // words of [query, head] and of a panel
  float *scores, *blocks, *open;    // [query, kPanel]; closed blocks; current block of each query
  int64_t *open_ids, *ends;         // id of the current block; end of the keys that each query sees
  float* scales;                    // scales of a panel
  const char** offsets;             // rows of a panel
  Candidates* candidates;
  uint32_t *order, *sorted;
  const char *ahead = nullptr, *ahead_end = nullptr;  // next panel to prefetch
  int64_t b, tiles_before;  // current sequence, and the number of tiles before it
  int64_t loaded = -1, first_query = 0, count = 0;
  IndexerSequence sequence{};
};

template <class Op>
void select_keys(const IndexerParams& p, int threads) {
  const IndexerPlan plan(p, threads);
  cpu::Workspace memory(PartLists::floats(plan));
  const PartLists shared(memory, plan);
  if (plan.hints > 0 && plan.parts > 1) {
    FlushDenormals flush;
    Indexer<Op> indexer(p, plan, shared);
    for (int64_t tile = 0; tile < plan.tiles; ++tile)
      shared.hinted[tile] = indexer.hinted_threshold(tile);
  }
  cpu::parallel_items(plan.tiles * plan.parts, threads, [&](cpu::ItemCounter& items) {
    FlushDenormals flush;
    Indexer<Op> indexer(p, plan, shared);
    for (int64_t item; (item = items.next()) >= 0;) indexer.run(item);
  });
}

}  // namespace

void indexer_topk_select(const IndexerParams& p) {
  // Below about 64 Ki products a parallel region costs more than it gains.
  const int64_t products = p.tokens * p.heads * p.k.rows * p.head_dim;
  const int threads = products < (1 << 16) ? 1 : cpu::num_threads();
#if defined(TM_DOTS)
  if (p.dtype == DType::bfloat16) return select_keys<BFloat16>(p, threads);
#endif
  select_keys<Float32>(p, threads);
}

}  // namespace tokenmill::TOKENMILL_ISA
