// From scores S to weights P in the registers of an sm_90a warpgroup. A lane has rows g and g + 8
// of the 16 rows of its warp: element 4 n + i of `s` belongs to row g + 8 (i / 2).
#pragma once
#include <algorithm>

#include "attention/epilogue.cuh"
#include "attention/online_softmax.cuh"
#include "attention/score_map.cuh"
#include "attention/score_mod.cuh"
#include "cuda/arch/sm90/wgmma.cuh"

namespace tokenmill::cuda {

// Scale and softcap, prepared by the host.
struct Sm90Scores {
  float factor;  // from q.k to the exponent of a weight (fast: the argument of tanh)
  // softcap: from q.k to the argument of tanh, whose result is multiplied by factor
  float cap_scale;
  bool fast;

  // unit: unit of exponents, or of the arguments of tanh.
  static Sm90Scores of(float scale, float softcap, float unit = kLog2e, bool fast = false) {
    if (!(softcap > 0)) return {unit * scale, 0, fast};
    return {unit * softcap, std::min(scale / softcap, kFloatMax), fast};  // inf * 0 would be NaN
  }

  template <int kCount>
  __device__ __forceinline__ void cap(float (&s)[kCount]) const {
    if (cap_scale == 0) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) s[i] = tanh_accurate(s[i] * cap_scale);
  }
};

// Band mask of a lane's rows: row g + 8 h sees columns begin[h] .. end[h] - 1, counted from the
// lane's first column.
struct RowBounds {
  int begin[2], end[2];

  // left, right: some row does not see the first, the last column.
  template <int kCount>
  __device__ __forceinline__ void hide(float (&s)[kCount], bool left, bool right) const {
    if (left) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (i / 4 * 8 + i % 2 < begin[i / 2 % 2]) s[i] = -infinity();
    }
    if (right) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (i / 4 * 8 + i % 2 >= end[i / 2 % 2]) s[i] = -infinity();
    }
  }
};

// Makes the weights of 64 rows and 2 kCount keys from scores, in place. `pack` then makes words of
// two weights, the A operand of P V; no word may be written while a running product reads it.
// kShifts: number of constants of the logits, one for all rows or one each for rows g and g + 8.
template <typename T, Weights kWeights, int kShifts = 1>
class Sm90ScoreMap;

// Softmax: p = 2^(factor s - row_max). row_max is updated only when an exponent exceeds it by
// kHeadroom, so rescaling is rare, and depends on the row's own scores only. row_max is rounded,
// the exponent is not: where half an ulp of row_max counts, p = 2^(factor (s - top)) with the score
// `top` of row_max.
template <typename T, int kShifts>
class Sm90ScoreMap<T, Weights::softmax, kShifts> {
 public:
  // shift, the constant of the head, is left out of the exponents.
  template <typename... Shifts>
  __device__ Sm90ScoreMap(const Sm90Scores& plan, Shifts...) : plan_(plan) {}

