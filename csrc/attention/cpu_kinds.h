// Weights that are a function of the logit only: no row_max, and a row is normalised at its end.
#pragma once
#include <type_traits>

#include "attention/cpu_scores.h"

namespace tokenmill::TOKENMILL_ISA {

// Calls f(std::integral_constant<ScoreMap, map>()).
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

// Weight of a logit and its derivative; a logit of -inf hides its pair.
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

// Turns logits into weights in place and adds them to the lanes of sums.
template <bool kCoarse>
TM_INLINE void add_weights(ScoreMap kind, vf* scores, int64_t vectors, float* sums) {
  vf sum = zero();
  visit_map(kind, [&](auto map) TM_LAMBDA {
    for (int64_t j = 0; j < vectors; ++j) {
      scores[j] = weight_of<decltype(map)::value, kCoarse>(scores[j]).value;
      sum = sum + scores[j];
    }
  });
  store(sums, load(sums) + sum);
}

// Rounds weights to the precision in which products of Op take them, and adds them to the lanes of
// sums. Does nothing where weights stay float32.
template <class Op>
TM_INLINE void add_rounded(vf* weights, int64_t vectors, float* sums) {
#if defined(__AVX512BF16__)
  if constexpr (Op::kPair != 1) {
    vf sum = load(sums);
    for (int64_t j = 0; j < vectors; ++j) {
      weights[j] = round_bfloat(weights[j]);
      sum = sum + weights[j];
    }
    store(sums, sum);
  }
#endif
}

}  // namespace tokenmill::TOKENMILL_ISA
