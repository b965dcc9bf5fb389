// Gradients of queries, keys and gates of one block and head, from the states before the block and
// their gradients after it. Blocks are independent here. Tiles are [kTokens][kTokens]: a warp owns
// some rows, a lane a column.
#pragma once
#include "linear/titans_memory/kernel.cuh"

namespace tokenmill::cuda::titans_memory {

constexpr int kRowsOfWarp = kTokens * kWarpSize / kThreads;
constexpr int kTile = kTokens * kPairStep;

struct BlockShared {
  Factors f;
  float w[kTile], e[kTile];
  // q_t . k_j and dout_t . u_j, then the gradients of W and of q_t . k_j
  float scores[kTile], values[kTile];
  float states[5][kTile], rows[3][kTile];
  float dmemory[kTokens], dmomentum[kTokens], dw_end[kTokens], de_end[kTokens];
  float sums[3][kThreads / kWarpSize];
};

// Tile of a state [D][Dv]: rows d, columns c.
__device__ __forceinline__ void load_state_tile(float* to, const float* state, int64_t d, int64_t c,
                                                int64_t dim, int64_t columns) {
  for (int i = threadIdx.x; i < kTokens * kTokens; i += kThreads) {
    const int64_t r = d + i / kTokens, x = c + i % kTokens;
    to[i / kTokens * kPairStep + i % kTokens] = r < dim && x < columns ? state[r * columns + x] : 0;
  }
}

// sums[i] += row (warp + 8 i) of a dot row `lane` of b.
__device__ __forceinline__ void add_products(float (&sums)[kRowsOfWarp], const float* a,
                                             const float* b) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll 4
  for (int c = 0; c < kTokens; ++c) {
    const float y = b[lane * kPairStep + c];
#pragma unroll
    for (int i = 0; i < kRowsOfWarp; ++i)
      sums[i] = fmaf(a[(warp + i * (kThreads / kWarpSize)) * kPairStep + c], y, sums[i]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    block_kernel(const __grid_constant__ TitansBackwardParams p,
                 const __grid_constant__ Kept kept) {
  extern __shared__ float4 memory[];
  BlockShared& s = *reinterpret_cast<BlockShared*>(memory);
  const TitansParams& in = p.forward;
  const int64_t slot = blockIdx.x / in.heads, h = blockIdx.x % in.heads;
  const int64_t dim = in.head_dim, columns = in.value_dim;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  constexpr int kWarps = kThreads / kWarpSize;
  if (slot == kept.slots) {  // packed: tokens outside of every sequence
    clear_loose<T>(in, p.dq, h, 0, dim, static_cast<int>(dim));
    clear_loose<T>(in, p.dk, h, 0, dim, static_cast<int>(dim));
    const auto clear_gate = [&](const TokenGates& g) {
      clear_loose<float>(in, {g.data, 0, g.seq, g.head}, h, 0, 1, 1);
    };
    clear_gate(p.dalpha);
    clear_gate(p.deta);
    clear_gate(p.dtheta);
    return;
  }
  const Place at = kept.places[slot];
  const int n = at.tokens;
  if (n == 0) return;
  const int64_t b = at.sequence, token = at.first;
  weigh<true>(in, s.f, s.w, s.e, b, h, token, n);
  for (int i = threadIdx.x; i < kTokens; i += kThreads)
    s.dmemory[i] = s.dmomentum[i] = s.dw_end[i] = s.de_end[i] = 0;
  for (int i = threadIdx.x; i < 3 * kTile; i += kThreads) s.rows[0][i] = 0;  // zero past n

  const auto load = [&](float* to, const Rows& rows, int64_t first, int64_t length) {
    const T* const from = rows.data ? row_at<T>(rows, b, token, h) : nullptr;
    load_rows(to, kPairStep, from, rows.seq, n, first, rows.data ? length : 0, kTokens);
  };
  const auto load_kept = [&](float* to, const float* rows, int64_t first) {
    const float* const from = rows + (row_number(in, b, token) * in.heads + h) * columns;
    load_rows(to, kPairStep, from, in.heads * columns, n, first, columns, kTokens);
  };
  const auto row_of = [&](int i) { return warp + i * kWarps; };

  // P = Q K^T, X = dO U^T
  float scores[kRowsOfWarp] = {}, values[kRowsOfWarp] = {};
#pragma unroll 1
  for (int64_t d = 0; d < dim; d += kTokens) {
    __syncthreads();
    load(s.rows[0], in.q, d, dim);
    load(s.rows[1], in.k, d, dim);
    __syncthreads();
    add_products(scores, s.rows[0], s.rows[1]);
  }
#pragma unroll 1
  for (int64_t c = 0; c < columns; c += kTokens) {
    __syncthreads();
    load(s.rows[0], p.dout, c, columns);
    load_kept(s.rows[1], kept.u, c);
    __syncthreads();
    add_products(values, s.rows[0], s.rows[1]);
  }
#pragma unroll
  for (int i = 0; i < kRowsOfWarp; ++i) {
    const int t = row_of(i), at_pair = t * kPairStep + lane;
    const bool seen = lane <= t && t < n;
    s.scores[at_pair] = seen ? -scores[i] * values[i] : 0;     // gradient of W
    s.values[at_pair] = seen ? -s.w[at_pair] * values[i] : 0;  // gradient of q_t . k_j
  }

  const auto state = [&](int64_t of, int which) {
    return kept.states + state_offset(in, of, h, which);
  };
  float inner[3] = {};
#pragma unroll 1
  for (int64_t d = 0; d < dim; d += kTokens) {
    float memory_q[kRowsOfWarp] = {}, momentum_q[kRowsOfWarp] = {};
    float memory_k[kRowsOfWarp] = {}, momentum_k[kRowsOfWarp] = {}, start_k[kRowsOfWarp] = {};
#pragma unroll 1
    for (int64_t c = 0; c < columns; c += kTokens) {
      __syncthreads();
#pragma unroll
      for (int which = 0; which < 4; ++which)
        load_state_tile(s.states[which], state(slot, which), d, c, dim, columns);
      load_state_tile(s.states[4], state(at.start_slot, kMemory), d, c, dim, columns);
      load(s.rows[0], p.dout, c, columns);
      load_kept(s.rows[1], kept.u, c);
      load_kept(s.rows[2], kept.du, c);
      __syncthreads();
      // dO M^T, dO S^T, U dM'^T, U dS'^T and dU G^T
      add_products(memory_q, s.rows[0], s.states[kMemory]);
      add_products(momentum_q, s.rows[0], s.states[kMomentum]);
      add_products(memory_k, s.rows[1], s.states[kMemoryGradient]);
      add_products(momentum_k, s.rows[1], s.states[kMomentumGradient]);
      add_products(start_k, s.rows[2], s.states[4]);
#pragma unroll
      for (int i = 0; i < kRowsOfWarp; ++i) {
        const int place = row_of(i) * kPairStep + lane;
        const float m = s.states[kMemory][place], o = s.states[kMomentum][place];
        const float dm = s.states[kMemoryGradient][place];
        inner[0] = fmaf(m, dm, inner[0]);
        inner[1] = fmaf(o, dm, inner[1]);
        inner[2] = fmaf(o, s.states[kMomentumGradient][place], inner[2]);
      }
    }
    __syncthreads();
    load(s.rows[0], in.q, d, dim);
    load(s.rows[1], in.k, d, dim);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRowsOfWarp; ++i) {
      const int t = row_of(i);
      if (t >= n) continue;  // uniform across the warp
      const float q = s.rows[0][t * kPairStep + lane], k = s.rows[1][t * kPairStep + lane];
      const float of_memory = warp_sum(memory_q[i] * q), of_momentum = warp_sum(momentum_q[i] * q);
      const float of_w = warp_sum(memory_k[i] * k), of_e = warp_sum(momentum_k[i] * k);
      if (lane == 0) {
        s.dmemory[t] += of_memory;
        s.dmomentum[t] += of_momentum;
        s.dw_end[t] -= of_w;
        s.de_end[t] -= of_e;
      }
      float dq = fmaf(s.f.memory[t], memory_q[i], s.f.momentum[t] * momentum_q[i]);
      for (int j = 0; j <= t; ++j)
        dq = fmaf(s.values[t * kPairStep + j], s.rows[1][j * kPairStep + lane], dq);
      float dk = start_k[i] - s.f.w_end[t] * memory_k[i] - s.f.e_end[t] * momentum_k[i];
      for (int j = t; j < n; ++j)
        dk = fmaf(s.values[j * kPairStep + t], s.rows[0][j * kPairStep + lane], dk);
      if (d + lane < dim) {
        const_cast<T*>(row_at<T>(p.dq, b, token + t, h))[d + lane] = static_cast<T>(dq);
        const_cast<T*>(row_at<T>(p.dk, b, token + t, h))[d + lane] = static_cast<T>(dk);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const float sum = warp_sum(inner[i]);
    if (lane == 0) s.sums[i][warp] = sum;
  }
  __syncthreads();
  if (warp > 0) return;

  // Rows of W and E in reverse: each lane owns a column of both.
  float dmemory = 0, dmomentum = 0, dkept = 0;  // gradients of the carried factors
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    dmemory += s.sums[0][i];
    dmomentum += s.sums[1][i];
    dkept += s.sums[2][i];
  }
  float gw = lane < n ? s.dw_end[lane] : 0, ge = lane < n ? s.de_end[lane] : 0;
  for (int t = n - 1; t >= 0; --t) {
    const bool last = t == n - 1;
    const float a = last ? 1 : s.f.decay[t + 1], e = last ? 1 : s.f.eta[t + 1];
    dmemory = fmaf(a, dmemory, s.dmemory[t]);
    dmomentum = fmaf(a, dmomentum, s.dmomentum[t]);
    dkept = fmaf(e, dkept, dmomentum);
    gw = fmaf(a, gw, s.scores[t * kPairStep + lane]);
    ge = fmaf(e, ge, gw);
    const bool earlier = lane < t;
    const float da = warp_sum(earlier ? gw * s.w[(t - 1) * kPairStep + lane] : 0);
    const float de = warp_sum(earlier ? ge * s.e[(t - 1) * kPairStep + lane] : 0);
    const auto put = [&](const TokenGates& g, float x) {
      g.data[b * g.batch + (token + t) * g.seq + h * g.head] = x;
    };
    if (lane == t) {
      const float m = t > 0 ? s.f.memory[t - 1] : 1, o = t > 0 ? s.f.momentum[t - 1] : 0;
      put(p.dalpha, -(da + dmemory * m + dmomentum * o));
      put(p.deta, fmaf(dkept, t > 0 ? s.f.kept[t - 1] : 1, de));
      put(p.dtheta, ge);
    }
  }
}

}  // namespace tokenmill::cuda::titans_memory
