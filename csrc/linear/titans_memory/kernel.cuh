// Sweeps over the blocks of a sequence. A CTA owns a head and a slice of the columns of V, which
// are independent of each other, and keeps the state of the slice in shared memory:
//
//   states_kernel     out, and the state after the last token; or the inputs of the backward
//   gradients_kernel  from the last block to the first: dV, and the gradients of the states
//
// The rest of the backward is in kernel_backward.cuh.
#pragma once
#include "cuda/sequences.cuh"
#include "cuda/vector.cuh"
#include "cuda/warp.cuh"
#include "linear/titans_memory/blocks.h"

namespace tokenmill::cuda::titans_memory {

constexpr int kThreads = 256;
constexpr int kTokens = 32;             // per block: one lane each
constexpr int kPairStep = kTokens + 1;  // row stride of pairs
constexpr int kMaxHeadDim = 256;
// CTAs per SM for the register budget; without it ptxas targets three on sm_120, and spills.
constexpr int kBlocksOfMultiprocessor = 2;

// Location of a block; `first` counts all tokens of a batch or of packed sequences. tokens = 0: no
// block.
struct Place {
  int sequence, tokens, start_slot;
  int64_t first;
};

// Data kept for the backward, by slot: each block of a sequence has one.
struct Kept {
  int64_t slots;
  Place* places;  // [slots]
  float* states;  // [slots, H, 4, D, Dv]: M and S before a block, their gradients after it
  float *u, *du;  // [tokens, H, Dv]
};

enum : int { kMemory, kMomentum, kMemoryGradient, kMomentumGradient };

// First slot of a sequence. A part of a chunk is counted for each sequence that begins or ends in
// it.
__host__ __device__ inline int64_t slots_before(const TitansParams& p, int64_t sequence,
                                                int64_t start) {
  if (!p.cu_seqlens) return sequence * titans_blocks(p.seqlen, p.chunk_size, kTokens);
  return (start / p.chunk_size + sequence) * ceil_div(p.chunk_size, kTokens);
}

__device__ __forceinline__ int64_t state_offset(const TitansParams& p, int64_t slot, int64_t h,
                                                int which) {
  return ((slot * p.heads + h) * 4 + which) * p.head_dim * p.value_dim;
}

__device__ inline PackedRows rows_of(const TitansParams& p, int64_t b) {
  if (!p.cu_seqlens) return {0, static_cast<int>(p.seqlen)};
  return rows_of_sequence(p.cu_seqlens, p.batch, p.seqlen, b);
}

// Row of a token among the rows of a head.
__device__ __forceinline__ int64_t row_number(const TitansParams& p, int64_t b, int64_t token) {
  return (p.cu_seqlens ? 0 : b * p.seqlen) + token;
}

// Factors that the gates apply to M and S, after each token and after the block.
struct Factors {
  float decay[kTokens], eta[kTokens], theta[kTokens];
  float memory[kTokens], momentum[kTokens], kept[kTokens];
  float w_end[kTokens], e_end[kTokens];
};

// pairs[t][j] becomes W[t, 2 + j], and with kAll kept[t][j] E[t, 2 + j]. Called by the first two
// warps.
template <bool kAll>
__device__ inline void weigh(const TitansParams& p, Factors& f, float* pairs, float* kept,
                             int64_t b, int64_t h, int64_t token, int n) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  if (warp == 0 && lane < n) {
    const auto at = [&](const TokenGates& g) {
      return g.data[b * g.batch + (token + lane) * g.seq + h * g.head];
    };
    f.decay[lane] = 1 - at(p.alpha);
    f.eta[lane] = at(p.eta);
    f.theta[lane] = at(p.theta);
  }
  __syncthreads();
  if (warp == 0) {
    float w = 0, e = 0;
    for (int t = 0; t < n; ++t) {
      e = lane < t ? f.eta[t] * e : lane == t ? f.theta[t] : 0;
      w = lane < t ? fmaf(f.decay[t], w, e) : e;
      pairs[t * kPairStep + lane] = w;
      if (kAll) kept[t * kPairStep + lane] = e;
    }
    f.w_end[lane] = w;
    f.e_end[lane] = e;
  } else if (warp == 1) {
    float memory = 1, momentum = 0, own = 1;
    for (int t = 0; t < n; ++t) {
      own *= f.eta[t];
      momentum = fmaf(f.decay[t], momentum, own);
      memory *= f.decay[t];
      if (lane == t) f.memory[t] = memory, f.momentum[t] = momentum, f.kept[t] = own;
    }
  }
  __syncthreads();
}

