// Element-wise steps of the backward around its three recurrences: gradients through the
// normalizer, sums over the query heads of a group, derivatives of feature maps, gradients of
// decays.
#pragma once
#include "cuda/vector.cuh"
#include "linear/decay.cuh"
#include "linear/linear_attention/kernel_state.cuh"

namespace tokenmill::cuda::linear_attention {

// Rows are numbered over all sequences: [tokens, H, ...] in the workspace.
struct BackwardPlan {
  int64_t tokens, segments;  // totals over all sequences; packed: a bound on the segments
  int features, group;
  bool taylor;
  float *dy_zero, *dz;  // dy: elements have the dtype of q, see launch
  float *dq, *dk, *dv;  // [tokens, H, features or value_dim]; null: written in place
  float *forward_states, *backward_states;
  int64_t slot_floats, slices, state_floats, tail_floats;  // layout of the saved states
  // For the gradient of decays: [tokens, H], [segments, H], [tokens, H]. diagonal: weight of a
  // token's pair with itself in dphi(q) and dphi(k), which exclude it until then, because it
  // cancels.
  float *change, *partial, *diagonal;
  Rows dy;
};

struct TokenPlace {
  int64_t b, t;
};
__device__ __forceinline__ TokenPlace place_of(const LinearAttentionParams& p, int64_t token) {
  if (p.cu_seqlens) return {0, token};
  const unsigned t = static_cast<unsigned>(token), length = static_cast<unsigned>(p.seqlen);
  return {t / length, t % length};
}

// The warps of a CTA process heads of one token.
__device__ __forceinline__ int64_t head_of_warp() {
  return blockIdx.y * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
}

// With z the normalizer: dy = dout / z and, for the column of ones, dz = -dout . out / z.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    divide_gradients_kernel(const __grid_constant__ LinearAttentionBackwardParams p,
                            const __grid_constant__ BackwardPlan plan) {
  const LinearAttentionParams& f = p.forward;
  const int64_t token = blockIdx.x, h = head_of_warp(), row = token * f.heads + h;
  if (h >= f.heads) return;
  const int lane = threadIdx.x % kWarpSize;

  const auto [b, t] = place_of(f, token);
  const int64_t at = (f.cu_seqlens ? h : b * f.heads + h) * f.seqlen + t;
  const float inverse = f.normalize && p.dout.data ? 1 / f.normalizer[at] : 0;
  T* const dy = reinterpret_cast<T*>(plan.dy_zero) + row * f.value_dim;
  float sum = 0;
  for (int c = lane; c < f.value_dim; c += kWarpSize) {
    float x = 0;
    if (p.dout.data) {
      x = static_cast<float>(rows_at<T>(p.dout, b, t, h)[c]) * inverse;
      sum = fmaf(x, static_cast<float>(rows_at<T>(f.out, b, t, h)[c]), sum);
    }
    dy[c] = static_cast<T>(x);
  }
  sum = warp_sum(sum);
  if (f.normalize && lane == 0) plan.dz[at] = -sum;
}

__device__ __forceinline__ int pair_feature(int i, int j, int dim) {
  const int low = min(i, j), high = max(i, j);
  return 1 + dim + low * dim - low * (low - 1) / 2 + high - low;
}

// d map / dx
__device__ __forceinline__ float map_derivative(FeatureMap map, float x) {
  switch (map) {
    case FeatureMap::elu1:
      return x < 0 ? exp2_approx(kLog2e * x) : 1;
    case FeatureMap::relu:
      return x > 0 ? 1 : x <= 0 ? 0 : x;  // NaN propagates
    case FeatureMap::silu: {
      const float s = sigmoid(x);
      return s * fmaf(x, 1 - s, 1.f);
    }
    default:
      return 1;
  }
}

// Gradient of rows of `dim` elements from the gradients of their features, summed over `group`
// heads.
struct GradientRows {
  const float* from;      // [tokens, H, features]
  const float* diagonal;  // [tokens, H], times features of `other`; or null
  Rows x, other, to;
  int features, dim, group, other_group;
  FeatureMap map;
  bool query;  // taylor2: this side has the factors; otherwise `other` has them
};

