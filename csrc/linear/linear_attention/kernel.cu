// A CTA processes one part of a sequence for one head and a slice of the columns of V, chunk by
// chunk. Each warp keeps the state of 16 columns in its accumulators.
#include "linear/linear_attention/cuda_plan.cuh"
#include "linear/linear_attention/kernel_decay.cuh"
#include "linear/linear_attention/kernel_features.cuh"
#include "linear/linear_attention/kernel_normalizer.cuh"
#include "linear/linear_attention/kernel_part.cuh"
#include "linear/linear_attention/kernel_state.cuh"
#include "linear/linear_attention/kernel_store.cuh"

namespace tokenmill::cuda::linear_attention {

template <typename T, int kBucket, bool kTaylor>
class RecurrenceBlock {
 public:
  using Shape = RecurrenceShape<T, kBucket, kTaylor>;
  static constexpr int kTokens = Shape::kTokens;
  static constexpr int kTokenTiles = kTokens / 8;
  using Vectors = SharedVectors<kTokens>;
  using Rows = TileLoader<T, typename Shape::RowTile, kTokens>;
  using Values = TileLoader<T, typename Shape::ValueTile, kTokens>;

  __device__ RecurrenceBlock(const Recurrence& p, const RecurrencePlan& plan, const Part& part,
                             int64_t h, int slice, unsigned char* shared)
      : p_(p),
        plan_(plan),
        part_(part),
        h_(h),
        vectors_(*reinterpret_cast<Vectors*>(shared)),
        weights_(shared_address(shared) + sizeof(Vectors)),
        stages_(weights_ + Shape::kWeightBytes + (kTaylor ? 2 * Shape::kFeatureBytes : 0)),
        warp_(__shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0)),
        column_(slice * plan.warps * kColumnsPerWarp),
        slot_(static_cast<uint32_t>((part.slot * p.heads + h) * plan.slices + slice)),
        decays_(p.decay, plan.reverse, part.b, part.start, part.length, h),
        slot_state_(own_slot()) {}

  __device__ void run() {
    if (kTaylor || p_.value_taylor) list_features(vectors_, kTaylor ? p_.q.dim : p_.v.dim);
    for (int i = threadIdx.x; i < kTokens + kTableBefore; i += blockDim.x)
      vectors_.table[i] = output_scale() * decays_.at_distance(i - kTableBefore);

    // Chained: the first pass computes the state that is handed to the next part.
#pragma unroll 1
    for (int before = chained(); before >= 0; --before) {
      runs_ahead_ = plan_.states_only || before;
      if (before && part_.is_last()) continue;
      run_chunks();
      finish_state();
      __syncthreads();
    }
  }

 private:
  // Scale of the weights; taylor2 includes it in its features.
  __device__ float output_scale() const { return kTaylor || p_.value_taylor ? 1 : p_.scale; }
  __device__ bool chained() const { return Shape::kChains && plan_.chained; }
  // True in a pass that computes only the state, without outputs.
  __device__ bool states_only() const { return Shape::kChains ? runs_ahead_ : plan_.states_only; }
  __device__ bool live() const { return warp_column() < p_.columns; }
  __device__ int steps() const { return Shape::kSteps ? plan_.features / Shape::kFeatures : 1; }
  __device__ CallerState caller_state(const StateRows& rows) const {
    return {rows, part_.b, h_,
            static_cast<int>(kTaylor ? feature_dim(FeatureMap::taylor2, p_.q.dim) : p_.q.dim),
            p_.columns};
  }
  __device__ int subtiles() const { return plan_.warps * kColumnsPerWarp / kSubtileColumns; }
  // Tokens of the chunk that starts at `first`.
  __device__ int tokens_from(int first) const {
    return min(part_.end - first, kTokens - (first + part_.padding) % kTokens);
  }

  __device__ __forceinline__ GlobalRows<T> rows_of(const Operand& x, bool aligned, int column,
                                                   int end) const {
    const int64_t last = part_.start + int64_t{part_.length} - 1;
    return {rows_at<T>(x.rows, part_.b, plan_.reverse ? last : part_.start, h_ / x.group) + column,
            plan_.reverse ? -x.rows.seq : x.rows.seq, end, x.dim - column, aligned};
  }

