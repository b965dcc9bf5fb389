// Vectorized feature maps of linear attention, for the CPU kernels.
#pragma once
#include "cpu/simd.h"
#include "linear/params.h"

namespace tokenmill::TOKENMILL_ISA {

// e^x for x <= 100 (the product x log2(e) as two floats: its rounding error would grow with |x|).
TM_INLINE vf exp_below(vf x) {
  x = max_of(set(-150.f), x);
  const vf t = x * set(kLog2e);
  const vf rest = fma(x, set(kLog2e), t * set(-1.f)) + x * set(1.925963033500e-8f);
  return exp2<5>(t) * fma(rest, set(kLn2), set(1.f));
}

// e^x of the log decay of a token. Slow decays multiply over thousands of tokens: a bias of 1e-7 of
// each would be seen.
TM_INLINE vf decay_of(vf x) {
  const float c[] = {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
  vf slow = set(c[0]);
  TM_UNROLL(8)
  for (int i = 1; i < 6; ++i) slow = fma(x, slow, set(c[i]));
  return select(less(set(-0.125f), x), slow, exp_below(x));
}

TM_INLINE vf sigmoid_of(vf x) {
  return set(1.f) / (set(1.f) + exp_below(min_of(set(100.f), x * set(-1.f))));
}

// Element-wise maps (all but taylor2).
template <FeatureMap kMap>
TM_INLINE vf feature(vf x) {
  if constexpr (kMap == FeatureMap::elu1)
    return select(less(zero(), x), x + set(1.f), exp_below(min_of(zero(), x)));
  if constexpr (kMap == FeatureMap::relu) return max_of(zero(), x);
  if constexpr (kMap == FeatureMap::silu) return x * sigmoid_of(x);
  return x;
}

// d feature(x) / dx.
template <FeatureMap kMap>
TM_INLINE vf feature_slope(vf x) {
  if constexpr (kMap == FeatureMap::elu1)
    return select(less(zero(), x), set(1.f), exp_below(min_of(zero(), x)));
  if constexpr (kMap == FeatureMap::relu) return select(less(zero(), x), set(1.f), zero());
  if constexpr (kMap == FeatureMap::silu) {
    const vf s = sigmoid_of(x);
    return s * fma(x, set(1.f) - s, set(1.f));
  }
  return set(1.f);
}

// Calls visit(MapConstant) with the map as a compile-time constant: one branch outside the loop.
template <FeatureMap kMap>
struct MapConstant {
  static constexpr FeatureMap value = kMap;
};
template <typename Visit>
TM_INLINE void visit_map(FeatureMap map, const Visit& visit) {
  switch (map) {
    case FeatureMap::elu1:
      return visit(MapConstant<FeatureMap::elu1>());
    case FeatureMap::relu:
      return visit(MapConstant<FeatureMap::relu>());
    case FeatureMap::silu:
      return visit(MapConstant<FeatureMap::silu>());
    default:
      return visit(MapConstant<FeatureMap::identity>());
  }
}

// Replaces `rows` rows of floats, ld (a multiple of kWidth) apart, by factor * feature; elements
// past `length` stay zero.
inline void map_rows(FeatureMap map, float factor, float* x, int64_t ld, int64_t rows,
                     int64_t length) {
  visit_map(map, [&](auto m) TM_LAMBDA {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < length; d += kWidth) {
        float* at = x + r * ld + d;
        const vf y = feature<decltype(m)::value>(load(at)) * set(factor);
        store(at, d + kWidth <= length ? y : select(lanes(0, length - d), y, zero()));
      }
  });
}

// First feature index of row i of the upper triangle of second moments.
TM_INLINE int64_t moment_row(int64_t i, int64_t head_dim) {
  return 1 + head_dim + i * head_dim - i * (i - 1) / 2;
}

// taylor2 features of one row of head_dim numbers.
template <bool kQuery>
inline void taylor_row(const float* x, int64_t head_dim, float* to) {
  *to++ = 1;
  for (int64_t i = 0; i < head_dim; ++i) *to++ = x[i];
  for (int64_t i = 0; i < head_dim; ++i) {
    *to++ = x[i] * x[i] * (kQuery ? 0.5f : 1.f);
    for (int64_t j = i + 1; j < head_dim; ++j) *to++ = x[i] * x[j];
  }
}

// dx from the gradients g of taylor_row(x).
template <bool kQuery>
inline void taylor_row_backward(const float* x, const float* g, int64_t head_dim, float* dx) {
  ++g;
  for (int64_t i = 0; i < head_dim; ++i) dx[i] = *g++;
  for (int64_t i = 0; i < head_dim; ++i) {
    dx[i] += *g++ * x[i] * (kQuery ? 1.f : 2.f);
    for (int64_t j = i + 1; j < head_dim; ++j, ++g) {
      dx[i] += *g * x[j];
      dx[j] += *g * x[i];
    }
  }
}

// taylor2 features of vectors x_1 .. x_D for kWidth tokens at a time, in rows `step` floats apart
// from row 1 on. kQuery: with the factors of the moments (x includes the scale). Row 0 is 1 for the
// first `valid` tokens.
template <bool kQuery>
inline void taylor_features(float* x, int64_t step, int64_t head_dim, int64_t tokens,
                            int64_t valid) {
  for (int64_t t = 0; t < tokens; t += kWidth) {
    store(x + t, select(lanes(0, valid - t), set(1.f), zero()));
    for (int64_t i = 0; i < head_dim; ++i) {
      const vf xi = load(x + (1 + i) * step + t);
      float* to = x + moment_row(i, head_dim) * step + t;
      store(to, kQuery ? xi * xi * set(0.5f) : xi * xi);
      for (int64_t j = i + 1; j < head_dim; ++j)
        store(to + (j - i) * step, xi * load(x + (1 + j) * step + t));
    }
  }
}

}  // namespace tokenmill::TOKENMILL_ISA
