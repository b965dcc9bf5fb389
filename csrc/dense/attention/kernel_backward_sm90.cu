// sm_90a backward, for calls that takes_sm90() accepts: five products.
//
//   S^T = K Q^T    dP^T = V dO^T    dV += P^T dO    dK += dS^T Q    dQ += dS K
//   softmax: dS = P (dP - delta), delta = rowsum(dO O) - dlse;   sigmoid: dS = P (1 - P) dP
//
// A CTA owns kBlockKeys keys of a KV head and runs over the query tiles, of all heads of the GQA
// group, that see them. One producer warp loads Q, dO and the row statistics into kStages stages.
// Each of two consumer warpgroups owns 64 keys: S^T, P^T, dP^T and dS^T are accumulators, which,
// rounded, are the A operands of dV and dK as they are. dS goes through shared memory, and the
// warpgroups compute tiles of dQ in turn. Another warp adds them to a float32 accumulator in global
// memory, after the CTAs of later keys have added theirs: the order is deterministic. A second
// kernel rounds dQ. For wide heads a CTA has 64 keys, see kernel_backward_sm90_wide.cuh.
#include <algorithm>

#include "cuda/launch.cuh"
#include "dense/attention/kernel_backward_sm90_load.cuh"
#include "dense/attention/kernel_backward_sm90_weights.cuh"
#include "dense/attention/kernel_backward_sm90_wide.cuh"
#include "dense/attention/launch.cuh"

namespace tokenmill::cuda {

// Consumer warpgroup: 64 keys.
template <typename T, typename Shape, Weights kWeights>
class Sm90Keys {
 public:
  static constexpr int kQueries = Shape::kTileQueries, kHeadDim = Shape::kHeadDim;
  static constexpr int kColumns = Shape::kColumns;
  using Weighing = Sm90KeyWeights<T, Shape, kWeights>;
  template <bool kGeneral>
  static constexpr bool kEarly = Weighing::template kEarly<kGeneral>;

