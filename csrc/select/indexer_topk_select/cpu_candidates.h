// Scores and ids of one query above a threshold.
#pragma once
#include "select/cpu_keys.h"

namespace tokenmill::TOKENMILL_ISA {

// Candidates for a list: scores, none of which is NaN, and ascending ids.
struct Candidates {
  float* scores;
  int32_t* ids;
  int64_t count;
  float threshold;  // scores above it are candidates

  // Adds the scores above the threshold, with ids first .. first + n - 1; n is at most kPanel.
  // `from` has whole vectors.
  TM_INLINE void add(const float* from, int64_t n, int64_t first) {
    const vf bound = set(threshold);
    for (int64_t i = 0; i < n; i += kWidth) {
      vf x = load(from + i);
      if (n - i < kWidth) x = select(lanes(0, n - i), x, bound);
      const vm above = less(bound, x);
      if (!any(above)) continue;
      int32_t* const to = ids + count;
      const int found = store_lane_numbers(to, static_cast<int32_t>(first + i), above);
      for (int c = 0; c < found; ++c) scores[count + c] = from[to[c] - first];
      count += found;
    }
  }

  // Keeps the `most` best candidates. keys, sorted: scratch for `count` numbers each.
  void cut(int64_t maximum, uint32_t* keys, uint32_t* sorted) {
    if (count <= maximum) return;
    for (int64_t i = 0; i < count; ++i) keys[i] = sorted[i] = key_of(scores[i]);
    const uint32_t minimum = nth_largest(sorted, count, maximum);
    int64_t above = 0, kept = 0;
    for (int64_t i = 0; i < count; ++i) above += keys[i] > minimum;
    int64_t ties = maximum - above;
    for (int64_t i = 0; i < count; ++i) {
      const bool tie = keys[i] == minimum && ties > 0;
      scores[kept] = scores[i];
      ids[kept] = ids[i];
      kept += keys[i] > minimum || tie;
      ties -= tie;
    }
    count = maximum;
    threshold = score_of(minimum);
  }
};

// The threshold just below `least`, which keeps `least` and larger scores. Subnormal numbers
// compare as 0.
inline float just_below(float minimum) {
  constexpr float kNormal = 0x1p-126f;
  if (minimum == kNegInf) return kNegInf;
  return minimum > -kNormal && minimum < kNormal ? -kNormal : score_of(key_of(minimum) - 1);
}

}  // namespace tokenmill::TOKENMILL_ISA
