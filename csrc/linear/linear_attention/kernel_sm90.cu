// sm_90a forward, for the calls that takes_sm90 accepts. For chunks of 64 tokens:
//
//   W = decayed, causal Q K^T    O = start S Q + W V    S = total S + K^T (end V)
//
// A CTA processes one part of a sequence for one head and 128 columns of V. A producer warp loads
// chunks into kStages pipeline stages, another warp computes the decays of each chunk. One consumer
// warpgroup computes W, one chunk ahead. Each of the other consumer warpgroups keeps the state of
// 64 columns in its accumulators, transposed: converted to 16 bits, the state is the A operand of
// its product with Q, and so is V as loaded by ldmatrix.
#include "attention/epilogue_sm90.cuh"
#include "cuda/arch/sm90/tma.cuh"
#include "cuda/arch/sm90/wgmma_columns.cuh"
#include "cuda/arch/sm90/wgmma_rows.cuh"
#include "cuda/launch.cuh"
#include "linear/linear_attention/kernel_decay.cuh"
#include "linear/linear_attention/kernel_part.cuh"
#include "linear/linear_attention/kernel_products.cuh"
#include "linear/linear_attention/kernel_sm90_shape.cuh"
#include "linear/linear_attention/kernel_state.cuh"
#include "linear/linear_attention/launch_sm90.h"

namespace tokenmill::cuda::linear_attention {

// Context shared by the warps of a CTA.
template <typename Shape>
struct Sm90Block {
  static constexpr int kTokens = Shape::kTokens;

  const Recurrence& p;
  const Sm90Plan& plan;
  const Part& part;
  int h, slice;
  Sm90Shared<Shape>& shared;

  __device__ bool states_only() const { return plan.parts.states_only; }
  __device__ int batch() const { return p.cu_seqlens ? 0 : part.b; }
  // Workspace slot of the part `other` parts away.
  __device__ float* slot(int other) const {
    const int64_t number = part.slot + other;
    return p.workspace +
           ((number * p.heads + h) * plan.parts.slices + slice) * plan.parts.slot_floats;
  }

  // Calls visit(number, first token of the sequence, tokens) for each chunk.
  template <typename Visit>
  __device__ __forceinline__ void each_chunk(const Visit& visit) const {
    unsigned number = 0;
#pragma unroll 1
    for (int first = part.first; first < part.end; first += kTokens, ++number)
      visit(number, first, min(part.end - first, kTokens));
  }

