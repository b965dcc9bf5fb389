// Consumer warpgroups of the sm_90a backward for wide heads.
//
// dK and dV of 64 keys take as many registers per thread as the head has columns. So one warpgroup
// accumulates dV and the other dK, and each computes the products that have its operands:
//
//   S^T = K Q^T    P^T    dV += P^T dO           dP^T = V dO^T    dS^T    dK += dS^T Q
//
// P^T and dS^T, rounded, are A operands as they lie in registers. Slopes go from the first
// warpgroup to the second through shared memory in float32, dS to both in 16 bits: they compute
// parts of dQ = dS K in turn. The first warpgroup runs ahead: its part of a dQ tile comes after the
// weights of the next tile.
#pragma once
#include "dense/attention/kernel_backward_sm90_weights.cuh"

namespace tokenmill::cuda {

// Common part of both warpgroups.
template <typename T, typename Shape, Weights kWeights>
class Sm90WideKeys {
 public:
  static constexpr int kQueries = Shape::kTileQueries, kHeadDim = Shape::kHeadDim;
  using Weighing = Sm90KeyWeights<T, Shape, kWeights>;
  using Shared = Sm90BackwardShared<Shape>;
  using QueryStage = Stage<decltype(Shared::queries)>;
  using GradientStage = Stage<decltype(Shared::gradients)>;

  __device__ Sm90WideKeys(const AttentionBackwardParams& bp, const Sm90BackwardPlan& plan,
                          Shared& shared, const Sm90KeyTile& keys)
      : bp_(bp), plan_(plan), shared_(shared), keys_(keys), score_map_(bp, plan, keys, 0) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) sums_[i] = 0;
  }

 protected:
  // Mainloop over all query tiles: make(Index<kGeneral>, words, first query, number) makes the A
  // operand of a product, add(words, number) issues the product. kGeneral: a mask or an end cuts
  // the tile, or plan.general. Returns the number of tiles.
  template <typename Make, typename Add>
  __device__ __forceinline__ unsigned for_tiles(const Make& make, const Add& add) {
    shared_.keys_full.wait(0);
    unsigned number = 0;
#pragma unroll 1
    for (int i = 0; i < plan_.group; ++i) {
      score_map_.set_constant(keys_.h * plan_.group + i);
#pragma unroll 1
      for (int tile = keys_.begin; tile < keys_.end; ++tile, ++number) {
        const int first = tile * kQueries;
        uint32_t words[kQueries / 4];
        if (!plan_.general && keys_.is_whole<Shape>(0, first))
          make(Index<false>{}, words, first, number);
        else
          make(Index<true>{}, words, first, number);
        add(words, number);
      }
    }
    return number;
  }

  // dQ = dS K for this warpgroup's part, if it has one; waits for all its products. done() is
  // called before the part waits for its turn at shared memory. Parts take turns, the second
  // warpgroup first.
  template <int kWarpgroup, typename Done>
  __device__ __forceinline__ void add_to_queries(unsigned number, const Done& done) {
    constexpr int kParts = Shape::kQueryParts, kBlock = Shape::kRows * kBoxRowBytes;
    constexpr int kPart = kParts > 1 ? 1 - kWarpgroup : 0;
    if (kParts == 1 && number % 2 == kWarpgroup) {
      wait_for_product<0>(sums_);
      return done();
    }
    const ColumnOperand ds{shared_address(shared_.ds[number % 2]), kBlock, 0};
    const ColumnOperand k{
        shared_address(shared_.k[0]) + kPart * Shape::kPartColumns / kBoxColumns * kBlock, kBlock,
        0};
    float dq[Shape::kPartColumns / 2];
    start_by_columns<T, 1>(dq, ds, k);
    wait_for_product<0>(dq);
    fence_accumulators(sums_);
    done();
    const unsigned i = number * kParts + kPart;                 // even: second warpgroup
    shared_.dq_empty[kWarpgroup].wait(i / 2 % 2 ^ kWarpgroup);  // part i - 1
    const uint32_t to = shared_address(shared_.dq) + warpgroup_thread() * 16;
    unroll<Shape::kPartColumns / 8>([&](auto n) {
      store_floats<n * kWarpgroupThreads * 16>(to, reinterpret_cast<const float (&)[4]>(dq[4 * n]));
    });
    fence_stores();
    release(shared_.dq_full);
  }

  __device__ uint32_t own_slopes() const {
    return shared_address(shared_.slopes) + warpgroup_thread() * 16;
  }
  // Address of the statistics of the lane's first column.
  static __device__ uint32_t own_statistics(const float (&statistics)[kQueries]) {
    return shared_address(statistics) + threadIdx.x % 4 * 8;
  }

  const AttentionBackwardParams& bp_;
  const Sm90BackwardPlan& plan_;
  Shared& shared_;
  const Sm90KeyTile& keys_;
  Weighing score_map_;
  float sums_[kHeadDim / 2];  // dV or dK
};

// First consumer warpgroup: weights and dV.
template <typename T, typename Shape, Weights kWeights>
class Sm90ValueGradient : Sm90WideKeys<T, Shape, kWeights> {
  using Base = Sm90WideKeys<T, Shape, kWeights>;
  using Base::bp_, Base::plan_, Base::shared_, Base::score_map_, Base::sums_;
  static constexpr int kQueries = Base::kQueries;

