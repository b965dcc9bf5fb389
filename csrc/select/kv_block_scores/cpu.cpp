// Panels of keys, transposed once, times the query rows of a key head. What a query does not see is
// hidden in the product, which is then reduced over rows of a block, queries and heads in cache.
#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/tile.h"
#include "cpu/workspace.h"
#include "select/kv_block_scores/cpu_vote.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kPartColumns = 96;  // that share a panel, at least, if there are as many
constexpr int64_t kItemRows = 1024;   // of keys, at least

// Score rows ("columns", as they lie behind each other in memory) of a key head are ordered by row
// of the result, head, query. A set makes one result.
struct ScorePlan {
  int64_t group, row_queries, set, part_sets, sets, parts;
  int64_t panel_blocks, item_blocks, items_per_part;

  explicit ScorePlan(const BlockScoreParams& p)
      : group(p.heads / std::max<int64_t>(p.kv_heads, 1)),
        row_queries(queries_of_row(p)),
        set(row_queries * (reduces_group(p) ? group : 1)),
        part_sets(std::max<int64_t>(kPartColumns / set, 1)),
        sets(p.rows * (reduces_group(p) ? 1 : group)),
        parts(ceil_div(sets, part_sets)),
        panel_blocks(std::max<int64_t>(kPanel / p.block_rows, 1)),
        item_blocks(round_up(ceil_div(kItemRows, p.block_rows), panel_blocks)),
        items_per_part(ceil_div(p.blocks, item_blocks)) {}
};

