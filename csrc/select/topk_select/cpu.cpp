// The k largest scores of each row. A threshold, from a sample of the row or from hints, leaves a
// few candidates in one pass over it; the k-th of them is exact. Ties at the threshold need no
// candidates. For short rows and small k the k-th score is found directly, by repeated maxima.
#include <algorithm>
#include <cmath>

#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "select/cpu_keys.h"
#include "select/topk_select/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kMaxHints = 256;  // hints whose scores are read
constexpr int64_t kMaxSample = 2048, kGroups = 31 * 16, kMaxGroups = 4 * kGroups;
constexpr int kBatch = 64;        // positions per word of bits
constexpr int64_t kShort = 1024;  // maximum row length for repeated maxima

constexpr uint32_t kSeed = 0x9e3779b9;

// Pseudo-random position in interval number s, from a linear congruential generator.
TM_INLINE int64_t random_in_interval(uint32_t& random, int64_t s, int64_t interval) {
  random = random * 1664525 + 1013904223;
  return s * interval + static_cast<int64_t>(uint64_t{random} * interval >> 32);
}

template <bool kOrEqual>
TM_INLINE vm above_bound(vf x, vf bound) {
  return kOrEqual ? either(less(bound, x), equal(bound, x)) : less(bound, x);
}

// Number of x[0 .. count - 1] above a bound > -inf, or equal to it. x is padded with -inf.
template <bool kOrEqual = false>
inline int64_t count_above(const float* x, int64_t count, float bound) {
  constexpr int kChains = 4;
  const vf minimum = set(bound), one = set(1);
  vf sums[kChains] = {zero(), zero(), zero(), zero()};
  for (int64_t i = 0; i < count; i += kChains * kWidth) {
    TM_UNROLL(4)
    for (int c = 0; c < kChains; ++c)
      sums[c] =
          select(above_bound<kOrEqual>(load(x + i + c * kWidth), minimum), sums[c] + one, sums[c]);
  }
  return static_cast<int64_t>(sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])));
}
constexpr int64_t kPadding = 4 * kWidth;
inline void pad(float* x, int64_t count) { std::fill(x + count, x + count + kPadding, kNegInf); }

// Positions of an earlier selection. Any numbers may occur.
struct Hints {
  const int32_t* positions;
  int64_t count;

  bool ascend() const {
    bool fall = false;
    for (int64_t j = 1; j < count; ++j) fall |= positions[j] < positions[j - 1];
    return !fall;
  }
};

// Bracket of the wanted-th score: somewhat more positions than wanted probably lie above
// `threshold`, and fewer above `surely`.
struct Guess {
  float threshold, surely;
};

// Positions begin .. end - 1 of a row of scores.
template <DType kType>
struct Range {
  const void* scores;  // position 0
  int64_t begin, end;

  float at(int64_t i) const {
    if constexpr (kType == DType::float32) return static_cast<const float*>(scores)[i];
    return first(Elements<kType>::load_n(scores, i, 1));
  }

  // Appends the positions above the threshold, in order, to `to`, which has room for
  // `room` + kBatch of them. Returns their number, or room + 1 if there are more than `room`.
  int64_t above(float threshold, int32_t* to, int64_t room) const {
    const vf bound = set(threshold);
    int64_t count = 0, i = begin;
    for (; i + kBatch <= end; i += kBatch) {
      uint64_t bits = 0;
      TM_UNROLL(16)
      for (int b = 0; b < kBatch; b += kWidth)
        bits |= bits_of(less(bound, Elements<kType>::load(scores, i + b))) << b;
      if (bits == 0) continue;
      int32_t* next = to + count;
      count += std::popcount(bits);
      if (count > room) return room + 1;
      // The first few are written without a branch each, which would be mispredicted.
      TM_UNROLL(5)
      for (int few = 0; few < 5; ++few, bits &= bits - 1)
        *next++ = static_cast<int32_t>(i + std::countr_zero(bits | uint64_t{1} << 63));
      for (; bits != 0; bits &= bits - 1)
        *next++ = static_cast<int32_t>(i + std::countr_zero(bits));
    }
    for (; i < end; i += kWidth) {
      const int64_t n = std::min<int64_t>(kWidth, end - i);
      const vf x = select(lanes(0, n), Elements<kType>::load_n(scores, i, n), set(kNegInf));
      count += store_lane_numbers(to + count, static_cast<int32_t>(i), less(bound, x));
      if (count > room) return room + 1;
    }
    return count;
  }

