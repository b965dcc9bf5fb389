// Sweeps over the chunks of a sequence. A CTA owns a value head and kColumns columns of the state,
// which are independent of each other, in shared memory:
//
//   delta_states_kernel     out and the state after the last token, or the inputs of the backward
//   delta_gradients_kernel  from the last chunk to the first: dv, and the gradients of the states
//
// A warp owns 16 tokens and 8 columns of the products with columns of v.
#pragma once
#include "linear/delta_attention/kernel_chunk.cuh"

namespace tokenmill::cuda::delta_attention {

struct SweepShared {
  float q[kKeyTile], k[kKeyTile];
  float pairs[kPairMatrices][kPairTile];
  float x[kColumnTile], y[kColumnTile], z[kColumnTile];
  float sums[kTokens][kColumns / 8];
  float end[kTokens];  // factors of keys in the state after the chunk
  RowFactors f;
  float state[1];  // [D rounded up to a tile][kColumnStep]
};

__host__ __device__ constexpr int64_t sweep_bytes(int64_t dim) {
  return sizeof(SweepShared) + (dim + kChannels - 1) / kChannels * kChannels * kColumnStep * 4;
}

template <typename T, bool kPerChannel>
class Sweep {
 public:
  __device__ Sweep(const DeltaAttentionParams& p, const Scratch& scratch, void* shared)
      : p_(p), scratch_(scratch), s(*static_cast<SweepShared*>(shared)) {
    const int64_t slices = (p.value_dim + kColumns - 1) / kColumns, head = blockIdx.x / slices;
    slice = blockIdx.x % slices;
    first = slice * kColumns;
    place.b = head / p.heads;
    place.h = head % p.heads;
    place.key_head = place.h / (p.heads / p.key_heads);
    rows = sequence_of(p, place.b, slot_);
    warp_row = threadIdx.x / kWarpSize / 4 * 16;
    warp_column = threadIdx.x / kWarpSize % 4 * 8;
  }

  __device__ int64_t chunks() const { return chunks_of(rows.length); }

  // Moves to a chunk, and loads what does not depend on the state.
  __device__ __forceinline__ void begin(int64_t chunk) {
    place.slot = slot_ + chunk;
    place.token = rows.start + chunk * kTokens;
    place.n = static_cast<int>(min(int64_t{kTokens}, rows.length - chunk * kTokens));
    by_channel_ = kPerChannel ? (place.slot * p_.heads + place.h) * kTokens * p_.head_dim : 0;
    __syncthreads();
    load_factors(s.f, scratch_.factors_of(place.slot, p_.heads, place.h));
  }
  __device__ __forceinline__ void load_matrix(int which) {
    load_pairs(s.pairs[which], scratch_.pairs_of(place.slot, p_.heads, place.h, which));
  }

  // Rows of v and similar tensors, and of their gradients between the kernels.
  template <typename U>
  __device__ __forceinline__ void load(float* to, const Rows& from) {
    load_columns(to, kColumnStep, kColumns, from.data ? place.at<U>(from, place.h) : nullptr,
                 from.seq, place.n, first, p_.value_dim);
  }
  template <typename U>
  __device__ __forceinline__ void store(const Rows& to, const float* from) {
    store_columns(place.at<U>(to, place.h), to.seq, from, kColumnStep, kColumns, place.n, first,
                  p_.value_dim);
  }
  __device__ __forceinline__ float* row_of(float* rows) const {
    return rows + (place.row(p_) * p_.heads + place.h) * p_.value_dim;
  }

