// Decode: a thread holds a channel, whose inputs pass through its registers.
#pragma once
#include "linear/causal_conv1d_decode/params.h"
#include "linear/conv.cuh"

namespace tokenmill::cuda::causal_conv1d_decode {

using conv::kThreads;

// kQuads: a channel has four columns, aligned as one access.
template <typename T, int kTaps, bool kQuads>
__global__ void __launch_bounds__(kThreads)
    conv_decode_kernel(const __grid_constant__ ConvDecodeParams p, int slices) {
  const int64_t slice = blockIdx.x % static_cast<unsigned>(slices);
  const int64_t b = blockIdx.x / static_cast<unsigned>(slices);
  const int64_t channel = slice * kThreads + threadIdx.x;
  if (channel >= p.channels) return;
  const int64_t slot = p.requests.slot(b);
  T* const out = static_cast<T*>(p.out.data) + b * p.out.batch + channel;
  if (slot < 0) {
#pragma unroll 1
    for (int64_t t = 0; t < p.seqlen; ++t) out[t * p.out.seq] = static_cast<T>(0.f);
    return;
  }
  const T* const x = static_cast<const T*>(p.x.data) + b * p.x.batch + channel;
  T* const state =
      static_cast<T*>(p.state.data) + slot * p.state.sequence + channel * p.state.channel;
  const conv::Taps<1, kTaps> taps(p.filter, channel);
  Pack<T, 4> columns;  // with kQuads
  if constexpr (kQuads) columns = *reinterpret_cast<const Pack<T, 4>*>(state);
  float window[kTaps - 1][1];
#pragma unroll
  for (int s = 0; s < kTaps - 1; ++s) {
    const int64_t column = p.columns - (kTaps - 1) + s;
    if constexpr (kQuads)
      window[s][0] = static_cast<float>(columns.x[s + 1]);
    else
      window[s][0] = s >= taps.unused ? static_cast<float>(state[column * p.state.column]) : 0;
  }
  const int64_t kept = p.requests.kept(b, p.seqlen);
#pragma unroll 1
  for (int64_t t = 0; t < p.seqlen; ++t) {
    const T input = x[t * p.x.seq];
    const float own[1] = {static_cast<float>(input)};
    float sum[1];
    taps.convolve(sum, window, own);
    out[t * p.out.seq] = static_cast<T>(p.filter.silu ? sum[0] * sigmoid(sum[0]) : sum[0]);
    conv::shift<1, kTaps>(window, own);
    if (kQuads && t < kept) columns = {columns.x[1], columns.x[2], columns.x[3], input};
  }
  if constexpr (kQuads) {
    *reinterpret_cast<Pack<T, 4>*>(state) = columns;
  } else {
    // Column k takes input k + kept; it is read before column k + kept is written.
#pragma unroll 1
    for (int64_t k = 0; k < p.columns; ++k) {
      const int64_t from = k + kept;
      state[k * p.state.column] =
          from < p.columns ? state[from * p.state.column] : x[(from - p.columns) * p.x.seq];
    }
  }
}

}  // namespace tokenmill::cuda::causal_conv1d_decode