  // The first (or last) `wanted` positions with this score, in order. Returns their number.
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
      if (from_the_end)  // filled backwards from the end
        std::copy(found + here - taken, found + here, to + wanted - count - taken);
      else
        std::copy(found, found + taken, to + count);
      count += taken;
    }
    if (from_the_end && count < wanted) std::copy(to + wanted - count, to + wanted, to);
    return count;
  }

  // A score that probably has a few more than `wanted` positions above it; if fewer, then probably
  // because many are equal to it. Chooses the method that leaves fewer candidates.
  float guess(int64_t wanted, uint32_t* keys) const {
    const int64_t length = end - begin, sample = std::clamp<int64_t>(length / 128, 256, kMaxSample);
    const double expected = static_cast<double>(wanted) * sample / length;
    const double rank = expected + 3.5 * std::sqrt(expected) + 3;
    int64_t groups = kGroups;
    while (5 * groups < 8 * wanted) groups *= 2;
    if (groups <= kMaxGroups && 4 * groups <= length) {
      // As many positions lie above the wanted-th of the group maxima as fall into that many
      // groups. Reading one of them again costs as much as reading kReread for the maxima.
      constexpr double kReread = 25;
      const double above = -groups * std::log1p(-static_cast<double>(wanted) / groups);
      const double depth = std::sqrt(above * kReread * length) / groups;
      const int64_t maximum = (length - groups - kWidth) / (groups + kWidth) + 1;
      const int64_t blocks = std::clamp<int64_t>(static_cast<int64_t>(depth), 2, maximum);
      if (above * sample < rank * groups * blocks)
        return score_of(largest_of_groups(wanted, groups, blocks, keys));
    }
    return sample < length && rank < sample
               ? score_of(largest_of_sample(static_cast<int64_t>(rank), sample, keys))
               : kNegInf;
  }

  // The rank-th largest maximum of `groups` groups with one position in each block: at least `rank`
  // positions have this score or more. Vector lanes are groups, so that adjacent positions fall
  // into different groups; the disjoint blocks begin at random offsets, so that a periodic row
  // reaches all groups.
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

  // Samples one random position from each of `sample` intervals, which is robust to periodic
  // scores.
  uint32_t largest_of_sample(int64_t rank, int64_t sample, uint32_t* keys) const {
    uint32_t random = kSeed;
    const int64_t interval = (end - begin) / sample;
    for (int64_t s = 0; s < sample; ++s)
      keys[s] = key_of(at(begin + random_in_interval(random, s, interval)));
    return nth_largest(keys, sample, rank);
  }

  // Guess from hints. The count of positions above a score is estimated from the hints, one in
  // `stride`, plus the other positions, one vector per interval of 2^shift positions. If most hints
  // are right, nearly all of them and few others lie above the wanted score, so that both estimates
  // are close. Repeated hints make the threshold too high.
  Guess guess_from(Hints hints, int64_t wanted, int32_t* sampled, float* hinted,
                   float* others) const {
    const int64_t length = end - begin;
    const int64_t vectors = std::clamp<int64_t>(length / 128, 256, kMaxSample) / kWidth;
    // An interval has at least one vector; a short row then has fewer intervals.
    const auto each = static_cast<uint64_t>(std::max<int64_t>(length / vectors, kWidth));
    const int shift = static_cast<int>(std::bit_width(each)) - 1;
    const int64_t intervals = length >> shift, inside = (int64_t{1} << shift) - kWidth + 1;
    for (int64_t s = 0; s < intervals; ++s) {
      const uint32_t random = static_cast<uint32_t>(s) * kSeed;
      const int64_t offset = static_cast<int64_t>(uint64_t{random} * inside >> 32);
      sampled[s] = static_cast<int32_t>(begin + (s << shift) + offset);
      store(others + s * kWidth, Elements<kType>::load(scores, sampled[s]));
    }
    hide(hints, sampled, intervals, shift, others);
    const int64_t sample = intervals * kWidth;
    const double interval = static_cast<double>(int64_t{1} << shift) / kWidth;
    const int64_t stride = ceil_div(hints.count, kMaxHints), read = hints.count / stride;
    for (int64_t s = 0; s < read; ++s) {
      const int32_t hint = hints.positions[s * stride];
      const bool repeated = s > 0 && hint == hints.positions[s * stride - 1];
      hinted[s] = hint >= begin && hint < end && !repeated ? at(hint) : kNegInf;
    }
    pad(hinted, read);
    pad(others, sample);
    // Bisection: enough positions probably lie above the score of `low`, not enough above the score
    // of `high`.
    struct Above {
      uint32_t key;
      int64_t hinted, others;
    } low{key_of(kNegInf), read, sample}, high{key_of(-kNegInf), 0, 0};
    float surely = -kNegInf;
    while (high.key - low.key > 1) {
      const int64_t between = (low.hinted - high.hinted) * stride;
      if (between + (low.others - high.others) * interval <= 2 * interval)
        return {score_of(low.key), surely};
      Above middle{low.key + (high.key - low.key) / 2, 0, 0};
      const float bound = score_of(middle.key);
      middle.hinted = count_above(hinted, read, bound);
      middle.others = count_above(others, sample, bound);
      const double of_hints = static_cast<double>(stride * middle.hinted);
      const double of_others = interval * middle.others;
      const double missing = std::max(wanted - of_hints, 0.);
      const double variance =
          stride > 1 ? of_hints * stride * (read + 1 - middle.hinted) / read : 0;
      const double margin =
          3 * std::sqrt(variance + missing * interval) + (missing > 0 ? 2 * interval : 0);
      const bool enough = of_hints + of_others >= wanted + margin;
      const double maximum =
          of_hints + of_others + interval + 2 * std::sqrt(variance + of_others * interval);
      if (!enough && maximum <= wanted) surely = bound;
      (enough ? low : high) = middle;
    }
    return {score_of(high.key), surely};  // many scores are equal to it
  }

  // Masks hinted positions among the sampled ones: kWidth from sampled[s] on, in interval s.
  void hide(Hints hints, int32_t* sampled, int64_t intervals, int shift, float* others) const {
    if (hints.ascend()) {
      const int32_t* hint = hints.positions;
      const int32_t* const last = hint + hints.count;
      for (int64_t s = 0; s < intervals; ++s) {
        hint = std::lower_bound(hint, last, sampled[s]);
        for (; hint < last && *hint < sampled[s] + kWidth; ++hint)
          others[s * kWidth + *hint - sampled[s]] = kNegInf;
      }
      return;
    }
    // Hints outside of all intervals are compared with the first position, which is far from all of
    // them.
    sampled[intervals] = static_cast<int32_t>(begin);
    const uint32_t first = static_cast<uint32_t>(begin), outside = static_cast<uint32_t>(intervals);
    for (int64_t j = 0; j < hints.count; ++j) {
      const uint32_t hint = static_cast<uint32_t>(hints.positions[j]);
      const uint32_t s = std::min((hint - first) >> shift, outside);
      const uint32_t lane = hint - static_cast<uint32_t>(sampled[s]);
      if (lane < kWidth) others[s * kWidth + lane] = kNegInf;
    }
  }

  // True if repeated maxima are fastest: each takes a pass over the range.
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
      store(all + length, select(less(none, x), x, none));  // NaN becomes -inf
    }
    float minimum = -kNegInf;  // smallest maximum found so far
    for (float found = 0; found < static_cast<float>(wanted);) {
      vf next = none, count = zero();
      for (int64_t i = 0; i < length; i += kWidth) {
        const vf x = load(all + i);
        const vm below = less(x, set(minimum));
        next = max_of(next, select(below, x, none));
        count = select(below, count, count + set(1));
      }
      found = sum_lanes(count);
      if (found < static_cast<float>(wanted)) minimum = max_lanes(next);
      if (minimum == kNegInf) break;
    }
    return minimum;
  }

  // The wanted-th largest score, by radix passes over the whole range.
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

