// Decode of the delta rule: a CTA holds columns of the state of a head in registers, for all tokens
// of the call. Adjacent lanes hold adjacent columns; the other lanes and the warps hold other rows.
#pragma once
#include "cuda/arch/opaque.cuh"
#include "cuda/vector.cuh"
#include "cuda/warp.cuh"
#include "linear/decay.cuh"
#include "linear/delta_attention_decode/params.h"

namespace tokenmill::cuda::delta_attention_decode {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
constexpr int kMaxDim = 256;
constexpr int kLanes = 8;                 // lanes of a row
constexpr int kRows = kThreads / kLanes;  // rows of a pass of the CTA
constexpr int kPasses = kMaxDim / kRows;  // rows of a thread

template <int kVector>
struct Shared {
  float q[kMaxDim], k[kMaxDim], decay[kMaxDim];
  float squares[2][kWarps];
  float parts[2][kWarps][kLanes * kVector];
};

// Sum over all rows of the CTA, in the same order in every thread.
template <int kVector>
__device__ __forceinline__ void sum_rows(float (&x)[kVector],
                                         float (&parts)[kWarps][kLanes * kVector]) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
#pragma unroll
    for (int step = kLanes; step < kWarpSize; step *= 2)
      x[e] += __shfl_xor_sync(0xffffffff, x[e], step);
    if (threadIdx.x % kWarpSize < kLanes) parts[warp][lane * kVector + e] = x[e];
  }
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    x[e] = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) x[e] += parts[w][lane * kVector + e];
  }
}

// 1 / |x| of a row whose elements are spread over the threads.
__device__ __forceinline__ float inverse_norm(float x, float (&parts)[kWarps]) {
  x = warp_sum(x * x);
  if (threadIdx.x % kWarpSize == 0) parts[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  float sum = kL2NormEpsilon;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += parts[w];
  return 1 / sqrtf(sum);
}

// A value head of a request.
template <typename T>
struct Head {
  const DeltaDecodeParams& p;
  int64_t b, h;

  __device__ T* at(const Rows& x, int64_t t, int64_t head) const {
    return static_cast<T*>(x.data) + b * x.batch + t * x.seq + head * x.head;
  }
  __device__ const float* gate(const TokenGates& x, int64_t t) const {
    return x.data + b * x.batch + t * x.seq + h * x.head;
  }
};

// q, k and the decays of token t, for all threads.
template <typename T, int kVector>
__device__ __forceinline__ void load_token(const Head<T>& head, int64_t t,
                                           Shared<kVector>& shared) {
  const DeltaDecodeParams& p = head.p;
  const int64_t key_head = head.h / (p.heads / p.key_heads);
  const int d = threadIdx.x;
  float q = 0, k = 0;
  if (d < p.head_dim) {
    q = static_cast<float>(head.at(p.q, t, key_head)[d]);
    k = static_cast<float>(head.at(p.k, t, key_head)[d]);
  }
  if (p.l2norm) {
    q *= inverse_norm(q, shared.squares[0]);
    k *= inverse_norm(k, shared.squares[1]);
  }
  if (d < p.head_dim) {
    shared.q[d] = p.scale * q;
    shared.k[d] = k;
    float decay = 1;
    if (p.log_decay.data) {
      const float x = head.gate(p.log_decay, t)[p.per_channel ? d : 0];
      decay = exp2_exact(log2_decay(x, kMinTokenDecay));
    }
    shared.decay[d] = decay;
  }
  __syncthreads();
}

// Rows row, row + kRows, ... of kVector columns of a state.
template <int kVector>
struct Columns {
  float s[kPasses][kVector];
  int row, rows;  // rows: those that exist, 0 if the columns do not

  template <typename Visit>
  __device__ __forceinline__ void each(const Visit& visit) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i)
      if (row + i * kRows < rows) visit(s[i], row + i * kRows);
  }

  // S *= decay; returns k S.
  __device__ __forceinline__ void decay(const Shared<kVector>& shared, float (&of_key)[kVector]) {
    each([&](float (&x)[kVector], int r) {
      const float decay = shared.decay[r], key = shared.k[r];
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        x[e] *= decay;
        of_key[e] = fmaf(key, x[e], of_key[e]);
      }
    });
  }

  // S += k^T u; returns q S.
  __device__ __forceinline__ void update(const Shared<kVector>& shared, const float (&u)[kVector],
                                         float (&y)[kVector]) {
    each([&](float (&x)[kVector], int r) {
      const float key = shared.k[r], query = shared.q[r];
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        x[e] = fmaf(key, u[e], x[e]);
        y[e] = fmaf(query, x[e], y[e]);
      }
    });
  }
};

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    delta_decode_kernel(const __grid_constant__ DeltaDecodeParams p, int slices) {
  __shared__ Shared<kVector> shared;
  const int64_t item = blockIdx.x / static_cast<unsigned>(slices);
  const int slice = static_cast<int>(blockIdx.x % static_cast<unsigned>(slices));
  const Head<T> head{p, item / p.heads, item % p.heads};
  const int64_t slot = p.requests.slot(head.b);
  const int column = (slice * kLanes + threadIdx.x % kLanes) * kVector;
  const bool has_columns = column < p.value_dim;
  const int row = threadIdx.x / kLanes;
  const auto store_out = [&](int64_t t, const float (&y)[kVector]) {
    if (row > 0 || !has_columns) return;
#pragma unroll
    for (int e = 0; e < kVector; ++e) head.at(p.out, t, head.h)[column + e] = static_cast<T>(y[e]);
  };
  if (slot < 0) {
    for (int64_t t = 0; t < p.seqlen; ++t) store_out(t, {});
    return;
  }

  float* const state = p.state.data + slot * p.state.sequence + head.h * p.state.head + column;
  Columns<kVector> columns{{}, row, has_columns ? static_cast<int>(p.head_dim) : 0};
  columns.each([&](float (&x)[kVector], int r) { load_floats(x, state + r * p.value_dim); });
  const int64_t kept = p.requests.kept(head.b, p.seqlen);
#pragma unroll 1
  for (int64_t t = 0; t < p.seqlen; ++t) {
    load_token(head, t, shared);
    float u[kVector] = {}, y[kVector] = {};
    columns.decay(shared, u);
    sum_rows(u, shared.parts[0]);
    // u = beta (v - k S)
    const float beta = *head.gate(p.beta, t);
#pragma unroll
    for (int e = 0; e < kVector; ++e)
      if (has_columns)
        u[e] = beta * (static_cast<float>(head.at(p.v, t, head.h)[column + e]) - u[e]);
    columns.update(shared, u, y);
    sum_rows(y, shared.parts[1]);
    store_out(t, y);
    if (t + 1 == kept) {
      int64_t stride = p.value_dim;
      opt_barrier(stride);  // addresses of rows in registers of the loop would spill
      columns.each([&](float (&x)[kVector], int r) { store_floats(state + r * stride, x); });
    }
  }
}

}  // namespace tokenmill::cuda::delta_attention_decode
