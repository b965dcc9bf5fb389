// The k largest of each row. A threshold from part of the row leaves a few candidates in one pass
// over it; the k-th of them is exact. Ties at the threshold need no candidates. Of short rows and
// small k the k-th score itself is found, one maximum after the other.
#include <algorithm>
#include <cmath>

#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "select/cpu_keys.h"
#include "select/topk_select/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kMaxSample = 2048, kGroups = 31 * 16, kMaxGroups = 4 * kGroups;
constexpr int64_t kShort = 1024;  // positions of a row for single maxima

// Positions begin .. end - 1 of a row of scores.
template <DType kType>
struct Range {
  const void* scores;  // position 0
  int64_t begin, end;

  float at(int64_t i) const {
    if constexpr (kType == DType::float32) return static_cast<const float*>(scores)[i];
    return first(Elements<kType>::load_n(scores, i, 1));
  }

  // Appends, in order, the positions above the threshold to `to`, which has room for `room` of them
  // and kWidth more. Returns how many, or room + 1 if there are more.
  int64_t above(float threshold, int32_t* to, int64_t room) const {
    constexpr int kBatch = 4;
    const vf bound = set(threshold);
    int64_t count = 0, i = begin;
    for (; i + kBatch * kWidth <= end; i += kBatch * kWidth) {
      vm m[kBatch];
      TM_UNROLL(4)
      for (int b = 0; b < kBatch; ++b)
        m[b] = less(bound, Elements<kType>::load(scores, i + b * kWidth));
      if (!any(either(either(m[0], m[1]), either(m[2], m[3])))) continue;
      TM_UNROLL(4)
      for (int b = 0; b < kBatch; ++b) {
        count += store_lane_numbers(to + count, static_cast<int32_t>(i + b * kWidth), m[b]);
        if (count > room) return room + 1;
      }
    }
    for (; i < end; i += kWidth) {
      const int64_t n = std::min<int64_t>(kWidth, end - i);
      const vf x = select(lanes(0, n), Elements<kType>::load_n(scores, i, n), set(kNegInf));
      count += store_lane_numbers(to + count, static_cast<int32_t>(i), less(bound, x));
      if (count > room) return room + 1;
    }
    return count;
  }

  // The first (or last) `wanted` positions with this score, in order. Returns how many there are.
  int64_t equal_to(float score, bool from_the_end, int64_t wanted, int32_t* to) const {
    const vf x = set(score);
    const int64_t vectors = ceil_div(end - begin, kWidth);
    int64_t count = 0;
    int32_t found[kWidth * 2];
    for (int64_t v = 0; v < vectors && count < wanted; ++v) {
      const int64_t i = begin + (from_the_end ? vectors - 1 - v : v) * kWidth;
      const int64_t n = std::min<int64_t>(kWidth, end - i);
      const vm m = n < kWidth ? equal(select(lanes(0, n), Elements<kType>::load_n(scores, i, n),
                                             set(__builtin_nanf(""))),
                                      x)
                              : equal(Elements<kType>::load(scores, i), x);
      if (!any(m)) continue;
      const int64_t here = store_lane_numbers(found, static_cast<int32_t>(i), m);
      const int64_t taken = std::min(here, wanted - count);
      if (from_the_end)  // backwards, from the last place on
        std::copy(found + here - taken, found + here, to + wanted - count - taken);
      else
        std::copy(found, found + taken, to + count);
      count += taken;
    }
    if (from_the_end && count < wanted) std::copy(to + wanted - count, to + wanted, to);
    return count;
  }

  // A score that probably has a few more than `wanted` positions above it; if it has fewer, then
  // probably because many are equal to it. Of two ways, that which leaves fewer.
  float guess(int64_t wanted, uint32_t* keys) const {
    const int64_t length = end - begin, sample = std::clamp<int64_t>(length / 128, 256, kMaxSample);
    const double expected = static_cast<double>(wanted) * sample / length;
    const double rank = expected + 3.5 * std::sqrt(expected) + 3;
    int64_t groups = kGroups;
    while (5 * groups < 8 * wanted) groups *= 2;
    if (groups <= kMaxGroups && 4 * groups <= length) {
      // Above the wanted-th of the maxima lie as many positions as fall into that many groups.
      // Reading one of them again costs as much as reading kReread for the maxima.
      constexpr double kReread = 25;
      const double above = -groups * std::log1p(-static_cast<double>(wanted) / groups);
      const double depth = std::sqrt(above * kReread * length) / groups;
      const int64_t most = (length - groups - kWidth) / (groups + kWidth) + 1;
      const int64_t blocks = std::clamp<int64_t>(static_cast<int64_t>(depth), 2, most);
      if (above * sample < rank * groups * blocks)
        return score_of(largest_of_groups(wanted, groups, blocks, keys));
    }
    return sample < length && rank < sample
               ? score_of(largest_of_sample(static_cast<int64_t>(rank), sample, keys))
               : kNegInf;
  }

