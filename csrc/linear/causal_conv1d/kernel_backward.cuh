// Backward: gradients before the activation and their sums for the filter; then the inputs'.
#pragma once
#include "linear/causal_conv1d/kernel.cuh"

namespace tokenmill::cuda::causal_conv1d {

constexpr int kGradientChannels = 4;  // adjacent channels per thread

template <typename T, int kVector, int kTaps>
__global__ void __launch_bounds__(kThreads)
    conv_filter_kernel(const __grid_constant__ CausalConv1dBackwardParams params, int slices) {
  const CausalConv1dParams& p = params.forward;
  const int64_t slice = blockIdx.x % static_cast<unsigned>(slices);
  const int64_t part = blockIdx.x / static_cast<unsigned>(slices);
  const int64_t channel = (slice * kThreads + threadIdx.x) * kVector;
  if (channel >= p.channels) return;
  const conv::Taps<kVector, kTaps> taps(p.filter, channel);
  float sums[kTaps + 1][kVector] = {};
  const int64_t first = part * params.part_rows;
  each_row<T, kVector, kTaps>(
      p, first, min(first + params.part_rows, p.rows), channel, taps,
      [&](const Sequence& s, int64_t row, const float (&own)[kVector],
          const float (&window)[kTaps - 1][kVector], float (&sum)[kVector]) {
        float d[kVector];
        load_floats(d, row_at<T>(params.dout, p, s, row) + channel);
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          if (p.filter.silu) {
            const float y = sigmoid(sum[e]);
            d[e] *= y * fmaf(sum[e], 1 - y, 1);
          }
      // dweight_j += dpre x_j, dbias += dpre
#pragma unroll
          for (int i = 0; i < kTaps - 1; ++i) sums[i][e] = fmaf(d[e], window[i][e], sums[i][e]);
          sums[kTaps - 1][e] = fmaf(d[e], own[e], sums[kTaps - 1][e]);
          sums[kTaps][e] += d[e];
        }
        store_floats(params.dpre + row * p.channels + channel, d);
      });
  float* const to = params.parts + part * (p.filter.width + 1) * p.channels + channel;
#pragma unroll
  for (int i = 0; i <= kTaps; ++i)
    if (i >= taps.unused) store_floats(to + (i - taps.unused) * p.channels, sums[i]);
}

// dx_t = sum over k of tap_(W - 1 - k) dpre_(t + k), within the sequence, plus dfinal_state.
template <typename T, int kVector, int kTaps>
__global__ void __launch_bounds__(kThreads)
    conv_input_kernel(const __grid_constant__ CausalConv1dBackwardParams params, int tile,
                      int slices) {
  const CausalConv1dParams& p = params.forward;
  const int64_t slice = blockIdx.x % static_cast<unsigned>(slices);
  const int64_t first = int64_t{blockIdx.x / static_cast<unsigned>(slices)} * tile;
  const int64_t channel = (slice * kThreads + threadIdx.x) * kVector;
  if (channel >= p.channels) return;
  const conv::Taps<kVector, kTaps> taps(p.filter, channel);
  Sequence s{0, 0, 0};
#pragma unroll 1
  for (int64_t row = first; row < min(first + tile, p.rows); ++row) {
    if (row >= s.end) s = sequence_of(p, row);
    const int64_t left = s.end - row, width = p.filter.width;
    float sum[kVector] = {};
#pragma unroll
    for (int k = 0; k < kTaps; ++k)
      if (k < left && k < width) {
        float d[kVector];
        load_floats(d, params.dpre + (row + k) * p.channels + channel);
#pragma unroll
        for (int e = 0; e < kVector; ++e) sum[e] = fmaf(taps.tap[kTaps - 1 - k][e], d[e], sum[e]);
      }
    if (params.dfinal.data && left < width) {
#pragma unroll
      for (int e = 0; e < kVector; ++e)
        sum[e] +=
            static_cast<float>(*state_at<T>(params.dfinal, s.b, channel + e, width - 1 - left));
    }
    store_floats(row_at<T>(params.dx, p, s, row) + channel, sum);
  }
}

// dinitial_state: input k meets tap k - t of token t. A thread holds a channel.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    conv_initial_kernel(const __grid_constant__ CausalConv1dBackwardParams params, int slices) {
  const CausalConv1dParams& p = params.forward;
  const int64_t slice = blockIdx.x % static_cast<unsigned>(slices);
  const int64_t b = blockIdx.x / static_cast<unsigned>(slices);
  const int64_t channel = slice * kThreads + threadIdx.x;
  if (channel >= p.channels) return;
  const Sequence s = sequence_at(p, b);
  const int64_t length = s.end - s.start;
#pragma unroll 1
  for (int64_t k = 0; k + 1 < p.filter.width; ++k) {
    float sum = 0;
#pragma unroll 1
    for (int64_t t = 0; t <= k && t < length; ++t)
      sum = fmaf(conv::load_tap(p.filter, channel, k - t),
                 params.dpre[(s.start + t) * p.channels + channel], sum);
    if (params.dfinal.data && k >= length)
      sum += static_cast<float>(*state_at<T>(params.dfinal, b, channel, k - length));
    *state_at<T>(params.dinitial, b, channel, k) = static_cast<T>(sum);
  }
}

// Adds the parts, in their order: row blockIdx.y of the filter, a channel per thread.
__global__ void __launch_bounds__(kThreads)
    conv_parts_kernel(const __grid_constant__ CausalConv1dBackwardParams params, int64_t parts) {
  const CausalConv1dParams& p = params.forward;
  const int64_t channel = int64_t{blockIdx.x} * kThreads + threadIdx.x, j = blockIdx.y;
  const int64_t width = p.filter.width;
  if (channel >= p.channels || (j == width && !params.dbias)) return;
  const float* from = params.parts + j * p.channels + channel;
  float sum = 0;
#pragma unroll 8
  for (int64_t i = 0; i < parts; ++i) sum += from[i * (width + 1) * p.channels];
  if (j == width)
    conv::store_from_float(params.dbias, p.filter.bias_dtype, channel, sum);
  else
    conv::store_from_float(params.dweight, p.filter.dtype, channel * width + j, sum);
}

}  // namespace tokenmill::cuda::causal_conv1d
