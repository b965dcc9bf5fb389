// Backward on compute capability 9.0a, of the calls that takes_sm90 lets in: five products.
//
//   S^T = K Q^T    dP^T = V dO^T    dV += P^T dO    dK += dS^T Q    dQ += dS K
//   softmax: dS = P (dP - delta), delta = rowsum(dO O) - dlse;   sigmoid: dS = P (1 - P) dP
//
// A block owns kBlockKeys keys of a KV head and runs over the tiles of queries, of all heads of the
// group, that see them. One warp loads Q, dO and the statistics of rows into kStages stages. Each
// of two warpgroups owns 64 keys: their S^T, P^T, dP^T and dS^T are accumulators, which, rounded,
// are the left operands of dV and dK as they are. dS goes through shared memory, and the warpgroups
// make tiles of dQ in turn. Another warp adds them to a sum in float32 in global memory, when the
// blocks of later keys have added theirs: the order is always the same. A second kernel then rounds
// the sums.
#pragma once
#include <algorithm>

#include "cuda/arch/sm90/wgmma_columns.cuh"
#include "cuda/attention/score_mod_backward.cuh"
#include "cuda/launch.cuh"
#include "dense/attention/kernel_backward_sm90_load.cuh"
#include "dense/attention/kernel_backward_store.cuh"
#include "dense/attention/launch_backward_sm90.h"

namespace tokenmill::cuda {

// A warpgroup that multiplies: 64 keys.
template <typename T, typename Shape, Weights kWeights>
class Sm90Keys {
 public:
  static constexpr int kRows = Shape::kRows, kQueries = Shape::kTileQueries;
  static constexpr int kHeadDim = Shape::kHeadDim, kColumns = Shape::kColumns;
  static constexpr bool kSoftmax = kWeights == Weights::softmax;
  static constexpr bool kScales = !kSoftmax && std::is_same_v<T, __half>;  // see kHalfScale
  // What registers allow: slopes in float32, else in words; dP that runs while weights are made,
  // but not where words of slopes are made, too.
  static constexpr bool kPacked = kQueries > 64;
  template <bool kGeneral>
  static constexpr bool kEarly = !kPacked || (kSoftmax && !kGeneral);
  // Slopes that are packed reach 1 / n as weights do. Those of the fast map do not.
  static constexpr bool kScalesSlope = kScales && kPacked;

