// score_mod backward: from q.k to the weight of a pair and its derivatives.
#pragma once
#include "attention/score_map.cuh"
#include "attention/score_mod.cuh"

namespace tokenmill::cuda {

// Plain modes: one map without further modifiers (elementwise: an unbounded map without a
// constant). general: any map with any modifier.
enum class Mode { softmax, sigmoid, fast_sigmoid, elementwise, general };

// float16 weights near 1 / n are subnormal from n = 16384 on: P is scaled by 2^15.
constexpr float kHalfScaleLog2 = 15, kHalfScale = 32768;
// Upper clamp on log2 of e^-z, so that P (1 - P) is 0 and not 0 * inf.
constexpr float kMaxOddsLog2 = 122.9f;

// cap tanh(z / cap) and its derivative.
struct Softcapped {
  float z, slope;
};
__device__ __forceinline__ Softcapped softcap_with_slope(float z, float cap) {
  const float t = tanh_accurate(z / cap);
  return {cap * t, fmaf(-t, t, 1.f)};
}

// p: weight P of a pair; slope: factor from the gradient dP (softmax: dP - delta) to dz; through:
// derivative of the softcap.
struct Weight {
  float p, slope, through;
};

// Sigmoid weight from odds = log2 of e^-z. kScale: e^-z is divided by kHalfScale, P is multiplied
// by it; kScaleSlope: the slope too.
template <bool kScale, bool kScaleSlope = false>
__device__ __forceinline__ Weight sigmoid_weight(float odds) {
  constexpr float kOne = kScale ? 1 / kHalfScale : 1.f;
  const float e =
      exp2_approx(min_or_nan(odds, kScale ? kMaxOddsLog2 - kHalfScaleLog2 : kMaxOddsLog2));
  const float p = reciprocal_approx(e + kOne);
  return {p, e * p * (kScale && !kScaleSlope ? p * kOne : p), 1.f};  // e p is 1 - P
}

// Sigmoid weight from t = tanh(z / 2): P = (1 + t) / 2. The slope is 4 times dP / dz.
template <bool kScale>
__device__ __forceinline__ Weight fast_sigmoid_weight(float half_z) {
  constexpr float kHalf = kScale ? kHalfScale / 2 : 0.5f;
  const float t = tanh_approx(half_z);
  return {fmaf(t, kHalf, kHalf), fmaf(-t, t, 1.f), 1.f};
}

// score_mod and map of one head of one sequence.
template <Mode kMode, bool kScale>
struct BackwardScoreMod {
  float constant;  // sigmoid: constant in the argument of the map

  __device__ BackwardScoreMod(const AttentionParams& p, int64_t b, int64_t h) {
    if constexpr (kMode == Mode::softmax) return;
    constant = constant_of(p, b, h, sequence_of(p, b).k_length);
    if constexpr (kMode == Mode::sigmoid)
      constant = -constant * kLog2e - (kScale ? kHalfScaleLog2 : 0);
    else
      constant *= 0.5f;
  }

  // Calls use(mod) with run-time choices resolved. scale: of weights, where kScale does not decide.
  template <typename Use>
  __device__ __forceinline__ void visit(ScoreMap, float, const Use& use) const {
    use(*this);
  }

  // statistic: for softmax minus the row's log-sum-exp without the constant, in bits.
  __device__ __forceinline__ Weight apply_map(float qk, float factor, int, int,
                                              float statistic) const {
    if constexpr (kMode == Mode::softmax) {
      const float w = exp2_approx(fmaf(qk, factor, statistic));
      return {w, w, 1.f};
    } else {
      const float x = fmaf(qk, factor, constant);
      return kMode == Mode::sigmoid ? sigmoid_weight<kScale>(x) : fast_sigmoid_weight<kScale>(x);
    }
  }
};

template <bool kScale>
struct BackwardScoreMod<Mode::elementwise, kScale> {
  __device__ BackwardScoreMod(const AttentionParams&, int64_t, int64_t) {}

  template <typename SlopeOf>
  struct Weigher {
    const SlopeOf& slope_of;
    float scale;

