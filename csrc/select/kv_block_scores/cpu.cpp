// Panels of keys times the query rows of a KV head: few rows are multiplied with the keys as they
// are in memory, more rows with a transposed copy. Masks are applied to the product, which is then
// reduced over rows of a block, queries and heads while in cache.
#include <algorithm>
#include <cstring>

#include "cpu/float8.h"
#include "cpu/parallel.h"
#include "cpu/tile.h"
#include "cpu/workspace.h"
#include "select/kv_block_scores/cpu_vote.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kPartColumns = 96;  // score rows that share a panel, if there are that many
constexpr int64_t kAllColumns = 768;  // the same over all KV heads, to stay in cache
constexpr int64_t kItemRows = 1024;   // minimum key rows per item
constexpr int64_t kAheadRows = 16;    // prefetch distance, in rows
constexpr int64_t kFewColumns = 8;    // up to this many, a transposed copy does not pay

// Score rows ("columns", since they are contiguous in memory) of a KV head are ordered by row of
// the result, head, query. A set of them makes one result. An item is some rows of the result, for
// all heads, and some key blocks, whose heads are read one after another, since they are adjacent.
struct ScorePlan {
  int64_t group, row_queries, set, part_sets, sets, parts;
  int64_t panel_blocks, item_blocks, items_per_part;

  explicit ScorePlan(const BlockScoreParams& p)
      : group(p.heads / std::max<int64_t>(p.kv_heads, 1)),
        row_queries(queries_of_row(p)),
        set(row_queries * (reduces_group(p) ? group : 1)),
        part_sets(std::max<int64_t>(
            std::min(kPartColumns, kAllColumns / std::max<int64_t>(p.kv_heads, 1)) / set, 1)),
        sets(p.rows * (reduces_group(p) ? 1 : group)),
        parts(ceil_div(sets, part_sets)),
        panel_blocks(std::max<int64_t>(kPanel / p.block_rows, 1)),
        item_blocks(round_up(ceil_div(kItemRows, p.block_rows), panel_blocks)),
        items_per_part(ceil_div(p.blocks, item_blocks)) {}
};

// Maximum; NaN if either is NaN.
TM_INLINE vf max_or_nan(vf a, vf b) { return select(equal(a, a), max_of(a, b), a); }
TM_INLINE float max_or_nan(float a, float b) { return a != a || a > b ? a : b; }

// float32 keys as words, without the factor of FloatWords: a third of the work of three columns.
struct Unscaled {
  TM_INLINE vf operator()(const float* p, int64_t i, int64_t length) const {
    return Elements<DType::float32>::load_n(p, i, length - i);
  }
};

template <class Op>
class Scorer {
 public:
  explicit Scorer(const BlockScoreParams& p)
      : p(p),
        plan(p),
        columns(plan.part_sets * plan.set),
        halves(p.boxes ? 2 : 1),
        words(words_of<Op>(p.head_dim)),
        ldq(round_up(words, kWidth)),
        codes(p.k_dtype == DType::float8_e4m3fn),
        query_size(p.dtype == DType::float32 ? 4 : 2),
        key_size(codes ? 1 : query_size),
        few(std::min(columns, plan.sets * plan.set) <= kFewColumns),
        block_ld(round_up(std::min(plan.panel_blocks, p.blocks), kWidth)),
        memory(halves * (p.kv_heads * columns * ldq + words * kPanel + kPanel * row_floats()) +
               columns * (p.kv_heads * (block_ld + (few ? kPanel : 0)) + kPanel + 2) +
               4 * row_floats() + 10 * kPanel + 18 * 16) {
    queries = memory.take(halves * p.kv_heads * columns * ldq);
    keys = memory.take(halves * words * kPanel);
    gathered = reinterpret_cast<char*>(memory.take(halves * kPanel * row_floats()));
    products = memory.take(columns * kPanel * (few ? p.kv_heads : 1));
    blocks = memory.take(p.kv_heads * columns * block_ld);
    offsets = reinterpret_cast<int64_t*>(memory.take(2 * kPanel));
    scale_offsets = reinterpret_cast<int64_t*>(memory.take(2 * kPanel));
    key_scales = memory.take(kPanel);
    ends = reinterpret_cast<int64_t*>(memory.take(2 * columns));
    for (float*& row : rows) row = memory.take(row_floats());
    hidden = memory.take(kPanel);
    total = memory.take(2 * kPanel);
  }