template <typename T>
__device__ __forceinline__ const T* row_at(const Rows& rows, int64_t b, int64_t token, int64_t h) {
  return static_cast<const T*>(rows.data) + b * rows.batch + token * rows.seq + h * rows.head;
}

// Loads n rows of `columns` elements from column `first` on, at most `width` of them, as floats;
// zero past the columns.
template <typename T>
__device__ __forceinline__ void load_rows(float* to, int step, const T* from, int64_t seq, int n,
                                          int64_t first, int64_t columns, int width) {
  for (int i = threadIdx.x; i < n * width; i += kThreads) {
    const int t = i / width, c = i % width;
    to[t * step + c] = first + c < columns ? static_cast<float>(from[t * seq + first + c]) : 0;
  }
}
template <typename T>
__device__ __forceinline__ void store_rows(T* to, int64_t seq, const float* from, int step, int n,
                                           int64_t first, int64_t columns, int width,
                                           float factor) {
  for (int i = threadIdx.x; i < n * width; i += kThreads) {
    const int t = i / width, c = i % width;
    if (first + c < columns) to[t * seq + first + c] = static_cast<T>(factor * from[t * step + c]);
  }
}

__device__ __forceinline__ float4& four(float* p) { return *reinterpret_cast<float4*>(p); }
__device__ __forceinline__ void add(float (&sum)[4], float x, const float4& y) {
  sum[0] = fmaf(x, y.x, sum[0]);
  sum[1] = fmaf(x, y.y, sum[1]);
  sum[2] = fmaf(x, y.z, sum[2]);
  sum[3] = fmaf(x, y.w, sum[3]);
}
// sum += a[i * a_step] * b[i * b_step .. + 3]
__device__ __forceinline__ void multiply(float (&sum)[4], const float* a, int a_step, float* b,
                                         int b_step, int n) {
#pragma unroll 4
  for (int i = 0; i < n; ++i) add(sum, a[i * a_step], four(b + i * b_step));
}
__device__ __forceinline__ float4 sum_of(float4 a, float x, float4 b, float y, float4 c) {
  return {fmaf(x, a.x, fmaf(y, b.x, c.x)), fmaf(x, a.y, fmaf(y, b.y, c.y)),
          fmaf(x, a.z, fmaf(y, b.z, c.z)), fmaf(x, a.w, fmaf(y, b.w, c.w))};
}

__device__ __forceinline__ float4 sum_of(float4 a, float x, float4 b) {
  return {fmaf(x, a.x, b.x), fmaf(x, a.y, b.y), fmaf(x, a.z, b.z), fmaf(x, a.w, b.w)};
}

// Shared memory of both sweeps, in floats: three states, two tiles of rows of the slice, keys and
// queries, pairs.
__host__ __device__ inline int64_t sweep_floats(int64_t dim, int width) {
  return 3 * dim * width + 2 * kTokens * width + 2 * kTokens * (dim + 1) + kTokens * kPairStep;
}

template <int kWidth>
struct Sweep {
  static constexpr int kFours = kWidth / 4;
  float *first, *second, *start;  // [D][kWidth]
  float *x, *y;                   // [kTokens][kWidth]
  float *k, *q, *pairs;
  int dim, step;

  __device__ Sweep(float* shared, int dim) : dim(dim), step(dim + 1) {
    first = shared;
    second = first + dim * kWidth;
    start = second + dim * kWidth;
    x = start + dim * kWidth;
    y = x + kTokens * kWidth;
    k = y + kTokens * kWidth;
    q = k + kTokens * step;
    pairs = q + kTokens * step;
  }

  template <typename T>
  __device__ void load_keys(const TitansParams& p, int64_t b, int64_t token, int64_t h, int n) {
    load_rows(k, step, row_at<T>(p.k, b, token, h), p.k.seq, n, 0, dim, dim);
    load_rows(q, step, row_at<T>(p.q, b, token, h), p.q.seq, n, 0, dim, dim);
  }

  // pairs[t][j], j <= t: multiplied by -(q_t . k_j); they hold the weights on entry.
  __device__ void score(int n) {
    for (int i = threadIdx.x; i < n * kTokens; i += kThreads) {
      const int t = i / kTokens, j = i % kTokens;
      if (j > t) continue;
      float sum = 0;
#pragma unroll 4
      for (int d = 0; d < dim; ++d) sum = fmaf(q[t * step + d], k[j * step + d], sum);
      pairs[t * kPairStep + j] *= -sum;
    }
  }

