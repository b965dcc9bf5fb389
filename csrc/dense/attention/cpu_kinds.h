// Weights that are a function of the logit itself: no row_max, and a row is divided at its end.
#pragma once
#include <type_traits>

#include "dense/attention/cpu_scores.h"

namespace tokenmill::TOKENMILL_ISA {

// f(std::integral_constant<ScoreMap, map>())
template <typename F>
TM_INLINE void visit_map(ScoreMap map, const F& f) {
  switch (map) {
    case ScoreMap::relu:
      return f(std::integral_constant<ScoreMap, ScoreMap::relu>());
    case ScoreMap::elu1:
      return f(std::integral_constant<ScoreMap, ScoreMap::elu1>());
    case ScoreMap::linear:
      return f(std::integral_constant<ScoreMap, ScoreMap::linear>());
    case ScoreMap::taylor2:
      return f(std::integral_constant<ScoreMap, ScoreMap::taylor2>());
    default:
      return f(std::integral_constant<ScoreMap, ScoreMap::sigmoid>());
  }
}

// The weight of a logit, of which -inf hides its pair, and its derivative.
struct Weight {
  vf value, slope;
};

template <ScoreMap kMap, bool kCoarse>
TM_INLINE Weight weight_of(vf z) {
  const vf one = set(1.f);
  if constexpr (kMap == ScoreMap::relu) {
    return {max_of(zero(), z), select(less(z, zero()), zero(), one)};
  } else if constexpr (kMap == ScoreMap::elu1) {
    const vm above = less(zero(), z);
    const vf e = power<kCoarse>(min_of(zero(), z * set(kLog2e)));
    return {select(above, z + one, e), select(above, one, e)};
  } else if constexpr (kMap == ScoreMap::sigmoid) {
    const vf e = power<kCoarse>(z * set(-kLog2e)), w = reciprocal<kCoarse>(one + e);
    return {w, w * (min_of(set(kMaxOdds), e) * w)};
  } else {
    const vm hidden = less(z, set(-kMax));
    const bool taylor = kMap == ScoreMap::taylor2;
    const vf value = taylor ? fma(z, fma(z, set(0.5f), one), one) : z;
    return {select(hidden, zero(), value), select(hidden, zero(), taylor ? one + z : one)};
  }
}

}  // namespace tokenmill::TOKENMILL_ISA
