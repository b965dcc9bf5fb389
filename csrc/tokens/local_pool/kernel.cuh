// A thread pools a vector of channels of one token. For compact windows a CTA copies a tile of the
// map and its halo, in a slice of channels, to shared memory; otherwise it processes a run of
// tokens of a line, and adjacent threads share their reads through the L1 cache.
#pragma once
#include "cuda/arch/cp_async.cuh"
#include "cuda/arch/opaque.cuh"
#include "cuda/arch/shared_memory.cuh"
#include "cuda/fast_divmod.cuh"
#include "cuda/math.cuh"
#include "cuda/vector.cuh"
#include "tokens/local_pool/params.h"
#include "tokens/row_copy.cuh"

namespace tokenmill::cuda::local_pool {

constexpr uint16_t kNoTap = 0xffff;   // taps are below 255 x 255
constexpr int kPoolBlocks = 4;        // CTAs per SM, if tiles permit
constexpr int kPoolBytes = 16;        // bytes per load and lane
constexpr int kTileBytes = 48 << 10;  // shared memory of a tile and its scales

// height x width tokens plus a halo of halo_y, halo_x, in lines of pitch tokens; slices of `lanes`
// vectors of channels.
struct PoolTiles {
  int height, width, halo_y, halo_x, pitch;
  int lines, columns, slices, lanes;  // tiles along y and x, and along the channels
  FastDivmod inner, outer;            // width, pitch
};

struct PoolPlan {
  FastDivmod width, height;
  int tokens;
  PoolTiles tiles;
};

// Elements of the tokens of one sequence; Index is int in shared memory.
template <typename T, typename Index = int64_t>
struct PoolSource {
  const T* data;
  Index line, token;

  __device__ __forceinline__ const T* at(int y, int x) const { return data + y * line + x * token; }
};
// Elements of all sequences.
template <typename T>
struct PoolMap {
  const T* data;
  int64_t batch, line, token;
};

struct PoolToken {
  int64_t index, b;
  int y, x;

