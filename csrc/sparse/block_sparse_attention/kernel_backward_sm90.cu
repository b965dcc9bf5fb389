// sm_90a backward, for the calls that takes_backward_sm90 accepts: seven products in two kernels
// without atomics, as in listed_backward.cuh.
//
//   queries:  S = Q K^T, dP = dO V^T, dQ += dS K
//   keys:     S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q
//   dS = P (dP - delta), delta = rowsum(dO O) - dlse
//
// This file has the query-side kernel. Its grid and its producer warp are the forward's.
#include "attention/epilogue_sm90.cuh"
#include "attention/masked_values_sm90.cuh"
#include "sparse/block_sparse_attention/cuda_plan.cuh"
#include "sparse/block_sparse_attention/kernel_backward_sm90_keys.cuh"
#include "sparse/block_sparse_attention/kernel_sm90_loader.cuh"

namespace tokenmill::cuda::block_sparse_attention {

// out_map describes dO.
struct Sm90QueryGradients : Sm90Launch {
  Rows dq;
  const float *minus_lse, *minus_delta;  // layout of lse
};

// Consumer warpgroup: computes one unit.
template <typename T, typename Shape>
class Sm90QueryRows {
 public:
  static constexpr int kRows = Shape::kRows, kKeys = Shape::kTileKeys, kHeadDim = Shape::kHeadDim;
  // Issue dP before the softmax where registers allow it; else dP reuses the registers of S.
  static constexpr bool kEarly = kHeadDim <= 64;
  using Shared = Sm90Shared<Shape>;

  __device__ Sm90QueryRows(const Sm90QueryGradients& d, Shared& shared, int warpgroup)
      : d_(d), shared_(shared), rows_(shared.rows(warpgroup)), warpgroup_(warpgroup) {}

  __device__ __forceinline__ void run() {
    const TileNumber number = TileNumber::of(d_);
    const RequestBlock block = RequestBlock::of(d_, number.b, number.block);
    const Sm90Unit unit = Sm90Unit::of(d_, number, block, warpgroup_);
    const int first = unit.first_query + block.diagonal;
    const AttentionParams& p = d_.attention;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warpgroup_row(h);
      const bool exists = row < unit.queries;
      const int64_t at =
          (block.b * p.heads + unit.head) * p.seqlen_q + unit.first_query + (exists ? row : 0);
      minus_lse_[h] = exists ? d_.minus_lse[at] : -infinity();
      minus_delta_[h] = exists ? d_.minus_delta[at] : 0;
    }
#pragma unroll
    for (int j = 0; j < kHeadDim / 2; ++j) dq_[j] = 0;
    shared_.q_full.wait(0);
#pragma unroll 1
    for (unsigned tile = 0;; ++tile) {
      const Stage<Shape> stage(tile);
      shared_.k_full[stage.index].wait(stage.parity);
      const TileMask visibility = shared_.visibility[stage.index];
      if (visibility.end < 0) break;
      if (unit.queries <= 0 || !visibility.any<kRows>(first))
        skip_tile(stage);
      else
        add_tile(stage, visibility, first);
    }
    if (unit.queries <= 0) return;
    const uint32_t staged = shared_address(rows_.q);
    sync_warpgroup(warpgroup_);  // all threads are done with the staging memory
    unroll<2>([&](auto h) { stage_row<T, h, kHeadDim>(staged, dq_, p.scale, false); });
    sync_warpgroup(warpgroup_);
    store_rows<T, kHeadDim>(rows_at<T>(d_.dq, block.b, unit.first_query, unit.head), d_.dq.seq,
                            unit.queries, staged);
  }

 private:
  __device__ __forceinline__ void skip_tile(const Stage<Shape>& stage) {
    release(shared_.k_empty[stage.index]);
    shared_.v_full[stage.index].wait(stage.parity);
    release(shared_.v_empty[stage.index]);
  }

