// M, N and X of each chunk and value head, and the factors of its rows. Chunks are independent
// here.
#pragma once
#include "linear/delta_attention/kernel_chunk.cuh"

namespace tokenmill::cuda::delta_attention {

struct PairsShared {
  float q[kKeyTile], k[kKeyTile], gates[kKeyTile];  // gates: log2 of the decays per channel
  float m[kPairTile], n[kPairTile];
  RowFactors factors;
  float high[kTokens], low[kTokens];  // log2 e^(G_i), as two floats
};

// 1 / |x| of each row of q or k, or 1.
template <typename T>
__device__ __forceinline__ void find_norms(float* norms, const T* rows, int64_t seq, int n,
                                           const DeltaAttentionParams& p) {
  const int lane = threadIdx.x % kWarpSize;
  for (int t = threadIdx.x / kWarpSize; t < kTokens; t += kWarps) {
    float norm = t < n ? 1 : 0;
    if (p.l2norm && t < n) {
      float squares = 0;
      for (int64_t d = lane; d < p.head_dim; d += kWarpSize) {
        const float x = static_cast<float>(rows[t * seq + d]);
        squares = fmaf(x, x, squares);
      }
      norm = 1 / sqrtf(warp_sum(squares) + kL2NormEpsilon);
    }
    if (lane == 0) norms[t] = norm;
  }
}

// beta and, per head, the factors of decays. Called by one warp, a lane for each token.
template <bool kCorrects>
__device__ __forceinline__ void find_gates(PairsShared& s, const DeltaAttentionParams& p,
                                           const Place& place) {
  const int t = threadIdx.x % kWarpSize;
  const bool exists = t < place.n;
  double sum = 0;
  if (exists && p.log_decay.data && !p.per_channel)
    sum = log2_decay(*place.gate(p.log_decay, t), kMinTokenDecay);
#pragma unroll
  for (int by = 1; by < kWarpSize; by *= 2) {
    const double before = __shfl_up_sync(kFullWarp, sum, by);
    if (t >= by) sum += before;
  }
  const double last = __shfl_sync(kFullWarp, sum, kWarpSize - 1);
  s.factors.beta[t] = kCorrects && exists ? *place.gate(p.beta, t) : 0;
  s.factors.enter[t] = exists ? exp2_exact(sum) : 0;
  s.factors.stay[t] = exists ? exp2_exact(last - sum) : 0;
  s.factors.total[t] = exp2_exact(last);
  s.high[t] = static_cast<float>(sum);
  s.low[t] = static_cast<float>(sum - s.high[t]);
}

// Adds to M and N the products of tokens of the same block, pair by pair: a warp takes key j, and
// a lane two channels.
template <bool kCorrects>
__device__ __forceinline__ void add_own_pairs(PairsShared& s) {
  const int lane = threadIdx.x % kWarpSize;
  const auto two = [&](const float* tile, int t) {
    return *reinterpret_cast<const float2*>(tile + t * kKeyStep + 2 * lane);
  };
  for (int j = threadIdx.x / kWarpSize; j < kTokens; j += kWarps) {
    const float2 key = two(s.k, j);
    float2 sum{};
    const int end = j / kBlock * kBlock + kBlock;
#pragma unroll 1
    for (int i = j; i < end; ++i) {
      if (i > j) {
        const float2 gate = two(s.gates, i);
        sum.x += gate.x, sum.y += gate.y;
      }
      const float2 q = two(s.q, i), k = kCorrects ? two(s.k, i) : float2{};
      const float x = key.x * exp2_approx(sum.x), y = key.y * exp2_approx(sum.y);
      const float m = warp_sum(fmaf(q.x, x, q.y * y));
      if (lane == 0) s.m[i * kPairStep + j] += m;
      if constexpr (kCorrects) {
        const float n = warp_sum(fmaf(k.x, x, k.y * y));
        if (lane == 0) s.n[i * kPairStep + j] += n;
      }
    }
  }
}

// A thread takes a channel: keys of the first block decay to its end, rows of the second from
// there; the factors of all rows go to memory.
template <bool kCorrects>
__device__ __forceinline__ void decay_channels(PairsShared& s, const DeltaAttentionParams& p,
                                               float* enters, float* stays, int64_t first) {
  const int d = threadIdx.x % kChannels, task = threadIdx.x / kChannels;
  const bool exists = first + d < p.head_dim;
  float sum = 0;
  if (task == 0) {
    for (int j = kBlock; j-- > 0;) {
      s.k[j * kKeyStep + d] *= exp2_approx(sum);
      sum += s.gates[j * kKeyStep + d];
    }
  } else if (task == 1) {
    for (int i = kBlock; i < kTokens; ++i) {
      sum += s.gates[i * kKeyStep + d];
      const float decay = exp2_approx(sum);
      s.q[i * kKeyStep + d] *= decay;
      if constexpr (kCorrects) s.k[i * kKeyStep + d] *= decay;
    }
  } else if (task == 2) {
    for (int i = 0; i < kTokens; ++i) {
      sum += s.gates[i * kKeyStep + d];
      if (exists) enters[i * p.head_dim + first + d] = exp2_approx(sum);
    }
  } else {
    for (int j = kTokens; j-- > 0;) {
      if (exists) stays[j * p.head_dim + first + d] = exp2_approx(sum);
      sum += s.gates[j * kKeyStep + d];
    }
  }
}

// Products of all pairs: q_i . k_j in M and k_i . k_j in N, with decays per channel inside.
template <typename T, bool kPerChannel, bool kCorrects>
__device__ __forceinline__ void multiply_all(PairsShared& s, const DeltaAttentionParams& p,
                                             const Scratch& scratch, const Place& place) {
  const int warp = threadIdx.x / kWarpSize;
  // Tile of a warp: of M and N both, or (per channel) of the second block's rows of one of them.
  const int row = kPerChannel ? kBlock : warp / 4 * 16;
  const int column = kPerChannel ? warp % 2 * 8 : warp % 4 * 8;
  float m[1][4] = {}, n[1][4] = {};
  for (int i = threadIdx.x; i < kPairTile; i += kThreads) s.m[i] = s.n[i] = 0;
  const T* const queries = place.at<T>(p.q, place.key_head);
  const T* const keys = place.at<T>(p.k, place.key_head);
  const int64_t own = place.slot * p.heads + place.h;
#pragma unroll 1
  for (int64_t d = 0; d < p.head_dim; d += kChannels) {
    __syncthreads();
    load_keys(s.q, queries, p.q.seq, place.n, p.head_dim, d, s.factors.query, nullptr,
              scratch.vectors);
    load_keys(s.k, keys, p.k.seq, place.n, p.head_dim, d, s.factors.key, nullptr, scratch.vectors);
    if constexpr (kPerChannel) {
      const float* const gates = p.log_decay.data + place.b * p.log_decay.batch +
                                 place.token * p.log_decay.seq + place.h * p.log_decay.head;
      for (int i = threadIdx.x; i < kTokens * kChannels; i += kThreads) {
        const int t = i / kChannels, c = i % kChannels;
        float x = 0;
        if (t < place.n && d + c < p.head_dim) x = gates[t * p.log_decay.seq + d + c];
        s.gates[t * kKeyStep + c] = kLog2e * (x < kMinTokenDecay ? kMinTokenDecay : x);
      }
    }
    __syncthreads();
    if constexpr (kPerChannel) {
      add_own_pairs<kCorrects>(s);
      __syncthreads();
      const int64_t offset = own * kTokens * p.head_dim;
      decay_channels<kCorrects>(s, p, scratch.enters + offset, scratch.stays + offset, d);
      __syncthreads();
    }
    const float* const b = s.k + column * kKeyStep;
    if (kPerChannel ? warp < 2 : column <= row + 8)
      multiply<false, true>(m, s.q + row * kKeyStep, kKeyStep, b, kKeyStep, kChannels);
    if (kCorrects && (kPerChannel ? warp / 2 == 1 : column <= row + 8))
      multiply<false, true>(n, s.k + row * kKeyStep, kKeyStep, b, kKeyStep, kChannels);
  }
  const auto store = [&](float* to, float (&x)[4]) {
    each_element(x, [&](float y, int r, int c) { to[(row + r) * kPairStep + column + c] = y; });
  };
  if (kPerChannel ? warp < 2 : true) store(s.m, m[0]);
  if (kCorrects && (kPerChannel ? warp / 2 == 1 : true)) store(s.n, n[0]);
}

// Column `lane` of X, from the first row to the last.
__device__ __forceinline__ void invert(const PairsShared& s, float* inverse) {
  const int column = threadIdx.x % kWarpSize;
  float x[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    float sum = i == column ? 1 : 0;
#pragma unroll
    for (int j = 0; j < i; ++j) sum = fmaf(s.n[i * kPairStep + j], x[j], sum);
    x[i] = i < column ? 0 : s.factors.beta[i] * sum;
    inverse[i * kTokens + column] = x[i];
  }
}

template <typename T, bool kPerChannel, bool kCorrects>
__global__ void __launch_bounds__(kThreads)
    delta_pairs_kernel(const __grid_constant__ DeltaAttentionParams p,
                       const __grid_constant__ Scratch scratch) {
  __shared__ PairsShared s;
  const Place place = place_of_block(p, [&](const LooseRows& rows, int64_t h) {
    if (p.out.data) rows.fill(rows_at<T>(p.out, 0, 0, h), p.out.seq, p.value_dim, 0);
  });
  if (place.n == 0) return;
  find_norms(s.factors.query, place.at<T>(p.q, place.key_head), p.q.seq, place.n, p);
  find_norms(s.factors.key, place.at<T>(p.k, place.key_head), p.k.seq, place.n, p);
  if (threadIdx.x < kWarpSize) find_gates<kCorrects>(s, p, place);
  multiply_all<T, kPerChannel, kCorrects>(s, p, scratch, place);
  __syncthreads();

  const auto matrix = [&](int which) {
    return scratch.pairs_of(place.slot, p.heads, place.h, which);
  };
  for (int at = threadIdx.x; at < kTokens * kTokens; at += kThreads) {
    const int i = at / kTokens, j = at % kTokens;
    float weight = i < j ? 0 : 1;
    if (!kPerChannel && i > j)
      weight = exp2_approx((s.high[i] - s.high[j]) + (s.low[i] - s.low[j]));
    // Pairs without weight are 0, even if their product is not finite.
    const float m = weight == 0 ? 0 : p.scale * weight * s.m[i * kPairStep + j];
    matrix(kOfQueries)[at] = m;
    if constexpr (kCorrects) {
      const float n = weight == 0 || i == j ? 0 : -weight * s.n[i * kPairStep + j];
      s.n[i * kPairStep + j] = n;
      matrix(kOfKeys)[at] = n;
    }
  }
  if (threadIdx.x < kFactorFloats)
    reinterpret_cast<float*>(&scratch.factors_of(place.slot, p.heads, place.h))[threadIdx.x] =
        reinterpret_cast<const float*>(&s.factors)[threadIdx.x];
  if constexpr (kCorrects) {
    __syncthreads();
    if (threadIdx.x < kWarpSize) invert(s, matrix(kInverse));
  }
}

}  // namespace tokenmill::cuda::delta_attention