  __device__ Sm90Keys(const AttentionBackwardParams& bp, const Sm90BackwardPlan& plan,
                      Sm90BackwardShared<Shape>& shared, const Sm90KeyTile& keys, int warpgroup)
      : bp_(bp),
        plan_(plan),
        shared_(shared),
        keys_(keys),
        warpgroup_(warpgroup),
        score_map_(bp, plan, keys, warpgroup) {}

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) dk_[i] = dv_[i] = 0;
    shared_.keys_full.wait(0);
    unsigned number = 0;
#pragma unroll 1
    for (int i = 0; i < plan_.group; ++i) {
      score_map_.set_constant(keys_.h * plan_.group + i);
#pragma unroll 1
      for (int tile = keys_.begin; tile < keys_.end; ++tile, ++number) {
        const int first = tile * kQueries;
        const Stage<Shape> stage(number);
        shared_.full[stage.index].wait(stage.parity);
        if (!keys_.sees<Shape>(warpgroup_, first))
          skip_tile(number);
        else if (!plan_.general && keys_.is_whole<Shape>(warpgroup_, first))
          add_tile<false>(first, number);
        else
          add_tile<true>(first, number);
        if (number % Shape::kWarpgroups == warpgroup_) add_to_queries(first, number);
      }
    }
    store();
  }

 private:
  __device__ void skip_tile(unsigned number) {
    if (bp_.sums) note_slopes(0, number);
    finish_tile(number);
  }
  __device__ void note_slopes(float sum, unsigned number) {
    shared_.slope_sums.note(sum, number, threadIdx.x / kWarpSize - kWarpgroupThreads / kWarpSize);
  }

  // One query tile: dV += P^T dO, dK += dS^T Q, and dS to shared memory. kGeneral: a mask or an end
  // cuts the tile, or plan.general.
  template <bool kGeneral>
  __device__ __forceinline__ void add_tile(int query0, unsigned number) {
    const int stage = Stage<Shape>(number).index;
    const uint32_t q = shared_address(shared_.q[stage]);
    const uint32_t dout = shared_address(shared_.dout[stage]);
    const uint32_t own = threadIdx.x % 4 * 8;
    float s[kQueries / 2], dp[kQueries / 2];
    uint32_t p[kQueries / 4], ds[kQueries / 4];  // ds holds packed slopes at first
    // S^T = K Q^T; dP^T = V dO^T early where registers allow
    start_qk<T, kHeadDim, kQueries>(s, shared_address(shared_.k[warpgroup_]), q);
    if constexpr (kEarly<kGeneral>)
      start_qk<T, kHeadDim, kQueries>(dp, shared_address(shared_.v[warpgroup_]), dout);
    wait_for_product<kEarly<kGeneral> ? 1 : 0>(s);
    score_map_.template apply_map<kGeneral>(p, ds, s, query0,
                                            shared_address(shared_.minus_lse[stage]) + own);
    if constexpr (!kEarly<kGeneral>)
      start_qk<T, kHeadDim, kQueries>(dp, shared_address(shared_.v[warpgroup_]), dout);
    // dV += P^T dO
    start_pv<T, kQueries>(dv_, p, dout);
    wait_for_product<1>(dp);
    [[maybe_unused]] const float sum = score_map_.template make_ds<kGeneral>(
        ds, dp, shared_address(shared_.minus_delta[stage]) + own, [&](auto n) -> float4 {
          if constexpr (!Weighing::kPacked)
            return {s[4 * n], s[4 * n + 1], s[4 * n + 2], s[4 * n + 3]};
          const auto& words = kEarly<kGeneral> ? p : ds;
          const float2 a = unpack<T>(words[2 * n]), b = unpack<T>(words[2 * n + 1]);
          return {a.x, a.y, b.x, b.y};
        });
    // dK += dS^T Q
    start_pv<T, kQueries>(dk_, ds, q);
    score_map_.store_ds(shared_address(shared_.ds[number % 2]), ds);
    if constexpr (kGeneral && !Weighing::kSoftmax) {
      if (bp_.sums) note_slopes(sum, number);
    }
    fence_stores();
    wait_for_product<0>(dk_);
    fence_accumulators(dv_);
    finish_tile(number);
  }

  // Releases the stage, and waits until both warpgroups have written dS.
  __device__ void finish_tile(unsigned number) {
    release(shared_.empty[Stage<Shape>(number).index]);
    meet();
  }

  // dQ = dS K, or dQ^T, see Shape::kTransposed, to shared memory for the dQ warp.
  __device__ __forceinline__ void add_to_queries(int query0, unsigned number) {
    constexpr int kBlock = Shape::kRows * kBoxRowBytes;
    const ColumnOperand ds{shared_address(shared_.ds[number % 2]), Shape::kSlabs * kBlock, kBlock};
    const ColumnOperand k{shared_address(shared_.k[0]), kBlock, Shape::kSlabBytes};
    const ColumnOperand &a = Shape::kTransposed ? k : ds, &b = Shape::kTransposed ? ds : k;
    float dq[64];
    const bool first_sees = keys_.sees<Shape>(0, query0);
    if (first_sees && keys_.sees<Shape>(1, query0)) {
      start_by_columns<T, 2>(dq, a, b);
      wait_for_product<0>(dq);
    } else {
      start_by_columns<T, 1>(dq, a, b, first_sees ? 0 : 1);
      wait_for_product<0>(dq);
    }
    fence_accumulators(dk_);
    fence_accumulators(dv_);
    shared_.dq_empty[0].wait(number % 2 ^ 1);
    const uint32_t to = shared_address(shared_.dq) + warpgroup_thread() * 16;
    unroll<16>([&](auto n) {
      store_floats<n * kWarpgroupThreads * 16>(to, reinterpret_cast<const float (&)[4]>(dq[4 * n]));
    });
    fence_stores();
    release(shared_.dq_full);
  }

  __device__ __forceinline__ void store() const {
    score_map_.store_sums(bp_.dv, dv_, plan_.dv_factor);
    score_map_.store_sums(bp_.dk, dk_, plan_.dq_factor);
  }

  // Barrier of both consumer warpgroups.
  static __device__ void meet() {
    asm volatile("barrier.sync 1, %0;" ::"n"(Shape::kWarpgroups * kWarpgroupThreads) : "memory");
  }

  const AttentionBackwardParams& bp_;
  const Sm90BackwardPlan& plan_;
  Sm90BackwardShared<Shape>& shared_;
  const Sm90KeyTile& keys_;
  int warpgroup_;
  Weighing score_map_;
  float dk_[kColumns / 2], dv_[kColumns / 2];
};