  // Runs through the chunks of the part.
  __device__ __forceinline__ void run_chunks() {
    const auto load = [&](uint32_t stage, int row) {
      const int end = row + tokens_from(row);
      if (!states_only())
        Rows(rows_of(p_.q, plan_.q_aligned, 0, end), row, plan_.q_step)
            .load(stage + Rows::own_offset(), row);
      Rows(rows_of(p_.k, plan_.k_aligned, 0, end), row, plan_.k_step)
          .load(stage + Shape::kRowBytes + Rows::own_offset(), row);
      const uint32_t to = stage + 2 * Shape::kRowBytes + Values::own_offset();
      const int raw = p_.value_taylor ? subtiles() : 0;
#pragma unroll 1
      for (int i = raw; i < subtiles() || i == raw; ++i)
        Values(rows_of(p_.v, plan_.v_aligned, raw ? 0 : column_ + i * kSubtileColumns, end), row,
               plan_.v_step)
            .load(to + i * Shape::kValueBytes, row);
      cp_async_commit();
    };

    const int stage_bytes = Shape::stage_bytes(plan_.warps, p_.value_taylor);
    uint32_t stage = stages_, other = plan_.stages > 1 ? stages_ + stage_bytes : stages_;
    if (!Shape::kChains) start_state();
    if (part_.first < part_.end) load(stage, part_.first);
    if (Shape::kChains) start_state();  // may wait, while the copies are in flight
#pragma unroll 1
    for (int first = part_.first; first < part_.end;) {
      const int n = tokens_from(first), next = first + n;
      cp_async_wait<0>();
      __syncthreads();
      const bool more = next < part_.end;
      if (more && plan_.stages > 1) load(other, next);
      if (plan_.reverse) save_state(part_.length - first);
      add_chunk(stage, first, n);
      if (!plan_.reverse) save_state(next);
      if (more && plan_.stages == 1) {
        __syncthreads();
        load(stage, next);
      }
      const uint32_t swap = stage;
      stage = other;
      other = swap;
      first = next;
    }
  }

  __device__ int64_t normalizer_row() const {
    return (p_.cu_seqlens ? h_ : part_.b * p_.heads + h_) * p_.seqlen;
  }
  __device__ int warp_column() const { return column_ + warp_ * kColumnsPerWarp; }
  __device__ SlotState<Shape> own_slot() const {
    uint32_t slot = slot_;
    opt_barrier(slot);  // otherwise its address would occupy registers meanwhile
    return SlotState<Shape>(p_.workspace + slot * plan_.slot_floats);
  }
  __device__ float* slot_normalizer(SlotState<Shape> slot) const {
    return slot.data() + plan_.features * kColumnsPerWarp * plan_.warps;
  }

  // Between parts the state comes from the workspace. A state too large for the accumulators is
  // kept there: a part reuses the slot of the previous part, the first part the last slot.
  __device__ __forceinline__ void start_state() {
    if (!Shape::kSteps) slot_state_ = own_slot();
    const bool carried = plan_.from_workspace && !states_only() && part_.index > 0;
    const int64_t slots = p_.heads * plan_.slices;  // per part
    const int64_t slot_step = slots * plan_.slot_floats;
    if (chained() && !states_only()) {
      if (carried) await(plan_.arrived + slot_ - slots);
      if (!part_.is_last()) hand_on(carried, slot_step);
    }
    const bool loaded = carried && chained() && !part_.is_last();
    if (carried) {
      slot_state_.move(-slot_step);
    } else if (Shape::kSteps && !states_only()) {
      slot_state_.move((part_.count - 1) * slot_step);
    }
    const CallerState initial = caller_state(p_.initial);
    const bool given = part_.index == 0 && initial.data;
    have_state_ = carried || given;
    if (loaded) return;
    if (!carried || !Shape::kSteps) {
#pragma unroll 1
      for (int step = 0; step < steps(); ++step) {
        if (carried) {
          slot_state_.load(s_, step);
        } else {
#pragma unroll
          for (auto& s : s_) s[0] = s[1] = s[2] = s[3] = 0;
          if (given)
            initial.each(s_, step * Shape::kFeatures, warp_column(),
                         [](const float& from, float& to) { to = from; });
        }
        if (Shape::kSteps) slot_state_.store(s_, step);
      }
    }

    if (p_.extra != Extra::none) {
      const int column = warp_column() + threadIdx.x % kColumnsPerWarp;
      extra_state_ =
          carried ? slot_normalizer(slot_state_)[column - column_]
          : given && column < p_.columns
              ? initial.data[initial.features * initial.feature_step + column * initial.column_step]
              : 0;
    }
    if (!p_.normalize) return;
    for (int f = threadIdx.x; f < plan_.features; f += blockDim.x)
      vectors_.normalizer[f] =
          carried ? slot_normalizer(slot_state_)[f]
          : given && f < initial.features
              ? initial.data[f * initial.feature_step + initial.columns * initial.column_step]
              : 0;
  }

