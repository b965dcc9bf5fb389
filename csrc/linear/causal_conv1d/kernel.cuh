// Forward: a thread walks down the tokens of a tile with the inputs before in registers.
#pragma once
#include "linear/causal_conv1d/params.h"
#include "linear/conv.cuh"

namespace tokenmill::cuda::causal_conv1d {

using conv::kThreads;
constexpr int kGroup = 4;  // tokens loaded at once

// A sequence among all rows. Whatever cu_seqlens hold, start <= row < end, within the tensor.
struct Sequence {
  int64_t b, start, end;
};

__device__ inline Sequence sequence_of(const CausalConv1dParams& p, int64_t row) {
  if (!p.cu_seqlens) {
    const int64_t b = row / p.seqlen;
    return {b, b * p.seqlen, (b + 1) * p.seqlen};
  }
  int64_t low = 0, high = p.batch;  // the last sequence that begins at or before the row
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (p.cu_seqlens[middle] > row ? high : low) = middle;
  }
  const int64_t start = min(max(int64_t{p.cu_seqlens[low]}, int64_t{0}), row);
  return {low, start, max(min(int64_t{p.cu_seqlens[low + 1]}, p.rows), row + 1)};
}

// First row and end of sequence b, clamped to the tensor.
__device__ inline Sequence sequence_at(const CausalConv1dParams& p, int64_t b) {
  if (!p.cu_seqlens) return {b, b * p.seqlen, (b + 1) * p.seqlen};
  const int64_t start = min(max(int64_t{p.cu_seqlens[b]}, int64_t{0}), p.rows);
  return {b, start, max(min(int64_t{p.cu_seqlens[b + 1]}, p.rows), start)};
}

template <typename T>
__device__ __forceinline__ T* row_at(const ConvRows& r, const CausalConv1dParams& p,
                                     const Sequence& s, int64_t row) {
  const int64_t offset = p.cu_seqlens ? row * r.seq : s.b * r.batch + (row - s.start) * r.seq;
  return static_cast<T*>(r.data) + offset;
}

template <typename T>
__device__ __forceinline__ T* state_at(const ConvStates& s, int64_t b, int64_t channel,
                                       int64_t column) {
  return static_cast<T*>(s.data) + b * s.sequence + channel * s.channel + column * s.column;
}

// The inputs before a row.
template <typename T, int kVector, int kTaps>
__device__ void load_window(float (&window)[kTaps - 1][kVector], const CausalConv1dParams& p,
                            const Sequence& s, int64_t row, int64_t channel) {
  const int64_t width = p.filter.width;
#pragma unroll
  for (int i = 0; i < kTaps - 1; ++i) {
    const int back = kTaps - 1 - i;
    const int64_t position = row - s.start - back;
#pragma unroll
    for (int e = 0; e < kVector; ++e) window[i][e] = 0;
    if (back >= width) continue;
    if (position >= 0) {
      load_floats(window[i], row_at<T>(p.x, p, s, row - back) + channel);
    } else if (p.initial.data) {
#pragma unroll
      for (int e = 0; e < kVector; ++e)
        window[i][e] =
            static_cast<float>(*state_at<T>(p.initial, s.b, channel + e, width - 1 + position));
    }
  }
}

// Calls visit(row, own, window, sum) for the rows of a tile, with bias and taps summed.
template <typename T, int kVector, int kTaps, typename Visit>
__device__ __forceinline__ void each_row(const CausalConv1dParams& p, int64_t first, int64_t last,
                                         int64_t channel, const conv::Taps<kVector, kTaps>& taps,
                                         const Visit& visit) {
  Sequence s{0, 0, 0};
  float window[kTaps - 1][kVector];
#pragma unroll 1
  for (int64_t row = first; row < last;) {
    if (row >= s.end) {
      s = sequence_of(p, row);
      load_window<T, kVector, kTaps>(window, p, s, row, channel);
    }
    const int count = static_cast<int>(min(int64_t{kGroup}, min(last, s.end) - row));
    float own[kGroup][kVector];
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (i < count) load_floats(own[i], row_at<T>(p.x, p, s, row + i) + channel);
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (i < count) {
        float sum[kVector];
        taps.convolve(sum, window, own[i]);
        visit(s, row + i, own[i], window, sum);
        conv::shift<kVector, kTaps>(window, own[i]);
      }
    row += count;
  }
}

template <typename T, int kVector, int kTaps>
__global__ void __launch_bounds__(kThreads)
    conv_forward_kernel(const __grid_constant__ CausalConv1dParams p, int tile, int slices) {
  const int64_t slice = blockIdx.x % static_cast<unsigned>(slices);
  const int64_t first = int64_t{blockIdx.x / static_cast<unsigned>(slices)} * tile;
  const int64_t channel = (slice * kThreads + threadIdx.x) * kVector;
  if (channel >= p.channels) return;
  const conv::Taps<kVector, kTaps> taps(p.filter, channel);
  each_row<T, kVector, kTaps>(
      p, first, min(first + tile, p.rows), channel, taps,
      [&](const Sequence& s, int64_t row, const auto&, const auto&, float (&sum)[kVector]) {
        if (p.filter.silu) {
#pragma unroll
          for (int e = 0; e < kVector; ++e) sum[e] *= sigmoid(sum[e]);
        }
        store_floats(row_at<T>(p.out, p, s, row) + channel, sum);
      });
}

// The last W - 1 inputs of each sequence; a thread holds a channel.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    conv_final_kernel(const __grid_constant__ CausalConv1dParams p, int slices) {
  const int64_t slice = blockIdx.x % static_cast<unsigned>(slices);
  const int64_t b = blockIdx.x / static_cast<unsigned>(slices);
  const int64_t channel = slice * kThreads + threadIdx.x;
  if (channel >= p.channels) return;
  const Sequence s = sequence_at(p, b);
  const int64_t back = p.filter.width - 1;
#pragma unroll 1
  for (int64_t k = 0; k < back; ++k) {
    const int64_t row = s.end - back + k;
    T x = static_cast<T>(0.f);
    if (row >= s.start)
      x = row_at<T>(p.x, p, s, row)[channel];
    else if (p.initial.data)
      x = *state_at<T>(p.initial, b, channel, back + row - s.start);
    *state_at<T>(p.final, b, channel, k) = x;
  }
}

}  // namespace tokenmill::cuda::causal_conv1d
