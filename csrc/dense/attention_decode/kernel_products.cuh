// One warp's products for an output tile: S = Q K^T of 16 query rows and a step of keys, and O += P
// V. Independent of what is done to the scores in between.
#pragma once
#include "attention/float8_tile.cuh"
#include "attention/masked_values.cuh"
#include "attention/online_softmax.cuh"
#include "attention/qk.cuh"
#include "attention/stage_addresses.cuh"
#include "dense/attention_decode/kernel_latent.cuh"
#include "dense/attention_decode/kernel_shape.cuh"

namespace tokenmill::cuda {

template <typename T, int kBucket, typename Shape_ = DecodeShape<T, kBucket>>
class DecodeProducts {
 public:
  using Shape = Shape_;
  using Addresses = StageAddresses<Shape, false>;
  static constexpr int kColumns = Shape::kValueBucket / Shape::kColumnWarps;  // columns of V
  static constexpr int kTiles = kColumns / 8;
  static constexpr int kKeyTiles = Shape::kStepKeys / 8;

  // queries: shared-memory address of the output tile's Q.
  __device__ DecodeProducts(const DecodePlan& plan, uint32_t queries)
      : DecodeProducts(row_or_key_warp() & ((1 << plan.log2_row_warps) - 1), queries) {}

  // For the 16 rows with index row_warp.
  __device__ DecodeProducts(int row_warp, uint32_t queries)
      : row_warp_(row_warp), exchange_(queries + 16 * Shape::kRowBytes) {
    // From an opaque copy: ptxas would keep the swizzle of the key addresses live.
    int lane = threadIdx.x % kWarpSize;
    opt_barrier(lane);
    query_.find(queries + row_warp_ * 16 * Shape::kRowBytes, lane);
  }

  static __device__ int row_or_key_warp() {
    return threadIdx.x / kWarpSize % Shape::kRowOrKeyWarps;
  }
  static __device__ int first_column() {
    return threadIdx.x / kWarpSize / Shape::kRowOrKeyWarps * kColumns;
  }

  // Addresses in a stage of the keys from row `row` on.
  static __device__ __forceinline__ Addresses addresses(uint32_t stage, int row) {
    Addresses at(stage);
    at.move(row * Shape::kRowBytes);
    if constexpr (Shape::kColumnWarps > 1) {
      static_assert(kColumns * sizeof(T) % (8 * kChunkBytes) == 0);
#pragma unroll
      for (uint32_t& x : at.value)
        x += first_column() * static_cast<int>(sizeof(T)), opt_barrier(x);
    }
    return at;
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[0][n][i] = 0;
    // Initial row_max: a row's first weights overflow it, which sets its row_max.
    neg_row_max_[0] = neg_row_max_[1] = kFloatMax;
    sum_[0] = sum_[1] = 0;
  }

  __device__ __forceinline__ void load_queries() {
    if constexpr (Shape::kQueryInRegisters)
      unroll<Shape::kSlices>([&](auto j) { q_[j] = query_.template load<j>(); });
  }

  // Stores the partial sums of this warp to 16 rows of partials.
  __device__ __forceinline__ void store(float* rows) const {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* row = rows + (8 * half + lane / 4) * Shape::kPartialRow;
      float* columns = row + first_column();
      const float sum = quad_sum(sum_[half]);
      if constexpr (Shape::kFloat) {
        // Lane c of a quad holds columns 32 group + 8 c ... + 7.
#pragma unroll
        for (int group = 0; group < kColumns / 32; ++group)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float (&of)[kTiles][4] = out_[0];
            const int n = 4 * group, at = 2 * half + i;
            const float4 x{of[n][at], of[n + 1][at], of[n + 2][at], of[n + 3][at]};
            *reinterpret_cast<float4*>(columns + 32 * group + 8 * (lane % 4) + 4 * i) = x;
          }
      } else {
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
          *reinterpret_cast<float2*>(columns + 8 * n + 2 * (lane % 4)) = {out_[0][n][2 * half],
                                                                          out_[0][n][2 * half + 1]};
      }
      if (lane % 4 == 0 && first_column() == 0) {
        row[Shape::kSumAt] = sum;
        row[Shape::kRowMaxAt] = -neg_row_max_[half];
      }
    }
  }

  __device__ int row_warp() const { return row_warp_; }
  __device__ bool active() const { return active_; }

 protected:
  // Calls visit(score, 0 for row g or 1 for g + 8, key of the step).
  template <typename Visit>
  static __device__ __forceinline__ void each_score(float (&s)[kKeyTiles][4], const Visit& visit) {
    const int column = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) visit(s[n][i], i / 2, 8 * n + column + i % 2);
  }

  __device__ __forceinline__ void multiply_keys(float (&s)[kKeyTiles][4], const Addresses& at) {
    auto& tile = reinterpret_cast<float (&)[1][kKeyTiles][4]>(s);
    if constexpr (Shape::kLatent)
      multiply_shares<T, kDecodeWarps>(s, at, query_, exchange_);
    else if constexpr (Shape::kQueryInRegisters)
      multiply_held<T, Shape::kSlices, 0>(tile, at, [&](int, auto j) { return q_[j]; });
    else
      multiply_shared<T, 0>(tile, at, query_);
  }

  // P = 2^(S - row_max); updates row_max if a weight exceeds the headroom.
  __device__ __forceinline__ void exponentiate(float (&s)[kKeyTiles][4]) {
    float top[2] = {-infinity(), -infinity()};
    each_score(s, [&](float& x, int half, int) { top[half] = fmaxf(top[half], x); });
    top[0] = quad_max(top[0]), top[1] = quad_max(top[1]);
    const bool over = top[0] + neg_row_max_[0] > kHeadroom || top[1] + neg_row_max_[1] > kHeadroom;
    if (__any_sync(kFullWarp, over)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (!(top[half] + neg_row_max_[half] > kHeadroom)) continue;
        const float shrink = exp2_approx(-neg_row_max_[half] - top[half]);
        neg_row_max_[half] = -top[half];
        rescale(out_[0], sum_[half], half, shrink);
      }
    }
    each_score(s, [&](float& x, int half, int) {
      x = exp2_approx(x + neg_row_max_[half]);
      sum_[half] += x;
    });
  }

  // O += P V. cut: a mask cuts the step, see multiply_seen_values.
  template <typename Sees>
  __device__ __forceinline__ void multiply_values(const float (&e)[kKeyTiles][4],
                                                  const Addresses& at, bool cut, const Sees& sees,
                                                  bool any_sign = false) {
    using Value = typename Shape::Value;
    const bool infinite = cut && !all_finite<Value, Shape::kStepKeys, kTiles>(at);
    if constexpr (Shape::kFloat8) {
      multiply_scaled<T, Value, 0, Shape::kStepKeys>(out_, e, at, infinite, sees, any_sign);
    } else {
      Fragment<T, 4> p[1][1];
      set_fragments(p[0], e);
      const auto nothing = [](auto) {};
      if (infinite)
        multiply_seen_values<T, 0, Shape::kStepKeys>(out_, p, at, nothing, sees, any_sign);
      else
        cuda::multiply_values<T, 0, 0>(out_, p, at, nothing);
    }
  }

  bool active_;
  int row_warp_;
  float neg_row_max_[2], sum_[2];  // rows g, g + 8; sum_: of this lane's keys
  float out_[1][kTiles][4];

 private:
  uint32_t exchange_;  // exchange buffer of latent heads
  SharedQueries<Shape> query_;
  QuerySlice q_[Shape::kQueryInRegisters ? Shape::kSlices : 1];
};

}  // namespace tokenmill::cuda