  __device__ __forceinline__ void add_tile(const Stage<Shape>& stage, const TileMask& visibility,
                                           int first) {
    const uint32_t k = shared_address(shared_.k[stage.index]);
    float scores[1 + kEarly][kKeys / 2];
    auto &s = scores[0], &dp = scores[kEarly];
    uint32_t p[kKeys / 4], ds[kKeys / 4];
    // S = Q K^T
    start_qk<T, kHeadDim, kKeys>(s, shared_address(rows_.q), k);
    shared_.v_full[stage.index].wait(stage.parity);
    // dP = dO V^T
    const auto start_dp = [&] {
      start_qk<T, kHeadDim, kKeys>(dp, shared_address(rows_.out),
                                   shared_address(shared_.v[stage.index]));
    };
    if constexpr (kEarly) start_dp();
    wait_for_product<kEarly ? 1 : 0>(s);
    const bool cut = !visibility.all<kRows>(first);
    if (cut) visibility.bounds(first, 2 * static_cast<int>(threadIdx.x % 4)).hide(s, true, true);
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) {
      // P = 2^(factor S - lse)
      const float x = fmaf(s[2 * i], d_.scores.factor, minus_lse_[i % 2]);
      const float y = fmaf(s[2 * i + 1], d_.scores.factor, minus_lse_[i % 2]);
      p[i] = pack<T>(exp2_approx(x), exp2_approx(y));
    }
    if constexpr (!kEarly) start_dp();
    wait_for_product<0>(dp);
    release(shared_.v_empty[stage.index]);
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) {
      const float2 w = unpack<T>(p[i]);
      // dS = P (dP - delta)
      const float x = w.x * (dp[2 * i] + minus_delta_[i % 2]);
      const float y = w.y * (dp[2 * i + 1] + minus_delta_[i % 2]);
      ds[i] = pack<T>(x, y);
    }
    if (cut) clear_hidden(ds, p);
    // dQ += dS K
    start_pv<T, kKeys>(dq_, ds, k);
    wait_for_product<0>(dq_);
    release(shared_.k_empty[stage.index]);
  }

  const Sm90QueryGradients& d_;
  Shared& shared_;
  typename Shared::Rows& rows_;
  int warpgroup_;
  float minus_lse_[2], minus_delta_[2];
  float dq_[kHeadDim / 2];
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(Sm90Shape<kHeadDim>::threads(Sm90Shape<kHeadDim>::kMaxWarpgroups),
                                  1)
    block_sparse_queries_sm90_kernel(const __grid_constant__ Sm90QueryGradients d) {
  using Shape = Sm90Shape<kHeadDim, true>;
  const auto make_zero = [&](const LooseRows& loose, int64_t h) {
    loose.fill(rows_at<T>(d.dq, 0, 0, h), d.dq.seq, d.attention.head_dim, 0);
  };
  if (fill_loose_rows(d, make_zero)) return;
  run_roles<Shape, Sm90QueryRows<T, Shape>>(d);
}

template <typename T, int kHeadDim>
const char* launch_gradients_sm90(const BlockSparseBackwardParams& bp,
                                  const BlockSparseGradients& g, cudaStream_t stream) {
  using Shape = Sm90Shape<kHeadDim, true>;
  Sm90QueryGradients plan{};
  if (const char* error = plan_sm90<Shape>(plan, bp.forward, bp.dout)) return error;
  plan.dq = g.dq;
  plan.minus_lse = g.minus_lse;
  plan.minus_delta = g.minus_delta;
  if (const char* error = launch<block_sparse_queries_sm90_kernel<T, kHeadDim>>(
          query_tiles(plan), Shape::threads(plan.warpgroups),
          Sm90Shared<Shape>::bytes(plan.warpgroups), stream, plan))
    return error;
  return launch_keys_sm90<T, kHeadDim>(plan, g, stream);
}

template <typename T>
const char* launch_gradients_sm90(const BlockSparseBackwardParams& bp,
                                  const BlockSparseGradients& g, cudaStream_t stream) {
  return bp.forward.attention.head_dim == 64 ? launch_gradients_sm90<T, 64>(bp, g, stream)
                                             : launch_gradients_sm90<T, 128>(bp, g, stream);
}

template const char* launch_gradients_sm90<TOKENMILL_ELEMENT>(const BlockSparseBackwardParams&,
                                                              const BlockSparseGradients&,
                                                              cudaStream_t);

}  // namespace tokenmill::cuda::block_sparse_attention