  void run(int64_t item) {
    const int64_t part = item / plan.items_per_part;
    if (part != loaded) load_queries(part);
    loaded = part;
    const int64_t first = item % plan.items_per_part * plan.item_blocks;
    const int64_t last = std::min(first + plan.item_blocks, p.blocks);
    for (int64_t block = first; block < last; block += plan.panel_blocks)
      score_blocks(block, std::min(block + plan.panel_blocks, last));
  }

 private:
  int64_t row_floats() const { return p.head_dim + kWidth; }
  const char* query_row(int64_t h, int64_t i) const {
    return static_cast<const char*>(p.q.data) +
           (b * p.q.batch + i * p.q.seq + h * p.q.head) * query_size;
  }

  // Loads the columns of a part as words, and the end of the keys that each query sees.
  void load_queries(int64_t part) {
    b = part / plan.parts;
    first_set = part % plan.parts * plan.part_sets;
    count = (std::min(first_set + plan.part_sets, plan.sets) - first_set) * plan.set;
    const int64_t tokens = tokens_of(p, b);
    end = 0;
    for (int64_t c = 0; c < count; ++c) {
      const int64_t column = first_set * plan.set + c;
      const int64_t row = column / (plan.group * plan.row_queries);
      const int64_t i = p.mean_q ? last_query(p, row) : row * p.block_q + column % plan.row_queries;
      const SeenRows seen = seen_rows(p, tokens, i);
      begin = seen.begin;
      ends[c] = i < p.queries ? seen.end : 0;
      end = std::max(end, ends[c]);
      for (int64_t h = 0; h < p.kv_heads; ++h) {
        const int64_t head = h * plan.group + column / plan.row_queries % plan.group;
        const void* query =
            p.mean_q ? mean_row(head, row) : query_row(head, std::min(i, p.queries - 1));
        for (int half = 0; half < halves; ++half)
          pack_rows<Op>(p.boxes ? clamped_row(query, half) : query, p.dtype, 0, 1, 1, p.head_dim, 1,
                        query_words(h, half, c), ldq);
      }
    }
  }

  const void* mean_row(int64_t h, int64_t row) {
    const int64_t first = row * p.block_q, last = last_query(p, row);
    const vf divisor = set(static_cast<float>(last - first + 1));
    float* const sums = rows[3];
    std::fill(sums, sums + row_floats(), 0.f);
    visit_elements(p.dtype, [&](auto e) TM_LAMBDA {
      for (int64_t i = first; i <= last; ++i) {
        const char* const query = query_row(h, i);
        for (int64_t d = 0; d < p.head_dim; d += kWidth)
          store(sums + d, load(sums + d) + e.load_n(query, d, p.head_dim - d));
      }
      for (int64_t d = 0; d < p.head_dim; d += kWidth)
        e.store_n(rows[0], d, load(sums + d) / divisor, p.head_dim - d);
    });
    return rows[0];
  }

  // The negative (half 0) or positive elements; NaN is in both.
  const void* clamped_row(const void* from, int half) {
    for (int64_t d = 0; d < p.head_dim; d += kWidth) {
      const vf x = load_as_float_n(from, p.dtype, d, p.head_dim - d);
      const vm cut = half == 0 ? less(zero(), x) : less(x, zero());
      store_from_float_n(rows[1 + half], p.dtype, d, select(cut, zero(), x), p.head_dim - d);
    }
    return rows[1 + half];
  }

