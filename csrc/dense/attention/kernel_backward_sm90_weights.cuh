// Scores to weights, slopes and dS of 64 keys and a query tile, in the registers of an sm_90a
// warpgroup. Accumulators are keys by queries: element 4 n + 2 h + i of a lane belongs to its key h
// and to column 8 n + i from its first one on.
#pragma once
#include "attention/backward_store.cuh"
#include "attention/score_mod_backward.cuh"
#include "cuda/arch/sm90/wgmma_columns.cuh"
#include "dense/attention/kernel_backward_sm90_shape.cuh"

namespace tokenmill::cuda {

template <typename T, typename Shape, Weights kWeights>
class Sm90KeyWeights {
 public:
  static constexpr int kRows = Shape::kRows, kQueries = Shape::kTileQueries;
  static constexpr bool kSoftmax = kWeights == Weights::softmax;
  static constexpr bool kScales = !kSoftmax && std::is_same_v<T, __half>;  // see kHalfScale
  // Register budget: slopes are kept in float32, or packed; dP runs while weights are made
  // (kEarly), except where packed slopes are made too.
  static constexpr bool kPacked = kQueries > 64;
  template <bool kGeneral>
  static constexpr bool kEarly = !kPacked || (kSoftmax && !kGeneral);
  // Packed slopes reach 1 / n like weights do, and are scaled. Slopes of the fast map do not.
  static constexpr bool kScalesSlope = kScales && kPacked;

  // For keys kRows slab .. of the CTA.
  __device__ Sm90KeyWeights(const AttentionBackwardParams& bp, const Sm90BackwardPlan& plan,
                            const Sm90KeyTile& keys, int slab)
      : bp_(bp), plan_(plan), keys_(keys), slab_(slab) {}

  __device__ int first_key() const { return keys_.first + slab_ * kRows; }

  // Sets the logit constant of the query head whose tiles follow.
  __device__ void set_constant(int head) {
    if constexpr (kSoftmax) return;
    const AttentionParams& p = bp_.forward;
    constant_ = plan_.fast
                    ? BackwardScoreMod<Mode::fast_sigmoid, kScales>(p, keys_.place.b, head).constant
                    : BackwardScoreMod<Mode::sigmoid, kScales>(p, keys_.place.b, head).constant;
  }

  // P from scores: words of weights in p; s becomes slopes of the map, or slopes are packed into
  // `slopes`. Softmax without a softcap has slope = weight. kGeneral: a mask or an end cuts the
  // tile, or plan.general.
  template <bool kGeneral>
  __device__ __forceinline__ void apply_map(uint32_t (&p)[kQueries / 4],
                                            uint32_t (&slopes)[kQueries / 4],
                                            float (&s)[kQueries / 2], int query0,
                                            uint32_t minus_lse) const {
    const Seen sees = kGeneral ? seen(query0) : Seen{};
    const auto weigh_by = [&]<bool kCapped>(const auto& weight_of) {
      unroll<kQueries / 8>([&](auto n) {
        float2 addend{constant_, constant_};
        if constexpr (kSoftmax) addend = load_float2<n * 32>(minus_lse);
        unroll<2>([&](auto h) {
          float &x = s[4 * n + 2 * h], &y = s[4 * n + 2 * h + 1];
          Weight a = weight_of(fmaf(x, plan_.factor, addend.x));
          Weight b = weight_of(fmaf(y, plan_.factor, addend.y));
          if constexpr (kCapped) {
            a.slope *= fmaf(-x, x, 1.f);
            b.slope *= fmaf(-y, y, 1.f);
          }
          if (kGeneral && !sees(h, n * 8)) a.p = a.slope = 0;
          if (kGeneral && !sees(h, n * 8 + 1)) b.p = b.slope = 0;
          p[2 * n + h] = pack<T>(a.p, b.p);
          if constexpr (!kPacked) {
            x = a.slope;
            y = b.slope;
          } else if constexpr (!kEarly<kGeneral>) {
            slopes[2 * n + h] = pack<T>(a.slope, b.slope);
          }
        });
      });
    };
    const auto weigh_map = [&](const auto& weight_of) {
      if constexpr (kGeneral)
        if (plan_.cap_scale > 0) return weigh_by.template operator()<true>(weight_of);
      weigh_by.template operator()<false>(weight_of);
    };
    if constexpr (kGeneral)
      if (plan_.cap_scale > 0) {
#pragma unroll
        for (int i = 0; i < kQueries / 2; ++i) s[i] = tanh_accurate(s[i] * plan_.cap_scale);
      }
    if constexpr (kSoftmax) {
      weigh_map([](float x) {
        const float w = exp2_approx(x);
        return Weight{w, w, 1};
      });
    } else if (plan_.fast) {
      weigh_map([](float x) { return fast_sigmoid_weight<kScales>(x); });
    } else {
      weigh_map([](float x) { return sigmoid_weight<kScales, kScalesSlope>(x); });
    }
  }