  // Stores the state at the end of the part: its own contribution and, except in the first part,
  // the decayed state at its start, which the accumulators hold afterwards.
  __device__ __forceinline__ void hand_on(bool carried, int64_t slot_step) {
    SlotState<Shape> before = slot_state_;
    before.move(-slot_step);
    if (carried)
      slot_state_.pass_on(s_, remaining_, before);
    else
      slot_state_.store(s_, 0);
    float* const to = slot_normalizer(slot_state_);
    const float* const from = slot_normalizer(before);
    if (p_.extra != Extra::none) {
      const int column = warp_column() - column_ + threadIdx.x % kColumnsPerWarp;
      const float x = carried ? from[column] : 0;
      extra_state_ = fmaf(remaining_, x, extra_state_);
      store_extra(to);
      extra_state_ = x;
    }
    if (p_.normalize)
      for (int f = threadIdx.x; f < plan_.features; f += blockDim.x) {
        const float x = carried ? from[f] : 0;
        to[f] = fmaf(remaining_, x, vectors_.normalizer[f]);
        vectors_.normalizer[f] = x;
      }
    announce(plan_.arrived + slot_);
  }

  __device__ __forceinline__ void finish_state() {
    if (states_only()) {
      if (chained()) return;
      const SlotState<Shape> slot = own_slot();
      if (!Shape::kSteps) slot.store(s_, 0);
      __syncthreads();
      float* const normalizer = slot_normalizer(slot);
      if (p_.normalize)
        for (int f = threadIdx.x; f < plan_.features; f += blockDim.x)
          normalizer[f] = vectors_.normalizer[f];
      store_extra(normalizer);
      if (threadIdx.x == 0) normalizer[plan_.tail] = remaining_;
      return;
    }
    const CallerState last = caller_state(p_.final);
    if (!last.data || !part_.is_last()) return;
    const float factor = decays_.behind_last();
#pragma unroll 1
    for (int step = 0; step < steps(); ++step) {
      if (Shape::kSteps) slot_state_.load(s_, step);
      last.each(s_, step * Shape::kFeatures, warp_column(),
                [&](float& to, float from) { to = factor * from; });
    }
    const int column = warp_column() + threadIdx.x % kColumnsPerWarp;
    if (p_.extra != Extra::none && column < p_.columns)
      last.data[last.features * last.feature_step + column * last.column_step] =
          factor * extra_state_;
    if (!p_.normalize || column_ > 0) return;
    __syncthreads();
    for (int f = threadIdx.x; f < last.features; f += blockDim.x)
      last.data[f * last.feature_step + last.columns * last.column_step] =
          factor * vectors_.normalizer[f];
  }

  __device__ void store_extra(float* to) const {
    if (p_.extra != Extra::none && threadIdx.x % kWarpSize < kColumnsPerWarp)
      to[warp_column() - column_ + threadIdx.x % kColumnsPerWarp] = extra_state_;
  }

  // Saves the state after `tokens` tokens of the sequence, if a segment ends there.
  __device__ __forceinline__ void save_state(int tokens) {
    if (!p_.saved || states_only() || (tokens % kSegment != 0 && tokens != part_.length)) return;
    const int64_t segment = first_segment(p_, part_.b) + (tokens - 1) / kSegment;
    const int64_t slice = column_ / (plan_.warps * kColumnsPerWarp);
    const SlotState<Shape> slot(p_.saved + ((segment * p_.heads + h_) * plan_.slices + slice) *
                                               plan_.slot_floats);
#pragma unroll 1
    for (int step = 0; step < steps(); ++step) {
      if (Shape::kSteps) slot_state_.load(s_, step);
      slot.store(s_, step);
    }
    store_extra(slot_normalizer(slot));
  }

