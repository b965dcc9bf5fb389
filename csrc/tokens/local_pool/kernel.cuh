// A thread pools a vector of channels of one token. Neighbours share what they read through the
// level 1 cache: a block is a run of tokens of a line.
#pragma once
#include "cuda/divisor.cuh"
#include "cuda/vector.cuh"
#include "tokens/local_pool/params.h"
#include "tokens/row_copy.cuh"

namespace tokenmill::cuda {

constexpr uint16_t kNoTap = 0xffff;  // taps are below 255 x 255

struct PoolPlan {
  Divisor width, height;
  int tokens;
};

struct PoolToken {
  int64_t index, b;
  int y, x;

  __device__ __forceinline__ PoolToken(const PoolPlan& plan, int i) : index(i) {
    const int line = plan.width.divide(i);
    x = i - line * plan.width.value;
    const int sequence = plan.height.divide(line);
    y = line - sequence * plan.height.value;
    b = sequence;
  }
};

__device__ __forceinline__ bool pool_counts(const LocalPoolParams& p, int64_t b, int y, int x) {
  return !p.mask || p.mask[b * p.mask_batch + y * p.mask_line + x * p.mask_token];
}

// begin_line(), then visit(tap, y, x) for the taps of a line of the window that are on the map;
// kStep is -1 for the tokens whose window has this one as that tap.
template <int kStep, typename BeginLine, typename Visit>
__device__ __forceinline__ void for_taps(const LocalPoolParams& p, const PoolToken& at,
                                         const BeginLine& begin_line, const Visit& visit) {
  for (int i = 0; i < p.kernel_y; ++i) {
    const int y = at.y + kStep * (i - p.kernel_y / 2) * p.dilation_y;
    if (y < 0 || y >= p.height) continue;
    begin_line();
    for (int j = 0; j < p.kernel_x; ++j) {
      const int x = at.x + kStep * (j - p.kernel_x / 2) * p.dilation_x;
      if (x >= 0 && x < p.width) visit(i * p.kernel_x + j, y, x);
    }
  }
}

__device__ __forceinline__ float pool_divisor(const LocalPoolParams& p, int count) {
  return static_cast<float>(p.count_include_pad ? p.kernel_y * p.kernel_x : count);
}

// visit(token) for the tokens of this thread, visit_channels(c) for its vectors of one.
template <typename Visit>
__device__ __forceinline__ void visit_token(const PoolPlan& plan, const Visit& visit) {
  const int64_t i = row_of_thread();
  if (i < plan.tokens) visit(PoolToken(plan, static_cast<int>(i)));
}
template <int kVector, typename Visit>
__device__ __forceinline__ void visit_channels(const LocalPoolParams& p, const Visit& visit) {
  for (int64_t c = threadIdx.x * kVector; c < p.channels; c += blockDim.x * kVector) visit(c);
}

template <int kVector>
__device__ __forceinline__ void fill(float (&x)[kVector], float value) {
#pragma unroll
  for (int v = 0; v < kVector; ++v) x[v] = value;
}
template <int kVector>
__device__ __forceinline__ void add(float (&x)[kVector], const float (&y)[kVector], float scale) {
#pragma unroll
  for (int v = 0; v < kVector; ++v) x[v] = fmaf(scale, y[v], x[v]);
}

template <typename T, int kVector, bool kMax>
__global__ void __launch_bounds__(kRowThreads, 5)
    local_pool_kernel(const __grid_constant__ LocalPoolParams p,
                      const __grid_constant__ PoolPlan plan) {
  visit_token(plan, [&](const PoolToken& at) {
    const T* x = static_cast<const T*>(p.x) + at.b * p.x_batch;
    visit_channels<kVector>(p, [&](int64_t c) {
      float pooled[kVector], line[kVector], value[kVector];
      fill(pooled, kMax ? -INFINITY : 0);
      fill(line, 0);
      int count = 0;
      for_taps<1>(
          p, at,
          [&] {
            if constexpr (kMax) return;
            add(pooled, line, 1);
            fill(line, 0);
          },
          [&](int, int ty, int tx) {
            if (!pool_counts(p, at.b, ty, tx)) return;
            ++count;
            load_floats(value, x + ty * p.x_line + tx * p.x_token + c);
            if constexpr (kMax) {
#pragma unroll
              for (int v = 0; v < kVector; ++v)
                pooled[v] = value[v] != value[v] || value[v] > pooled[v] ? value[v] : pooled[v];
            } else {
              add(line, value, 1);
            }
          });
      if constexpr (!kMax) {
        add(pooled, line, 1);
        const float divisor = count > 0 ? pool_divisor(p, count) : 1;
#pragma unroll
        for (int v = 0; v < kVector; ++v) pooled[v] = pooled[v] / divisor;
      }
      if (count == 0) fill(pooled, 0);
      if (p.subtract_input) {
        load_floats(value, x + at.y * p.x_line + at.x * p.x_token + c);
        add(pooled, value, -1);
      }
      store_floats(static_cast<T*>(p.out) + at.index * p.channels + c, pooled);
    });
  });
}

// One over what the mean of each token was divided by, 0 where nothing was.
__global__ void __launch_bounds__(kRowThreads)
    pool_scales_kernel(const __grid_constant__ LocalPoolParams p,
                       const __grid_constant__ PoolPlan plan, float* scales) {
  visit_token(plan, [&](const PoolToken& at) {
    int count = 0;
    for_taps<1>(p, at, [] {}, [&](int, int y, int x) { count += pool_counts(p, at.b, y, x); });
    scales[at.index] = count > 0 ? 1 / pool_divisor(p, count) : 0;
  });
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kRowThreads)
    mean_backward_kernel(const __grid_constant__ LocalPoolBackwardParams q,
                         const __grid_constant__ PoolPlan plan, const float* scales) {
  const LocalPoolParams& p = q.forward;
  visit_token(plan, [&](const PoolToken& at) {
    const T* dout = static_cast<const T*>(q.dout) + at.b * q.dout_batch;
    const float* of_sequence = scales + at.b * p.height * p.width;
    const bool counts = pool_counts(p, at.b, at.y, at.x);
    visit_channels<kVector>(p, [&](int64_t c) {
      float sum[kVector] = {}, line[kVector] = {}, value[kVector];
      const auto end_line = [&] {
        add(sum, line, 1);
        fill(line, 0);
      };
      if (counts)
        for_taps<-1>(p, at, end_line, [&](int, int y, int x) {
          load_floats(value, dout + y * q.dout_line + x * q.dout_token + c);
          const float scale = of_sequence[y * p.width + x];
          if (scale != 0) add(line, value, scale);
        });
      end_line();
      if (p.subtract_input) {
        load_floats(value, dout + at.y * q.dout_line + at.x * q.dout_token + c);
        add(sum, value, -1);
      }
      store_floats(static_cast<T*>(p.out) + at.index * p.channels + c, sum);
    });
  });
}

// The tap that each maximum comes from.
template <typename T, int kVector>
__global__ void __launch_bounds__(kRowThreads)
    pool_taps_kernel(const __grid_constant__ LocalPoolParams p,
                     const __grid_constant__ PoolPlan plan, uint16_t* taps) {
  visit_token(plan, [&](const PoolToken& at) {
    const T* x = static_cast<const T*>(p.x) + at.b * p.x_batch;
    visit_channels<kVector>(p, [&](int64_t c) {
      float best[kVector], value[kVector];
      Pack<uint16_t, kVector> found;
#pragma unroll
      for (int v = 0; v < kVector; ++v) found.x[v] = kNoTap;
      fill(best, 0);
      for_taps<1>(
          p, at, [] {},
          [&](int tap, int ty, int tx) {
            if (!pool_counts(p, at.b, ty, tx)) return;
            load_floats(value, x + ty * p.x_line + tx * p.x_token + c);
#pragma unroll
            for (int v = 0; v < kVector; ++v) {
              // The first NaN stays: nothing is greater, and none but a number gives way to it.
              const bool is_number = best[v] == best[v];
              const bool wins = is_number && !(value[v] <= best[v]);
              if (wins || found.x[v] == kNoTap) {
                best[v] = value[v];
                found.x[v] = static_cast<uint16_t>(tap);
              }
            }
          });
      *reinterpret_cast<Pack<uint16_t, kVector>*>(taps + at.index * p.channels + c) = found;
    });
  });
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kRowThreads)
    maximum_backward_kernel(const __grid_constant__ LocalPoolBackwardParams q,
                            const __grid_constant__ PoolPlan plan, const uint16_t* taps) {
  const LocalPoolParams& p = q.forward;
  visit_token(plan, [&](const PoolToken& at) {
    const T* dout = static_cast<const T*>(q.dout) + at.b * q.dout_batch;
    const uint16_t* of_sequence = taps + at.b * p.height * p.width * p.channels;
    visit_channels<kVector>(p, [&](int64_t c) {
      float sum[kVector] = {}, value[kVector];
      for_taps<-1>(
          p, at, [] {},
          [&](int tap, int y, int x) {
            const int64_t token = int64_t{y} * p.width + x;
            const auto found = *reinterpret_cast<const Pack<uint16_t, kVector>*>(
                of_sequence + token * p.channels + c);
            load_floats(value, dout + y * q.dout_line + x * q.dout_token + c);
#pragma unroll
            for (int v = 0; v < kVector; ++v)
              if (found.x[v] == tap) sum[v] += value[v];
          });
      if (p.subtract_input) {
        load_floats(value, dout + at.y * q.dout_line + at.x * q.dout_token + c);
        add(sum, value, -1);
      }
      store_floats(static_cast<T*>(p.out) + at.index * p.channels + c, sum);
    });
  });
}

}  // namespace tokenmill::cuda
