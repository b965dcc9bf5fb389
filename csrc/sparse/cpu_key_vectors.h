// Vectors of kWidth keys from listed runs, with a query range per lane, for the CPU kernels.
#pragma once
#include "sparse/cpu_walk.h"

namespace tokenmill::TOKENMILL_ISA {

constexpr int64_t kStepVectors = 256 / kWidth;
static_assert(kStepVectors <= 64 && kStepVectors % kTileVectors == 0);

struct KeyVector {
  const float *k, *v;                 // packed
  int64_t keys;                       // fewer than kWidth if gathered
  bool gathered;                      // otherwise keys at[0] .. at[0] + kWidth - 1
  int64_t at[kWidth];                 // key places within the request
  float from[kWidth], until[kWidth];  // range of queries of the block that see each lane
  float first_from, last_from, first_until, last_until;

  void open(bool gather) {
    keys = 0;
    gathered = gather;
    for (int l = 0; l < kWidth; ++l) from[l] = 0, until[l] = SeenBy::kNever;
    first_from = first_until = SeenBy::kNever;
    last_from = last_until = 0;
  }
  // Lanes are visible to every query unless see() restricts them.
  void see_all() { first_from = 0, last_until = SeenBy::kNever; }
  void see(int64_t lane, SeenBy by) {
    const float begin = static_cast<float>(by.from), end = static_cast<float>(by.until);
    from[lane] = begin;
    until[lane] = end;
    first_from = begin < first_from ? begin : first_from;
    last_from = begin > last_from ? begin : last_from;
    first_until = end < first_until ? end : first_until;
    last_until = end > last_until ? end : last_until;
  }
  void close() {
    if (!gathered) return;
    for (int64_t l = keys; l < kWidth; ++l) from[l] = SeenBy::kNever, until[l] = 0;
    if (keys < kWidth) last_from = SeenBy::kNever;
  }

  // For queries first .. last: seen: any key is visible to any of them; whole: all keys are visible
  // to all of them.
  bool seen(float first, float last) const { return first_from <= last && first < last_until; }
  bool whole(float first, float last) const { return last_from <= first && last < first_until; }
};

struct Step {
  int64_t count;
  KeyVector vectors[kStepVectors];
};

}  // namespace tokenmill::TOKENMILL_ISA
