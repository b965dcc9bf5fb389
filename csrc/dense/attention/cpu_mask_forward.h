// Mask of a query tile against panels of keys, for the forward CPU kernel.
#pragma once
#include "attention/cpu_mask.h"
#include "attention/cpu_weights.h"

namespace tokenmill::TOKENMILL_ISA {

constexpr int64_t kQueryTile = 96;  // a multiple of kTileRows
constexpr int64_t kKeyStep = 256;   // a multiple of kPanel

// A range of vectors of a panel.
struct Vectors {
  int64_t first, count;

  Vectors within(const Vectors& x) const {
    const int64_t from = x.first > first ? x.first : first;
    const int64_t to = x.first + x.count < first + count ? x.first + x.count : first + count;
    return {from, to - from};
  }
};

// Test of single pairs.
struct PairTest {
  HeadMask mask;
  int64_t rows = 0;                           // rows of the sequence
  int32_t *first = nullptr, *last = nullptr;  // ids of its keys

  // Lane mask of the keys column .. column + kWidth - 1 that query i sees. Rows that pad a register
  // tile repeat the last one.
  TM_INLINE vm seen(int64_t i, int64_t column) const {
    const bool ids = mask.q_spans;
    return mask.seen_keys(i < rows ? i : rows - 1, positions(column),
                          ids ? load_integers(first + column) : vi{},
                          ids ? load_integers(last + column) : vi{});
  }
};

template <class Op>
class TileMask {
 public:
  explicit TileMask(const AttentionParams& p) : p(p) {}

  bool any() const { return p.mask.any(); }

  int64_t size(int64_t longest_k) const {
    return p.mask.q_spans ? 2 * plane(longest_k) + floats_of(hulls(longest_k)) + 3 * 16 : 0;
  }
  void place(cpu::Workspace& workspace, int64_t longest_k) {
    if (!p.mask.q_spans) return;
    const int64_t padded = round_up(longest_k, kPanel);
    test.first = reinterpret_cast<int32_t*>(workspace.take(plane(longest_k)));
    test.last = reinterpret_cast<int32_t*>(workspace.take(plane(longest_k)));
    units = reinterpret_cast<Hull*>(workspace.take(floats_of(hulls(longest_k))));
    panels = units + padded / kUnit;
    steps = panels + padded / kPanel;
  }

  // Enters queries first .. first + rows - 1 of head h.
  void enter(const Sequence& s, int64_t b, int64_t h, int64_t first, int64_t rows) {
    const HeadMask mask(p.mask, b, h, s.q_start, s.k_start);
    test.mask = mask;
    test.rows = s.q_length;
    length = s.k_length;
    if (mask.q_spans && b != loaded) load_keys();
    loaded = b;
    tile = {};
    groups = 0;
    for (int64_t row = 0, n; row < rows; row += n) {
      n = rows_of_tile<Op>(rows - row);
      QueryHull& queries = group[groups++].queries;
      queries = {};
      for (int64_t r = row; r < row + n && r < rows; ++r) mask.add_query(first + r, queries);
      mask.add_queries(queries, tile);
    }
  }

  // True if the tile may see any key of [begin, end), at most kKeyStep keys.
  bool sees(int64_t begin, int64_t end) const {
    Hull ids = of(steps, begin / kKeyStep);
    ids.add(of(steps, (end - 1) / kKeyStep));
    return test.mask.seen(tile, ids, begin, end) != Seen::none;
  }

  // True if the tile sees any key of the panel at `column`; also computes what each group of rows
  // sees.
  bool enter_panel(int64_t column) {
    const int64_t end = column + kPanel < length ? column + kPanel : length;
    const Hull& ids = of(panels, column / kPanel);
    const Seen by_tile = test.mask.seen(tile, ids, column, end);
    if (by_tile == Seen::none) return false;
    bool any = false;
    for (int64_t g = 0; g < groups; ++g) {
      Group& x = group[g];
      const bool all = by_tile == Seen::all;
      const Seen s = all ? Seen::all : test.mask.seen(x.queries, ids, column, end);
      x.vectors = {0, s == Seen::none ? 0 : kTileVectors};
      x.cut = s == Seen::some;
      if (x.cut) narrow(x, column, end);
      any |= x.vectors.count > 0;
    }
    return any;
  }
  const Vectors& vectors(int64_t g) const { return group[g].vectors; }
  // Pair test of a group that does not see all of its vectors, else null.
  const PairTest* pairs(int64_t g) const { return group[g].cut ? &test : nullptr; }