  // Tiles of the channels from d on: of q and of k as they enter the chunk, or of k at its end.
  __device__ __forceinline__ void load_entering(int64_t d, bool queries, bool keys) {
    const float* const enters = kPerChannel ? scratch_.enters + by_channel_ : nullptr;
    __syncthreads();
    if (keys)
      load_keys(s.k, place.at<T>(p_.k, place.key_head), p_.k.seq, place.n, p_.head_dim, d, s.f.key,
                enters, scratch_.vectors);
    if (queries)
      load_keys(s.q, place.at<T>(p_.q, place.key_head), p_.q.seq, place.n, p_.head_dim, d,
                s.f.query, enters, scratch_.vectors);
    __syncthreads();
  }
  __device__ __forceinline__ void load_leaving(int64_t d) {
    const float* const stays = kPerChannel ? scratch_.stays + by_channel_ : nullptr;
    __syncthreads();
    load_keys(s.k, place.at<T>(p_.k, place.key_head), p_.k.seq, place.n, p_.head_dim, d, s.end,
              stays, scratch_.vectors);
    __syncthreads();
  }

  // acc += keys S over the loaded channels.
  __device__ __forceinline__ void multiply_state(float (&acc)[1][4], const float* keys, int64_t d) {
    multiply<false, false>(acc, keys + warp_row * kKeyStep, kKeyStep,
                           s.state + d * kColumnStep + warp_column, kColumnStep, kChannels);
  }

  // S of the loaded channels: S e^(G_n), then visit(acc, its first channel within the tile), then
  // stored. A warp owns 8 columns of two blocks of 16 channels.
  template <typename Visit>
  __device__ __forceinline__ void update_state(int64_t d, const Visit& visit) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int channel = warp_row + 32 * half;
      float acc[1][4];
      const auto state_at = [&](int r, int c) -> float& {
        return s.state[(d + channel + r) * kColumnStep + warp_column + c];
      };
      each_element(acc[0], [&](float& x, int r, int c) {
        float total = s.f.total[0];
        if constexpr (kPerChannel) {
          const int64_t own = d + channel + r;
          total = own < p_.head_dim ? enters_of_last()[own] : 0;
        }
        x = total * state_at(r, c);
      });
      visit(acc, channel);
      each_element(acc[0], [&](float x, int r, int c) { state_at(r, c) = x; });
    }
  }

  __device__ __forceinline__ void load_state(const States& from) {
    const float* const own = from.data ? state_of(from) : nullptr;
    const int64_t rows = chunked_dim();
    for (int64_t i = threadIdx.x; i < rows * kColumns; i += kThreads) {
      const int64_t d = i / kColumns, c = i % kColumns;
      const bool exists = own && d < p_.head_dim && first + c < p_.value_dim;
      s.state[d * kColumnStep + c] = exists ? own[d * p_.value_dim + first + c] : 0;
    }
  }
  __device__ __forceinline__ void store_state(float* to) const {
    for (int64_t i = threadIdx.x; i < p_.head_dim * kColumns; i += kThreads) {
      const int64_t d = i / kColumns, c = i % kColumns;
      if (first + c < p_.value_dim) to[d * p_.value_dim + first + c] = s.state[d * kColumnStep + c];
    }
  }
  __device__ __forceinline__ void keep_state(float* states) const {
    store_state(states + (place.slot * p_.heads + place.h) * p_.head_dim * p_.value_dim);
  }
  __device__ __forceinline__ float* state_of(const States& x) const {
    return x.data + place.b * x.sequence + place.h * x.head;
  }

  // The warp's elements of a tile [kTokens][kColumnStep].
  template <typename Visit>
  __device__ __forceinline__ void each(float (&acc)[1][4], const Visit& visit) const {
    each_element(acc[0], [&](float& x, int r, int c) {
      visit(x, warp_row + r, (warp_row + r) * kColumnStep + warp_column + c);
    });
  }

  // True in all threads if the elements of all accumulators are finite.
  __device__ __forceinline__ bool all_finite(const float (&acc)[1][4]) const {
    bool finite = true;
#pragma unroll
    for (float x : acc[0]) finite = finite && fabsf(x) < infinity();
    return __syncthreads_and(finite);
  }

 private:
  __device__ int64_t chunked_dim() const {
    return (p_.head_dim + kChannels - 1) / kChannels * kChannels;
  }
  __device__ const float* enters_of_last() const {
    return scratch_.enters + by_channel_ + (kTokens - 1) * p_.head_dim;
  }

  const DeltaAttentionParams& p_;
  const Scratch& scratch_;
  int64_t slot_, by_channel_ = 0;

 public:
  SweepShared& s;
  Place place{};
  PackedRows rows;
  int64_t slice, first;  // of the columns
  int warp_row, warp_column;
};