// The larger, NaN if one is.
TM_INLINE vf max_or_nan(vf a, vf b) { return select(equal(a, a), max_of(a, b), a); }
TM_INLINE float max_or_nan(float a, float b) { return a != a || a > b ? a : b; }

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
        element_size(p.dtype == DType::float32 ? 4 : 2),
        block_ld(round_up(std::min(plan.panel_blocks, p.blocks), kWidth)),
        memory(halves * (columns * ldq + words * kPanel + kPanel * row_floats()) +
               columns * (kPanel + block_ld + 2) + 4 * row_floats() + 5 * kPanel + 16 * 16) {
    queries = memory.take(halves * columns * ldq);
    keys = memory.take(halves * words * kPanel);
    gathered = reinterpret_cast<char*>(memory.take(halves * kPanel * row_floats()));
    products = memory.take(columns * kPanel);
    blocks = memory.take(columns * block_ld);
    ends = reinterpret_cast<int64_t*>(memory.take(2 * columns));
    for (float*& row : rows) row = memory.take(row_floats());
    hidden = memory.take(kPanel);
    best = memory.take(2 * kPanel);
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
           (b * p.q.batch + i * p.q.seq + h * p.q.head) * element_size;
  }

  // The columns of a part as words, and where their queries see keys.
  void load_queries(int64_t part) {
    const int64_t kv_head_row = part / plan.parts;
    b = kv_head_row / p.kv_heads;
    kv_head = kv_head_row % p.kv_heads;
    first_set = part % plan.parts * plan.part_sets;
    count = (std::min(first_set + plan.part_sets, plan.sets) - first_set) * plan.set;
    const int64_t tokens = tokens_of(p, b);
    begin = 0, end = 0;
    for (int64_t c = 0; c < count; ++c) {
      const int64_t column = first_set * plan.set + c;
      const int64_t row = column / (plan.group * plan.row_queries);
      const int64_t h = kv_head * plan.group + column / plan.row_queries % plan.group;
      const int64_t i = p.mean_q ? last_query(p, row)
                                 : row * p.block_q + column % plan.row_queries;
      const SeenRows seen = seen_rows(p, tokens, i);
      begin = seen.begin;
      ends[c] = i < p.queries ? seen.end : 0;
      end = std::max(end, ends[c]);
      const void* from = p.mean_q ? mean_row(h, row) : query_row(h, std::min(i, p.queries - 1));
      for (int half = 0; half < halves; ++half) {
        const void* x = p.boxes ? clamped_row(from, half) : from;
        pack_rows<Op>(x, p.dtype, 0, 1, 1, p.head_dim, 1, queries + (half * columns + c) * ldq,
                      ldq);
      }
    }
  }

  const void* mean_row(int64_t h, int64_t row) {
    const int64_t first = row * p.block_q, last = last_query(p, row);
    for (int64_t d = 0; d < p.head_dim; d += kWidth) {
      vf sum = zero();
      for (int64_t i = first; i <= last; ++i)
        sum = sum + load_as_float_n(query_row(h, i), p.dtype, d, p.head_dim - d);
      store_from_float_n(rows[0], p.dtype, d, sum / set(static_cast<float>(last - first + 1)),
                         p.head_dim - d);
    }
    return rows[0];
  }

  // The negative (half 0) or positive elements; NaN is both.
  const void* clamped_row(const void* from, int half) {
    for (int64_t d = 0; d < p.head_dim; d += kWidth) {
      const vf x = load_as_float_n(from, p.dtype, d, p.head_dim - d);
      const vm cut = half == 0 ? less(zero(), x) : less(x, zero());
      store_from_float_n(rows[1 + half], p.dtype, d, select(cut, zero(), x), p.head_dim - d);
    }
    return rows[1 + half];
  }

  void score_blocks(int64_t block, int64_t block_end) {
    const int64_t first = block * p.block_rows;
    const int64_t last = std::min(block_end * p.block_rows, p.k.rows);
    bool fresh = true;  // no panel of these blocks has been added
    const int64_t skipped = std::max<int64_t>(begin - first, 0) / kPanel * kPanel;
    for (int64_t row = first + skipped; row < std::min(last, end); row += kPanel) {
      const int64_t panel = std::min<int64_t>(kPanel, last - row);
      load_keys(row, panel);
      multiply_all();
      for (int64_t c = 0; c < count; ++c) {
        hide(c, row, panel);
        if (p.block_rows > 1) reduce_rows(c, panel, fresh);
      }
      fresh = false;
    }
    if (fresh) {
      float* const all = p.block_rows > 1 ? blocks : products;
      std::fill(all, all + count * ld(), -__builtin_inff());
    }
    for (int64_t s = 0; s < count / plan.set; ++s) emit(s, block, block_end - block);
  }

  int64_t ld() const { return p.block_rows > 1 ? block_ld : kPanel; }

  void load_keys(int64_t row, int64_t panel) {
    const char* const data = static_cast<const char*>(p.k.data);
    const int64_t head = kv_head * p.k.head;
    KeyRun run = key_run(p.k, b, row);
    const char* from = data + (run.offset + head) * element_size;
    int64_t stride = p.k.seq, half_stride = p.k_half;
    if (run.end < row + panel) {  // rows of several pages
      stride = row_floats();
      half_stride = kPanel * row_floats();
      for (int64_t i = 0, page = row; i < panel; ++i) {
        if (row + i == run.end) run = key_run(p.k, b, page = row + i);
        for (int half = 0; half < halves; ++half)
          std::memcpy(gathered + (half * half_stride + i * stride) * element_size,
                      data + (run.offset + (row + i - page) * p.k.seq + head + half * p.k_half) *
                                 element_size,
                      p.head_dim * element_size);
      }
      from = gathered;
    }
    for (int half = 0; half < halves; ++half)
      pack_transposed<Op>(from + half * half_stride * element_size, p.dtype, stride, panel,
                          p.head_dim, 1, keys + half * words * kPanel);
    any_hidden = false;
    for (int64_t i = 0; i < panel && p.boxes; ++i) {
      const char* at = from + i * stride * element_size;
      hidden[i] = scalar_as_float(at, p.dtype, 0) > scalar_as_float(at, p.dtype, half_stride);
      any_hidden |= hidden[i] != 0;
    }
  }

  template <bool kAssign, int M>
  void multiply_some(int64_t& c, int half) {
    for (; c + M <= count; c += M)
      multiply_rows<Op, false, M, kAssign>(products + c * kPanel, kPanel,
                                           queries + (half * columns + c) * ldq, ldq,
                                           keys + half * words * kPanel, kPanel, words, kPanel);
  }
  template <bool kAssign>
  void multiply_half(int half) {
    int64_t c = 0;
    multiply_some<kAssign, kTileRows>(c, half);
    multiply_some<kAssign, 4>(c, half);
    multiply_some<kAssign, 2>(c, half);
    multiply_some<kAssign, 1>(c, half);
  }
  void multiply_all() {
    multiply_half<true>(0);
    if (halves > 1) multiply_half<false>(1);
  }

  void hide(int64_t c, int64_t row, int64_t panel) {
    const int64_t from = begin - row, to = std::min(ends[c] - row, panel);
    const vf scale = set(p.scale), nothing = set(-__builtin_inff());
    for (int64_t i = 0; i < kPanel; i += kWidth) {
      float* const at = products + c * kPanel + i;
      vf z = load(at) * scale;
      if (any_hidden) z = select(less(zero(), load(hidden + i)), nothing, z);
      if (from > i || to < i + kWidth) z = select(lanes(from - i, to - i), z, nothing);
      store(at, z);
    }
  }

  void reduce_rows(int64_t c, int64_t panel, bool fresh) {
    const float* z = products + c * kPanel;
    for (int64_t i = 0, block = 0; i < panel; ++block) {
      const int64_t until = std::min(i + p.block_rows, panel);
      vf most = set(-__builtin_inff());
      for (; i + kWidth <= until; i += kWidth) most = max_or_nan(most, load(z + i));
      float m = max_lanes(most);
      if (max_lanes(select(equal(most, most), zero(), set(1.f))) > 0) m = __builtin_nanf("");
      for (; i < until; ++i) m = max_or_nan(m, z[i]);
      float& of_block = blocks[c * block_ld + block];
      of_block = fresh ? m : max_or_nan(of_block, m);
    }
  }

  // Set s of the part: the maximum over queries, then the maximum or mean over heads.
  void emit(int64_t s, int64_t block, int64_t n) {
    const int64_t number = first_set + s, heads = reduces_group(p) ? plan.group : 1;
    const int64_t row = number / (plan.group / heads), g = number % (plan.group / heads);
    const float* z = (p.block_rows > 1 ? blocks : products) + s * plan.set * ld();
    const float* from = z;
    if (plan.set > 1) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t i = 0; i < plan.row_queries; ++i, z += ld())
          for (int64_t j = 0; j < n; j += kWidth)
            store(best + j, i == 0 ? load(z + j) : max_or_nan(load(best + j), load(z + j)));
        for (int64_t j = 0; j < n; j += kWidth) {
          const vf x = load(best + j), sum = load(total + j);
          store(total + j, h == 0                                     ? x
                           : p.head_reduce == HeadReduce::group_mean ? sum + x
                                                                      : max_or_nan(sum, x));
        }
      }
      const vf divisor = set(static_cast<float>(plan.group));
      for (int64_t j = 0; j < n && p.head_reduce == HeadReduce::group_mean; j += kWidth)
        store(total + j, load(total + j) / divisor);
      from = total;
    }
    const bool votes = p.head_reduce == HeadReduce::softmax_vote;
    const int64_t out_head = reduces_group(p) ? b * p.kv_heads + kv_head
                                              : b * p.heads + kv_head * plan.group + g;
    float* const to = (votes ? p.scores : p.out) + (out_head * p.rows + row) * p.blocks + block;
    std::memcpy(to, from, n * sizeof(float));
  }

  const BlockScoreParams& p;
  const ScorePlan plan;
  int64_t columns, halves, words, ldq, element_size, block_ld;
  cpu::Workspace memory;
  float *queries, *keys, *products, *blocks, *rows[3], *hidden, *best, *total;
  int64_t* ends;
  char* gathered;
  int64_t loaded = -1, b = 0, kv_head = 0, first_set = 0, count = 0, begin = 0, end = 0;
  bool any_hidden = false;
};

template <class Op>
void score(const BlockScoreParams& p, int threads) {
  const ScorePlan plan(p);
  const int64_t items = p.batch * p.kv_heads * plan.parts * plan.items_per_part;
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
#if defined(__AVX512BF16__)
  if (p.dtype == DType::bfloat16)
    score<BFloat16>(p, threads);
  else
#endif
    score<Float32>(p, threads);
  if (p.head_reduce == HeadReduce::softmax_vote) vote(p, threads);
}

}  // namespace tokenmill::TOKENMILL_ISA