  __device__ __forceinline__ void await_chunk(const Stage<Shape>& stage) const {
    shared.full[stage.index].wait(stage.parity);
    shared.ready[stage.index].wait(stage.parity);
  }
  // Waits until the stage may be overwritten.
  __device__ __forceinline__ void await_empty(const Stage<Shape>& stage) const {
    wait_as_warp(shared.empty[stage.index], stage.parity ^ 1);
  }
};

// Producer warp.
template <typename Shape>
__device__ void producer(const Sm90Block<Shape>& b) {
  constexpr int kTokens = Shape::kTokens, kHeadDim = Shape::kHeadDim;
  constexpr int kValueBytes = Shape::kWarpgroups * Shape::kBlockBytes;
  auto& shared = b.shared;
  b.each_chunk([&](unsigned number, int first, int) {
    const Stage<Shape> stage(number);
    b.await_empty(stage);
    if (threadIdx.x % kWarpSize > 0) return;
    Mbarrier& full = shared.full[stage.index];
    const int rows = b.states_only() ? 1 : 2, row = b.part.start + first;
    full.arrive_expecting(rows * Shape::kRowBytes + kValueBytes);
    if (!b.states_only())
      load_boxes<kTokens, kHeadDim>(b.plan.q, {row, b.h, b.batch()}, shared.q[stage.index], full);
    load_boxes<kTokens, kHeadDim>(b.plan.k, {row, b.h / b.p.k.group, b.batch()},
                                  shared.k[stage.index], full);
    load_boxes<kTokens, Shape::kBlockColumns>(
        b.plan.v, {row, b.h / b.p.v.group, b.batch(), b.slice * Shape::kBlockColumns},
        shared.v[stage.index], full);
  });
}

// Decay warp. Packed: rows past the end of the sequence belong to the next one, and a NaN there
// times a weight of 0 would be NaN: they are zeroed.
template <typename Shape>
__device__ void decay_sm90(const Sm90Block<Shape>& b) {
  constexpr int kTokens = Shape::kTokens;
  auto& shared = b.shared;
  const Decays decays(b.p.decay, false, b.part.b, b.part.start, b.part.length, b.h);
  const bool first_lane = threadIdx.x % kWarpSize == 0;
  float remaining = 1;  // product of decays since the start of the part
  b.each_chunk([&](unsigned number, int first, int n) {
    const Stage<Shape> stage(number);
    b.await_empty(stage);
    ChunkDecays& to = shared.decays[stage.index];
    decays.prepare(to, first, n, b.p.scale, false, false);
    if (first_lane) remaining *= to.total[0];
    if (b.p.cu_seqlens && n < kTokens) {
      shared.full[stage.index].wait(stage.parity);
      clear_rows<kTokens, Shape::kHeadDim>(shared.k[stage.index], n);
      clear_rows<kTokens, Shape::kBlockColumns>(shared.v[stage.index], n);
      fence_stores();
    }
    release(shared.ready[stage.index]);
  });
  if (b.states_only() && first_lane) b.slot(0)[b.plan.parts.slot_floats - 4] = remaining;
}

// Consumer warpgroup that computes W, [queries, keys] of a chunk.
template <typename T, typename Shape>
__device__ void weigh_sm90(const Sm90Block<Shape>& b) {
  constexpr int kTokens = Shape::kTokens;
  auto& shared = b.shared;
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, c = lane % 4;
  const int warp = warpgroup_thread() / kWarpSize, row = 16 * warp + g;
  b.each_chunk([&](unsigned number, int, int) {
    const Stage<Shape> stage(number);
    const Stage<Sm90WeightStages> to(number);
    float s[kTokens / 2];
    b.await_chunk(stage);
    // W = Q K^T
    start_qk<T, Shape::kHeadDim, kTokens>(s, shared_address(shared.q[stage.index]),
                                          shared_address(shared.k[stage.index]));
    const ChunkDecays& decays = shared.decays[stage.index];
    const float high[2] = {decays.high[row], decays.high[row + 8]};
    const float low[2] = {decays.low[row], decays.low[row + 8]};
    wait_for_product<0>(s);
    shared.weights_empty[to.index].wait(to.parity ^ 1);
    const uint32_t own = square_base<typename Shape::WeightTile>(
        shared_address(shared.weights[to.index]), 16 * warp);
    unroll<kTokens / 16>([&](auto pair) {
      uint32_t words[4] = {};
      if (pair <= warp) {  // later keys are fully masked
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = 16 * pair + i / 2 * 8 + 2 * c, query = row + i % 2 * 8;
          const float2 key_high = *reinterpret_cast<const float2*>(decays.high + key);
          const float2 key_low = *reinterpret_cast<const float2*>(decays.low + key);
          // W *= scale * decay
          float* const x = s + 8 * pair + 2 * i;
          x[0] *= b.p.scale * exp2_approx((high[i % 2] - key_high.x) + (low[i % 2] - key_low.x));
          x[1] *= b.p.scale * exp2_approx((high[i % 2] - key_high.y) + (low[i % 2] - key_low.y));
          // select instead of multiply: 0 times NaN or Inf is NaN
          words[i] = pack<T>(key > query ? 0 : x[0], key + 1 > query ? 0 : x[1]);
        }
      }
      store_matrices<0>(own ^ pair * 32, words);
    });
    fence_stores();
    release(shared.weights_full[to.index]);
    release(shared.empty[stage.index]);
  });
}

// Consumer warpgroup that keeps the state of 64 columns of V: [columns, features].
template <typename T, typename Shape>
class Sm90State {
 public:
  static constexpr int kTokens = Shape::kTokens, kHeadDim = Shape::kHeadDim;
  static constexpr int kHalves = kHeadDim / 128;  // one product per half of the features
  static constexpr bool kHalf = std::is_same_v<T, __half>;

  __device__ Sm90State(const Sm90Block<Shape>& b, int warpgroup) : b_(b), warpgroup_(warpgroup) {}