// Scratch memory for one row.
struct Scratch {
  int32_t *positions, *ties;  // candidates; scores equal to the threshold
  float* scores;              // candidates and hints
  uint32_t* keys;             // candidates and samples
  int32_t* numbers;           // aliases keys
  float* others;              // aliases keys
  int64_t room;

  Scratch(cpu::Workspace& memory, const TopkParams& p) : room(room_of(p)) {
    positions = reinterpret_cast<int32_t*>(memory.take(room + kBatch));
    ties = reinterpret_cast<int32_t*>(memory.take(p.k + kPadding));
    scores = memory.take(room + kPadding);
    others = memory.take(room + kPadding);
    keys = reinterpret_cast<uint32_t*>(others);
    numbers = reinterpret_cast<int32_t*>(others);
  }
  // Also large enough for up to 2 kMaxSample samples and the 2 k hints that are read.
  static int64_t room_of(const TopkParams& p) {
    return std::max(std::min(p.columns, 8 * p.k + 16384 + p.columns / 64),
                    std::max(2 * kMaxSample, p.previous ? 2 * p.k : 0));
  }
  static int64_t floats(const TopkParams& p) {
    return 3 * room_of(p) + p.k + 4 * (kPadding + 16) + kBatch;
  }
};

// Selects `wanted` of more candidates, in the order of the positions.
inline void select_candidates(int64_t count, int64_t wanted, Guess guess, bool tie_high,
                              const Scratch& scratch, int32_t* to) {
  const int32_t* const positions = scratch.positions;
  const float* const scores = scratch.scores;
  const auto take_above = [&](float bound) {  // exactly `wanted` are above
    int64_t found = 0;
    for (int64_t c = 0; c < count; c += kWidth)
      found += store_lane_numbers(scratch.numbers + found, static_cast<int32_t>(c),
                                  less(set(bound), load(scores + c)));
    for (int64_t j = 0; j < wanted; ++j) to[j] = positions[scratch.numbers[j]];
  };
  // Bisection: more positions than wanted lie above the score of `low`, and fewer, `larger`, above
  // the score of `high`.
  uint32_t low = key_of(guess.threshold), high = key_of(guess.surely);
  int64_t larger = count_above(scores, count, guess.surely);
  if (larger == 0 || larger >= wanted) {
    vf maximum = set(guess.threshold);
    for (int64_t c = 0; c < count; c += kWidth) maximum = max_of(maximum, load(scores + c));
    high = key_of(max_lanes(maximum));
    larger = 0;
  }
  for (int64_t more = count, step = 0; high - low > 1; ++step) {
    // Linear interpolation of the counts to `wanted`, or the midpoint.
    const double part =
        step % 3 < 2 ? static_cast<double>(more - wanted) / static_cast<double>(more - larger) : .5;
    const uint32_t between = static_cast<uint32_t>(part * (high - low));
    const uint32_t middle = low + std::clamp(between, 1u, high - low - 1);
    const int64_t some = count_above(scores, count, score_of(middle));
    if (some == wanted) return take_above(score_of(middle));
    if (some > wanted)
      low = middle, more = some;
    else
      high = middle, larger = some;
  }
  const float minimum = score_of(high);
  // Among the candidates with the smallest score, takes numbers `from` to `from + ties - 1`.
  const int64_t ties = wanted - larger;
  const int64_t from = tie_high ? count_above<true>(scores, count, minimum) - wanted : 0;
  for (int64_t c = 0, found = 0, seen = 0; c < count && found < wanted; ++c) {
    const bool tie = scores[c] == minimum;
    to[found] = positions[c];
    found += (scores[c] > minimum) | (tie & (seen >= from) & (seen < from + ties));
    seen += tie;
  }
}