  // Number of keys of [begin, end) that query i sees and that no bias hides.
  float visible(const ScoreMod& score_mod, int64_t i, int64_t begin, int64_t end) const {
    float count = 0;
    for (int64_t at = begin, to; at < end; at = to) {
      to = round_up(at + 1, kKeyStep);
      to = to < end ? to : end;
      if (test.mask.seen(tile, of(steps, at / kKeyStep), at, to) == Seen::none) continue;
      count += score_mod.visible(i, at, to, [&](int64_t j) TM_LAMBDA { return test.seen(i, j); });
    }
    return count;
  }

 private:
  static constexpr int64_t kUnit = kWidth * Op::kPair;  // keys per hull

  struct Group {  // the rows of a register tile
    QueryHull queries;
    Vectors vectors;
    bool cut;
  };

  // Padded: vectors are read from any key on.
  static int64_t plane(int64_t longest_k) { return round_up(longest_k, kPanel) + kWidth; }
  static int64_t hulls(int64_t longest_k) {
    const int64_t padded = round_up(longest_k, kPanel);
    return padded / kUnit + padded / kPanel + ceil_div(padded, kKeyStep);
  }
  static int64_t floats_of(int64_t hulls) { return hulls * (sizeof(Hull) / sizeof(float)); }

  const Hull& of(const Hull* hulls, int64_t i) const { return p.mask.q_spans ? hulls[i] : nothing; }

  void load_keys() {
    const int64_t padded = round_up(length, kPanel);
    for (int64_t i = 0; i < padded / kUnit; ++i) units[i] = {};
    for (int64_t j = 0; j < plane(length); ++j) {
      const Span ids = j < length ? test.mask.key(j) : Span::nothing();
      test.first[j] = ids.first;
      test.last[j] = ids.last;
      if (j < length) units[j / kUnit].add(ids);
    }
    for (int64_t i = 0; i < padded / kPanel; ++i) panels[i] = {};
    for (int64_t i = 0; i < padded / kUnit; ++i) panels[i * kUnit / kPanel].add(units[i]);
    for (int64_t i = 0; i < ceil_div(padded, kKeyStep); ++i) steps[i] = {};
    for (int64_t i = 0; i < padded / kPanel; ++i) steps[i * kPanel / kKeyStep].add(panels[i]);
  }

  // Restricts a group to the units, from first to last, that it may see in the panel at `column`.
  void narrow(Group& x, int64_t column, int64_t end) const {
    int64_t first = kPanel / kUnit, last = -1, whole = 0;
    for (int64_t u = 0; column + u * kUnit < end; ++u) {
      const int64_t at = column + u * kUnit, to = at + kUnit < end ? at + kUnit : end;
      const Seen s = test.mask.seen(x.queries, of(units, at / kUnit), at, to);
      if (s == Seen::none) continue;
      first = u < first ? u : first;
      last = u;
      whole += s == Seen::all;
    }
    const int64_t count = last < 0 ? 0 : last + 1 - first;
    x.vectors = {first * Op::kPair, count * Op::kPair};
    x.cut = whole != count;
  }

  const AttentionParams& p;
  PairTest test;
  int64_t length = 0, loaded = -1, groups = 0;
  Hull *units = nullptr, *panels = nullptr, *steps = nullptr;  // hulls of the ids of keys
  Hull nothing;
  QueryHull tile;
  Group group[kQueryTile / kShortRows];
};

}  // namespace tokenmill::TOKENMILL_ISA
