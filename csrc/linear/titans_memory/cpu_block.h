// Factors of the gates in a block, for the forward and backward CPU kernels.
#pragma once
#include "linear/cpu_matrix.h"
#include "linear/titans_memory/blocks.h"

namespace tokenmill::TOKENMILL_ISA {

struct Gates {
  float decay[kBlock], eta[kBlock], theta[kBlock];

  void read(const TitansParams& p, int64_t b, int64_t h, int64_t first, int64_t n) {
    const auto at = [&](const TokenGates& g, int64_t t) TM_LAMBDA {
      return g.data[b * g.batch + (first + t) * g.seq + h * g.head];
    };
    for (int64_t t = 0; t < n; ++t) {
      decay[t] = 1 - at(p.alpha, t);
      eta[t] = at(p.eta, t);
      theta[t] = at(p.theta, t);
    }
  }
};

// Factors of M and S in the memory, and of S in the momentum, after each token; the factors of the
// gradients are separate rows of W and E.
struct Factors {
  float memory[kBlock], momentum[kBlock], kept[kBlock];
};

// Rows of W and E without their first two columns: [n][kBlock] with kAll, else only the last row.
template <bool kAll>
inline void weigh(const Gates& g, int64_t n, Factors& f, float* w, float* e) {
  float memory = 1, momentum = 0, kept = 1;
  for (int64_t t = 0; t < n; ++t) {
    const float a = g.decay[t], b = g.eta[t];
    kept *= b;
    momentum = a * momentum + kept;
    memory *= a;
    f.memory[t] = memory, f.momentum[t] = momentum, f.kept[t] = kept;
    float *wt = kAll ? w + t * kBlock : w, *et = kAll ? e + t * kBlock : e;
    const float *w_before = kAll ? wt - kBlock : w, *e_before = kAll ? et - kBlock : e;
    const int64_t vector = t / kWidth * kWidth, lane = t - vector;
    for (int64_t j = 0; j < vector; j += kWidth) {
      const vf ev = load(e_before + j) * set(b);
      store(et + j, ev);
      store(wt + j, fma(load(w_before + j), set(a), ev));
    }
    vf ev = zero(), wv = zero();
    if (lane > 0) {
      ev = load(e_before + vector) * set(b);
      wv = fma(load(w_before + vector), set(a), ev);
    }
    const vm earlier = lanes(0, lane), own = lanes(lane, lane + 1);
    const vf step = select(own, set(g.theta[t]), zero());
    store(et + vector, select(earlier, ev, step));
    store(wt + vector, select(earlier, wv, step));
    if (kAll || t == 0)
      for (int64_t j = vector + kWidth; j < kBlock; j += kWidth)
        store(et + j, zero()), store(wt + j, zero());
  }
}

// Negated contribution of a pair of tokens: 0 without weight, even if the product is not finite.
TM_INLINE vf negative_product(vf weight, vf x) {
  return select(equal(weight, zero()), zero(), zero() - weight * x);
}

}  // namespace tokenmill::TOKENMILL_ISA