  // The rank-th largest maximum of `groups` groups of one position in each block: at least `rank`
  // positions have this score or more. Lanes of vectors are groups, so that neighbours fall into
  // several; blocks, which do not overlap, begin anywhere, so that a period meets all.
  uint32_t largest_of_groups(int64_t rank, int64_t groups, int64_t blocks, uint32_t* keys) const {
    const int64_t reach = end - begin - groups - kWidth;
    float maxima[kMaxGroups];
    std::fill(maxima, maxima + groups, kNegInf);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t from = begin + reach * block / (blocks - 1) + block % kWidth;
      for (int64_t j = 0; j < groups; j += kWidth)
        store(maxima + j, max_of(Elements<kType>::load(scores, from + j), load(maxima + j)));
    }
    for (int64_t j = 0; j < groups; ++j) keys[j] = key_of(maxima[j]);
    return nth_largest(keys, groups, rank);
  }

  // One position of each of `sample` intervals, which a period in the scores does not meet.
  uint32_t largest_of_sample(int64_t rank, int64_t sample, uint32_t* keys) const {
    uint32_t random = 0x9e3779b9;
    const uint64_t interval = (end - begin) / sample;
    for (int64_t s = 0; s < sample; ++s) {
      random = random * 1664525 + 1013904223;
      keys[s] = key_of(at(begin + s * interval + static_cast<int64_t>(random * interval >> 32)));
    }
    return nth_largest(keys, sample, rank);
  }

  // Whether one maximum after the other is quickest: each takes a pass over the range.
  bool takes_maxima(int64_t wanted) const {
    return end - begin <= kShort && wanted * (end - begin) <= 512 * kWidth;
  }

  // The wanted-th largest score of a short range, -inf if there are fewer.
  float exact_by_maxima(int64_t wanted) const {
    const vf none = set(kNegInf);
    float all[kShort];
    int64_t length = 0;
    for (int64_t i = begin; i < end; i += kWidth, length += kWidth) {
      const vf x = end - i < kWidth ? select(lanes(0, end - i),
                                             Elements<kType>::load_n(scores, i, end - i), none)
                                    : Elements<kType>::load(scores, i);
      store(all + length, select(less(none, x), x, none));  // NaN is none
    }
    float least = -kNegInf;  // of those that were found
    for (float found = 0; found < static_cast<float>(wanted);) {
      vf next = none, count = zero();
      for (int64_t i = 0; i < length; i += kWidth) {
        const vf x = load(all + i);
        const vm below = less(x, set(least));
        next = max_of(next, select(below, x, none));
        count = select(below, count, count + set(1));
      }
      found = sum_lanes(count);
      if (found < static_cast<float>(wanted)) least = max_lanes(next);
      if (least == kNegInf) break;
    }
    return least;
  }

  // The wanted-th largest score, by passes over the whole range.
  float exact(int64_t wanted) const {
    uint32_t prefix = 0;
    for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift == 10 ? 0 : -1) {
      const int bits = shift == 0 ? 10 : 11;
      int64_t bins[kMaxBins] = {};
      for (int64_t i = begin; i < end; ++i) {
        const uint32_t key = key_of(at(i));
        if (shift == 21 || key >> (shift + bits) == prefix)
          ++bins[key >> shift & ((1u << bits) - 1)];
      }
      uint32_t bin = (1u << bits) - 1;
      for (; bin > 0 && bins[bin] < wanted; --bin) wanted -= bins[bin];
      prefix = prefix << bits | bin;
    }
    return score_of(prefix);
  }
};

// Memory for one row: positions and keys of candidates, and of ties.
struct Scratch {
  int32_t *positions, *ties;
  uint32_t *keys, *sorted;
  int64_t room;

  Scratch(cpu::Workspace& memory, const TopkParams& p) : room(room_of(p)) {
    positions = reinterpret_cast<int32_t*>(memory.take(room + 2 * kWidth));
    ties = reinterpret_cast<int32_t*>(memory.take(p.k + kWidth));
    keys = reinterpret_cast<uint32_t*>(memory.take(std::max(room, kMaxSample)));
    sorted = reinterpret_cast<uint32_t*>(memory.take(room));
  }
  static int64_t room_of(const TopkParams& p) {
    return std::min(p.columns, 8 * p.k + 16384 + p.columns / 64);
  }
  static int64_t floats(const TopkParams& p) {
    return 3 * room_of(p) + kMaxSample + p.k + 4 * 16 + 3 * kWidth;
  }
};