  __device__ void load_states(const States& a, const States& b, int64_t sequence, int64_t h,
                              int64_t column, int64_t columns) {
    for (int i = threadIdx.x; i < dim * kWidth; i += kThreads) {
      const int64_t d = i / kWidth, c = column + i % kWidth;
      const auto at = [&](const States& s) {
        return s.data && c < columns ? s.data[sequence * s.sequence + h * s.head + d * columns + c]
                                     : 0;
      };
      first[i] = at(a);
      second[i] = at(b);
    }
  }
  __device__ void store_states(float* a, float* b, int64_t column, int64_t columns) {
    for (int i = threadIdx.x; i < dim * kWidth; i += kThreads) {
      const int64_t d = i / kWidth, c = column + i % kWidth;
      if (c < columns) a[d * columns + c] = first[i], b[d * columns + c] = second[i];
    }
  }
};

// Head and slice of a CTA. Packed: one extra sequence stands for the tokens outside of every
// sequence.
struct Share {
  int64_t b, h, column;
  __device__ Share(const TitansParams& p, int width) {
    const int64_t slices = ceil_div(p.value_dim, width);
    const int64_t head = blockIdx.x / slices;
    column = blockIdx.x % slices * width;
    b = head / p.heads;
    h = head % p.heads;
  }
};

// Zeroes the rows outside of every sequence.
template <typename T>
__device__ inline void clear_loose(const TitansParams& p, const Rows& rows, int64_t h,
                                   int64_t column, int64_t columns, int width) {
  const PackedRows all = all_rows(p.cu_seqlens, p.batch, p.seqlen);
  for (int64_t i = threadIdx.x; i < p.seqlen * width; i += kThreads) {
    const int64_t t = i / width, c = column + i % width;
    if (c < columns && !all.contain(t))
      const_cast<T*>(row_at<T>(rows, 0, t, h))[c] = static_cast<T>(0.f);
  }
}

// Writes the slots of sequence b, and the unused ones after it.
__device__ inline void write_places(const TitansParams& p, const Kept& kept, int64_t b,
                                    const PackedRows& rows) {
  const int64_t own = slots_before(p, b, rows.start);
  const int64_t blocks = titans_blocks(rows.length, p.chunk_size, kTokens);
  const int64_t begin = b == 0 ? 0 : own;
  const int64_t end =
      b == p.batch - 1 ? kept.slots : slots_before(p, b + 1, rows.start + rows.length);
  for (int64_t slot = begin + threadIdx.x; slot < end; slot += kThreads) {
    Place place{};
    if (slot >= own && slot < own + blocks) {
      const TitansBlock at = titans_block(slot - own, rows.length, p.chunk_size, kTokens);
      place = {static_cast<int>(b), static_cast<int>(at.tokens),
               static_cast<int>(own + at.number_of_start), rows.start + at.first};
    }
    kept.places[slot] = place;
  }
}