  __device__ __forceinline__ void run() {
    start_state();
    b_.each_chunk([&](unsigned number, int first, int n) {
      const Stage<Shape> stage(number);
      b_.await_chunk(stage);
      add_chunk(stage, number);
      fence_stores();  // V was read through the generic proxy; the next TMA copy overwrites it
      release(b_.shared.empty[stage.index]);
      if (!b_.states_only()) store(first, n);
    });
    finish_state();
    if (warpgroup_thread() == 0) wait_for_stores();
  }

 private:
  // First column of this warp within the warpgroup.
  __device__ static int warp_column() { return warpgroup_thread() / kWarpSize * kColumnsPerWarp; }
  // First column of the warpgroup within V.
  __device__ int column() const {
    return b_.slice * Shape::kBlockColumns + warpgroup_ * Shape::kColumns;
  }

  __device__ __forceinline__ void add_chunk(const Stage<Shape>& stage, unsigned number) {
    const ChunkDecays& decays = b_.shared.decays[stage.index];
    const uint32_t values = shared_address(b_.shared.v[stage.index][warpgroup_]);
#pragma unroll
    for (float& x : o_) x = 0;
    // O = S Q
    if (!b_.states_only() && have_state_) multiply_state(shared_address(b_.shared.q[stage.index]));
    ValueFragments<T, Shape> fragments;
    uint32_t weighted[kTokens / 4];
    fragments.load(values, warp_column());
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k) {
      const Fragment<T, 4> words = fragments.weighted(k, decays.end);
#pragma unroll
      for (int i = 0; i < 4; ++i) weighted[4 * k + i] = words.words[i];
    }
    have_state_ = true;
    // S = total S
    const float total = decays.total[0];
#pragma unroll
    for (auto& half : s_)
#pragma unroll
      for (float& x : half) x *= total;
    // S += K^T (end V)
    unroll<kHalves>([&](auto half) {
      start_pv<T, kTokens>(s_[half], weighted,
                           shared_address(b_.shared.k[stage.index]) +
                               half * (128 / kBoxColumns) * Shape::kBlockBytes);
    });
    // O *= start
    if (!b_.states_only()) scale_outputs(decays);
#pragma unroll
    for (auto& half : s_) wait_for_product<0>(half);
    // O += W V
    if (!b_.states_only()) multiply_weights(fragments, values, number);
  }

  // O^T = S^T Q^T. float16: the state is scaled into range. bfloat16: split into high + low, for
  // sums over long contexts.
  __device__ __forceinline__ void multiply_state(uint32_t queries) {
    // k-steps of 16 features with operands in registers
    constexpr int kSteps = (kHalf ? 8 : 4) / kHalves;
    float factor[2] = {1, 1};
    if constexpr (kHalf) {
      const RowScale scale(reinterpret_cast<const float (&)[kHeadDim / 8][4]>(s_));
#pragma unroll
      for (int h = 0; h < 2; ++h) factor[h] = scale.factor[h], inverse_[h] = scale.inverse[h];
    }
    unroll<kHeadDim / 16 / kSteps>([&](auto batch) {
      uint32_t high[4 * kSteps];
      [[maybe_unused]] uint32_t low[4 * kSteps];
#pragma unroll
      for (int j = 0; j < 4 * kSteps; ++j) {
        constexpr int kFirst = batch * kSteps;
        const int step = kFirst + j / 4, i = j % 4;
        const float* const own = s_[step / 8] + 8 * (step % 8) + 4 * (i / 2) + i % 2 * 2;
        const float x = own[0] * factor[i % 2], y = own[1] * factor[i % 2];
        high[j] = pack<T>(x, y);
        if constexpr (!kHalf)
          low[j] = pack<T>(x - __uint_as_float(high[j] << 16),
                           y - __uint_as_float(high[j] & 0xffff0000u));
      }
      if constexpr (!kHalf) start_by_rows<T, batch * kSteps>(o_, batch > 0, low, queries);
      start_by_rows<T, batch * kSteps>(o_, !kHalf || batch > 0, high, queries);
      wait_for_product<0>(o_);
    });
  }

  __device__ __forceinline__ void scale_outputs(const ChunkDecays& decays) {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int t = 0; t < kTokens / 8; ++t) {
      const float2 start = *reinterpret_cast<const float2*>(decays.start + 8 * t + 2 * c);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = o_[4 * t + i];
        if constexpr (kHalf) x *= inverse_[i / 2];
        x *= i % 2 ? start.y : start.x;
      }
    }
  }

  // O^T += V^T W^T; the state is the state after the chunk.
  __device__ __forceinline__ void multiply_weights(ValueFragments<T, Shape>& fragments,
                                                   uint32_t values, unsigned number) {
    const Stage<Sm90WeightStages> from(number);
    const uint32_t weights = shared_address(b_.shared.weights[from.index]);
    b_.shared.weights_full[from.index].wait(from.parity);
    // A non-finite value makes its sum in the state non-finite, whatever its key.
    const bool infinite =
        __any_sync(kFullWarp, !is_finite<float>(s_[0][0]) || !is_finite<float>(s_[0][2]));
    if (infinite)
      add_infinite<T, Shape>(reinterpret_cast<float (&)[kTokens / 8][4]>(o_), values, warp_column(),
                             weights, 0);
    // Reloaded, since registers could not hold the fragments meanwhile.
    if constexpr (kHeadDim > 128) fragments.load(values, warp_column());
    if (infinite) fragments.make_all_finite();
    start_by_rows<T, 0>(
        o_, true, reinterpret_cast<const uint32_t (&)[kTokens / 4]>(fragments.words), weights);
    wait_for_product<0>(o_);
    release(b_.shared.weights_empty[from.index]);
  }

  // Epilogue through shared memory.
  __device__ __forceinline__ void store(int first, int n) {
    char* const staged = b_.shared.out[warpgroup_];
    const int token = b_.part.start + first;
    if (warpgroup_thread() == 0) wait_for_stores();  // store of the previous chunk
    sync_warpgroup(warpgroup_);
    const uint32_t own = ValueFragments<T, Shape>::own_chunk(shared_address(staged), warp_column());
    unroll<kTokens / 16>([&](auto t) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = pack<T>(o_[8 * t + 2 * i], o_[8 * t + 2 * i + 1]);
      store_matrices_transposed<t * 16 * kBoxRowBytes>(own, words);
    });
    fence_stores();
    sync_warpgroup(warpgroup_);
    if (!b_.p.cu_seqlens || n == kTokens) {  // TMA clips rows outside of the tensor
      if (warpgroup_thread() == 0)
        store_boxes<kTokens, Shape::kColumns>(b_.plan.out, {token, b_.h, b_.batch(), column()},
                                              staged);
      return;
    }
    store_rows<T, Shape::kColumns>(rows_at<T>(b_.p.out, 0, token, b_.h) + column(), b_.p.out.seq, n,
                                   shared_address(staged));
  }

  __device__ CallerState caller_state(const StateRows& rows) const {
    return {rows, b_.part.b, b_.h, kHeadDim, b_.p.columns};
  }
  // Calls visit(element of the slot, accumulators), 4 at a time.
  template <typename Visit>
  __device__ __forceinline__ void each_of_slot(float* slot, const Visit& visit) {
    constexpr int kThreads = Shape::kWarpgroups * kWarpgroupThreads;
    float4* const own =
        reinterpret_cast<float4*>(slot) + warpgroup_ * kWarpgroupThreads + warpgroup_thread();
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) visit(own[n * kThreads], s_[n / 16] + n % 16 * 4);
  }
  // Calls visit(element of the state, accumulator).
  template <typename Visit>
  __device__ __forceinline__ void each_of_caller(const CallerState& state, const Visit& visit) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
      state.each(reinterpret_cast<float (&)[16][4]>(s_[half]), half * 128, column() + warp_column(),
                 visit);
  }

  __device__ __forceinline__ void start_state() {
    const bool carried = b_.plan.parts.from_workspace && !b_.states_only() && b_.part.index > 0;
    const CallerState initial = caller_state(b_.p.initial);
    const bool given = b_.part.index == 0 && initial.data;
    have_state_ = carried || given;
#pragma unroll
    for (auto& half : s_)
#pragma unroll
      for (float& x : half) x = 0;
    if (carried)
      each_of_slot(b_.slot(-1), [](const float4& from, float* to) {
        to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
      });
    else if (given)
      each_of_caller(initial, [](const float& from, float& to) { to = from; });
  }

  __device__ __forceinline__ void finish_state() {
    if (b_.states_only()) {
      each_of_slot(b_.slot(0), [](float4& to, const float* from) {
        to = {from[0], from[1], from[2], from[3]};
      });
      return;
    }
    const CallerState last = caller_state(b_.p.final);
    if (last.data && b_.part.is_last())
      each_of_caller(last, [](float& to, float from) { to = from; });
  }

  const Sm90Block<Shape>& b_;
  const int warpgroup_;
  bool have_state_;            // otherwise the state is zero
  float inverse_[2] = {1, 1};  // inverse scale of the state, see RowScale
  float s_[kHalves][64];
  float o_[kTokens / 2];
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(Sm90Shape<kHeadDim>::kThreads, 1)
    recurrence_sm90_kernel(const __grid_constant__ Recurrence p,
                           const __grid_constant__ Sm90Plan plan) {
  using Shape = Sm90Shape<kHeadDim>;
  extern __shared__ __align__(1024) char recurrence_sm90_shared[];
  auto& shared = *reinterpret_cast<Sm90Shared<Shape>*>(recurrence_sm90_shared);
  const unsigned slices = plan.parts.slices, heads = static_cast<unsigned>(p.heads);
  const unsigned slice = blockIdx.x % slices, rest = blockIdx.x / slices;
  const Part part(p, plan.parts, rest / heads);
  if (part.b < 0) {
    if (!plan.parts.states_only) clear_tokens<T>(p, plan.parts, part, rest % heads, slice);
    return;
  }
  if (plan.parts.states_only && part.is_last()) return;
  if (threadIdx.x == 0) shared.init_barriers(!plan.parts.states_only);
  __syncthreads();
  const Sm90Block<Shape> block{
      p, plan, part, static_cast<int>(rest % heads), static_cast<int>(slice), shared};
  // Broadcast from lane 0, so that the compiler knows the value is warp-uniform.
  const int warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpSize, 0);
  const int warpgroup = warp / (kWarpgroupThreads / kWarpSize);
  if (warpgroup == 0) {
    shrink_registers<Shape::kLoadRegisters>();
    if (warp == 0) producer(block);
    if (warp == 1) decay_sm90(block);
  } else if (warpgroup == 1) {
    shrink_registers<Shape::kWeighRegisters>();
    if (!block.states_only()) weigh_sm90<T>(block);
  } else {
    grow_registers<Shape::kStateRegisters>();
    Sm90State<T, Shape>(block, warpgroup - 2).run();
  }
}