// The `wanted` largest scores above -inf, in the order of the positions. Returns how many there
// are.
template <DType kType>
int64_t select_range(const Range<kType>& range, int64_t wanted, bool tie_high,
                     const Scratch& scratch, int32_t* to) {
  if (wanted == 0 || range.begin == range.end) return 0;
  int32_t* const positions = scratch.positions;
  const int64_t room = scratch.room;
  float threshold = kNegInf;
  if (wanted < range.end - range.begin)
    threshold = range.takes_maxima(wanted) ? range.exact_by_maxima(wanted)
                                           : range.guess(wanted, scratch.keys);
  int64_t above = range.above(threshold, positions, room), equals = 0;
  if (above < wanted && threshold > kNegInf) {
    equals = range.equal_to(threshold, tie_high, wanted - above, scratch.ties);
    if (above + equals < wanted) above = room + 1;
  }
  if (above > room) {  // the guess was bad
    threshold = range.exact(wanted);
    above = range.above(threshold, positions, room);
    equals =
        threshold > kNegInf ? range.equal_to(threshold, tie_high, wanted - above, scratch.ties) : 0;
  }
  if (above <= wanted) {
    std::merge(positions, positions + above, scratch.ties, scratch.ties + equals, to);
    return above + equals;
  }
  for (int64_t c = 0; c < above; ++c) {
    scratch.keys[c] = key_of(range.at(positions[c]));
    scratch.sorted[c] = scratch.keys[c];
  }
  const uint32_t least = nth_largest(scratch.sorted, above, wanted);
  int64_t larger = 0, same = 0;
  for (int64_t c = 0; c < above; ++c) {
    larger += scratch.keys[c] > least;
    same += scratch.keys[c] == least;
  }
  // Of the candidates with the least score, those number `from` to `from + wanted - larger - 1`.
  const int64_t from = tie_high ? same - (wanted - larger) : 0, until = from + wanted - larger;
  int64_t count = 0, seen = 0;
  for (int64_t c = 0; c < above; ++c) {
    const bool tie = scratch.keys[c] == least;
    to[count] = positions[c];
    count += scratch.keys[c] > least || (tie && seen >= from && seen < until);
    seen += tie;
    if (count == wanted) break;
  }
  return count;
}

template <DType kType>
void order_by_score(const Range<kType>& row, bool tie_high, int32_t* positions, int64_t count) {
  std::sort(positions, positions + count, [&](int32_t a, int32_t b) {
    const uint32_t x = key_of(row.at(a)), y = key_of(row.at(b));
    return x != y ? x > y : tie_high ? a > b : a < b;
  });
}

template <DType kType>
void select_row(const TopkParams& p, int64_t r, const Scratch& scratch) {
  using Element = typename Elements<kType>::type;
  const TopkWindow window = topk_window(p, r);
  const Element* scores = static_cast<const Element*>(p.scores) + r * p.row_stride + window.start;
  const int64_t first_end = std::min(p.force_first, window.length);
  const int64_t last_begin = std::max(first_end, window.length - p.force_last);
  int32_t* const to = p.indices + r * p.k;
  int64_t count = 0;
  for (int64_t i = 0; i < first_end; ++i) to[count++] = static_cast<int32_t>(i);
  const int64_t forced = first_end + window.length - last_begin;
  count += select_range(Range<kType>{scores, first_end, last_begin}, p.k - forced, p.tie_high,
                        scratch, to + count);
  for (int64_t i = last_begin; i < window.length; ++i) to[count++] = static_cast<int32_t>(i);
  if (p.by_score) order_by_score(Range<kType>{scores, 0, window.length}, p.tie_high, to, count);
  std::fill(to + count, to + p.k, -1);
  p.counts[r] = static_cast<int32_t>(count);
  if (p.values) {
    Element* const values = static_cast<Element*>(p.values) + r * p.k;
    for (int64_t i = 0; i < count; ++i) values[i] = scores[to[i]];
    for (int64_t i = count; i < p.k; ++i) store_from_float_n(values, kType, i, set(kNegInf), 1);
  }
  if (p.physical) {
    int32_t* const physical = p.physical + r * p.k;
    for (int64_t i = 0; i < count; ++i) physical[i] = topk_physical(p, r, to[i]);
    std::fill(physical + count, physical + p.k, -1);
  }
}

}  // namespace

void topk_select(const TopkParams& p) {
  // Below about 32 Ki scores a parallel region costs more than it gains.
  const int threads = p.rows * p.columns < (1 << 15) ? 1 : cpu::num_threads();
  cpu::parallel_items(p.rows, threads, [&](cpu::ItemCounter& rows) {
    cpu::Workspace memory(Scratch::floats(p));
    const Scratch scratch(memory, p);
    for (int64_t r; (r = rows.next()) >= 0;)
      visit_elements(p.dtype,
                     [&]<DType kType>(Elements<kType>) { select_row<kType>(p, r, scratch); });
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
