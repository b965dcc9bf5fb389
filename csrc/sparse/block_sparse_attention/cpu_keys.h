// Which rows a tile has and which keys they see, for the CPU kernels.
#pragma once
#include "dense/attention/cpu_scores.h"
#include "sparse/block_sparse_attention/params.h"

namespace tokenmill::TOKENMILL_ISA {

// A part of the rows of a block of queries: row r of the block is its query r % queries in head
// r / queries of those that share a list and keys.
struct RowTile {
  int64_t b, kv_head, head;  // head: the first of those together
  int64_t list_row;
  int64_t query, queries;  // of the block
  int64_t first, rows;     // of the block's rows

  int64_t head_of(int64_t r) const { return head + (first + r) / queries; }
  int64_t query_of(int64_t r) const { return query + (first + r) % queries; }
  // The queries from first_query() to last_query() have rows.
  bool one_head() const { return first / queries == (first + rows - 1) / queries; }
  int64_t first_query() const { return one_head() ? query_of(0) : query; }
  int64_t last_query() const { return one_head() ? query_of(rows - 1) : query + queries - 1; }

  // visit(row, count): rows of one head, whose queries follow each other.
  template <typename Visit>
  void for_each_head(const Visit& visit) const {
    for (int64_t r = 0, n; r < rows; r += n) {
      n = queries - (first + r) % queries;
      if (n > rows - r) n = rows - r;
      visit(r, n);
    }
  }
};

// The tiles of a KV head, in the order in which they are worked on: of most_rows at most, and all
// but the last of a block a multiple of `unit`, which divides most_rows.
struct RowTiles {
  const BlockSparseParams& d;
  int64_t together, block, unit, parts, count;

  RowTiles(const BlockSparseParams& d, int64_t most_rows, int64_t unit)
      : d(d),
        together(d.heads_together()),
        block(lower(int64_t{1} << d.log2_block_q, d.attention.seqlen_q)),
        unit(unit),
        parts(ceil_div(block * together, most_rows)),
        count(d.list.rows * parts * (d.attention.heads / d.attention.kv_heads / together)) {}

  // rows <= 0: nothing is left for this part of a short block.
  RowTile at(int64_t kv, int64_t n) const {
    const AttentionParams& p = d.attention;
    RowTile t{kv / p.kv_heads, kv % p.kv_heads};
    t.head = t.kv_head * (p.heads / p.kv_heads) + n / (d.list.rows * parts) * together;
    t.list_row = n / parts % d.list.rows;
    t.query = t.list_row << d.log2_block_q;
    t.queries = lower(p.seqlen_q - t.query, block);
    const int64_t all = t.queries * together;
    const int64_t each = round_up(ceil_div(all, parts), unit);
    t.first = n % parts * each;
    t.rows = lower(all - t.first, each);
    return t;
  }
  static int64_t lower(int64_t a, int64_t b) { return a < b ? a : b; }
};

// Keys [begin, end). Key x is first seen by query x + shift, if causal is on, and by `stay` queries
// from there.
struct KeyRun {
  int64_t begin, end, shift, stay;
};

// The queries of a block that see a key: from <= query < until, relative to the block's first.
struct SeenBy {
  static constexpr int32_t kNever = 1 << 20;
  int32_t from, until;
};

// The keys that rows of a tile see, as runs. No key is in two of them, and each is seen by one row
// at least.
class KeyRuns {
 public:
  explicit KeyRuns(const BlockSparseParams& d) : d(d) {}

  int64_t most() const { return d.list.entries + 2; }
  int64_t floats() const { return most() * static_cast<int64_t>(sizeof(KeyRun) / sizeof(float)); }
  void place(float* memory) { runs_ = reinterpret_cast<KeyRun*>(memory); }

  void find(const RowTile& t) {
    const AttentionParams& p = d.attention;
    const SeenKeys first = d.seen(t.b, t.first_query()), last = d.seen(t.b, t.last_query());
    const int64_t enter = p.seqlen_q - d.length(t.b) - t.query;
    const int64_t recent = d.causal ? d.num_recent : 0;
    count_ = 0;
    add({0, last.sinks, enter, kAlways});
    const int64_t list_head = d.list_head(t.head), n = d.list.count(t.b, list_head, t.list_row);
    const int32_t* ids = d.list.at(t.b, list_head, t.list_row);
    ListWalk walk{d.key_blocks()};
    const int64_t lists = count_;
    for (int64_t e = 0; e < n; ++e) {
      if (!walk.counts(ids[e])) continue;
      const int64_t at = int64_t{ids[e]} << d.log2_block_k;
      const int64_t begin = upper(at, d.num_sink);
      const int64_t end = lower(at + (int64_t{1} << d.log2_block_k), last.listed);
      if (count_ > lists && runs_[count_ - 1].end == begin && begin < end)
        runs_[count_ - 1].end = end;
      else
        add({begin, end, enter + recent, kAlways});
    }
    if (recent > 0) add({upper(first.listed, d.num_sink), last.end, enter, recent});
  }
  void clear() { count_ = 0; }
  int64_t count() const { return count_; }
  const KeyRun& operator[](int64_t i) const { return runs_[i]; }

  SeenBy seen_by(const KeyRun& run, int64_t x) const {
    if (!d.causal) return {0, SeenBy::kNever};
    const int64_t from = x + run.shift;
    return {clamp(from), clamp(from + run.stay)};
  }

 private:
  static constexpr int64_t kAlways = int64_t{1} << 40;
  static int64_t lower(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t upper(int64_t a, int64_t b) { return a > b ? a : b; }
  static int32_t clamp(int64_t i) {
    return static_cast<int32_t>(i < 0 ? 0 : lower(i, SeenBy::kNever));
  }
  void add(const KeyRun& run) {
    if (run.begin < run.end) runs_[count_++] = run;
  }

  const BlockSparseParams& d;
  KeyRun* runs_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace tokenmill::TOKENMILL_ISA