// Gradient of one feature: element i of the row, mapped, times element j if there is one.
template <typename T>
__device__ __forceinline__ float sum_heads(const GradientRows& g, const float* from,
                                           const float* diagonal, int64_t b, int64_t t, int head,
                                           int feature, int i, int j, float factor) {
  float y = 0;
#pragma unroll 1
  for (int n = 0; n < g.group; ++n) {
    y += from[int64_t{n} * g.features + feature];
    if (!diagonal) continue;
    const T* other = rows_at<T>(g.other, b, t, (head + n) / g.other_group);
    float value = factor * map_feature(g.map, static_cast<float>(other[i]));
    if (j >= 0) value *= static_cast<float>(other[j]);
    y = fmaf(diagonal[n], value, y);
  }
  return y;
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    finish_gradients_kernel(const __grid_constant__ LinearAttentionParams p,
                            const __grid_constant__ GradientRows g) {
  const int64_t token = blockIdx.x, h = head_of_warp(), first = h * g.group;
  if (first >= p.heads) return;
  const int lane = threadIdx.x % kWarpSize;

  if (p.cu_seqlens && !all_rows(p.cu_seqlens, p.batch, p.seqlen).contain(token)) {
#pragma unroll 1
    for (int c = lane; c < g.dim; c += kWarpSize)
      rows_at<T>(g.to, 0, token, h)[c] = static_cast<T>(0.f);
    return;
  }
  const auto [b, t] = place_of(p, token);
  const float* from = g.from + (token * p.heads + first) * g.features;
  const float* diagonal = g.diagonal ? g.diagonal + token * p.heads + first : nullptr;
  const T* x = g.x.data ? rows_at<T>(g.x, b, t, h) : nullptr;
  T* to = rows_at<T>(g.to, b, t, h);
  const bool taylor = g.map == FeatureMap::taylor2;
  const float own = taylor && g.query ? p.scale : 1, theirs = taylor && !g.query ? p.scale : 1;
  for (int c = lane; c < g.dim; c += kWarpSize) {
    float y = 0;
    // Linear feature of element c (j = -1), then its products with element j.
#pragma unroll 1
    for (int j = -1; j < (taylor ? g.dim : 0); ++j) {
      const bool square = j == c && !g.query;
      const float factor = square ? theirs * theirs / 2 : j < 0 ? theirs : theirs * theirs;
      const float weight = square ? 2 : j < 0 ? own : own * own;
      const int feature = !taylor ? c : j < 0 ? 1 + c : pair_feature(c, j, g.dim);
      const float sum =
          sum_heads<T>(g, from, diagonal, b, t, static_cast<int>(first), feature, c, j, factor);
      y = fmaf(weight * sum, j < 0 ? 1 : static_cast<float>(x[j]), y);
    }
    if (x && !taylor) y *= map_derivative(g.map, static_cast<float>(x[c]));
    to[c] = static_cast<T>(y);
  }
}

// True if `token`, number t of its batch, is the last of its sequence. Called by one warp.
__device__ __forceinline__ bool ends_sequence(const LinearAttentionParams& p, int64_t token,
                                              int64_t t) {
  if (!p.cu_seqlens) return t + 1 == p.seqlen;
  bool found = false;
  for (int64_t b = threadIdx.x % kWarpSize; b < p.batch; b += kWarpSize)
    found |= clamped_end(p.cu_seqlens, b + 1, p.seqlen) == token + 1;
  return __any_sync(kFullWarp, found);
}

// phi(q) . dphi(q) - phi(k) . dphi(k), without the diagonal, and the diagonal. Without it, the key
// of a sequence's last token only affects the final state, from which the saved states exclude it
// too.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    decay_change_kernel(const __grid_constant__ LinearAttentionParams p,
                        const __grid_constant__ BackwardPlan plan) {
  const int64_t token = blockIdx.x, h = head_of_warp(), row = token * p.heads + h;
  if (h >= p.heads) return;
  const int lane = threadIdx.x % kWarpSize, dim = static_cast<int>(p.head_dim);

  const auto [b, t] = place_of(p, token);
  const T* q = rows_at<T>(p.q, b, t, h);
  const T* k = rows_at<T>(p.k, b, t, static_cast<int>(h) / plan.group);
  const float* dq = plan.dq + row * plan.features;
  const float* dk = plan.dk + row * plan.features;
  const auto x = [](const T* from, int i) { return static_cast<float>(from[i]); };
  const float key = ends_sequence(p, token, t) ? 0 : 1;
  float sum = 0;
  if (plan.taylor) {
    if (lane == 0) sum = dq[0] - key * dk[0];
    for (int i = lane; i < dim; i += kWarpSize) {
      sum += p.scale * x(q, i) * dq[1 + i] - key * x(k, i) * dk[1 + i];
      for (int j = i; j < dim; ++j) {
        const int f = pair_feature(i, j, dim);
        const float factor = p.scale * p.scale * (i == j ? 0.5f : 1);
        sum += factor * x(q, i) * x(q, j) * dq[f] - key * x(k, i) * x(k, j) * dk[f];
      }
    }
  } else {
    for (int i = lane; i < dim; i += kWarpSize)
      sum += map_feature(p.map, x(q, i)) * dq[i] - key * map_feature(p.map, x(k, i)) * dk[i];
  }
  sum = warp_sum(sum);
  if (lane == 0) plan.change[row] = sum;
  const T* dy = rows_at<T>(plan.dy, b, t, h);
  const T* v = rows_at<T>(p.v, b, t, static_cast<int>(h) / plan.group);
  float own = 0;
  for (int i = lane; i < p.value_dim; i += kWarpSize) own = fmaf(x(dy, i), x(v, i), own);
  own = warp_sum(own);
  if (p.normalize) own += plan.dz[(p.cu_seqlens ? h : b * p.heads + h) * p.seqlen + t];
  if (lane == 0) plan.diagonal[row] = plan.taylor ? own : p.scale * own;
}

// Segment of a sequence: its first token and its number of tokens.
struct Segment {
  TilePlace place;
  int64_t b, slot;  // b: -1 if there is no segment; slot: index among the segments of all sequences
  int start, length, first, count;