// kKeep: stores S before each chunk and Y instead of out.
template <typename T, bool kPerChannel, bool kCorrects, bool kKeep>
__global__ void __launch_bounds__(kThreads, kBlocksOfMultiprocessor)
    delta_states_kernel(const __grid_constant__ DeltaAttentionParams p,
                        const __grid_constant__ Scratch scratch) {
  extern __shared__ float4 shared[];
  Sweep<T, kPerChannel> sweep(p, scratch, shared);
  SweepShared& s = sweep.s;
  const int column = sweep.warp_column;
  constexpr int kRead = kKeep ? kOfKeys : kOfQueries;
  constexpr bool kReads = kCorrects || !kKeep;
  sweep.load_state(p.initial);
  for (int64_t i = 0, chunks = sweep.chunks(); i < chunks; ++i) {
    sweep.begin(i);
    if constexpr (kReads) sweep.load_matrix(kRead);
    if constexpr (kCorrects) sweep.load_matrix(kInverse);
    sweep.template load<T>(s.x, p.v);
    if constexpr (kKeep) sweep.keep_state(scratch.states);
    float y[1][4] = {}, out[1][4] = {}, u[1][4] = {};
    for (int64_t d = 0; kReads && d < p.head_dim; d += kChannels) {
      sweep.load_entering(d, !kKeep, kCorrects);
      if constexpr (kCorrects) sweep.multiply_state(y, s.k, d);
      if constexpr (!kKeep) sweep.multiply_state(out, s.q, d);
    }
    if constexpr (!kReads) __syncthreads();
    if (threadIdx.x < kTokens) s.end[threadIdx.x] = s.f.key[threadIdx.x] * s.f.stay[threadIdx.x];
    bool finite = true;
    if constexpr (kCorrects) {
      // y0 = v + k_in S
      sweep.each(y, [&](float& x, int t, int at) {
        x = s.x[at] - s.f.enter[t] * x;
        s.x[at] = x;
      });
      finite = sweep.all_finite(y);
      // u = X y0
      multiply_pairs<false>(u, s.pairs[kInverse], sweep.warp_row, s.x + column, finite);
      sweep.each(u, [&](float x, int, int at) { s.y[at] = x; });
      finite = sweep.all_finite(u);
    } else if constexpr (kReads) {
      sweep.each(u, [&](float& x, int, int at) { x = s.x[at]; });
      finite = sweep.all_finite(u);
    }
    const float* const rows = kCorrects ? s.y : s.x;  // u
    if constexpr (kReads) {
      // out = q_in S + M u, or y = y0 + N u
      sweep.each(
          out, [&](float& x, int t, int at) { x = kKeep ? s.x[at] : p.scale * s.f.enter[t] * x; });
      multiply_pairs<false>(out, s.pairs[kRead], sweep.warp_row, rows + column, finite);
      sweep.each(out, [&](float x, int, int at) { s.z[at] = x; });
    }
    // S = e^(G_n) S + k_end^T u
    for (int64_t d = 0; d < p.head_dim; d += kChannels) {
      sweep.load_leaving(d);
      sweep.update_state(d, [&](float (&acc)[1][4], int channel) {
        multiply<true, false>(acc, s.k + channel, kKeyStep, rows + column, kColumnStep, kTokens);
      });
    }
    if constexpr (kKeep && kCorrects)
      store_columns(sweep.row_of(scratch.y), p.heads * p.value_dim, s.z, kColumnStep, kColumns,
                    sweep.place.n, sweep.first, p.value_dim);
    else if constexpr (!kKeep)
      sweep.template store<T>(p.out, s.z);
  }
  __syncthreads();
  if (!kKeep && p.final.data) sweep.store_state(sweep.state_of(p.final));
}

}  // namespace tokenmill::cuda::delta_attention
