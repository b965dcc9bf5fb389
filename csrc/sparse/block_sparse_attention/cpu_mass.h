// Attention mass of each list entry. A work item is one list: the keys of its entries are gathered
// in panels, and the rows that read the list stream past each panel and have their scores
// recomputed.
//
//   mass_e = sum over rows r and keys j of e: 2^(t_rj - lse_r)
#pragma once
#include <optional>

#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "sparse/block_sparse_attention/cpu_blocks.h"

namespace tokenmill::TOKENMILL_ISA {

constexpr int64_t kMassRows = 512;  // rows packed at once
// Rows summed from zero before one addition to the total: equal weights round alike in every sum.
constexpr int64_t kMassSum = 8 * kTileRows;

// Keys, the entry of each, and the first query of the block that sees it through the list.
struct KeyPanel {
  int64_t keys = 0;
  const char* rows[kPanel];
  int64_t entry[kPanel];
  alignas(64) float from[kPanel];
};

// Walk: addressing of queries and keys (sparse/cpu_walk.h).
template <class Walk>
class MassWorker {
 public:
  explicit MassWorker(const BlockSparseMass& d)
      : d(d),
        p(d.attention),
        walk(d),
        words(words_of<Float32>(p.head_dim)),
        ld(round_up(words, kWidth)),
        workspace(kMassRows * (ld + 2) + words * kPanel + 4 * 16) {
    queries = workspace.take(kMassRows * ld);
    lse = workspace.take(kMassRows);
    place = workspace.take(kMassRows);
    keys = workspace.take(words * kPanel);
  }

  void run(int64_t item) {
    list_row = item % d.list.rows;
    list_head = item / d.list.rows % d.list.heads;
    b = item / d.list.rows / d.list.heads;
    mass = d.mass + (item / d.list.rows * d.mass_rows + list_row) * d.list.entries;
    for (int64_t e = 0; e < d.list.entries; ++e) mass[e] = 0;
    const int64_t all = p.heads / d.list.heads, group = p.heads / p.kv_heads;
    const int64_t together = all < group ? all : group;
    for (int64_t h = list_head * all; h < (list_head + 1) * all; h += together) {
      score_mod = ScoreMod(p, b, h, Sequence(p, b));
      const int64_t rows = walk.queries(list_row) * together;
      for (first = 0; first < rows; first += kMassRows) {
        count = rows - first < kMassRows ? rows - first : kMassRows;
        load_queries(h);
        stream_keys(h / group);
      }
    }
  }

 private:
  void load_queries(int64_t head) {
    const int64_t queries_of_block = walk.queries(list_row), padded = round_up(count, kTileRows);
    const char* rows[kMassRows];
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = walk.first_query(list_row) + (first + r) % queries_of_block;
      const int64_t h = head + (first + r) / queries_of_block;
      rows[r] = walk.query_row(p.q, b, i, h);
      const float x = p.lse[walk.lse_at(b, h, i)];
      lse[r] = x == -kInf ? kInf : x * kLog2e;  // a row that saw no key has P = 0
      place[r] = static_cast<float>((first + r) % queries_of_block);
    }
    for (int64_t r = count; r < padded; ++r) lse[r] = kInf, place[r] = -1;  // padding: sees no key
    const float factor = score_mod.plain ? score_mod.factor : 1;
    pack_rows<Float32>(ScatteredRows{rows}, p.dtype, count, padded, p.head_dim, factor, queries,
                       ld);
  }

  void stream_keys(int64_t kv_head) {
    const int64_t block = walk.first_query(list_row);
    const int64_t last = block + walk.queries(list_row) - 1, end = d.seen(b, last).listed;
    const int64_t enter = d.causal ? p.seqlen_q - d.length(b) - block + d.num_recent : 0;
    const int32_t* ids = d.list.at(b, list_head, list_row);
    const int64_t n = d.list.count(b, list_head, list_row);
    KeyPanel panel;
    ListWalk counted{d.key_blocks()};
    for (int64_t e = 0; e < n; ++e) {
      if (!counted.counts(ids[e])) continue;
      const int64_t begin = int64_t{ids[e]} << d.log2_block_k;
      const int64_t block_end = begin + (int64_t{1} << d.log2_block_k);
      for (int64_t x = begin > d.num_sink ? begin : d.num_sink; x < block_end && x < end; ++x) {
        const int64_t from = d.causal && x + enter > 0 ? x + enter : 0;
        panel.rows[panel.keys] = walk.key_row(p.k, b, x, kv_head);
        panel.entry[panel.keys] = e;
        panel.from[panel.keys] = static_cast<float>(from);
        if (++panel.keys == kPanel) add(panel);
      }
    }
    if (panel.keys > 0) add(panel);
  }