  // Called by all lanes of a warp.
  __device__ Segment(const LinearAttentionParams& p, int64_t number) : slot(number) {
    const int64_t each = (p.seqlen + kSegment - 1) / kSegment;
    place = {static_cast<int>(each ? number / each : -1),
             static_cast<int>(each ? number % each : 0),
             {0, static_cast<int>(p.seqlen)}};
    if (p.cu_seqlens) place = find_tile(p.cu_seqlens, p.batch, p.seqlen, kSegment, number);
    b = place.b;
    if (b < 0) return;
    start = place.rows.start;
    length = place.rows.length;
    if (p.cu_seqlens) slot = first_slot(place.rows, b, kSegment) + place.tile;
    first = place.tile * kSegment;
    count = min(length - first, kSegment);
  }
  __device__ bool is_last() const { return first + count == length; }
};

// Sum over the kMaxThreads threads of a CTA; every thread gets the result.
__device__ inline float block_sum(float x, float* shared) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < kMaxThreads / kWarpSize; ++i) sum += shared[i];
  return sum;
}

__device__ inline float decay_at(const LogDecay& decay, int64_t b, int64_t t, int64_t h) {
  const float x = decay.data[b * decay.batch + t * decay.seq + h * decay.head];
  return exp2_exact(log2_decay(x, kMinHeadDecay));
}

// Gradient of each decay of a segment: suffix sums of `change` from the segment's end, and the
// interaction of the state at its end with later tokens.
__global__ void __launch_bounds__(kSegment)
    decay_gradient_kernel(const __grid_constant__ LinearAttentionBackwardParams p,
                          const __grid_constant__ BackwardPlan plan) {
  __shared__ float sums[2][kSegment];
  __shared__ float parts[kMaxThreads / kWarpSize];
  const LinearAttentionParams& f = p.forward;
  const int64_t h = blockIdx.x % f.heads;
  const Segment s(f, blockIdx.x / f.heads);
  if (s.b < 0) {
    if (p.ddecay.per_token)
      LooseRows(s.place, f.seqlen, kSegment)
          .fill(p.ddecay.data + h * p.ddecay.head, p.ddecay.seq, 1, 0);
    return;
  }
  float inner = 0;
  for (int64_t slice = 0; slice < plan.slices; ++slice) {
    const int64_t at = ((s.slot * f.heads + h) * plan.slices + slice) * plan.slot_floats;
    const float* x = plan.forward_states + at;
    const float* y = plan.backward_states + at;
    for (int64_t i = threadIdx.x; i < plan.state_floats + plan.tail_floats; i += kSegment)
      inner = fmaf(x[i], y[i], inner);
  }
  inner = block_sum(inner, parts);
  const int64_t row = f.cu_seqlens ? 0 : s.b;  // batch index in tensors with tokens
  if (!s.is_last())
    inner *= decay_at(f.decay, f.decay.per_token ? row : s.b, s.start + s.first + s.count, h);
  const int i = threadIdx.x;
  const int64_t token = row * f.seqlen + s.start + s.first + i;
  float x = i < s.count ? plan.change[token * f.heads + h] : 0;
  int from = 0;
  for (int step = 1; step < kSegment; step *= 2) {
    sums[from][i] = x;
    __syncthreads();
    if (i + step < kSegment) x += sums[from][i + step];
    from ^= 1;
  }
  x = i < s.count ? x + inner : 0;
  // The first token's decay only affects the initial state.
  if (!f.initial.data && s.first + i == 0) x = 0;

  if (p.ddecay.per_token) {
    if (i < s.count)
      p.ddecay
          .data[row * p.ddecay.batch + (s.start + s.first + i) * p.ddecay.seq + h * p.ddecay.head] =
          x;
  } else {
    x = block_sum(x, parts);
    if (i == 0) plan.partial[s.slot * f.heads + h] = x;
  }
}

// Sums over the segments of a sequence; one warp each.
__global__ void __launch_bounds__(kMaxThreads)
    sum_decay_gradients_kernel(const __grid_constant__ LinearAttentionBackwardParams p,
                               const __grid_constant__ BackwardPlan plan) {
  const LinearAttentionParams& f = p.forward;
  const int64_t b = blockIdx.x, h = head_of_warp();
  if (h >= f.heads) return;

  int64_t first = b * ((f.seqlen + kSegment - 1) / kSegment), length = f.seqlen;
  if (f.cu_seqlens) {
    const PackedRows rows = rows_of_sequence(f.cu_seqlens, f.batch, f.seqlen, b);
    first = first_slot(rows, b, kSegment);
    length = rows.length;
  }
  const int64_t end = first + (length + kSegment - 1) / kSegment;
  float sum = 0;
  for (int64_t i = first + threadIdx.x % kWarpSize; i < end; i += kWarpSize)
    sum += plan.partial[i * f.heads + h];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarpSize == 0) p.ddecay.data[b * p.ddecay.batch + h * p.ddecay.head] = sum;
}

}  // namespace tokenmill::cuda::linear_attention