  float* query_words(int64_t h, int half, int64_t c) const {
    return queries + ((h * halves + half) * columns + c) * ldq;
  }
  // Scores of a column with a panel, and of its blocks if those have several rows.
  float* panel_scores(int64_t h, int64_t c) const {
    return products + ((few ? h : 0) * columns + c) * kPanel;
  }
  float* block_scores(int64_t h, int64_t c) const { return blocks + (h * columns + c) * block_ld; }

  void score_blocks(int64_t block, int64_t block_end) {
    const int64_t first = block * p.block_rows;
    const int64_t last = std::min(block_end * p.block_rows, p.k.rows);
    const bool reduces = p.block_rows > 1;
    bool fresh = true;  // no panel of these blocks has been added yet
    const int64_t skipped = std::max<int64_t>(begin - first, 0) / kPanel * kPanel;
    for (int64_t row = first + skipped; row < std::min(last, end); row += kPanel) {
      panel = std::min<int64_t>(kPanel, last - row);
      width = round_up(panel, kWidth);
      find_rows(row);
      if (few) multiply_few();
      for (int64_t h = 0; h < p.kv_heads; ++h) {
        if (p.boxes) find_empty_boxes(h);
        if (p.k_scale.data) load_scales(h);
        if (!few) {
          transpose_keys(h);
          multiply_many(h);
        }
        for (int64_t c = 0; c < count; ++c) {
          hide(panel_scores(h, c), ends[c], row);
          if (reduces) reduce_rows(panel_scores(h, c), block_scores(h, c), fresh);
        }
        if (!reduces) emit_sets(h, panel_scores(h, 0), kPanel, block, block_end - block);
      }
      fresh = false;
    }
    if (fresh) std::fill(blocks, blocks + p.kv_heads * columns * block_ld, -__builtin_inff());
    for (int64_t h = 0; h < p.kv_heads && (reduces || fresh); ++h)
      emit_sets(h, block_scores(h, 0), block_ld, block, block_end - block);
  }

  // Rows that no query sees, and those up to a whole vector, repeat the last visible row: their
  // pages may not exist.
  void find_rows(int64_t row) {
    const int64_t seen = std::min(panel, end - row);
    KeyRun run{0, row};
    for (int64_t i = 0, page = row; i < seen; ++i) {
      if (row + i == run.end) run = key_run(p.k, b, page = row + i);
      offsets[i] = run.offset + (row + i - page) * p.k.seq;
      if (p.k_scale.data) scale_offsets[i] = scale_offset(row + i);
    }
    std::fill(offsets + seen, offsets + width, offsets[seen - 1]);
    if (p.k_scale.data)
      std::fill(scale_offsets + seen, scale_offsets + panel, scale_offsets[seen - 1]);
    whole = key_run(p.k, b, row).end >= row + panel;
  }
  const char* key(int64_t i, int64_t h, int half) const {
    return static_cast<const char*>(p.k.data) +
           (offsets[i] + h * p.k.head + half * p.k_half) * key_size;
  }
  // Offset of the first head's scale of a row, whose page must exist.
  int64_t scale_offset(int64_t row) const {
    if (!p.k.table) return b * p.k_scale.page + row * p.k_scale.row;
    const int64_t page = p.k.table[b * p.k.table_stride + row / p.k.page_size];
    return page * p.k_scale.page + row % p.k.page_size * p.k_scale.row;
  }
  void load_scales(int64_t h) {
    for (int64_t i = 0; i < width; ++i)
      key_scales[i] = p.k_scale.data[scale_offsets[std::min(i, panel - 1)] + h * p.k_scale.head];
  }

  void find_empty_boxes(int64_t h) {
    any_hidden = false;
    visit_elements(p.dtype, [&](auto e) TM_LAMBDA {
      using Element = typename decltype(e)::type;
      Element low[kPanel] = {}, high[kPanel] = {};
      for (int64_t i = 0; i < panel; ++i) {
        std::memcpy(low + i, key(i, h, 0), sizeof(Element));
        std::memcpy(high + i, key(i, h, 1), sizeof(Element));
      }
      for (int64_t i = 0; i < width; i += kWidth) {
        const vm empty = less(e.load(high, i), e.load(low, i));
        store(hidden + i, select(empty, set(1.f), zero()));
        any_hidden |= any(empty);
      }
    });
  }