  // dS = slope (dP - delta) as words, with slopes_of(n) for elements 4 n .., which may be stored in
  // words of ds. Returns the sum of dS, without scale and softcap, where the gradient of score_bias
  // needs it.
  template <bool kGeneral, typename SlopesOf>
  __device__ __forceinline__ float make_ds(uint32_t (&ds)[kQueries / 4],
                                           const float (&dp)[kQueries / 2], uint32_t minus_delta,
                                           const SlopesOf& slopes_of) const {
    float sum = 0;
    unroll<kQueries / 8>([&](auto n) {
      [[maybe_unused]] float2 addend;
      if constexpr (kSoftmax) addend = load_float2<n * 32>(minus_delta);
      const float4 slopes = slopes_of(n);
      unroll<2>([&](auto h) {
        const float2 slope = h == 0 ? float2{slopes.x, slopes.y} : float2{slopes.z, slopes.w};
        float x = dp[4 * n + 2 * h], y = dp[4 * n + 2 * h + 1];
        if constexpr (kSoftmax) {
          x += addend.x;
          y += addend.y;
        } else if constexpr (kScalesSlope) {
          x *= plan_.slope_factor;
          y *= plan_.slope_factor;
        }
        x *= slope.x;
        y *= slope.y;
        if (kGeneral && slope.x == 0) x = 0;
        if (kGeneral && slope.y == 0) y = 0;
        if constexpr (kGeneral && !kSoftmax) sum += x + y;
        ds[2 * n + h] = pack<T>(x, y);
      });
    });
    return sum;
  }

  // Stores words of dS to this slab's rows of a tile [kBlockKeys, kQueries], in blocks of 64
  // queries.
  __device__ __forceinline__ void store_ds(uint32_t tile,
                                           const uint32_t (&ds)[kQueries / 4]) const {
    constexpr int kBlock = Shape::kBlockKeys * kBoxRowBytes;
    const int lane = threadIdx.x % kWarpSize;
    const uint32_t own = tile +
                         (slab_ * kRows + warpgroup_row(0) - lane / 4 + lane % 16) * kBoxRowBytes +
                         (lane / 16 ^ lane % 8) * 16;
    unroll<kQueries / 16>([&](auto n) {
      store_matrices<n / 4 * kBlock>(own ^ n % 4 * 32,
                                     reinterpret_cast<const uint32_t (&)[4]>(ds[4 * n]));
    });
  }

  // Stores accumulators of this slab's keys, times a factor, to rows of a gradient.
  template <int kCount>
  __device__ __forceinline__ void store_sums(const Rows& to, const float (&x)[kCount],
                                             float factor) const {
    const int lane = threadIdx.x % kWarpSize, own = first_key() + warpgroup_row(0) - lane / 4;
    const PackedRows& keys = keys_.place.rows;
    store_accumulators<1, T, 1, kCount / 8>(
        reinterpret_cast<const float (&)[1][kCount / 4][4]>(x), factor,
        rows_at<T>(to, keys_.place.b, keys.start + own, keys_.h), to.seq, keys.length - own, 0,
        Shape::kHeadDim, lane);
  }

 private:
  // Visible queries of a lane's two keys, as columns relative to the lane's first one.
  struct Seen {
    int begin[2], end[2];

    __device__ bool operator()(int h, int column) const {
      return column >= begin[h] && column < end[h];
    }
  };
  __device__ __forceinline__ Seen seen(int query0) const {
    Seen s;
    const MaskBand& band = keys_.band;
    const int own = query0 + 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int key = first_key() + warpgroup_row(h);
      const bool exists = key < keys_.place.rows.length;
      s.begin[h] = exists ? band.begin(key) - own : kQueries;
      s.end[h] = exists ? band.end(key) - own : 0;
    }
    return s;
  }

  const AttentionBackwardParams& bp_;
  const Sm90BackwardPlan& plan_;
  const Sm90KeyTile& keys_;
  int slab_;
  float constant_ = 0;  // sigmoid: constant in the argument of the map
};

}  // namespace tokenmill::cuda