 public:
  using Base::Base;

  __device__ __forceinline__ void run() {
    const unsigned tiles =
        this->for_tiles([&](auto general, auto& p, int first,
                            unsigned number) { make_weights<general>(p, first, number); },
                        [&](const auto& p, unsigned number) { add_to_values(p, number); });
    if (tiles > 0) {
      shared_.ds_full.wait((tiles - 1) % 2);
      this->template add_to_queries<0>(tiles - 1, [] {});
    }
    score_map_.store_sums(bp_.dv, sums_, plan_.dv_factor);
  }

 private:
  // S^T = K Q^T; words of P^T, and slopes to shared memory.
  template <bool kGeneral>
  __device__ __forceinline__ void make_weights(uint32_t (&p)[kQueries / 4], int query0,
                                               unsigned number) {
    const typename Base::QueryStage stage(number);
    float s[kQueries / 2];
    shared_.queries.full[stage.index].wait(stage.parity);
    start_qk<T, Base::kHeadDim, kQueries>(s, shared_address(shared_.k[0]),
                                          shared_address(shared_.q[stage.index]));
    wait_for_product<0>(s);
    uint32_t packed[kQueries / 4];  // unused: slopes take the place of s
    score_map_.template apply_map<kGeneral>(
        p, packed, s, query0, Base::own_statistics(shared_.queries.statistics[stage.index]));
    release(shared_.queries.empty[stage.index]);
    // the second warpgroup has read the previous tile's slopes
    shared_.ds_full.wait(number % 2 ^ 1);
    unroll<kQueries / 8>([&](auto n) {
      store_floats<n * kWarpgroupThreads * 16>(this->own_slopes(),
                                               reinterpret_cast<const float (&)[4]>(s[4 * n]));
    });
    release(shared_.slopes_full);
  }

  // dV += P^T dO
  __device__ __forceinline__ void add_to_values(const uint32_t (&p)[kQueries / 4],
                                                unsigned number) {
    const typename Base::GradientStage stage(number);
    shared_.gradients.full[stage.index].wait(stage.parity);
    start_pv<T, kQueries>(sums_, p, shared_address(shared_.dout[stage.index]));
    const auto done = [&] { release(shared_.gradients.empty[stage.index]); };
    if (number > 0) {
      this->template add_to_queries<0>(number - 1, done);
    } else {
      wait_for_product<0>(sums_);
      done();
    }
  }
};

// Second consumer warpgroup: dS and dK. Slopes of a tile arrive only after the first warpgroup has
// read dS of the tile before the previous one, whose buffer this tile reuses.
template <typename T, typename Shape, Weights kWeights>
class Sm90KeyGradient : Sm90WideKeys<T, Shape, kWeights> {
  using Base = Sm90WideKeys<T, Shape, kWeights>;
  using Base::bp_, Base::plan_, Base::shared_, Base::score_map_, Base::sums_;
  static constexpr int kQueries = Base::kQueries;

 public:
  using Base::Base;

  __device__ __forceinline__ void run() {
    this->for_tiles(
        [&](auto general, auto& ds, int, unsigned number) { make_ds<general>(ds, number); },
        [&](const auto& ds, unsigned number) { add_to_keys(ds, number); });
    score_map_.store_sums(bp_.dk, sums_, plan_.dq_factor);
  }

 private:
  // dP^T = V dO^T; words of dS^T = slopes (dP^T - delta)
  template <bool kGeneral>
  __device__ __forceinline__ void make_ds(uint32_t (&ds)[kQueries / 4], unsigned number) {
    const typename Base::GradientStage stage(number);
    float dp[kQueries / 2];
    shared_.gradients.full[stage.index].wait(stage.parity);
    start_qk<T, Base::kHeadDim, kQueries>(dp, shared_address(shared_.v[0]),
                                          shared_address(shared_.dout[stage.index]));
    shared_.slopes_full.wait(number % 2);
    wait_for_product<0>(dp);
    [[maybe_unused]] const float sum = score_map_.template make_ds<kGeneral>(
        ds, dp, Base::own_statistics(shared_.gradients.statistics[stage.index]),
        [&](auto n) -> float4 {
          float x[4];
          load_floats<n * kWarpgroupThreads * 16>(x, this->own_slopes());
          return {x[0], x[1], x[2], x[3]};
        });
    if constexpr (kGeneral && !Base::Weighing::kSoftmax) {
      if (bp_.sums) shared_.slope_sums.note(sum, number, warpgroup_thread() / kWarpSize);
    }
    release(shared_.gradients.empty[stage.index]);
  }

  // dK += dS^T Q
  __device__ __forceinline__ void add_to_keys(const uint32_t (&ds)[kQueries / 4], unsigned number) {
    const typename Base::QueryStage stage(number);
    shared_.queries.full[stage.index].wait(stage.parity);
    start_pv<T, kQueries>(sums_, ds, shared_address(shared_.q[stage.index]));
    score_map_.store_ds(shared_address(shared_.ds[number % 2]), ds);
    fence_stores();
    release(shared_.ds_full);
    shared_.ds_full.wait(number % 2);
    this->template add_to_queries<1>(number, [&] { release(shared_.queries.empty[stage.index]); });
  }
};

}  // namespace tokenmill::cuda
