// Rows of a tile and the keys they see, for the CPU kernels of attention over lists. Queries and
// keys are identified by places: indices in the order in which the kernels visit them. The queries
// of a row of a list are consecutive places, and so are the keys of an entry. A `Walk` maps places
// to tensor rows and lists to keys.
#pragma once
#include "attention/cpu_scores.h"
#include "sparse/listed.h"

namespace tokenmill::TOKENMILL_ISA {

// Part of the rows of a query block: row r of the block is its query r % queries in head
// r / queries of the heads that share a list and keys.
struct RowTile {
  int64_t b, kv_head, head;  // head: first of the heads that share keys
  int64_t list_row;
  int64_t query, queries;  // range of the block
  int64_t first, rows;     // within the rows of the block

  int64_t head_of(int64_t r) const { return head + (first + r) / queries; }
  int64_t query_of(int64_t r) const { return query + (first + r) % queries; }
  // Queries first_query() to last_query() have rows in the tile.
  bool one_head() const { return first / queries == (first + rows - 1) / queries; }
  int64_t first_query() const { return one_head() ? query_of(0) : query; }
  int64_t last_query() const { return one_head() ? query_of(rows - 1) : query + queries - 1; }
};

// Iterates over the rows of a tile.
class RowCursor {
 public:
  RowCursor() = default;
  explicit RowCursor(const RowTile& t)
      : begin_(t.query), end_(t.query + t.queries), head_(t.head_of(0)), query_(t.query_of(0)) {}

  int64_t head() const { return head_; }
  int64_t query() const { return query_; }
  void next() {
    if (++query_ < end_) return;
    query_ = begin_;
    ++head_;
  }

 private:
  int64_t begin_ = 0, end_ = 0, head_ = 0, query_ = 0;
};

// Tiles of a KV head in processing order, at most max_rows rows each. All but the last tile of a
// block have a multiple of `unit` rows; `unit` divides max_rows.
template <class Walk>
struct RowTiles {
  const Walk& walk;
  int64_t group, together, unit, list_rows, parts, count;

  RowTiles(const Walk& walk, int64_t max_rows, int64_t unit)
      : walk(walk),
        group(walk.d.attention.heads / walk.d.attention.kv_heads),
        together(walk.d.heads_together()),
        unit(unit),
        list_rows(walk.d.list.rows),
        parts(ceil_div(walk.max_queries() * together, max_rows)),
        count(list_rows * parts * (group / together)) {}

  // rows <= 0: this part of a short block is empty.
  RowTile at(int64_t kv, int64_t n) const {
    const int64_t kv_heads = walk.d.attention.kv_heads;
    RowTile t{kv / kv_heads, kv % kv_heads};
    t.head = t.kv_head * group + n / (list_rows * parts) * together;
    t.list_row = n / parts % list_rows;
    t.query = walk.first_query(t.list_row);
    t.queries = walk.queries(t.list_row);
    const int64_t all = t.queries * together;
    const int64_t each = round_up(ceil_div(all, parts), unit);
    t.first = n % parts * each;
    t.rows = all - t.first < each ? all - t.first : each;
    return t;
  }
};

// Keys [begin, end). Under a causal mask, key x is first seen by query x + shift, and by `stay`
// queries from there on.
struct KeyRun {
  int64_t begin, end, shift, stay;
};

// Queries of a block that see a key: from <= query < until, relative to the block's first.
struct SeenBy {
  static constexpr int32_t kNever = 1 << 20;
  int32_t from, until;
};

// Keys that the rows of a tile see, as disjoint runs. Each key is seen by at least one row.
class KeyRuns {
 public:
  static constexpr int64_t kAlways = int64_t{1} << 40;
  float sink = -kInf;  // sink logit of the softmax, without a key

  explicit KeyRuns(int64_t maximum) : max_(maximum) {}

  int64_t floats() const { return max_ * static_cast<int64_t>(sizeof(KeyRun) / sizeof(float)); }
  void place(float* memory) { runs_ = reinterpret_cast<KeyRun*>(memory); }

  void clear() {
    count_ = 0;
    sink = -kInf;
  }
  void add(const KeyRun& run) {
    if (run.begin < run.end) runs_[count_++] = run;
  }
  // Adds a run, or extends the last run if it is contiguous and its index is at least `first`.
  void join(int64_t first, const KeyRun& run) {
    if (count_ > first && runs_[count_ - 1].end == run.begin && run.begin < run.end)
      runs_[count_ - 1].end = run.end;
    else
      add(run);
  }
  int64_t count() const { return count_; }
  const KeyRun& operator[](int64_t i) const { return runs_[i]; }

 private:
  int64_t max_;
  KeyRun* runs_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace tokenmill::TOKENMILL_ISA