  __device__ Sm90Keys(const AttentionBackwardParams& bp, const Sm90BackwardPlan& plan,
                      Sm90BackwardShared<Shape>& shared, const Sm90KeyTile& keys, int warpgroup)
      : bp_(bp), plan_(plan), shared_(shared), keys_(keys), warpgroup_(warpgroup) {}

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) dk_[i] = dv_[i] = 0;
    shared_.keys_full.wait(0);
    unsigned number = 0;
#pragma unroll 1
    for (int i = 0; i < plan_.group; ++i) {
      const int head = keys_.h * plan_.group + i;
      if constexpr (!kSoftmax) set_constant(head);
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
  __device__ int first_key() const { return keys_.first + warpgroup_ * kRows; }

  __device__ void set_constant(int head) {
    const AttentionParams& p = bp_.forward;
    constant_ = plan_.fast
                    ? BackwardScoreMod<Mode::fast_sigmoid, kScales>(p, keys_.place.b, head).constant
                    : BackwardScoreMod<Mode::sigmoid, kScales>(p, keys_.place.b, head).constant;
  }

  // What a lane's two keys see of a tile, by columns from the lane's first one on.
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

  __device__ void skip_tile(unsigned number) {
    if (bp_.sums) note_slopes(0, number);
    finish_tile(number);
  }
  // The sum of a lane's dS, of which scale and softcap have no part.
  __device__ void note_slopes(float sum, unsigned number) {
    sum = warp_sum(sum);
    if (threadIdx.x % kWarpSize == 0)
      shared_.slope_sums[number % 3][threadIdx.x / kWarpSize - kWarpgroupThreads / kWarpSize] = sum;
  }

  // dV and dK of a tile, and its dS to shared memory. kGeneral: a mask or an end cuts it, or the
  // plan is general.
  template <bool kGeneral>
  __device__ __forceinline__ void add_tile(int query0, unsigned number) {
    const int stage = Stage<Shape>(number).index;
    const uint32_t q = shared_address(shared_.q[stage]);
    const uint32_t dout = shared_address(shared_.dout[stage]);
    const uint32_t own = threadIdx.x % 4 * 8;
    float s[kQueries / 2], dp[kQueries / 2];
    uint32_t p[kQueries / 4], ds[kQueries / 4];  // ds: of packed slopes first
    start_qk<T, kHeadDim, kQueries>(s, shared_address(shared_.k[warpgroup_]), q);
    if constexpr (kEarly<kGeneral>)
      start_qk<T, kHeadDim, kQueries>(dp, shared_address(shared_.v[warpgroup_]), dout);
    wait_for_product<kEarly<kGeneral> ? 1 : 0>(s);
    weigh<kGeneral>(p, ds, s, query0, shared_address(shared_.minus_lse[stage]) + own);
    if constexpr (!kEarly<kGeneral>)
      start_qk<T, kHeadDim, kQueries>(dp, shared_address(shared_.v[warpgroup_]), dout);
    start_pv<T, kQueries>(dv_, p, dout);
    wait_for_product<1>(dp);
    [[maybe_unused]] float sum = 0;
    const uint32_t delta = shared_address(shared_.minus_delta[stage]) + own;
    unroll<kQueries / 8>([&](auto n) {
      [[maybe_unused]] float2 minus_delta;
      if constexpr (kSoftmax) minus_delta = load_float2<n * 32>(delta);
      unroll<2>([&](auto h) {
        float2 slope{s[4 * n + 2 * h], s[4 * n + 2 * h + 1]};
        if constexpr (kPacked) slope = unpack<T>(kEarly<kGeneral> ? p[2 * n + h] : ds[2 * n + h]);
        float x = dp[4 * n + 2 * h], y = dp[4 * n + 2 * h + 1];
        if constexpr (kSoftmax) {
          x += minus_delta.x;
          y += minus_delta.y;
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
    start_pv<T, kQueries>(dk_, ds, q);
    const int lane = threadIdx.x % kWarpSize;
    const uint32_t scores =
        shared_address(shared_.ds[number % 2]) +
        (warpgroup_ * kRows + warpgroup_row(0) - lane / 4 + lane % 16) * kBoxRowBytes +
        (lane / 16 ^ lane % 8) * 16;
    constexpr int kBlock = Shape::kBlockKeys * kBoxRowBytes;  // of 64 queries
    unroll<kQueries / 16>([&](auto n) {
      store_matrices<n / 4 * kBlock>(scores ^ n % 4 * 32,
                                     reinterpret_cast<const uint32_t (&)[4]>(ds[4 * n]));
    });
    if constexpr (kGeneral && !kSoftmax) {
      if (bp_.sums) note_slopes(sum, number);
    }
    fence_stores();
    wait_for_product<0>(dk_);
    fence_accumulators(dv_);
    finish_tile(number);
  }

  // The stage may be loaded again, and dS of both warpgroups is written.
  __device__ void finish_tile(unsigned number) {
    release(shared_.empty[Stage<Shape>(number).index]);
    meet();
  }

  // Words of weights from scores, which become slopes of the map or are packed into words of them.
  // Slopes of a softmax without a cap are its weights.
  template <bool kGeneral>
  __device__ __forceinline__ void weigh(uint32_t (&p)[kQueries / 4],
                                        uint32_t (&slopes)[kQueries / 4], float (&s)[kQueries / 2],
                                        int query0, uint32_t minus_lse) const {
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

  // The tile's dQ or, see Shape, dQ^T.
  __device__ __forceinline__ void add_to_queries(int query0, unsigned number) {
    const ColumnOperand ds{shared_address(shared_.ds[number % 2]), Shape::kBlockKeys * kBoxRowBytes,
                           kRows * kBoxRowBytes};
    const ColumnOperand k{shared_address(shared_.k[0]), kRows * kBoxRowBytes, Shape::kSlabBytes};
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
    shared_.dq_empty.wait(number % 2 ^ 1);
    const uint32_t to = shared_address(shared_.dq) + warpgroup_thread() * 16;
    unroll<16>([&](auto n) {
      store_floats<n * kWarpgroupThreads * 16>(to, reinterpret_cast<const float (&)[4]>(dq[4 * n]));
    });
    fence_stores();
    release(shared_.dq_full);
  }

  __device__ __forceinline__ void store() const {
    const int lane = threadIdx.x % kWarpSize, own = first_key() + warpgroup_row(0) - lane / 4;
    const PackedRows& keys = keys_.place.rows;
    const auto store_rows = [&](const Rows& to, const float (&x)[kColumns / 2], float factor) {
      store_accumulators<1, T, 1, kColumns / 16>(
          reinterpret_cast<const float (&)[1][kColumns / 8][4]>(x), factor,
          rows_at<T>(to, keys_.place.b, keys.start + own, keys_.h), to.seq, keys.length - own, 0,
          kHeadDim, lane);
    };
    store_rows(bp_.dv, dv_, plan_.dv_factor);
    store_rows(bp_.dk, dk_, plan_.dq_factor);
  }

  // The threads of both warpgroups.
  static __device__ void meet() {
    asm volatile("barrier.sync 1, %0;" ::"n"(Shape::kWarpgroups * kWarpgroupThreads) : "memory");
  }

  const AttentionBackwardParams& bp_;
  const Sm90BackwardPlan& plan_;
  Sm90BackwardShared<Shape>& shared_;
  const Sm90KeyTile& keys_;
  int warpgroup_;
  float constant_ = 0;  // sigmoid: of the argument of the map
  float dk_[kColumns / 2], dv_[kColumns / 2];
};

template <typename T, int kHeadDim, Weights kWeights>
__global__ void __launch_bounds__(Sm90BackwardShape<kHeadDim>::kThreads, 1)
    attention_backward_sm90_kernel(const __grid_constant__ AttentionBackwardParams bp,
                                   const __grid_constant__ Sm90BackwardPlan plan) {
  using Shape = Sm90BackwardShape<kHeadDim>;
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
  // From the first lane: the compiler then knows that it is the same for a warp.
  const int warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpSize, 0);
  if (warp < kWarpgroupThreads / kWarpSize) {
    shrink_registers<Shape::kLoadRegisters>();
    if (warp == 0)
      load_backward_sm90<Shape, kWeights == Weights::softmax>(bp, plan, shared, keys);
    else if (threadIdx.x == kWarpSize)
      add_queries_sm90<Shape>(bp, plan, shared, keys);
  } else {
    grow_registers<Shape::kMultiplyRegisters>();
    Sm90Keys<T, Shape, kWeights>(bp, plan, shared, keys, warp / 4 - 1).run();
  }
}

// Rounds the sums of a tile of queries. Nobody has added to one that sees no keys.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(2 * kWarpgroupThreads)
    attention_backward_round_kernel(const __grid_constant__ AttentionBackwardParams bp,
                                    const __grid_constant__ Sm90BackwardPlan plan) {
  using Shape = Sm90BackwardShape<kHeadDim>;
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
  // Half of the threads take the first half of each thread's sums, see add_to_queries.
  const int thread = warpgroup_thread(), lane = thread % kWarpSize;
  const int half = threadIdx.x / kWarpgroupThreads, own = thread / kWarpSize * 16;
  float sums[1][8][4] = {};
  if (plan.turns[number] > 0) {
    const int64_t at = number * Shape::kTileFloats + half * (Shape::kTileFloats / 2);
    const auto* from = reinterpret_cast<const float4*>(plan.dq + at);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float4 x = from[n * kWarpgroupThreads + thread];
      sums[0][n][0] = x.x, sums[0][n][1] = x.y, sums[0][n][2] = x.z, sums[0][n][3] = x.w;
    }
  }
  const int row = place.tile * Shape::kTileQueries + (Shape::kTransposed ? half * 64 : own);
  T* const to = rows_at<T>(bp.dq, b, place.rows.start + row, h);
  const int rows = place.rows.length - row;
  if constexpr (Shape::kTransposed)
    store_transposed<T>(sums[0], plan.dq_factor, to + own, bp.dq.seq, rows, lane);
  else
    store_accumulators<1, T, 1, 4>(sums, plan.dq_factor, to, bp.dq.seq, rows, half * 64, kHeadDim,
                                   lane);
}

template <typename T, int kHeadDim, Weights kWeights>
const char* launch_backward_sm90(const Sm90Backward& call, cudaStream_t stream) {
  using Shape = Sm90BackwardShape<kHeadDim>;
  constexpr int kRows = Shape::kRows, kQueries = Shape::kTileQueries;
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
  using Keys = Sm90Keys<T, Shape, kWeights>;
  plan.dv_factor = Keys::kScales ? 1 / kHalfScale : 1;
  plan.slope_factor = Keys::kScalesSlope && !fast ? 1 / kHalfScale : 1;
  const int64_t tiles = sm90_query_tiles(p);
  static_assert(Shape::kTileFloats == kSm90TileFloats);
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
  return launch<attention_backward_round_kernel<T, kHeadDim>>(tiles, 2 * kWarpgroupThreads, 0,
                                                              stream, bp, plan);
}

// Defined in a generated source for each element type and map.
template <typename T, Weights kWeights>
const char* launch_backward_sm90(const Sm90Backward& call, cudaStream_t stream) {
  return visit_sm90_backward_dim(call.params.forward.head_dim, [&](auto dim) -> const char* {
    return launch_backward_sm90<T, dim, kWeights>(call, stream);
  });
}

}  // namespace tokenmill::cuda