// kKeep: stores the inputs of the backward instead of out.
template <typename T, int kWidth, bool kKeep>
__global__ void __launch_bounds__(kThreads, kBlocksOfMultiprocessor)
    states_kernel(const __grid_constant__ TitansParams p, const __grid_constant__ Kept kept) {
  extern __shared__ float4 shared[];
  __shared__ Factors f;
  Sweep<kWidth> s(reinterpret_cast<float*>(shared), static_cast<int>(p.head_dim));
  const Share own(p, kWidth);
  const int64_t b = own.b, h = own.h;
  if (b == p.batch) {
    if (!kKeep) clear_loose<T>(p, p.out, h, own.column, p.value_dim, kWidth);
    return;
  }
  const PackedRows rows = rows_of(p, b);
  if (kKeep && h == 0 && own.column == 0) write_places(p, kept, b, rows);
  const int64_t slot = slots_before(p, b, rows.start);
  const int64_t blocks = titans_blocks(rows.length, p.chunk_size, kTokens);
  s.load_states(p.initial_memory, p.initial_momentum, b, h, own.column, p.value_dim);
  __syncthreads();
  constexpr int kFours = kWidth / 4;
  for (int64_t i = 0; i < blocks; ++i) {
    const TitansBlock at = titans_block(i, rows.length, p.chunk_size, kTokens);
    const int64_t token = rows.start + at.first;
    const int n = static_cast<int>(at.tokens);
    if (kKeep)
      s.store_states(kept.states + state_offset(p, slot + i, h, kMemory),
                     kept.states + state_offset(p, slot + i, h, kMomentum), own.column,
                     p.value_dim);
    if (at.starts)
      for (int j = threadIdx.x; j < s.dim * kWidth; j += kThreads) s.start[j] = s.first[j];
    s.template load_keys<T>(p, b, token, h, n);
    load_rows(s.x, kWidth, row_at<T>(p.v, b, token, h), p.v.seq, n, own.column, p.value_dim,
              kWidth);
    weigh<false>(p, f, s.pairs, nullptr, b, h, token, n);
    // U = K G - V
    for (int j = threadIdx.x; j < n * kFours; j += kThreads) {
      const int t = j / kFours, c = j % kFours * 4;
      const float4 v = four(s.x + t * kWidth + c);
      float u[4] = {-v.x, -v.y, -v.z, -v.w};
      multiply(u, s.k + t * s.step, 1, s.start + c, kWidth, s.dim);
      four(s.x + t * kWidth + c) = {u[0], u[1], u[2], u[3]};
    }
    if (!kKeep) s.score(n);
    __syncthreads();
    if (kKeep) {
      float* const to = kept.u + (row_number(p, b, token) * p.heads + h) * p.value_dim;
      store_rows(to, p.heads * p.value_dim, s.x, kWidth, n, own.column, p.value_dim, kWidth, 1.f);
    } else {
      // out = diag(W0) Q M + diag(W1) Q S - (W o Q K^T) U
      for (int j = threadIdx.x; j < n * kFours; j += kThreads) {
        const int t = j / kFours, c = j % kFours * 4;
        float m[4] = {}, o[4] = {}, sum[4] = {};
        multiply(m, s.q + t * s.step, 1, s.first + c, kWidth, s.dim);
        multiply(o, s.q + t * s.step, 1, s.second + c, kWidth, s.dim);
        multiply(sum, s.pairs + t * kPairStep, 1, s.x + c, kWidth, t + 1);
        four(s.y + t * kWidth + c) =
            sum_of({m[0], m[1], m[2], m[3]}, f.memory[t], {o[0], o[1], o[2], o[3]}, f.momentum[t],
                   {sum[0], sum[1], sum[2], sum[3]});
      }
      __syncthreads();
      store_rows(const_cast<T*>(row_at<T>(p.out, b, token, h)), p.out.seq, s.y, kWidth, n,
                 own.column, p.value_dim, kWidth, 1.f);
    }
    const float to_memory = f.memory[n - 1], to_momentum = f.momentum[n - 1], stay = f.kept[n - 1];
    // M = W00 M + W01 S - (diag(w) K)^T U, S = E1 S - (diag(e) K)^T U
    for (int j = threadIdx.x; j < s.dim * kFours; j += kThreads) {
      const int d = j / kFours, c = j % kFours * 4;
      float m[4] = {}, o[4] = {};
#pragma unroll 2
      for (int t = 0; t < n; ++t) {
        const float x = -s.k[t * s.step + d];
        const float4 u = four(s.x + t * kWidth + c);
        add(m, f.w_end[t] * x, u);
        add(o, f.e_end[t] * x, u);
      }
      float4 &memory = four(s.first + d * kWidth + c), &momentum = four(s.second + d * kWidth + c);
      memory = sum_of(memory, to_memory, momentum, to_momentum, {m[0], m[1], m[2], m[3]});
      momentum = sum_of(momentum, stay, {o[0], o[1], o[2], o[3]});
    }
    __syncthreads();
  }
  if (!kKeep && p.memory.data)
    s.store_states(p.memory.data + b * p.memory.sequence + h * p.memory.head,
                   p.momentum.data + b * p.momentum.sequence + h * p.momentum.head, own.column,
                   p.value_dim);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocksOfMultiprocessor)
    gradients_kernel(const __grid_constant__ TitansBackwardParams p,
                     const __grid_constant__ Kept kept) {
  extern __shared__ float4 shared[];
  __shared__ Factors f;
  const TitansParams& in = p.forward;
  Sweep<kWidth> s(reinterpret_cast<float*>(shared), static_cast<int>(in.head_dim));
  const Share own(in, kWidth);
  const int64_t b = own.b, h = own.h;
  if (b == in.batch) return clear_loose<T>(in, p.dv, h, own.column, in.value_dim, kWidth);
  const PackedRows rows = rows_of(in, b);
  const int64_t slot = slots_before(in, b, rows.start);
  s.load_states(p.dmemory, p.dmomentum, b, h, own.column, in.value_dim);
  for (int j = threadIdx.x; j < s.dim * kWidth; j += kThreads) s.start[j] = 0;
  __syncthreads();
  constexpr int kFours = kWidth / 4;
  for (int64_t i = titans_blocks(rows.length, in.chunk_size, kTokens); i-- > 0;) {
    const TitansBlock at = titans_block(i, rows.length, in.chunk_size, kTokens);
    const int64_t token = rows.start + at.first;
    const int n = static_cast<int>(at.tokens);
    s.store_states(kept.states + state_offset(in, slot + i, h, kMemoryGradient),
                   kept.states + state_offset(in, slot + i, h, kMomentumGradient), own.column,
                   in.value_dim);
    s.template load_keys<T>(in, b, token, h, n);
    load_rows(s.x, kWidth, p.dout.data ? row_at<T>(p.dout, b, token, h) : nullptr, p.dout.seq, n,
              own.column, p.dout.data ? in.value_dim : 0, kWidth);
    weigh<false>(in, f, s.pairs, nullptr, b, h, token, n);
    s.score(n);
    __syncthreads();
    // dU = -(W o P)^T dO - diag(w) K dM' - diag(e) K dS'
    for (int j = threadIdx.x; j < n * kFours; j += kThreads) {
      const int t = j / kFours, c = j % kFours * 4;
      float m[4] = {}, o[4] = {}, sum[4] = {};
      multiply(m, s.k + t * s.step, 1, s.first + c, kWidth, s.dim);
      multiply(o, s.k + t * s.step, 1, s.second + c, kWidth, s.dim);
      multiply(sum, s.pairs + t * kPairStep + t, kPairStep, s.x + t * kWidth + c, kWidth, n - t);
      four(s.y + t * kWidth + c) =
          sum_of({m[0], m[1], m[2], m[3]}, -f.w_end[t], {o[0], o[1], o[2], o[3]}, -f.e_end[t],
                 {sum[0], sum[1], sum[2], sum[3]});
    }
    __syncthreads();
    // dV = -dU
    store_rows(const_cast<T*>(row_at<T>(p.dv, b, token, h)), p.dv.seq, s.y, kWidth, n, own.column,
               in.value_dim, kWidth, -1.f);
    float* const to = kept.du + (row_number(in, b, token) * in.heads + h) * in.value_dim;
    store_rows(to, in.heads * in.value_dim, s.y, kWidth, n, own.column, in.value_dim, kWidth, 1.f);
    const float to_memory = f.memory[n - 1], to_momentum = f.momentum[n - 1], stay = f.kept[n - 1];
    // dM, dS and dG, as in cpu_backward.cpp
    for (int j = threadIdx.x; j < s.dim * kFours; j += kThreads) {
      const int d = j / kFours, c = j % kFours * 4;
      float m[4] = {}, o[4] = {}, g[4] = {};
#pragma unroll 2
      for (int t = 0; t < n; ++t) {
        const float x = s.q[t * s.step + d];
        const float4 gradient = four(s.x + t * kWidth + c);
        add(m, f.memory[t] * x, gradient);
        add(o, f.momentum[t] * x, gradient);
        add(g, s.k[t * s.step + d], four(s.y + t * kWidth + c));
      }
      float4 &memory = four(s.first + d * kWidth + c), &momentum = four(s.second + d * kWidth + c);
      float4& start = four(s.start + d * kWidth + c);
      start = {start.x + g[0], start.y + g[1], start.z + g[2], start.w + g[3]};
      momentum = sum_of(momentum, stay, memory, to_momentum, {o[0], o[1], o[2], o[3]});
      const float4 sum{m[0], m[1], m[2], m[3]};
      if (at.starts) {
        memory = sum_of(memory, to_memory, start, 1, sum);
        start = {};
      } else {
        memory = sum_of(memory, to_memory, sum);
      }
    }
    __syncthreads();
  }
  if (p.dinitial_memory.data)
    s.store_states(
        p.dinitial_memory.data + b * p.dinitial_memory.sequence + h * p.dinitial_memory.head,
        p.dinitial_momentum.data + b * p.dinitial_momentum.sequence + h * p.dinitial_momentum.head,
        own.column, in.value_dim);
}

}  // namespace tokenmill::cuda::titans_memory