  void transpose_keys(int64_t h) {
    for (int half = 0; half < halves; ++half) {
      const char* from = key(0, h, half);
      int64_t stride = p.k.seq;
      if (codes) {
        stride = row_floats();
        float* const rows_of_floats = reinterpret_cast<float*>(gathered);
        for (int64_t i = 0; i < panel; ++i)
          widen_row(key(i, h, half), p.k_dtype, p.head_dim, 1, rows_of_floats + i * stride,
                    round_up(p.head_dim, kWidth));
        from = gathered;
      } else if (!whole) {
        stride = row_floats();
        for (int64_t i = 0; i < panel; ++i)
          std::memcpy(gathered + i * stride * key_size, key(i, h, half), p.head_dim * key_size);
        from = gathered;
      }
      pack_transposed<Op>(from, codes ? DType::float32 : p.dtype, stride, panel, p.head_dim, 1,
                          keys + half * words * kPanel);
    }
  }

  // Prefetches the rows kAheadRows after i, if known and if the heads of a row are adjacent: a
  // share per head, so that memory is read in order. (Rows of one head, further apart than a line,
  // take 1.4 times as long: hardware prefetchers do not follow them.)
  TM_INLINE void prefetch(int64_t i, int64_t h, int64_t count) const {
    if (p.kv_heads * p.head_dim * halves != p.k.seq) return;
    const bool known = i + kAheadRows + count <= panel;
    if (p.k.table && !known) return;
    const int64_t row_bytes = p.k.seq * key_size, bytes = count * row_bytes / p.kv_heads;
    const char* at = known ? key(i + kAheadRows, 0, 0) : key(i, 0, 0) + kAheadRows * row_bytes;
    at += h * bytes;
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at + byte, 0, 2);
  }

  template <typename Visit>
  TM_INLINE void visit_keys(const Visit& visit) const {
    if constexpr (Op::kPair == 1) {
      if (codes)
        return visit(static_cast<const uint8_t*>(p.k.data),
                     FloatWords<DType::float8_e4m3fn>{set(1.f)});
      if (p.dtype == DType::float32) return visit(static_cast<const float*>(p.k.data), Unscaled());
    }
    visit_words<Op>(p.k.data, p.dtype, 1, visit);
  }

  // Columns first .. last - 1 of all heads, kCount at a time: a vector of partial sums for each
  // (key, column) pair, kWidth of them reduced by a transpose. Three columns read a key once for
  // all of them, in two rounds of the keys whose sums fit into the registers.
  template <int kCount>
  __attribute__((noinline)) void multiply_rows_of(int64_t first, int64_t last) {
    constexpr int kRounds = kCount == 3 ? 2 : 1;
    constexpr int kKeys = kWidth / (kCount == 3 ? 2 : kCount);  // of a round
    constexpr int kRows = kRounds * kKeys;
    visit_keys([&]<typename T>(const T*, const auto words_at) TM_LAMBDA {
      for (int64_t i = 0; i < panel; i += kRows)
        for (int64_t h = 0; h < p.kv_heads; ++h) {
          prefetch(i, h, kRows);
          for (int64_t c = first; c < last; c += kCount) {
            vf partial[kCount * kRows / kWidth][kWidth];
            TM_UNROLL(2)
            for (int round = 0; round < kRounds; ++round) {
              vf acc[kCount][kKeys];
              multiply_keys<kCount, kKeys, T>(acc, words_at, i + round * kKeys, h, c);
              TM_UNROLL(4)
              for (int g = 0; g < kCount; ++g) {
                TM_UNROLL(16)
                for (int j = 0; j < kKeys; ++j) {
                  const int at = g * kRows + round * kKeys + j;
                  partial[at / kWidth][at % kWidth] = acc[g][j];
                }
              }
            }
            float sums[kCount * kRows];
            TM_UNROLL(4)
            for (int s = 0; s < kCount * kRows / kWidth; ++s)
              store(sums + s * kWidth, sum_rows(partial[s]));
            TM_UNROLL(4)
            for (int g = 0; g < kCount; ++g)
              std::memcpy(panel_scores(h, c + g) + i, sums + g * kRows, kRows * sizeof(float));
          }
        }
    });
  }
  // acc = products of keys i .. i + kKeys - 1 with columns c .. c + kCount - 1, lane by lane.
  template <int kCount, int kKeys, typename T, class Words>
  TM_INLINE void multiply_keys(vf (&acc)[kCount][kKeys], const Words& words_at, int64_t i,
                               int64_t h, int64_t c) const {
    TM_UNROLL(4)
    for (int g = 0; g < kCount; ++g) {
      TM_UNROLL(16)
      for (int j = 0; j < kKeys; ++j) acc[g][j] = zero();
    }
    for (int half = 0; half < halves; ++half) {
      const T* row[kKeys];
      TM_UNROLL(16)
      for (int j = 0; j < kKeys; ++j) row[j] = reinterpret_cast<const T*>(key(i + j, h, half));
      const float* const q = query_words(h, half, c);
      for (int64_t w = 0; w < ldq; w += kWidth) {
        vf x[kCount];
        TM_UNROLL(4)
        for (int g = 0; g < kCount; ++g) x[g] = load(q + g * ldq + w);
        TM_UNROLL(16)
        for (int j = 0; j < kKeys; ++j) {
          const vf k = words_at(row[j], w * Op::kPair, p.head_dim);
          TM_UNROLL(4)
          for (int g = 0; g < kCount; ++g) acc[g][j] = Op::madd(acc[g][j], x[g], k);
        }
      }
    }
  }
  void multiply_few() {
    const int64_t c = count / 4 * 4;
    if (c > 0) multiply_rows_of<4>(0, c);
    if (count - c == 3) multiply_rows_of<3>(c, count);
    if (count - c == 2) multiply_rows_of<2>(c, count);
    if (count - c == 1) multiply_rows_of<1>(c, count);
  }

  template <bool kAssign, int M>
  void multiply_some(int64_t h, int half, int64_t& c) {
    for (; c + M <= count; c += M)
      multiply_rows<Op, false, M, kAssign>(products + c * kPanel, kPanel, query_words(h, half, c),
                                           ldq, keys + half * words * kPanel, kPanel, words, width);
  }
  template <bool kAssign>
  void multiply_half(int64_t h, int half) {
    int64_t c = 0;
    multiply_some<kAssign, kTileRows>(h, half, c);
    multiply_some<kAssign, 4>(h, half, c);
    multiply_some<kAssign, 2>(h, half, c);
    multiply_some<kAssign, 1>(h, half, c);
  }
  void multiply_many(int64_t h) {
    multiply_half<true>(h, 0);
    if (halves > 1) multiply_half<false>(h, 1);
  }

  void hide(float* z, int64_t seen_end, int64_t row) const {
    const int64_t from = begin - row, to = std::min(seen_end - row, panel);
    const vf scale = set(p.scale), nothing = set(-__builtin_inff());
    for (int64_t i = 0; i < width; i += kWidth) {
      vf x = load(z + i) * scale;
      if (p.k_scale.data) x = x * load(key_scales + i);
      if (any_hidden) x = select(less(zero(), load(hidden + i)), nothing, x);
      if (from > i || to < i + kWidth) x = select(lanes(from - i, to - i), x, nothing);
      store(z + i, x);
    }
  }

  void reduce_rows(const float* z, float* to, bool fresh) const {
    for (int64_t i = 0; i < panel; ++to) {
      const int64_t until = std::min(i + p.block_rows, panel);
      vf maximum = set(-__builtin_inff());
      for (; i + kWidth <= until; i += kWidth) maximum = max_or_nan(maximum, load(z + i));
      float m = max_lanes(maximum);
      if (max_lanes(select(equal(maximum, maximum), zero(), set(1.f))) > 0) m = __builtin_nanf("");
      for (; i < until; ++i) m = max_or_nan(m, z[i]);
      *to = fresh ? m : max_or_nan(*to, m);
    }
  }

  // Reduces each set of columns, ld apart: maximum over queries, then maximum or mean over heads.
  void emit_sets(int64_t kv_head, const float* z, int64_t ld, int64_t block, int64_t n) const {
    const int64_t heads = reduces_group(p) ? plan.group : 1, others = plan.group / heads;
    for (int64_t s = 0; s < count / plan.set; ++s, z += plan.set * ld) {
      const int64_t row = (first_set + s) / others, g = (first_set + s) % others;
      const float* from = z;
      if (plan.set > 1) {
        reduce_set(z, ld, heads, n);
        from = total;
      }
      const int64_t out_head =
          reduces_group(p) ? b * p.kv_heads + kv_head : b * p.heads + kv_head * plan.group + g;
      float* const out = p.head_reduce == HeadReduce::softmax_vote ? p.scores : p.out;
      std::memcpy(out + (out_head * p.rows + row) * p.blocks + block, from, n * sizeof(float));
    }
  }
  void reduce_set(const float* z, int64_t ld, int64_t heads, int64_t n) const {
    const bool mean = p.head_reduce == HeadReduce::group_mean;
    const vf divisor = set(static_cast<float>(mean ? heads : 1));
    for (int64_t j = 0; j < n; j += kWidth) {
      const float* at = z + j;
      vf all = zero();
      for (int64_t h = 0; h < heads; ++h) {
        vf maximum = load(at);
        for (int64_t i = 1; i < plan.row_queries; ++i)
          maximum = max_or_nan(maximum, load(at + i * ld));
        at += plan.row_queries * ld;
        all = h == 0 ? maximum : mean ? all + maximum : max_or_nan(all, maximum);
      }
      store(total + j, all / divisor);
    }
  }

  const BlockScoreParams& p;
  const ScorePlan plan;
  int64_t columns, halves, words, ldq;
  bool codes;                    // keys are codes
  int64_t query_size, key_size;  // bytes per element
  bool few;                      // few columns, over all parts
  int64_t block_ld;
  cpu::Workspace memory;
  float *queries, *keys, *products, *blocks, *rows[4], *hidden, *total;
  float* key_scales;                        // scales of a panel
  int64_t *ends, *offsets, *scale_offsets;  // per column; per row of a panel
  char* gathered;
  int64_t loaded = -1, b = 0, first_set = 0, count = 0, begin = 0, end = 0;
  int64_t panel = 0, width = 0;  // key rows; product columns
  bool whole = true, any_hidden = false;
};

template <class Op>
void score(const BlockScoreParams& p, int threads) {
  const ScorePlan plan(p);
  const int64_t items = p.heads > 0 ? p.batch * plan.parts * plan.items_per_part : 0;
  cpu::parallel_items(items, threads, [&](cpu::ItemCounter& counter) {
    FlushDenormals flush;
    Scorer<Op> scorer(p);
    for (int64_t item; (item = counter.next()) >= 0;) scorer.run(item);
  });
}

}  // namespace

void kv_block_scores(const BlockScoreParams& p) {
  // Below about 64 Ki products a parallel region costs more than it gains.
  const int64_t products = p.batch * p.heads * p.queries * p.k.rows * p.head_dim;
  const int threads = products < (1 << 16) ? 1 : cpu::num_threads();
#if defined(TM_DOTS)
  if (p.k_dtype == DType::bfloat16)
    score<BFloat16>(p, threads);
  else
#endif
    score<Float32>(p, threads);
  if (p.head_reduce == HeadReduce::softmax_vote) vote(p, threads);
}

}  // namespace tokenmill::TOKENMILL_ISA