template <typename T, int kHeadDim>
const char* launch_sm90_kernel(const Recurrence& p, const RecurrencePlan& parts,
                               cudaStream_t stream) {
  using Shape = Sm90Shape<kHeadDim>;
  // Slices and slots of the plan are for 8 warps, see warps_of.
  static_assert(Shape::kBlockColumns == 8 * kColumnsPerWarp);
  Sm90Plan plan{};
  plan.parts = parts;
  const Sm90Tensors tensors(p);
  const auto encode = [&](CUtensorMap& map, const MappedRows& rows) {
    return encode_map(map, rows, p.dtype, Shape::kTokens);
  };
  if (const char* error = encode(plan.k, tensors.k)) return error;
  if (const char* error = encode(plan.v, tensors.v)) return error;
  if (const char* error = encode(plan.q, tensors.q)) return error;
  if (const char* error = encode(plan.out, tensors.out)) return error;
  return launch<recurrence_sm90_kernel<T, kHeadDim>>(parts.blocks, Shape::kThreads,
                                                     sizeof(Sm90Shared<Shape>), stream, p, plan);
}

template <typename T>
const char* launch_sm90(const Recurrence& p, const RecurrencePlan& plan, cudaStream_t stream) {
  if (p.q.dim == 128) return launch_sm90_kernel<T, 128>(p, plan, stream);
  return launch_sm90_kernel<T, 256>(p, plan, stream);
}

template const char* launch_sm90<TOKENMILL_ELEMENT>(const Recurrence&, const RecurrencePlan&,
                                                    cudaStream_t);

}  // namespace tokenmill::cuda::linear_attention