  __device__ __forceinline__ PoolToken(const LocalPoolParams& p, int64_t sequence, int y, int x)
      : index((sequence * p.height + y) * p.width + x), b(sequence), y(y), x(x) {}
  __device__ __forceinline__ PoolToken(const PoolPlan& plan, int i) : index(i) {
    const int line = plan.width.divide(i);
    x = i - line * plan.width.value;
    const int sequence = plan.height.divide(line);
    y = line - sequence * plan.height.value;
    b = sequence;
  }
};

template <bool kMasked = true>
__device__ __forceinline__ bool pool_counts(const LocalPoolParams& p, int64_t b, int y, int x) {
  if (!kMasked || !p.mask) return true;
  return p.mask[b * p.mask_batch + y * p.mask_line + x * p.mask_token];
}
// Calls run.operator()<kMasked>(), so that without a mask no tap tests it.
template <typename Run>
__device__ __forceinline__ void with_mask(const LocalPoolParams& p, const Run& run) {
  if (p.mask)
    run.template operator()<true>();
  else
    run.template operator()<false>();
}

// Calls visit(tap, y, x, data) for the taps of the window that lie on the map, and end_line() after
// each line; with kStep -1 for the tokens that have this token at that tap of their window.
template <int kStep, typename Source, typename Visit, typename EndLine>
__device__ __forceinline__ void for_taps(const LocalPoolParams& p, const PoolToken& at,
                                         const Source& source, const Visit& visit,
                                         const EndLine& end_line) {
  const int step_y = kStep * p.dilation_y, step_x = kStep * p.dilation_x;
  auto step = step_x * source.token;
  opt_barrier(step);
  const int first_x = at.x - p.kernel_x / 2 * step_x;
  int y = at.y - p.kernel_y / 2 * step_y;
  for (int i = 0; i < p.kernel_y; ++i, y += step_y) {
    if (static_cast<unsigned>(y) >= static_cast<unsigned>(p.height)) continue;
    auto data = source.at(y, first_x);
    for (int j = 0, x = first_x; j < p.kernel_x; ++j, x += step_x, data += step)
      if (static_cast<unsigned>(x) < static_cast<unsigned>(p.width))
        visit(i * p.kernel_x + j, y, x, data);
    end_line();
  }
}

__device__ __forceinline__ float pool_divisor(const LocalPoolParams& p, int count) {
  return static_cast<float>(p.count_include_pad ? p.kernel_y * p.kernel_x : count);
}

// Reciprocal of the divisor of a mean, 0 for an empty window.
__device__ __forceinline__ float pool_scale(const LocalPoolParams& p, int count) {
  return count > 0 ? 1 / pool_divisor(p, count) : 0;
}

// Number of taps on the map along one dimension.
__device__ __forceinline__ int taps_on_map(int place, int size, int kernel, int dilation) {
  int count = 0, at = place - kernel / 2 * dilation;
  for (int i = 0; i < kernel; ++i, at += dilation)
    count += static_cast<unsigned>(at) < static_cast<unsigned>(size);
  return count;
}

// Calls visit(token) for the tokens of this thread; visit_channels calls visit(c) for its vectors
// of channels.
template <typename Visit>
__device__ __forceinline__ void visit_token(const PoolPlan& plan, const Visit& visit) {
  const int64_t i = row_of_thread();
  if (i < plan.tokens) visit(PoolToken(plan, static_cast<int>(i)));
}
template <int kVector, typename Visit>
__device__ __forceinline__ void visit_channels(const LocalPoolParams& p, const Visit& visit) {
  for (int64_t c = threadIdx.x * kVector; c < p.channels; c += blockDim.x * kVector) visit(c);
}

// Calls visit(token, c, source, scales) for the tokens and channels of this thread; source has the
// elements of their windows from channel c on. scales, if kScaled: [batch, height, width]; null in
// a tile without a mask.
template <int kVector, bool kTiled, bool kScaled, typename T, typename Visit>
__device__ __forceinline__ void visit_windows(const LocalPoolParams& p, const PoolPlan& plan,
                                              const PoolMap<T>& from, const float* scales,
                                              const Visit& visit) {
  if constexpr (!kTiled) {
    visit_token(plan, [&](const PoolToken& at) {
      const PoolSource<float> factors{scales + at.b * p.height * p.width, p.width, 1};
      visit_channels<kVector>(p, [&](int64_t c) {
        visit(at, c, PoolSource<T>{from.data + at.b * from.batch + c, from.line, from.token},
              factors);
      });
    });
  } else {
    extern __shared__ uint4 pool_tile[];
    const PoolTiles& t = plan.tiles;
    int64_t block = blockIdx.x;
    const int slice = static_cast<int>(block % t.slices);
    block /= t.slices;
    const int x = static_cast<int>(block % t.columns) * t.width;
    block /= t.columns;
    const int y = static_cast<int>(block % t.lines) * t.height;
    const int64_t b = block / t.lines;
    const int64_t c = (int64_t{slice} * t.lanes + threadIdx.x) * kVector;
    const int staged = (t.height + 2 * t.halo_y) * t.pitch, step = t.lanes * kVector;
    T* const tile = reinterpret_cast<T*>(pool_tile) + threadIdx.x * kVector;
    float* const tile_scales = reinterpret_cast<float*>(pool_tile + staged * t.lanes);
    for (int i = threadIdx.y; i < staged; i += blockDim.y) {
      const int line = t.outer.divide(i), ty = y - t.halo_y + line;
      const int column = i - line * t.pitch, tx = x - t.halo_x + column;
      if (ty < 0 || ty >= p.height || tx < 0 || tx >= p.width) continue;
      if (column >= t.width + 2 * t.halo_x) continue;
      if (c < p.channels)
        cp_async(shared_address(tile + i * step),
                 from.data + b * from.batch + ty * from.line + tx * from.token + c);
    }
    cp_async_commit();
    if constexpr (kScaled) {
      const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
      int* const on_line = reinterpret_cast<int*>(tile_scales + staged);
      int* const on_column = on_line + t.height + 2 * t.halo_y;
      if (!scales) {
        for (int i = thread; i < t.height + 2 * t.halo_y; i += kRowThreads)
          on_line[i] = taps_on_map(y - t.halo_y + i, p.height, p.kernel_y, p.dilation_y);
        for (int i = thread; i < t.pitch; i += kRowThreads)
          on_column[i] = taps_on_map(x - t.halo_x + i, p.width, p.kernel_x, p.dilation_x);
        __syncthreads();
      }
      for (int i = thread; i < staged; i += kRowThreads) {
        const int line = t.outer.divide(i), column = i - line * t.pitch;
        const int ty = y - t.halo_y + line, tx = x - t.halo_x + column;
        if (!scales)
          tile_scales[i] = pool_scale(p, on_line[line] * on_column[column]);
        else if (ty >= 0 && ty < p.height && tx >= 0 && tx < p.width)
          tile_scales[i] = scales[(b * p.height + ty) * p.width + tx];
      }
    }
    cp_async_wait<0>();
    __syncthreads();
    const int origin = (t.halo_y - y) * t.pitch + t.halo_x - x;
    const PoolSource<T, int> source{tile + origin * step, t.pitch * step, step};
    const PoolSource<float, int> factors{tile_scales + origin, t.pitch, 1};
    for (int i = threadIdx.y; i < t.height * t.width; i += blockDim.y) {
      const int line = t.inner.divide(i), ty = y + line, tx = x + i - line * t.width;
      if (c < p.channels && ty < p.height && tx < p.width)
        visit(PoolToken(p, b, ty, tx), c, source, factors);
    }
  }
}

template <typename T>
__device__ __forceinline__ PoolMap<T> map_of_x(const LocalPoolParams& p) {
  return {static_cast<const T*>(p.x), p.x_batch, p.x_line, p.x_token};
}
template <typename T>
__device__ __forceinline__ PoolMap<T> map_of_dout(const LocalPoolBackwardParams& q) {
  return {static_cast<const T*>(q.dout), q.dout_batch, q.dout_line, q.dout_token};
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

template <typename T, int kVector, bool kMax, bool kTiled>
__global__ void __launch_bounds__(kRowThreads, kPoolBlocks)
    local_pool_kernel(const __grid_constant__ LocalPoolParams p,
                      const __grid_constant__ PoolPlan plan) {
  visit_windows<kVector, kTiled, false>(
      p, plan, map_of_x<T>(p), nullptr,
      [&](const PoolToken& at, int64_t c, const auto& x, const auto&) {
        float pooled[kVector], line[kVector], value[kVector];
        fill(pooled, kMax ? -INFINITY : 0);
        fill(line, 0);
        int count = 0;
        with_mask(p, [&]<bool kMasked>() {
          for_taps<1>(
              p, at, x,
              [&](int, int ty, int tx, const T* data) {
                if (!pool_counts<kMasked>(p, at.b, ty, tx)) return;
                ++count;
                load_floats(value, data);
                if constexpr (kMax) {
#pragma unroll
                  for (int v = 0; v < kVector; ++v) pooled[v] = max_or_nan(pooled[v], value[v]);
                } else {
                  add(line, value, 1);
                }
              },
              [&] {
                if constexpr (kMax) return;
                add(pooled, line, 1);
                fill(line, 0);
              });
        });
        if constexpr (!kMax) {
          const float divisor = count > 0 ? pool_divisor(p, count) : 1, scale = 1 / divisor;
      // 16-bit outputs hide the rounding of the reciprocal.
#pragma unroll
          for (int v = 0; v < kVector; ++v)
            pooled[v] = sizeof(T) == 2 ? pooled[v] * scale : pooled[v] / divisor;
        }
        if (count == 0) fill(pooled, 0);
        if (p.subtract_input) {
          load_floats(value, x.at(at.y, at.x));
          add(pooled, value, -1);
        }
        store_floats(static_cast<T*>(p.out) + at.index * p.channels + c, pooled);
      });
}

// Scale of each token.
__global__ void __launch_bounds__(kRowThreads)
    pool_scales_kernel(const __grid_constant__ LocalPoolParams p,
                       const __grid_constant__ PoolPlan plan, float* scales) {
  visit_token(plan, [&](const PoolToken& at) {
    int count = 0;
    const PoolSource<float> none{};
    for_taps<1>(
        p, at, none, [&](int, int y, int x, const float*) { count += pool_counts(p, at.b, y, x); },
        [] {});
    scales[at.index] = pool_scale(p, count);
  });
}

template <typename T, int kVector, bool kTiled>
__global__ void __launch_bounds__(kRowThreads, kPoolBlocks)
    mean_backward_kernel(const __grid_constant__ LocalPoolBackwardParams q,
                         const __grid_constant__ PoolPlan plan, const float* scales) {
  const LocalPoolParams& p = q.forward;
  visit_windows<kVector, kTiled, true>(
      p, plan, map_of_dout<T>(q), scales,
      [&](const PoolToken& at, int64_t c, const auto& dout, const auto& factors) {
        float sum[kVector] = {}, line[kVector] = {}, value[kVector];
        with_mask(p, [&]<bool kMasked>() {
          if (!pool_counts<kMasked>(p, at.b, at.y, at.x)) return;
          for_taps<-1>(
              p, at, dout,
              [&](int, int y, int x, const T* data) {
                load_floats(value, data);
                const float scale = *factors.at(y, x);
                if (!kMasked || scale != 0) add(line, value, scale);
              },
              [&] {
                add(sum, line, 1);
                fill(line, 0);
              });
        });
        if (p.subtract_input) {
          load_floats(value, dout.at(at.y, at.x));
          add(sum, value, -1);
        }
        store_floats(static_cast<T*>(p.out) + at.index * p.channels + c, sum);
      });
}

// Tap of each maximum.
template <typename T, int kVector, bool kTiled>
__global__ void __launch_bounds__(kRowThreads, kPoolBlocks)
    pool_taps_kernel(const __grid_constant__ LocalPoolParams p,
                     const __grid_constant__ PoolPlan plan, uint16_t* taps) {
  visit_windows<kVector, kTiled, false>(
      p, plan, map_of_x<T>(p), nullptr,
      [&](const PoolToken& at, int64_t c, const auto& x, const auto&) {
        float best[kVector], value[kVector];
        Pack<uint16_t, kVector> found;
#pragma unroll
        for (int v = 0; v < kVector; ++v) found.x[v] = kNoTap;
        fill(best, 0);
        with_mask(p, [&]<bool kMasked>() {
          for_taps<1>(
              p, at, x,
              [&](int tap, int ty, int tx, const T* data) {
                if (!pool_counts<kMasked>(p, at.b, ty, tx)) return;
                load_floats(value, data);
#pragma unroll
                for (int v = 0; v < kVector; ++v) {
                  // The first NaN wins: no value is greater, and a NaN is not replaced.
                  const bool is_number = best[v] == best[v];
                  const bool wins = is_number && !(value[v] <= best[v]);
                  if (wins || found.x[v] == kNoTap) {
                    best[v] = value[v];
                    found.x[v] = static_cast<uint16_t>(tap);
                  }
                }
              },
              [] {});
        });
        *reinterpret_cast<Pack<uint16_t, kVector>*>(taps + at.index * p.channels + c) = found;
      });
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kRowThreads, kPoolBlocks)
    maximum_backward_kernel(const __grid_constant__ LocalPoolBackwardParams q,
                            const __grid_constant__ PoolPlan plan, const uint16_t* taps) {
  const LocalPoolParams& p = q.forward;
  visit_token(plan, [&](const PoolToken& at) {
    const T* of_dout = static_cast<const T*>(q.dout) + at.b * q.dout_batch;
    const uint16_t* of_sequence = taps + at.b * p.height * p.width * p.channels;
    visit_channels<kVector>(p, [&](int64_t c) {
      float sum[kVector] = {}, value[kVector];
      const PoolSource<T> dout{of_dout + c, q.dout_line, q.dout_token};
      for_taps<-1>(
          p, at, dout,
          [&](int tap, int y, int x, const T* data) {
            const int64_t token = int64_t{y} * p.width + x;
            const auto found = *reinterpret_cast<const Pack<uint16_t, kVector>*>(
                of_sequence + token * p.channels + c);
            load_floats(value, data);
#pragma unroll
            for (int v = 0; v < kVector; ++v)
              if (found.x[v] == tap) sum[v] += value[v];
          },
          [] {});
      if (p.subtract_input) {
        load_floats(value, dout.at(at.y, at.x));
        add(sum, value, -1);
      }
      store_floats(static_cast<T*>(p.out) + at.index * p.channels + c, sum);
    });
  });
}

}  // namespace tokenmill::cuda::local_pool