template <typename T, int kHeadDim, Weights kWeights>
__global__ void __launch_bounds__(Sm90BackwardShapeOf<kHeadDim>::kThreads, 1)
    attention_backward_sm90_kernel(const __grid_constant__ AttentionBackwardParams bp,
                                   const __grid_constant__ Sm90BackwardPlan plan) {
  using Shape = Sm90BackwardShapeOf<kHeadDim>;
  extern __shared__ __align__(1024) char sm90_shared[];
  auto& shared = *reinterpret_cast<Sm90BackwardShared<Shape>*>(sm90_shared);
  if (threadIdx.x < kWarpSize) {
    unsigned number = 0;
    if (threadIdx.x == 0) number = atomicAdd(plan.begun, 1u);
    number = __shfl_sync(kFullWarp, number, 0);
    const Sm90KeyTile keys = Sm90KeyTile::of<Shape>(bp.forward, plan, number);
    if (threadIdx.x == 0) {
      shared.init_barriers();
      shared.keys = keys;
    }
  }
  __syncthreads();
  const Sm90KeyTile& keys = shared.keys;
  if (keys.place.b < 0) {
    const LooseRows none(keys.place, bp.forward.seqlen_k, Shape::kBlockKeys);
    for (const Rows* to : {&bp.dk, &bp.dv})
      none.fill(rows_at<T>(*to, 0, 0, keys.h), to->seq, kHeadDim, 0);
    return;
  }
  // Broadcast from lane 0 so that the compiler knows the value to be warp-uniform.
  const int warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpSize, 0);
  if (warp < kWarpgroupThreads / kWarpSize) {
    shrink_registers<Shape::kLoadRegisters>();
    if (warp == 0)
      load_backward_sm90<kWeights == Weights::softmax>(bp, plan, shared, keys);
    else if (threadIdx.x == kWarpSize)
      add_queries_sm90<Shape>(bp, plan, shared, keys);
    return;
  }
  grow_registers<Shape::kMultiplyRegisters>();
  const int warpgroup = warp / 4 - 1;
  if constexpr (!Shape::kWide)
    Sm90Keys<T, Shape, kWeights>(bp, plan, shared, keys, warpgroup).run();
  else if (warpgroup == 0)
    Sm90ValueGradient<T, Shape, kWeights>(bp, plan, shared, keys).run();
  else
    Sm90KeyGradient<T, Shape, kWeights>(bp, plan, shared, keys).run();
}

// Postprocess: rounds the dQ accumulator of a query tile; nothing was added for a tile that sees no
// keys.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(Sm90BackwardShapeOf<kHeadDim>::kTileFloats / 32)
    attention_backward_round_kernel(const __grid_constant__ AttentionBackwardParams bp,
                                    const __grid_constant__ Sm90BackwardPlan plan) {
  using Shape = Sm90BackwardShapeOf<kHeadDim>;
  const AttentionParams& p = bp.forward;
  const int64_t head = blockIdx.x / plan.query_tiles, b = head / p.heads, h = head % p.heads;
  int64_t number = blockIdx.x;
  TilePlace place{static_cast<int>(b),
                  static_cast<int>(blockIdx.x % plan.query_tiles),
                  {0, static_cast<int>(p.seqlen_q)}};
  if (p.cu_seqlens_q) {
    place = find_tile(p.cu_seqlens_q, p.batch, p.seqlen_q, Shape::kTileQueries, place.tile);
    if (place.b < 0) {
      const LooseRows none(place, p.seqlen_q, Shape::kTileQueries);
      return none.fill(rows_at<T>(bp.dq, 0, 0, h), bp.dq.seq, kHeadDim, 0);
    }
    number =
        head * plan.query_tiles + first_slot(place.rows, place.b, Shape::kTileQueries) + place.tile;
  }
  // 128 threads take 32 sums of each thread of add_to_queries: 64 columns of dQ or, of dQ^T, 64
  // queries.
  const int thread = warpgroup_thread(), lane = thread % kWarpSize;
  const int block = threadIdx.x / kWarpgroupThreads, own = thread / kWarpSize * 16;
  float sums[1][8][4] = {};
  if (plan.turns[number] > 0) {
    const int64_t at = number * Shape::kTileFloats + block * (32 * kWarpgroupThreads);
    const auto* from = reinterpret_cast<const float4*>(plan.dq + at);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float4 x = from[n * kWarpgroupThreads + thread];
      sums[0][n][0] = x.x, sums[0][n][1] = x.y, sums[0][n][2] = x.z, sums[0][n][3] = x.w;
    }
  }
  const int row = place.tile * Shape::kTileQueries + (Shape::kTransposed ? block * 64 : own);
  T* const to = rows_at<T>(bp.dq, b, place.rows.start + row, h);
  const int rows = place.rows.length - row;
  if constexpr (Shape::kTransposed)
    store_transposed<T>(sums[0], plan.dq_factor, to + own, bp.dq.seq, rows, lane);
  else
    store_accumulators<1, T, 1, 4>(sums, plan.dq_factor, to, bp.dq.seq, rows, block * 64, kHeadDim,
                                   lane);
}