  // Adds the mass of the panel's keys to their entries, and empties the panel.
  void add(KeyPanel& panel) {
    pack_transposed<Float32>(ScatteredRows{panel.rows}, p.dtype, panel.keys, p.head_dim, 1.f, keys);
    for (int64_t j = panel.keys; j < kPanel; ++j) panel.from[j] = SeenBy::kNever;
    float sum[kPanel] = {};
    for (int64_t begin = 0; begin < count; begin += kMassSum) {
      vf sums[kTileVectors];
      for (vf& x : sums) x = zero();
      for (int64_t r = begin; r < count && r < begin + kMassSum; r += kTileRows)
        score_mod.plain ? add_rows<true>(sums, panel, r) : add_rows<false>(sums, panel, r);
      for (int n = 0; n < kTileVectors; ++n)
        store(sum + n * kWidth, load(sum + n * kWidth) + sums[n]);
    }
    for (int64_t j = 0; j < panel.keys; ++j) mass[panel.entry[j]] += sum[j];
    panel.keys = 0;
  }

  template <bool kPlain>
  __attribute__((noinline)) void add_rows(vf (&sums)[kTileVectors], const KeyPanel& panel,
                                          int64_t row) const {
    vf t[kTileRows][kTileVectors];
    clear(t);
    multiply<Float32, false>(t, queries + row * ld, ld, keys, kPanel, words);
    TM_UNROLL(8)
    for (int m = 0; m < kTileRows; ++m) {
      const vf at = set(place[row + m]), shift = set(lse[row + m]);
      TM_UNROLL(4)
      for (int n = 0; n < kTileVectors; ++n) {
        vf x = t[m][n];
        if constexpr (!kPlain) x = score_mod.exponent(x, zero(), zero());
        const vm hidden = less(at, load(panel.from + n * kWidth));
        sums[n] = sums[n] + select(hidden, zero(), power<false>(x - shift));
      }
    }
  }

  const BlockSparseMass& d;
  const AttentionParams& p;
  Walk walk;
  int64_t words, ld;
  cpu::Workspace workspace;
  float* queries;      // packed rows: heads that read the list outer, queries of the block inner
  float *lse, *place;  // per row: lse in log2 units, and its query relative to the block's first
  float* keys;         // packed panel

  int64_t b = 0, list_head = 0, list_row = 0;
  int64_t first = 0, count = 0;  // packed rows
  ScoreMod score_mod{p, 0, 0, Sequence(p, 0)};
  float* mass = nullptr;
};

template <class Walk>
void listed_mass(const BlockSparseCalls& calls) {
  double pairs = 0;
  int64_t lists = 0;
  const auto lists_of = [&](int64_t r) {
    const BlockSparseParams& d = calls.each[r];
    return d.attention.batch * d.list.heads * d.list.rows;
  };
  for (int64_t r = 0; r < calls.count; ++r) {
    pairs += calls.each[r].max_pairs() * static_cast<double>(calls.each[r].attention.head_dim);
    lists += lists_of(r);
  }
  const int threads = 2 * pairs < 2e6 ? 1 : cpu::num_threads();
  cpu::parallel_items(lists, threads, [&](cpu::ItemCounter& items) {
    FlushDenormals flush;
    std::optional<MassWorker<Walk>> worker;
    // Items come in ascending order.
    for (int64_t item, r = 0, first = 0; (item = items.next()) >= 0;) {
      for (; item - first >= lists_of(r); worker.reset()) first += lists_of(r++);
      if (!worker) worker.emplace(calls.each[r]);
      worker->run(item - first);
    }
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