  template <int kCount>
  __device__ __forceinline__ void apply_map(float (&s)[kCount]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = -infinity();
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) top = fmaxf(top, s[i / 2 * 4 + 2 * h + i % 2]);
      top = quad_max(top);
      const float exponent = top * plan_.factor;
      shrink_[h] = 1;
      if (exponent + neg_row_max_[h] > kHeadroom) {
        shrink_[h] =
            exp2_approx(is_large(h) ? (top_[h] - top) * plan_.factor : -neg_row_max_[h] - exponent);
        neg_row_max_[h] = -exponent;
        top_[h] = top;
      }
      sum_[h] *= shrink_[h];
    }
    float offset[2] = {neg_row_max_[0], neg_row_max_[1]};
    if (__any_sync(kFullWarp, is_large(0) || is_large(1))) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float subtracted = is_large(h) ? top_[h] : 0;
        if (is_large(h)) offset[h] = 0;
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) s[i / 2 * 4 + 2 * h + i % 2] -= subtracted;
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      s[i] = exp2_approx(fmaf(s[i], plan_.factor, offset[i / 2 % 2]));
      sum_[i / 2 % 2] += s[i];
    }
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return cuda::pack<T>(low, high);
  }

  // Rescales O by exp2(old row_max - new row_max) of the last `apply_map`.
  template <int kCount>
  __device__ __forceinline__ void rescale(float (&o)[kCount]) const {
    if (!__any_sync(kFullWarp, shrink_[0] != 1 || shrink_[1] != 1)) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) o[i] *= shrink_[i / 2 % 2];
  }

  __device__ __forceinline__ RowScale finish(int h, const float* sink, float shift) const {
    return softmax_epilogue(sum(h), row_max(h), sink, shift);
  }
  // Row statistics for partial results. Called by all lanes of a warp.
  __device__ __forceinline__ float sum(int h) const { return quad_sum(sum_[h]); }
  __device__ __forceinline__ float row_max(int h) const { return -neg_row_max_[h]; }
  // Factor that makes sums relative to the rounded row_max. Clamped where any other score weighs
  // nothing next to row_max.
  __device__ __forceinline__ float to_row_max(int h) const {
    if (!is_large(h)) return 1;
    return exp2_approx(fminf(fmaxf(fmaf(top_[h], plan_.factor, neg_row_max_[h]), -64.f), 64.f));
  }

 private:
  // row_max has an error above 2^-13 from here on. False before the first weights.
  __device__ __forceinline__ bool is_large(int h) const {
    return fabsf(neg_row_max_[h]) > 0x1p12f && neg_row_max_[h] != kFloatMax;
  }

  const Sm90Scores& plan_;
  // initial value: the first weights overflow it, see ForwardWarp
  float neg_row_max_[2] = {kFloatMax, kFloatMax};
  float top_[2];  // score of row_max
  float sum_[2] = {0, 0}, shrink_[2];
};

// Sigmoid: p = 1 / (1 + e^-z), z = scale s + shift, times kScale<T>. No sums over rows.
template <typename T, int kShifts>
class Sm90ScoreMap<T, Weights::sigmoid, kShifts> {
 public:
  template <typename... Shifts>
  __device__ Sm90ScoreMap(const Sm90Scores& plan, Shifts... shifts)
      : plan_(plan), offset_{shifts...} {
    static_assert(sizeof...(Shifts) == kShifts);
#pragma unroll
    for (float& offset : offset_) {
      offset *= plan_.fast ? 0.5f : kLog2e;
      // a hidden pair, whose logit is -inf, stays hidden
      offset = offset > kFloatMax ? kFloatMax : offset < -kFloatMax ? -kFloatMax : offset;
      if (!plan_.fast) offset += kLog2Scale<T>;
    }
  }