template <typename T, int kHeadDim, Weights kWeights>
const char* launch_backward_sm90(const Sm90Backward& call, cudaStream_t stream) {
  using Shape = Sm90BackwardShapeOf<kHeadDim>;
  constexpr int kRows = Shape::kRows, kQueries = Shape::kTileQueries;
  static_assert(sizeof(Sm90BackwardShared<Shape>) <= 227 << 10);
  const AttentionBackwardParams& bp = call.params;
  const AttentionParams& p = bp.forward;
  const Sm90Tensors tensors(p, bp.dout);
  Sm90BackwardPlan plan{};
  if (const char* error = encode_map(plan.q, tensors.q, p.dtype, kQueries)) return error;
  if (const char* error = encode_map(plan.k, tensors.k, p.dtype, kRows)) return error;
  if (const char* error = encode_map(plan.v, tensors.v, p.dtype, kRows)) return error;
  if (const char* error = encode_map(plan.dout, tensors.out, p.dtype, kQueries)) return error;
  const int64_t key_tiles = max_tiles(p.cu_seqlens_k, p.batch, p.seqlen_k, Shape::kBlockKeys);
  plan.query_tiles = static_cast<int>(max_tiles(p.cu_seqlens_q, p.batch, p.seqlen_q, kQueries));
  plan.heads = static_cast<int>(tensors.q.batch * p.kv_heads);
  plan.group = static_cast<int>(p.heads / p.kv_heads);
  plan.fast = p.fast;
  const bool fast = kWeights == Weights::sigmoid && p.fast;
  const bool caps = p.softcap > 0;
  plan.factor = (caps ? p.softcap : p.scale) * (kWeights == Weights::softmax ? kLog2e
                                                : fast                       ? 0.5f
                                                                             : -kLog2e);
  if (caps) plan.cap_scale = std::min(p.scale / p.softcap, kFloatMax);  // inf * 0 would be NaN
  plan.lse_factor = caps ? kLog2e : 1;                                  // see launch_statistics
  plan.general = caps || bp.sums;
  plan.head_sums = blocks_of_sums(p);
  plan.dq_factor = fast ? 0.25f * p.scale : p.scale;
  using Weighing = Sm90KeyWeights<T, Shape, kWeights>;
  plan.dv_factor = Weighing::kScales ? 1 / kHalfScale : 1;
  plan.slope_factor = Weighing::kScalesSlope && !fast ? 1 / kHalfScale : 1;
  const int64_t tiles = sm90_query_tiles(p);
  plan.dq = call.dq_sums;
  plan.begun = reinterpret_cast<unsigned*>(call.dq_sums + tiles * Shape::kTileFloats);
  plan.turns = plan.begun + 1;
  if (const char* error = set_bytes(plan.begun, 0, (tiles + 1) * sizeof(unsigned), stream))
    return error;
  const int64_t heads = int64_t{plan.heads} * plan.group;
  if (bp.sums)
    if (const char* error =
            set_bytes(bp.sums, 0, heads * plan.head_sums * 2 * sizeof(float), stream))
      return error;
  if (const char* error = launch<attention_backward_sm90_kernel<T, kHeadDim, kWeights>>(
          key_tiles * plan.heads, Shape::kThreads, sizeof(Sm90BackwardShared<Shape>), stream, bp,
          plan))
    return error;
  return launch<attention_backward_round_kernel<T, kHeadDim>>(tiles, Shape::kTileFloats / 32, 0,
                                                              stream, bp, plan);
}

template <typename T, Weights kWeights>
const char* launch_backward_sm90(const Sm90Backward& call, cudaStream_t stream) {
  return visit_sm90_dim(call.params.forward.head_dim, [&](auto dim) -> const char* {
    return launch_backward_sm90<T, dim, kWeights>(call, stream);
  });
}

template const char* launch_backward_sm90<TOKENMILL_ELEMENT, Weights::TOKENMILL_MODE>(
    const Sm90Backward&, cudaStream_t);

}  // namespace tokenmill::cuda
