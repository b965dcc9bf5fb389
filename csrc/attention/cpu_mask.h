// Masks of ranges and spans, for CPU kernels. A range of keys is a span of positions, and a key is
// at one position, so both rules become one: the spans of query and key intersect, in positions and
// in ids. Hulls of spans decide what a tile of pairs sees before it is multiplied.
#pragma once
#include "attention/params.h"
#include "cpu/simd.h"

namespace tokenmill::TOKENMILL_ISA {

using vi = int32_t __attribute__((vector_size(kWidth * sizeof(int32_t))));

TM_INLINE vi load_integers(const int32_t* p) {
  vi x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
TM_INLINE vi positions(int64_t first) {
  return __builtin_convertvector(iota(), vi) + static_cast<int32_t>(first);
}
// Lane mask of a comparison of vi.
TM_INLINE vm mask_of(vi x) { return less(__builtin_convertvector(x, vf), zero()); }

// Closed interval [first, last]; empty if first > last.
struct Span {
  int32_t first, last;

  static constexpr Span nothing() { return {INT32_MAX, INT32_MIN}; }
  static constexpr Span at(int64_t j) { return {static_cast<int32_t>(j), static_cast<int32_t>(j)}; }
};

TM_INLINE bool meet(Span a, Span b) { return a.first <= b.last && b.first <= a.last; }
TM_INLINE vi meet(vi first, vi last, Span other) {
  return (first <= other.last) & (last >= other.first);
}

// Bounds of `first` and `last` over some spans.
struct Hull {
  int32_t min_first = INT32_MAX, max_first = INT32_MIN;
  int32_t min_last = INT32_MAX, max_last = INT32_MIN;

  TM_INLINE void add(const Hull& x) {
    min_first = x.min_first < min_first ? x.min_first : min_first;
    max_first = x.max_first > max_first ? x.max_first : max_first;
    min_last = x.min_last < min_last ? x.min_last : min_last;
    max_last = x.max_last > max_last ? x.max_last : max_last;
  }
  TM_INLINE void add(Span s) { add(Hull{s.first, s.first, s.last, s.last}); }

  static Hull of_positions(int64_t begin, int64_t end) {
    const Span a = Span::at(begin), z = Span::at(end - 1);
    return {a.first, z.first, a.first, z.first};
  }
};

// Visibility of the pairs of a tile.
enum class Seen : int32_t { none, some, all };

TM_INLINE Seen meet(const Hull& a, const Hull& b) {
  if (a.min_first > b.max_last || b.min_first > a.max_last) return Seen::none;
  return a.max_first <= b.min_last && b.max_first <= a.min_last ? Seen::all : Seen::some;
}

// Hulls of some queries.
struct QueryHull {
  Hull ranges[kMaxRanges], ids;
};

// Mask of one head of one sequence.
struct HeadMask {
  int64_t count = 0;  // ranges per query, if the mask has ranges
  const int32_t *ranges = nullptr, *q_spans = nullptr, *k_spans = nullptr;

  HeadMask() = default;
  HeadMask(const PairMask& m, int64_t b, int64_t h, int64_t q_start, int64_t k_start) {
    if (m.ranges) {
      count = m.count;
      ranges = m.ranges + b * m.ranges_batch + h * m.ranges_head + q_start * count * 2;
    }
    if (m.q_spans) {
      q_spans = m.q_spans + b * m.q_spans_batch + q_start * 2;
      k_spans = m.k_spans + b * m.k_spans_batch + k_start * 2;
    }
  }

  bool any() const { return ranges || q_spans; }

  Span range(int64_t i, int64_t r) const {
    const int32_t* at = ranges + (i * count + r) * 2;
    return at[0] < at[1] ? Span{at[0], at[1] - 1} : Span::nothing();
  }
  Span query(int64_t i) const { return {q_spans[2 * i], q_spans[2 * i + 1]}; }
  Span key(int64_t j) const { return {k_spans[2 * j], k_spans[2 * j + 1]}; }

  void add_query(int64_t i, QueryHull& to) const {
    for (int64_t r = 0; r < count; ++r) to.ranges[r].add(range(i, r));
    if (q_spans) to.ids.add(query(i));
  }
  void add_queries(const QueryHull& x, QueryHull& to) const {
    for (int64_t r = 0; r < count; ++r) to.ranges[r].add(x.ranges[r]);
    if (q_spans) to.ids.add(x.ids);
  }

  // Visibility of the keys [begin, end), whose ids have hull `ids`, to `queries`.
  Seen seen(const QueryHull& queries, const Hull& ids, int64_t begin, int64_t end) const {
    Seen maximum = count ? Seen::none : Seen::all;
    const Hull keys = Hull::of_positions(begin, end);
    for (int64_t r = 0; r < count; ++r) {
      const Seen s = meet(queries.ranges[r], keys);
      maximum = s > maximum ? s : maximum;
    }
    if (!q_spans || maximum == Seen::none) return maximum;
    const Seen s = meet(queries.ids, ids);
    return s < maximum ? s : maximum;
  }

  bool sees(int64_t i, int64_t j) const {
    bool shown = count == 0;
    for (int64_t r = 0; r < count; ++r) shown |= meet(range(i, r), Span::at(j));
    return shown && (!q_spans || meet(query(i), key(j)));
  }

  // Lane mask of the kWidth keys that query i sees, from their positions and ids.
  TM_INLINE vm seen_keys(int64_t i, vi position, vi first, vi last) const {
    vi shown = vi{} - (count == 0);
    for (int64_t r = 0; r < count; ++r) shown |= meet(position, position, range(i, r));
    if (q_spans) shown &= meet(first, last, query(i));
    return mask_of(shown);
  }
};

// Calls f(begin, end) for each run of ones, from the lowest on.
template <typename F>
TM_INLINE void for_each_run(uint64_t bits, const F& f) {
  while (bits) {
    const int begin = __builtin_ctzll(bits);
    const uint64_t inverse = ~(bits >> begin);
    const int end = inverse ? begin + __builtin_ctzll(inverse) : 64;
    f(begin, end);
    bits = end < 64 ? bits >> end << end : 0;
  }
}
constexpr uint64_t bits_of(int64_t begin, int64_t end) {  // [begin, end), begin < 64
  return (end < 64 ? (uint64_t{1} << end) - 1 : ~uint64_t{0}) & ~((uint64_t{1} << begin) - 1);
}

}  // namespace tokenmill::TOKENMILL_ISA
