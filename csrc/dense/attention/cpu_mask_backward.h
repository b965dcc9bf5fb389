// Mask of key tiles against blocks of queries, for the backward CPU kernel, whose lanes are
// queries.
#pragma once
#include "attention/cpu_backward_operands.h"
#include "attention/cpu_mask.h"

namespace tokenmill::TOKENMILL_ISA {

template <class Op>
class BlockMask {
 public:
  explicit BlockMask(const AttentionParams& p) : p(p) {}

  bool any() const { return p.mask.any(); }

  int64_t size(int64_t padded_q) const {
    return any() ? planes() * padded_q + floats_of(hulls(padded_q)) + (planes() + 1) * 16 : 0;
  }
  void place(cpu::Workspace& workspace, int64_t padded_q) {
    if (!any()) return;
    const auto take = [&] { return reinterpret_cast<int32_t*>(workspace.take(padded_q)); };
    for (int64_t r = 0; r < ranges(); ++r) range[r] = {take(), take()};
    if (p.mask.q_spans) ids = {take(), take()};
    units = reinterpret_cast<QueryHull*>(workspace.take(floats_of(hulls(padded_q))));
    panels = units + padded_q / kUnit;
    blocks = panels + padded_q / kPanel;
  }

  // Enters the queries of head h; queries that pad the last block see nothing.
  void enter(const Sequence& s, int64_t b, int64_t h, int64_t padded_q) {
    mask = HeadMask(p.mask, b, h, s.q_start, s.k_start);
    for (int64_t i = 0; i < hulls(padded_q); ++i) units[i] = {};
    for (int64_t i = 0; i < padded_q; ++i) {
      const bool there = i < s.q_length;
      for (int64_t r = 0; r < mask.count; ++r)
        range[r].set(i, there ? mask.range(i, r) : Span::nothing());
      if (mask.q_spans) ids.set(i, there ? mask.query(i) : Span::nothing());
      if (there) mask.add_query(i, units[i / kUnit]);
    }
    for (int64_t i = 0; i < padded_q / kUnit; ++i)
      mask.add_queries(units[i], panels[i * kUnit / kPanel]);
    for (int64_t i = 0; i < padded_q / kPanel; ++i)
      mask.add_queries(panels[i], blocks[i * kPanel / kQueryBlock]);
  }

  // Enters a key tile, keys first .. first + count - 1.
  void enter_keys(int64_t first, int64_t count) {
    first_key = first;
    keys = count;
    tile = {};
    for (int64_t r = 0; r < count; r += kKeyRows<Op>) {
      Hull& group = groups[r / kKeyRows<Op>] = {};
      for (int64_t j = r; mask.k_spans && j < end_of(r); ++j) group.add(mask.key(first + j));
      tile.add(group);
    }
  }

  // True if any query of the block at i may see a key of the tile.
  bool sees(int64_t i) const {
    return mask.seen(blocks[i / kQueryBlock], tile, first_key, first_key + keys) != Seen::none;
  }

  // Bits, one per kWidth queries of the block at i, of those that may see the keys of the tile from
  // r on, at most kKeyRows; *cut: bits of panels that do not see all of these keys.
  uint64_t queries(int64_t r, int64_t i, uint64_t* cut) const {
    const int64_t begin = first_key + r, end = first_key + end_of(r);
    const Hull& group = groups[r / kKeyRows<Op>];
    uint64_t found = 0;
    *cut = 0;
    for (int64_t c = 0; c < kQueryBlock; c += kPanel) {
      const Seen s = mask.seen(panels[(i + c) / kPanel], group, begin, end);
      if (s == Seen::none) continue;
      const uint64_t panel = bits_of(c / kWidth, (c + kPanel) / kWidth);
      if (s == Seen::all) {
        found |= panel;
        continue;
      }
      *cut |= panel;
      for (int64_t u = c; u < c + kPanel; u += kUnit)
        if (mask.seen(units[(i + u) / kUnit], group, begin, end) != Seen::none)
          found |= bits_of(u / kWidth, (u + kUnit) / kWidth);
    }
    return found;
  }

  // Lane mask of the queries query .. query + kWidth - 1 that see key j of the sequence.
  TM_INLINE vm seen(int64_t query, int64_t j) const {
    vi shown = vi{} - (mask.count == 0);
    for (int64_t r = 0; r < mask.count; ++r)
      shown |= meet(load_integers(range[r].first + query), load_integers(range[r].last + query),
                    Span::at(j));
    if (mask.q_spans)
      shown &= meet(load_integers(ids.first + query), load_integers(ids.last + query), mask.key(j));
    return mask_of(shown);
  }

 private:
  static constexpr int64_t kUnit = kWidth * Op::kPair;  // queries per hull

  struct Plane {
    int32_t *first, *last;
    void set(int64_t i, Span s) const { first[i] = s.first, last[i] = s.last; }
  };

  int64_t ranges() const { return p.mask.ranges ? p.mask.count : 0; }
  int64_t planes() const { return 2 * ranges() + (p.mask.q_spans ? 2 : 0); }
  static int64_t hulls(int64_t padded_q) {
    return padded_q / kUnit + padded_q / kPanel + padded_q / kQueryBlock;
  }
  static int64_t floats_of(int64_t hulls) { return hulls * (sizeof(QueryHull) / sizeof(float)); }
  int64_t end_of(int64_t r) const { return r + kKeyRows<Op> < keys ? r + kKeyRows<Op> : keys; }

  const AttentionParams& p;
  HeadMask mask;
  Plane range[kMaxRanges] = {}, ids = {};
  QueryHull *units = nullptr, *panels = nullptr, *blocks = nullptr;
  int64_t first_key = 0, keys = 0;
  Hull groups[kKeyTile / kKeyRows<Op>], tile;  // hulls of the ids of keys
};

}  // namespace tokenmill::TOKENMILL_ISA