    // statistic: normalisation factor of the row's weights
    __device__ __forceinline__ Weight apply_map(float qk, float factor, int, int,
                                                float statistic) const {
      const Slope f = slope_of(qk * factor);
      return {f.value * (kScale ? statistic * scale : statistic), f.slope * statistic, 1.f};
    }
  };

  template <typename Use>
  __device__ __forceinline__ void visit(ScoreMap map, float scale, const Use& use) const {
    visit_slope(map, [&](const auto& slope_of) {
      use(Weigher<std::remove_cvref_t<decltype(slope_of)>>{slope_of, scale});
    });
  }
};

template <bool kScale>
struct BackwardScoreMod<Mode::general, kScale> {
  const AttentionParams& p;
  int64_t batch, head;
  Sequence sequence;
  ScoreMod mod;

  __device__ BackwardScoreMod(const AttentionParams& p, int64_t b, int64_t h)
      : p(p),
        batch(b),
        head(h),
        sequence(sequence_of(p, b)),
        mod(p, b, h, sequence,
            p.map == ScoreMap::softmax ? 0 : constant_of(p, b, h, sequence.k_length)) {}

  __device__ BackwardScoreMod& operator=(const BackwardScoreMod& other) {
    batch = other.batch;
    head = other.head;
    sequence = other.sequence;
    mod = other.mod;
    return *this;
  }
  template <typename Use>
  __device__ __forceinline__ void visit(ScoreMap, float, const Use& use) const {
    use(*this);
  }
  __device__ float distance(int query, int key) const { return mod.distance(query, key); }

  // A logit of -inf hides its pair.
  __device__ Weight unbounded_weight(float z) const {
    Weight w{0, 0, 1.f};
    if (z == -infinity()) return w;
    visit_slope(p.map, [&](const auto& slope_of) {
      const Slope f = slope_of(z);
      w.p = kScale && scales_weights(p) ? f.value * kHalfScale : f.value;
      w.slope = f.slope;
    });
    return w;
  }

  // statistic: for softmax minus log-sum-exp in nats, else the normalisation factor of the row.
  __device__ Weight apply_map(float qk, float, int query, int key, float statistic) const {
    float z = qk * p.scale, through = 1;
    if (p.softcap > 0) {
      const Softcapped capped = softcap_with_slope(z, p.softcap);
      z = capped.z;
      through = capped.slope;
    }
    if (p.bias) z = min_or_nan(z + mod.bias_at(query, key), kFloatMax);
    // +inf is clamped to the largest finite logit, which has no gradient.
    const bool stuck = p.bias && z >= kFloatMax;
    if (mod.has_alibi()) z = mod.with_alibi(z, query, key);
    z += mod.constant;
    const float odds = fmaf(z, -kLog2e, kScale ? -kHalfScaleLog2 : 0.f);
    Weight w;
    switch (weights_of(p)) {
      case Weights::softmax:
        w.p = w.slope = exp2_approx((z + statistic) * kLog2e);
        if (p.post_decay) w.p *= mod.fade(mod.distance(query, key));
        break;
      case Weights::sigmoid:
        w = sigmoid_weight<kScale>(odds);
        break;
      case Weights::fast_sigmoid:
        w = fast_sigmoid_weight<kScale>(z * 0.5f);
        w.slope *= 0.25f;
        break;
      default:
        if (p.map == ScoreMap::sigmoid)
          w = sigmoid_weight<kScale>(odds);
        else
          w = unbounded_weight(z);
        w.p *= statistic;
        w.slope *= statistic;
    }
    w.through = through;
    if (stuck) w.slope = p.post_decay ? -w.slope : 0;
    return w;
  }

  // Backward of a softmax weight e (the slope of its Weight) with ALiBi decay: dz, and `moved`,
  // whose product with the distance is subtracted from the slope's gradient. e is negative where
  // the logit is clamped.
  struct Faded {
    float dz, moved;
  };
  __device__ Faded faded(float e, float fade, float dp, float minus_delta) const {
    const float dz = e <= 0 ? 0 : e * fmaf(fade, dp, minus_delta);
    return {dz, e == 0 ? 0 : fabsf(e) * fade * dp};
  }
};

}  // namespace tokenmill::cuda