  template <int kCount>
  __device__ __forceinline__ void apply_map(float (&s)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; i += kStep) weigh_step(reinterpret_cast<float (&)[kStep]>(s[i]));
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    if constexpr (!kPairs) return cuda::pack<T>(low, high);
    const uint32_t weights = __float_as_uint(low);
    return fma_packed(__float_as_uint(high), weights, weights);
  }

  template <int kCount>
  __device__ __forceinline__ void rescale(float (&)[kCount]) const {}

  __device__ __forceinline__ RowScale finish(int, const float*, float) const {
    return {plan_.fast ? 1 : 1 / kScale<T>, 0};
  }
  __device__ __forceinline__ float sum(int) const { return 0; }
  __device__ __forceinline__ float row_max(int) const { return 0; }
  __device__ __forceinline__ float to_row_max(int) const { return 1; }

 private:
  static constexpr int kStep = 16;  // a lane's scores of 32 keys
  // float16 has enough digits to compute small weights in packed pairs: `low` then holds two e,
  // `high` two r of weights e + r e.
  static constexpr bool kPairs = std::is_same_v<T, __half>;
  static constexpr float kLargest = kScale<T> / 5;  // bound of small weights

  __device__ __forceinline__ void weigh_step(float (&s)[kStep]) const {
#pragma unroll
    for (int i = 0; i < kStep; ++i) s[i] = fmaf(s[i], plan_.factor, offset_[i / 2 % 2 % kShifts]);
    if (plan_.fast) {
#pragma unroll
      for (int i = 0; i < kStep; ++i) s[i] = fmaf(tanh_approx(s[i]), 0.5f, 0.5f);
#pragma unroll
      for (int i = 0; i < kStep; i += 2) set_weights(s[i], s[i + 1], s[i], s[i + 1]);
      return;
    }
    uint32_t e[kStep / 2], top[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kStep / 2; ++i) {
      s[2 * i] = exp2_approx(s[2 * i]);
      s[2 * i + 1] = exp2_approx(s[2 * i + 1]);
      e[i] = cuda::pack<T>(s[2 * i], s[2 * i + 1]);
      top[i % 2] = max_packed<T>(top[i % 2], e[i]);
    }
    if (!__any_sync(kFullWarp, is_large(max_packed<T>(top[0], top[1])))) {
#pragma unroll
      for (int i = 0; i < kStep / 2; ++i) set_small_weights(s[2 * i], s[2 * i + 1], e[i]);
      return;
    }
    // each row decides by its own scores
    const bool large[2] = {is_large(quad_max_packed(top[0])), is_large(quad_max_packed(top[1]))};
#pragma unroll
    for (int i = 0; i < kStep / 2; ++i)
      if (large[i % 2])
        set_weights(s[2 * i], s[2 * i + 1], weight(s[2 * i]), weight(s[2 * i + 1]));
      else
        set_small_weights(s[2 * i], s[2 * i + 1], e[i]);
  }

  // e / (1 + e) of e = e^z, both times kScale; takes a second special function. e is clamped where
  // that makes no difference: infinity times 0 would be NaN.
  static __device__ __forceinline__ float weight(float e) {
    e = min_or_nan(e, 0x1p126f);
    return e * reciprocal_approx(fmaf(e, 1 / kScale<T>, 1.f));
  }
  static __device__ __forceinline__ void set_weights(float& low, float& high, float w0, float w1) {
    low = kPairs ? __uint_as_float(cuda::pack<T>(w0, w1)) : w0;
    high = kPairs ? 0 : w1;
  }

  // The same as the polynomial e + e^2 (a + b e), relative error 2^-12 up to e = 0.2.
  static __device__ __forceinline__ void set_small_weights(float& low, float& high, uint32_t both) {
    constexpr float kA = -0.98670116f, kB = 0.77178835f;
    constexpr uint32_t kInverseScale2 = 0x02000200, kA2 = 0xbbe5bbe5, kB2 = 0x3a2d3a2d;
    if constexpr (kPairs) {
      const uint32_t e = mul_packed(both, kInverseScale2);
      low = __uint_as_float(both);
      high = __uint_as_float(mul_packed(fma_packed(e, kB2, kA2), e));
    } else {
      low = fmaf(low * low, fmaf(low, kB, kA), low);
      high = fmaf(high * high, fmaf(high, kB, kA), high);
    }
  }
  // Weights are not negative, so their bits compare like integers. A NaN that is not visible is
  // already a weight.
  static __device__ __forceinline__ bool is_large(uint32_t e) {
    return max(e & 0xffff, e >> 16) > cuda::pack<T>(kLargest, 0);
  }
  static __device__ __forceinline__ uint32_t quad_max_packed(uint32_t e) {
    e = max_packed<T>(e, __shfl_xor_sync(kFullWarp, e, 1));
    return max_packed<T>(e, __shfl_xor_sync(kFullWarp, e, 2));
  }

  const Sm90Scores& plan_;
  float offset_[kShifts];
};

// Packs P into words of two weights, the A operand of P V.
template <typename Weighing, int kCount>
__device__ __forceinline__ void pack_weights(uint32_t (&p)[kCount / 2], float (&s)[kCount],
                                             const Weighing& weights) {
  fence_accumulators(s);
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) p[i] = weights.pack(s[2 * i], s[2 * i + 1]);
}

}  // namespace tokenmill::cuda