  // Processes tokens first ... first + n - 1.
  __device__ __forceinline__ void add_chunk(uint32_t stage, int first, int n) {
    const uint32_t queries = stage, keys = stage + Shape::kRowBytes;
    const uint32_t values =
        keys + Shape::kRowBytes + warp_ * kColumnsPerWarp / kSubtileColumns * Shape::kValueBytes;
    if (!kTaylor)
      map_chunk<T, Shape>(p_, states_only() ? 0 : queries, keys, plan_.warps * kColumnsPerWarp,
                          column_, n);
    if (p_.value_taylor) {
      const uint32_t to = keys + Shape::kRowBytes;
#pragma unroll 1
      for (int i = 0; i < subtiles(); ++i)
        make_features<T, typename Shape::ValueTile, typename Shape::ValueTile>(
            to + i * Shape::kValueBytes, to + subtiles() * Shape::kValueBytes, vectors_,
            column_ + i * kSubtileColumns, n, p_.value_factors, p_.scale);
      __syncthreads();
    }
    if (decays_.per_token() || n != prepared_ || first == 0 || first + n == part_.length ||
        p_.extra != Extra::none) {
      if (p_.extra != Extra::none && threadIdx.x < kTokens) {
        const int i = first + static_cast<int>(threadIdx.x);
        const int64_t token = part_.start + (plan_.reverse ? part_.length - 1 - i : i);
        vectors_.extra[threadIdx.x] =
            static_cast<int>(threadIdx.x) < n ? p_.extra_data[normalizer_row() + token] : 0;
      }

      prepared_ = first == 0 && plan_.reverse ? -1 : n;
      // The last token's own contribution to the final state cancels in the gradient of its decay.
      const bool drop_last = p_.saved && !plan_.reverse;
      if (warp_ == 0) decays_.prepare(vectors_, first, n, output_scale(), p_.scale_keys, drop_last);
      __syncthreads();
    }
    if (!states_only()) make_weights(queries, keys);  // W = causal, decay-weighted Q K^T

    ValueFragments<T, Shape> fragments;
    const int subtile_column = warp_ * kColumnsPerWarp % kSubtileColumns;
    if (kTaylor && live()) fragments.load(values, subtile_column);
    float acc[kTokenTiles][4];
#pragma unroll
    for (auto& x : acc) x[0] = x[1] = x[2] = x[3] = 0;
    const NormalizerRow<T, Shape> row;
    float normalizer = 0;
#pragma unroll 1
    for (int step = 0; step < steps(); ++step) {
      const int bytes = step * Shape::kFeatures * static_cast<int>(sizeof(T));
      uint32_t step_queries = queries + bytes, step_keys = keys + bytes;
      if constexpr (kTaylor) {
        step_queries = weights_ + Shape::kWeightBytes;
        step_keys = step_queries + Shape::kFeatureBytes;
        __syncthreads();
        if (!states_only())
          make_features<T, typename Shape::RowTile, typename Shape::FeatureTile>(
              step_queries, queries, vectors_, step * Shape::kFeatures, n, !p_.key_factors,
              p_.scale);
        make_features<T, typename Shape::RowTile, typename Shape::FeatureTile>(
            step_keys, keys, vectors_, step * Shape::kFeatures, n, p_.key_factors, p_.scale);
        __syncthreads();
      }
      if (live()) {
        if (Shape::kSteps) slot_state_.load(s_, step);
        // O = S Q
        if (!states_only() && have_state_)
          multiply_state<T, Shape>(acc, s_, step_queries, p_.split_state);
        if (p_.decay.data) {
          const float total = vectors_.total[0];  // S = total S
#pragma unroll
          for (auto& s : s_) s[0] *= total, s[1] *= total, s[2] *= total, s[3] *= total;
        }
        if (!kTaylor) fragments.load(values, subtile_column);
        // S += K^T (end V)
        add_to_state<T, Shape>(s_, fragments,
                               p_.decay.data || p_.scale_keys ? vectors_.end : nullptr, step_keys,
                               p_.split_state);
        if (Shape::kSteps) slot_state_.store(s_, step);
      }
      if (p_.normalize) {
        float* const state = vectors_.normalizer + step * Shape::kFeatures;
        if (!states_only()) normalizer += row.of_state(step_queries, state);
        __syncthreads();
        add_to_normalizer<T, Shape>(state, vectors_.total[0], vectors_.end, step_keys, n);
      }
    }
    if (p_.extra != Extra::none && live())
      extra_state_ = add_extra<T, Shape>(acc, extra_state_, vectors_, p_.extra == Extra::queries,
                                         values, subtile_column, n);
    have_state_ = true;
    remaining_ *= vectors_.total[0];
    if (states_only()) return;
    __syncthreads();
    if (p_.normalize) normalize(row, normalizer, first, n);
    if (!live()) return;
    // O = start O + W V
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      const float2 start = *reinterpret_cast<const float2*>(vectors_.start + 8 * t + 2 * c);
      acc[t][0] *= start.x, acc[t][1] *= start.y, acc[t][2] *= start.x, acc[t][3] *= start.y;
    }
    multiply_seen_weights<T, Shape>(acc, s_, fragments, values, subtile_column, weights_,
                                    p_.no_diagonal);
    if (p_.normalize) {
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        const float2 by = *reinterpret_cast<const float2*>(vectors_.inverse + 8 * t + 2 * c);
        acc[t][0] *= by.x, acc[t][1] *= by.y, acc[t][2] *= by.x, acc[t][3] *= by.y;
      }
    }
    store(acc, values, first, n);
  }

  // Computes W in 16 x 16 squares; squares above the diagonal are not stored.
  __device__ __forceinline__ void make_weights(uint32_t queries, uint32_t keys) {
    constexpr int kSquares = kTokens / 16;
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, c = lane % 4;
    const int row = warp_ % kSquares;
#pragma unroll 1
    for (int column = warp_ / kSquares; column <= row; column += plan_.warps / kSquares) {
      float w[2][4] = {};
      multiply_rows<T, typename Shape::RowTile>(w, queries, 16 * row, keys, 16 * column);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int key = 16 * column + 8 * n + 2 * c;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int query = 16 * row + 8 * h + g;
          float x[2] = {w[n][2 * h], w[n][2 * h + 1]};
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (kTaylor) {
              const float u = p_.scale * x[e];
              x[e] = fmaf(fmaf(0.5f, u, 1.f), u, 1.f);
            }
            if (p_.extra != Extra::none)
              x[e] += vectors_.extra[p_.extra == Extra::queries ? query : key + e];
            x[e] *= weight(query, key + e);
            // select instead of multiply: 0 times NaN or Inf is NaN
            if (column == row && is_hidden(8 * h, 8 * n + e, p_.no_diagonal)) x[e] = 0;
          }
          if constexpr (Shape::kFloat) {
            const uint32_t at = float_at<typename Shape::WeightTile>(weights_, query, key);
            store_shared(at, __float_as_uint(x[0]));
            store_shared<4>(at, __float_as_uint(x[1]));
          } else {
            store_shared(weights_ + Shape::WeightTile::offset(query, key / 8) + 4 * c,
                         pack<T>(x[0], x[1]));
          }
        }
      }
    }
  }

  __device__ __forceinline__ float weight(int query, int key) const {
    if (!decays_.per_token()) return vectors_.table[kTableBefore + query - key];
    return output_scale() * exp2_approx((vectors_.high[query] - vectors_.high[key]) +
                                        (vectors_.low[query] - vectors_.low[key]));
  }

  __device__ __forceinline__ void normalize(const NormalizerRow<T, Shape>& row, float of_state,
                                            int first, int n) {
    vectors_.sums[threadIdx.x] =
        fmaf(vectors_.start[row.token], of_state, row.of_weights(weights_));
    __syncthreads();
    if (threadIdx.x < kTokens) {
      float sum = kNormalizerEpsilon;
      for (int i = threadIdx.x; i < static_cast<int>(blockDim.x); i += kTokens)
        sum += vectors_.sums[i];
      vectors_.inverse[threadIdx.x] = 1 / sum;
      if (column_ == 0 && static_cast<int>(threadIdx.x) < n) {
        const int64_t token = part_.start + first + threadIdx.x;
        p_.normalizer[normalizer_row() + token] = sum;
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ void store(const float (&acc)[kTokenTiles][4], uint32_t values,
                                        int first, int n) const {
    const int64_t token = plan_.reverse ? part_.start + int64_t{part_.length} - 1 - first
                                        : part_.start + int64_t{first};
    const int64_t step = plan_.reverse ? -p_.out.seq : p_.out.seq;
    const int columns = p_.columns - warp_column();
    if (Shape::kFloat || p_.out_float)
      store_accumulators<Shape>(rows_at<float>(p_.out, part_.b, token, h_) + warp_column(), step,
                                acc, n, columns);
    else if constexpr (!Shape::kFloat)
      store_packed<T, Shape>(rows_at<T>(p_.out, part_.b, token, h_) + warp_column(), step, acc, n,
                             columns, plan_.out_aligned, values,
                             warp_ * kColumnsPerWarp % kSubtileColumns);
  }

  const Recurrence& p_;
  const RecurrencePlan& plan_;
  const Part& part_;
  const int64_t h_;
  Vectors& vectors_;
  const uint32_t weights_, stages_;
  const int warp_, column_;  // column_: first column of the CTA
  const uint32_t slot_;
  const Decays decays_;
  SlotState<Shape> slot_state_;
  float s_[Shape::kFeatureTiles][4];

  float extra_state_ = 0;  // for this lane's column
  float remaining_ = 1;    // product of decays since the start of the part
  int prepared_ = -1;      // number of tokens for which the decay vectors were computed
  bool have_state_;        // otherwise the state is zero
  bool runs_ahead_;        // current pass computes the state only, ahead of the outputs
};

template <typename T, int kBucket, bool kTaylor>
__global__ void __launch_bounds__(kMaxThreads, 1)
    recurrence_kernel(const __grid_constant__ Recurrence p,
                      const __grid_constant__ RecurrencePlan plan) {
  extern __shared__ __align__(128) unsigned char shared[];
  unsigned block = blockIdx.x;
  const bool chained = RecurrenceShape<T, kBucket, kTaylor>::kChains && plan.chained;
  if (chained) block = take_number(plan.begun, reinterpret_cast<unsigned*>(shared));
  const unsigned slice = block % plan.slices, rest = block / plan.slices;
  const unsigned heads = static_cast<unsigned>(p.heads);
  const Part part(p, plan, rest / heads);
  if (part.b < 0) {
    if (!plan.states_only) clear_tokens<T>(p, plan, part, rest % heads, slice);
    return;
  }
  if (plan.states_only && part.is_last()) return;
  RecurrenceBlock<T, kBucket, kTaylor>(p, plan, part, rest % heads, slice, shared).run();
}

template <typename T, int kBucket, bool kTaylor>
const char* launch_instance(const Recurrence& p, RecurrencePlan plan, cudaStream_t stream) {
  using Shape = RecurrenceShape<T, kBucket, kTaylor>;
  using Block = RecurrenceBlock<T, kBucket, kTaylor>;
  const int threads = plan.warps * kWarpSize;
  const auto aligned = [](const Rows& rows, int dim) {
    return is_vectorizable<T>(rows.data, dim, rows.batch, rows.seq, rows.head);
  };
  plan.q_aligned = aligned(p.q.rows, p.q.dim);
  plan.k_aligned = aligned(p.k.rows, p.k.dim);
  plan.v_aligned = aligned(p.v.rows, p.v.dim);
  plan.out_aligned = aligned(p.out, p.columns);
  const int sign = plan.reverse ? -1 : 1;
  plan.q_step = Block::Rows::step(sign * p.q.rows.seq, threads);
  plan.k_step = Block::Rows::step(sign * p.k.rows.seq, threads);
  plan.v_step = Block::Values::step(sign * p.v.rows.seq, threads);

  plan.stages = shared_bytes<Shape>(p, plan.warps, 2) <= shared_limit() ? 2 : 1;
  return launch<recurrence_kernel<T, kBucket, kTaylor>>(
      plan.blocks, threads, shared_bytes<Shape>(p, plan.warps, plan.stages), stream, p, plan);
}

template <typename T>
const char* launch_recurrence(const Recurrence& p, const RecurrencePlan& plan,
                              cudaStream_t stream) {
  return visit_instance<T>(p, [&]<typename Element, int kBucket, bool kTaylor>() {
    return launch_instance<Element, kBucket, kTaylor>(p, plan, stream);
  });
}

template const char* launch_recurrence<TOKENMILL_ELEMENT>(const Recurrence&, const RecurrencePlan&,
                                                          cudaStream_t);

}  // namespace tokenmill::cuda::linear_attention