// Selects the `wanted` largest scores above -inf, in the order of the positions. Returns their
// number.
template <DType kType>
int64_t select_range(const Range<kType>& range, int64_t wanted, bool tie_high, Hints hints,
                     const Scratch& scratch, int32_t* to) {
  if (wanted == 0 || range.begin == range.end) return 0;
  int32_t* const positions = scratch.positions;
  const int64_t room = scratch.room;
  Guess guess{kNegInf, -kNegInf};
  int64_t above = 0, equals = 0;
  // True if all wanted positions lie above the threshold or equal it, and fit in memory.
  const auto suffices = [&] {
    const float threshold = guess.threshold;
    above = range.above(threshold, positions, room);
    equals = above < wanted && threshold > kNegInf
                 ? range.equal_to(threshold, tie_high, wanted - above, scratch.ties)
                 : 0;
    return above <= room && (above + equals >= wanted || threshold == kNegInf);
  };
  const bool partly = wanted < range.end - range.begin, maxima = range.takes_maxima(wanted);
  bool done = false;
  if (partly && !maxima && hints.count > 0) {
    guess = range.guess_from(hints, wanted, positions, scratch.scores, scratch.others);
    done = suffices();
  }
  if (!done) {
    guess = {!partly  ? kNegInf
             : maxima ? range.exact_by_maxima(wanted)
                      : range.guess(wanted, scratch.keys),
             -kNegInf};
    done = suffices();
  }
  if (!done) {
    guess.threshold = range.exact(wanted);
    suffices();
  }
  if (above <= wanted) {
    std::merge(positions, positions + above, scratch.ties, scratch.ties + equals, to);
    return above + equals;
  }
  for (int64_t c = 0; c < above; ++c) scratch.scores[c] = range.at(positions[c]);
  pad(scratch.scores, above);
  select_candidates(above, wanted, guess, tie_high, scratch, to);
  return wanted;
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
  // Only the beginning of a long list of hints is read.
  Hints hints{p.previous + r * p.hint_stride, p.previous ? std::min(p.hints, 2 * p.k) : 0};
  while (hints.count > 0 && hints.positions[hints.count - 1] < 0) --hints.count;
  count += select_range(Range<kType>{scores, first_end, last_begin}, p.k - forced, p.tie_high,
                        hints, scratch, to + count);
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
