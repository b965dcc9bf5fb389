// Decode: the state of a head passes through the registers of one CTA once per token. Adjacent
// lanes hold adjacent columns; warps, and the remaining lanes of a warp, hold different features.
#pragma once
#include "cuda/arch/opaque.cuh"
#include "cuda/vector.cuh"
#include "cuda/warp.cuh"
#include "linear/decay.cuh"
#include "linear/feature_map.cuh"
#include "linear/linear_attention_decode/params.h"

namespace tokenmill::cuda::linear_attention_decode {

constexpr int kDecodeThreads = 256;
constexpr int kDecodeFeatures = 9 * 64;  // at least the features of taylor2 with 32 dimensions
constexpr int kDecodeColumns = 257;      // value_dim and the normalizer
constexpr int kDecodeChannels = 256;     // head_dim
constexpr int kDecodeBatch = 4;          // state rows loaded at once per thread

struct DecodePlan {
  int lanes;   // lanes per row of the state, a power of two
  int slices;  // slices of the columns, one CTA each; 1 with a normalizer, which all columns need
};

struct DecodeShared {
  float q[kDecodeFeatures], k[kDecodeFeatures];
  float v[kDecodeColumns], y[kDecodeColumns];
  float decay[kDecodeChannels];  // per channel
  float parts[kDecodeThreads * 4];
};

// Feature f of x [dim] in shared memory; query features include their factors.
__device__ inline float decode_feature(const float* x, int f, int dim, float scale, bool query) {
  if (f == 0) return 1;
  if (f <= dim) return query ? scale * x[f - 1] : x[f - 1];
  int rest = f - 1 - dim, i = 0;
  for (; rest >= dim - i; ++i) rest -= dim - i;
  const float factor = !query ? 1 : rest == 0 ? scale * scale / 2 : scale * scale;
  return factor * (x[i] * x[i + rest]);
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kDecodeThreads)
    decode_kernel(const __grid_constant__ LinearDecodeParams p,
                  const __grid_constant__ DecodePlan plan) {
  __shared__ DecodeShared shared;
  const int64_t head = blockIdx.x / static_cast<unsigned>(plan.slices);
  const int slice = static_cast<int>(blockIdx.x % static_cast<unsigned>(plan.slices));
  const int64_t b = head / p.heads, h = head % p.heads, kv_head = h / (p.heads / p.kv_heads);
  const int dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  const int columns = value_dim + p.normalize;
  const bool taylor = p.map == FeatureMap::taylor2;
  const int features = taylor ? 1 + dim + dim * (dim + 1) / 2 : dim;
  const int64_t slot = p.requests.slot(b), kept = p.requests.kept(b, p.seqlen);
  const bool skipped = slot < 0;
  const int width = plan.lanes * kVector;  // columns per pass of the CTA
  const int lane = threadIdx.x % plan.lanes * kVector, row = threadIdx.x / plan.lanes;
  const int rows = kDecodeThreads / plan.lanes;
  float* const state =
      skipped ? nullptr : p.state.data + slot * p.state.sequence + h * p.state.head;
  float* const draft = p.draft ? p.draft + head * features * columns : nullptr;
  const auto at = [](const Rows& x, int64_t batch, int64_t t, int64_t of_head) {
    return static_cast<T*>(x.data) + batch * x.batch + t * x.seq + of_head * x.head;
  };

#pragma unroll 1
  for (int64_t t = 0; t < p.seqlen; ++t) {
    T* const out = at(p.out, b, t, h);
    if (skipped) {
      for (int c = slice * width + threadIdx.x; c < value_dim; c += kDecodeThreads)
        if (plan.slices == 1 || c < (slice + 1) * width) out[c] = static_cast<T>(0.f);
      continue;
    }
    const T* const q = at(p.q, b, t, h);
    const T* const k = at(p.k, b, t, kv_head);
    const T* const v = at(p.v, b, t, kv_head);
    for (int c = threadIdx.x; c < columns; c += kDecodeThreads)
      shared.v[c] = c < value_dim ? static_cast<float>(v[c]) : 1;
    float* const raw = shared.parts;  // staging of q and k before the products of taylor2
    for (int f = threadIdx.x; f < dim; f += kDecodeThreads) {
      (taylor ? raw : shared.q)[f] = map_feature(p.map, static_cast<float>(q[f]));
      (taylor ? raw + dim : shared.k)[f] = map_feature(p.map, static_cast<float>(k[f]));
    }
    if (taylor) {
      __syncthreads();
      for (int f = threadIdx.x; f < features; f += kDecodeThreads) {
        shared.q[f] = decode_feature(raw, f, dim, p.scale, true);
        shared.k[f] = decode_feature(raw + dim, f, dim, p.scale, false);
      }
    }
    float of_head = 1;
    if (p.decay.data) {
      const float* const x = p.decay.data + b * p.decay.batch + t * p.decay.seq + h * p.decay.head;
      if (!p.decay.per_channel)
        of_head = exp2_exact(log2_decay(*x, kMinHeadDecay));
      else if (threadIdx.x < dim)
        shared.decay[threadIdx.x] = exp2_exact(log2_decay(x[threadIdx.x], kMinTokenDecay));
    }
    __syncthreads();
    const float* from = t <= kept ? state : draft;
    float* to = t < kept ? state : draft;
    opt_barrier(from);
    opt_barrier(to);
#pragma unroll 1
    for (int first = slice * width; first < columns; first += plan.slices * width) {
      const int column = first + lane;
      float sum[kVector] = {};
      if (column < columns) {
        float value[kVector];
#pragma unroll
        for (int e = 0; e < kVector; ++e) value[e] = shared.v[column + e];
#pragma unroll 1
        for (int f0 = row; f0 < features; f0 += kDecodeBatch * rows) {
          Pack<float, kVector> s[kDecodeBatch];
#pragma unroll
          for (int i = 0; i < kDecodeBatch; ++i)
            if (f0 + i * rows < features)
              s[i] = *reinterpret_cast<const Pack<float, kVector>*>(
                  from + int64_t{f0 + i * rows} * columns + column);
#pragma unroll
          for (int i = 0; i < kDecodeBatch; ++i) {
            const int f = f0 + i * rows;
            if (f >= features) break;
            const float key = shared.k[f], query = shared.q[f];
            const float decay = p.decay.per_channel ? shared.decay[f] : of_head;
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
              // S = decay S + k^T v, out += q S
              s[i].x[e] = fmaf(decay, s[i].x[e], key * value[e]);
              sum[e] = fmaf(query, s[i].x[e], sum[e]);
            }
            *reinterpret_cast<Pack<float, kVector>*>(to + int64_t{f} * columns + column) = s[i];
          }
        }
      }
#pragma unroll
      for (int e = 0; e < kVector; ++e) shared.parts[row * width + lane + e] = sum[e];
      __syncthreads();
      for (int c = threadIdx.x; c < width && first + c < columns; c += kDecodeThreads) {
        float y = 0;
        for (int r = 0; r < rows; ++r) y += shared.parts[r * width + c];
        shared.y[first + c] = taylor ? y : p.scale * y;
      }
      __syncthreads();
    }
    const float normalizer = p.normalize ? shared.y[value_dim] + kNormalizerEpsilon : 1;
    for (int c = slice * width + threadIdx.x; c < value_dim; c += kDecodeThreads)
      if (plan.slices == 1 || c < (slice + 1) * width)
        out[c] = static_cast<T>(p.normalize ? shared.y[c] / normalizer : shared.y[c]);
    __syncthreads();
  }
}

}  // namespace tokenmill::cuda::linear_attention_decode
