// Blocks of a sequence, for the CPU kernels: places are positions.
#pragma once
#include <vector>

#include "sparse/block_sparse_attention/requests.h"
#include "sparse/cpu_walk.h"

namespace tokenmill::TOKENMILL_ISA {

struct BlockWalk {
  using BackwardParams = BlockSparseBackwardParams;

  const BlockSparseParams& d;

  explicit BlockWalk(const BlockSparseParams& d) : d(d) {}

  Rows q() const { return d.attention.q; }
  Rows k() const { return d.attention.k; }
  Rows v() const { return d.attention.v; }
  Rows out() const { return d.attention.out; }
  Rows dout(const BlockSparseBackwardParams& g) const { return g.dout; }
  Rows dq(const BlockSparseBackwardParams& g) const { return g.dq; }
  Rows dk(const BlockSparseBackwardParams& g) const { return g.dk; }
  Rows dv(const BlockSparseBackwardParams& g) const { return g.dv; }
  char* query_row(const Rows& rows, int64_t b, int64_t query, int64_t h) const {
    return row_of(rows, d.attention.dtype, b, 0, query, h);
  }
  char* key_row(const Rows& rows, int64_t b, int64_t key, int64_t h) const {
    return row_of(rows, d.attention.dtype, b, 0, key, h);
  }
  int64_t lse_at(int64_t b, int64_t h, int64_t query) const {
    return (b * d.attention.heads + h) * d.lse_rows + query;
  }
  void keep_delta(const BlockSparseBackwardParams& g, int64_t lse_at, float delta) const {
    if (g.delta) g.delta[lse_at] = delta;
  }

  int64_t max_queries() const { return lower(block(), d.attention.seqlen_q); }
  int64_t first_query(int64_t list_row) const { return list_row << d.log2_block_q; }
  int64_t queries(int64_t list_row) const {
    return lower(d.attention.seqlen_q - first_query(list_row), block());
  }
  int64_t query_places() const { return d.attention.seqlen_q; }
  int64_t key_places() const { return d.attention.seqlen_k; }
  bool has_key(int64_t) const { return true; }
  int64_t max_runs() const { return d.list.entries + 2; }

  void find(const RowTile& t, KeyRuns& runs) const {
    const AttentionParams& p = d.attention;
    const SeenKeys first = d.seen(t.b, t.first_query()), last = d.seen(t.b, t.last_query());
    const int64_t enter = p.seqlen_q - d.length(t.b) - t.query;
    const int64_t recent = d.causal ? d.num_recent : 0;
    runs.clear();
    runs.add({0, last.sinks, enter, KeyRuns::kAlways});
    const int64_t list_head = d.list_head(t.head), n = d.list.count(t.b, list_head, t.list_row);
    const int32_t* ids = d.list.at(t.b, list_head, t.list_row);
    ListWalk walk{d.key_blocks()};
    const int64_t lists = runs.count();
    for (int64_t e = 0; e < n; ++e) {
      if (!walk.counts(ids[e])) continue;
      const int64_t at = int64_t{ids[e]} << d.log2_block_k;
      const int64_t begin = upper(at, d.num_sink);
      const int64_t end = lower(at + (int64_t{1} << d.log2_block_k), last.listed);
      runs.join(lists, {begin, end, enter + recent, KeyRuns::kAlways});
    }
    if (recent > 0) runs.add({upper(first.listed, d.num_sink), last.end, enter, recent});
  }

  SeenBy seen_by(const KeyRun& run, int64_t x) const {
    if (!d.causal) return {0, SeenBy::kNever};
    const int64_t from = x + run.shift;
    return {clamp(from), clamp(from + run.stay)};
  }

 private:
  int64_t block() const { return int64_t{1} << d.log2_block_q; }
  static int64_t lower(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t upper(int64_t a, int64_t b) { return a > b ? a : b; }
  static int32_t clamp(int64_t i) {
    return static_cast<int32_t>(i < 0 ? 0 : lower(i, SeenBy::kNever));
  }
};

template <class Walk>
std::vector<Walk> walks_of(const BlockSparseCalls& calls) {
  return {calls.each, calls.each + calls.count};
}

}  // namespace tokenmill::TOKENMILL_ISA
