// Pixels with the same home cell share their candidate clusters: a CTA measures the distances of
// some of them at once, from shared memory, and their weights go to global memory, one row of
// window_y window_x per pixel. A warp then owns a few adjacent clusters and adds up the pixels that
// reach them, in order. A slab, some rows of cells of all images, is the unit in which weights are
// kept in memory.
#pragma once
#include <type_traits>

#include "cuda/math.cuh"
#include "cuda/vector.cuh"
#include "cuda/warp.cuh"
#include "tokens/cluster_tokens/params.h"

namespace tokenmill::cuda::cluster_tokens {

constexpr int kClusterWarps = 4, kClusterThreads = kClusterWarps * kWarpSize;
constexpr int kMeasured = 16;   // maximum pixels of a cell measured together
constexpr int kCellPixels = 4;  // pixels processed together by spread_kernel
constexpr int kSpan = 4;        // adjacent clusters per warp

struct ClusterPlan {
  int window;         // clusters per row of weights
  int slab_rows;      // rows of cells per slab
  int slab_lines;     // maximum lines of pixels per slab
  int channel_tiles;  // tiles of 32 lanes
  int measured;       // pixels of a cell at once
  int64_t pitch;      // element stride of these in shared memory
  float* centroids;   // [B, gy, gx, C]
  float* weights;     // [B, slab_lines, X, window]
  float* sums;        // [B, gy, gx, C] and ...
  float* masses;      // ... [channel_tiles, B, gy, gx], of the slabs so far; with several slabs
};

// Channels per lane.
template <typename T>
constexpr int kLaneChannels = 16 / sizeof(T);

struct Slab {
  int first, last;    // rows of cells
  int line;           // first line of its pixels
  bool begins, ends;  // first or last slab of an iteration
  bool final;         // last iteration
};

__device__ __forceinline__ float* weights_at(const ClusterParams& p, const ClusterPlan& plan,
                                             const Slab& slab, int64_t b, int64_t y, int64_t x) {
  return plan.weights +
         ((b * plan.slab_lines + y - slab.line) * p.width + x) * int64_t{plan.window};
}

// Channels c .. c + kVector - 1 of a row, zero past the last channel. The assignment of lanes to
// channels does not depend on alignment, so that sums do not depend on strides.
template <bool kAligned, typename T, int kVector>
__device__ __forceinline__ void load_part(float (&to)[kVector], const T* row, int64_t c,
                                          int64_t channels) {
  if constexpr (kAligned) {
    load_floats(to, row + c);
  } else {
#pragma unroll
    for (int v = 0; v < kVector; ++v)
      to[v] = c + v < channels ? static_cast<float>(row[c + v]) : 0.f;
  }
}

template <bool kAligned, typename T, int kVector>
__device__ __forceinline__ void store_part(T* row, const float (&from)[kVector], int64_t c,
                                           int64_t channels) {
  if constexpr (kAligned) {
    store_floats(row + c, from);
  } else {
#pragma unroll
    for (int v = 0; v < kVector; ++v)
      if (c + v < channels) row[c + v] = static_cast<T>(from[v]);
  }
}

// Grid: rows of cells, cells of a row. Mean of the pixels of each cell, one warp per cell.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kClusterThreads)
    pool_cells_kernel(const __grid_constant__ ClusterParams p,
                      const __grid_constant__ ClusterPlan plan) {
  constexpr int kVector = kLaneChannels<T>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t cell_x = int64_t{blockIdx.x} * kClusterWarps + threadIdx.x / kWarpSize;
  if (cell_x >= p.grid_x) return;
  const CellRange xs = pooled_pixels(cell_x, p.width, p.grid_x);
  const T* const data = static_cast<const T*>(p.x);
  for (int64_t b = blockIdx.z; b < p.batch; b += gridDim.z)
    for (int64_t cell_y = blockIdx.y; cell_y < p.grid_y; cell_y += gridDim.y) {
      const CellRange ys = pooled_pixels(cell_y, p.height, p.grid_y);
      const float size = static_cast<float>((ys.end - ys.begin) * (xs.end - xs.begin));
      float* const to = plan.centroids + ((b * p.grid_y + cell_y) * p.grid_x + cell_x) * p.channels;
      for (int64_t c = lane * kVector; c < p.channels; c += kWarpSize * kVector) {
        float sum[kVector] = {}, x[kVector];
        for (int64_t y = ys.begin; y < ys.end; ++y)
          for (int64_t at = xs.begin; at < xs.end; ++at) {
            load_part<kAligned>(x, data + p.x_at(b, y, at), c, p.channels);
#pragma unroll
            for (int v = 0; v < kVector; ++v) sum[v] += x[v];
          }
#pragma unroll
        for (int v = 0; v < kVector; ++v) sum[v] /= size;
        store_part<kAligned>(to, sum, c, p.channels);
      }
    }
}

// Cell, its pixels and their candidate clusters.
struct HomeCell {
  int64_t b;
  CellRange ys, xs;   // clusters
  int line, column;   // first pixel
  int width, pixels;  // pixels per line, and in all lines
  int across, count;  // clusters per row, and in all rows

  __device__ HomeCell(const ClusterParams& p, int64_t b, int64_t cell_y, int64_t cell_x) : b(b) {
    ys = cells_near(cell_y, p.reach, p.grid_y);
    xs = cells_near(cell_x, p.reach, p.grid_x);
    across = static_cast<int>(xs.end - xs.begin);
    count = static_cast<int>(ys.end - ys.begin) * across;
    const CellRange lines = pixels_of_cells(cell_y, cell_y, p.height, p.grid_y);
    const CellRange columns = pixels_of_cells(cell_x, cell_x, p.width, p.grid_x);
    line = static_cast<int>(lines.begin);
    column = static_cast<int>(columns.begin);
    width = static_cast<int>(columns.end - columns.begin);
    pixels = static_cast<int>(lines.end - lines.begin) * width;
  }
  __device__ __forceinline__ int y_of(int pixel) const { return line + pixel / width; }
  __device__ __forceinline__ int x_of(int pixel) const { return column + pixel % width; }
  __device__ __forceinline__ int64_t cluster(const ClusterParams& p, int k) const {
    return (ys.begin + k / across) * p.grid_x + xs.begin + k % across;
  }
};

// Pixels first .. first + count - 1 of a cell, in shared memory.
template <typename T>
struct MeasuredPixels {
  int first, count;
  T* staged;  // [count, pitch]
  int64_t pitch;

  // Called by all threads.
  template <bool kAligned>
  __device__ __forceinline__ void stage(const ClusterParams& p, const HomeCell& cell) const {
    using Word = std::conditional_t<kAligned, uint4, T>;
    constexpr int kVector = sizeof(Word) / sizeof(T);
    for (int i = threadIdx.x / kWarpSize; i < count; i += kClusterWarps) {
      const int y = cell.y_of(first + i), x = cell.x_of(first + i);
      const T* const from = static_cast<const T*>(p.x) + p.x_at(cell.b, y, x);
      T* const to = staged + i * pitch;
      for (int64_t c = threadIdx.x % kWarpSize * kVector; c < p.channels; c += kWarpSize * kVector)
        *reinterpret_cast<Word*>(to + c) = *reinterpret_cast<const Word*>(from + c);
    }
    __syncthreads();
  }
};

// Distances of the pixels to their candidate clusters.
template <typename T, bool kAligned>
__device__ __forceinline__ void measure_pixels(const ClusterParams& p, const ClusterPlan& plan,
                                               const Slab& slab, const HomeCell& cell,
                                               const float* centroids,
                                               const MeasuredPixels<T>& pixels) {
  constexpr int kVector = kLaneChannels<T>;
  const int lane = threadIdx.x % kWarpSize;
  const int mine = pixels.first + lane;  // pixel whose distances this lane stores
  float* to = nullptr;
  if (lane < pixels.count) to = weights_at(p, plan, slab, cell.b, cell.y_of(mine), cell.x_of(mine));
  for (int k = threadIdx.x / kWarpSize; k < cell.count; k += kClusterWarps) {
    const float* const row = centroids + (cell.b * p.clusters() + cell.cluster(p, k)) * p.channels;
    float sum[kMeasured] = {};
    for (int64_t c = lane * kVector; c < p.channels; c += kWarpSize * kVector) {
      float centroid[kVector], x[kVector];
      load_part<kAligned>(centroid, row, c, p.channels);
#pragma unroll
      for (int i = 0; i < kMeasured; ++i) {
        if (i >= pixels.count) break;
        load_part<kAligned>(x, pixels.staged + i * pixels.pitch, c, p.channels);
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          const float difference = x[v] - centroid[v];
          sum[i] = fmaf(difference, difference, sum[i]);
        }
      }
    }
    float own = 0;
#pragma unroll
    for (int i = 0; i < kMeasured; ++i) {
      if (i >= pixels.count) break;
      const float whole = warp_sum(sum[i]);
      own = lane == i ? whole : own;
    }
    if (to) to[k] = own;
  }
}

// Softmax of a pixel over its clusters, from distances. Called by one warp.
__device__ __forceinline__ void weigh_pixel(const ClusterParams& p, float* weights, int count) {
  const int lane = threadIdx.x % kWarpSize;
  float minimum = infinity();
  for (int k = lane; k < count; k += kWarpSize) minimum = fminf(minimum, weights[k]);
  minimum = -warp_max(-minimum);
  const float factor = p.tau * kLog2e;
  float total = 0;
  for (int k = lane; k < count; k += kWarpSize) {
    const float t = (minimum - weights[k]) * factor;
    const float e = t < kMinLog2Weight ? 0 : exp2_approx(t);
    weights[k] = e;
    total += e;
  }
  const float inverse = 1 / warp_sum(total);
  for (int k = lane; k < count; k += kWarpSize) weights[k] *= inverse;
}

// Nearest of a pixel's candidate clusters. Called by one warp.
__device__ __forceinline__ int nearest_weighed(const float* distances, int count) {
  float best = infinity();
  int place = 0;
  for (int k = threadIdx.x % kWarpSize; k < count; k += kWarpSize) {
    const float d = distances[k] <= kMaxDistance ? distances[k] : kMaxDistance;
    if (d < best) best = d, place = k;
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(kFullWarp, best, offset);
    const int at = __shfl_xor_sync(kFullWarp, place, offset);
    const bool better = other < best || (other == best && at < place);
    best = better ? other : best;
    place = better ? at : place;
  }
  return place;
}

// Grid: cells of a row, rows of the slab, images.
template <typename T, bool kAligned, bool kLabels>
__global__ void __launch_bounds__(kClusterThreads, 4)
    weigh_kernel(const __grid_constant__ ClusterParams p, const __grid_constant__ ClusterPlan plan,
                 const __grid_constant__ Slab slab, const float* centroids) {
  extern __shared__ __align__(16) unsigned char shared[];
  for (int64_t b = blockIdx.z; b < p.batch; b += gridDim.z)
    for (int64_t cell_y = slab.first + blockIdx.y; cell_y <= slab.last; cell_y += gridDim.y) {
      const HomeCell cell(p, b, cell_y, blockIdx.x);
#pragma unroll 1
      for (int first = 0; first < cell.pixels; first += plan.measured) {
        const MeasuredPixels<T> pixels{first, min(plan.measured, cell.pixels - first),
                                       reinterpret_cast<T*>(shared), plan.pitch};
        pixels.template stage<kAligned>(p, cell);
        measure_pixels<T, kAligned>(p, plan, slab, cell, centroids, pixels);
        __syncthreads();  // the distances are in global memory
#pragma unroll 1
        for (int i = threadIdx.x / kWarpSize; i < pixels.count; i += kClusterWarps) {
          const int y = cell.y_of(first + i), x = cell.x_of(first + i);
          float* const weights = weights_at(p, plan, slab, b, y, x);
          if constexpr (kLabels) {
            const int64_t label = cell.cluster(p, nearest_weighed(weights, cell.count));
            p.labels[(b * p.height + y) * p.width + x] = static_cast<int32_t>(label);
          } else {
            weigh_pixel(p, weights, cell.count);
          }
        }
      }
    }
}

// Weighted sums of kSpan clusters over the pixels of the slab that reach them.
template <int kVector>
struct SpanSums {
  float sum[kSpan][kVector], mass[kSpan];
};

template <typename T, bool kAligned>
__device__ __forceinline__ void add_pixels(const ClusterParams& p, const ClusterPlan& plan,
                                           const Slab& slab, int64_t b, int64_t cluster_y,
                                           int64_t cluster_x, int64_t c,
                                           SpanSums<kLaneChannels<T>>& sums) {
  constexpr int kVector = kLaneChannels<T>;
  const CellRange near_y = cells_near(cluster_y, p.reach, p.grid_y);
  const int64_t begin_y = near_y.begin > slab.first ? near_y.begin : slab.first;
  const int64_t end_y = near_y.end < slab.last + 1 ? near_y.end : slab.last + 1;
  const int64_t begin_x = cells_near(cluster_x, p.reach, p.grid_x).begin;
  const int64_t end_x = cells_near(cluster_x + kSpan - 1, p.reach, p.grid_x).end;
  const bool there = c < p.channels;
  const T* const data = static_cast<const T*>(p.x);
#pragma unroll 1
  for (int64_t cell_y = begin_y; cell_y < end_y; ++cell_y)
#pragma unroll 1
    for (int64_t cell_x = begin_x; cell_x < end_x; ++cell_x) {
      const HomeCell cell(p, b, cell_y, cell_x);
      const int offset = static_cast<int>(cluster_x - cell.xs.begin);
      const int row = static_cast<int>(cluster_y - cell.ys.begin) * cell.across + offset;
      const int lines = cell.pixels / cell.width;
      for (int y = cell.line; y < cell.line + lines; ++y)
        for (int x = cell.column; x < cell.column + cell.width; ++x) {
          const float* const weights = weights_at(p, plan, slab, b, y, x) + row;
          float value[kVector] = {};
          if (there) load_part<kAligned>(value, data + p.x_at(b, y, x), c, p.channels);
#pragma unroll
          for (int j = 0; j < kSpan; ++j) {
            if (offset + j < 0 || offset + j >= cell.across) continue;  // out of reach
            const float w = weights[j];
            sums.mass[j] += w;
#pragma unroll
            for (int v = 0; v < kVector; ++v) sums.sum[j][v] = fmaf(w, value[v], sums.sum[j][v]);
          }
        }
    }
}

// Grid: spans of a row of clusters, rows of clusters, channel tiles of images.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kClusterThreads, 3)
    update_kernel(const __grid_constant__ ClusterParams p, const __grid_constant__ ClusterPlan plan,
                  const __grid_constant__ Slab slab) {
  constexpr int kVector = kLaneChannels<T>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first = (int64_t{blockIdx.x} * kClusterWarps + threadIdx.x / kWarpSize) * kSpan;
  const int tiles = static_cast<int>(p.batch) * plan.channel_tiles;
  if (first >= p.grid_x) return;
  for (int i = blockIdx.z; i < tiles; i += gridDim.z)
    for (int64_t y = blockIdx.y; y < p.grid_y; y += gridDim.y) {
      const int64_t b = i / plan.channel_tiles;
      const int tile = i % plan.channel_tiles;
      const int64_t c = (int64_t{tile} * kWarpSize + lane) * kVector;
      const bool there = c < p.channels;
      const int64_t cluster = (b * p.grid_y + y) * p.grid_x + first;
      float* const masses = plan.masses + tile * p.batch * p.clusters();
      SpanSums<kVector> sums{};
#pragma unroll
      for (int j = 0; j < kSpan; ++j) {
        if (slab.begins || first + j >= p.grid_x) continue;
        sums.mass[j] = masses[cluster + j];
        if (there)
          load_part<kAligned>(sums.sum[j], plan.sums + (cluster + j) * p.channels, c, p.channels);
      }
      add_pixels<T, kAligned>(p, plan, slab, b, y, first, c, sums);
#pragma unroll
      for (int j = 0; j < kSpan; ++j) {
        if (first + j >= p.grid_x) continue;
        const int64_t at = (cluster + j) * p.channels;
        if (!slab.ends) {
          __syncwarp();  // all lanes have read the mass
          if (lane == 0) masses[cluster + j] = sums.mass[j];
          if (there) store_part<kAligned>(plan.sums + at, sums.sum[j], c, p.channels);
          continue;
        }
        if (slab.final && c == 0) p.mass[cluster + j] = sums.mass[j];
        if (!there) continue;
        float centroid[kVector];
        load_part<kAligned>(centroid, plan.centroids + at, c, p.channels);
        if (slab.final) store_part<kAligned>(p.previous + at, centroid, c, p.channels);
        if (sums.mass[j] != 0) {
#pragma unroll
          for (int v = 0; v < kVector; ++v) centroid[v] = sums.sum[j][v] / sums.mass[j];
          store_part<kAligned>(plan.centroids + at, centroid, c, p.channels);
        }
        if (slab.final)
          store_part<kAligned>(static_cast<T*>(p.centroids) + at, centroid, c, p.channels);
      }
    }
}

// dx_n = sum over m of Q_mn dcentroids_m / mass_m. Same grid as weigh_kernel, with the weights
// computed from `previous`; a warp processes every fourth tile of channels.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kClusterThreads, 4)
    spread_kernel(const __grid_constant__ ClusterBackwardParams q,
                  const __grid_constant__ ClusterPlan plan, const __grid_constant__ Slab slab) {
  constexpr int kVector = kLaneChannels<T>;
  const ClusterParams& p = q.forward;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  for (int64_t b = blockIdx.z; b < p.batch; b += gridDim.z)
    for (int64_t cell_y = slab.first + blockIdx.y; cell_y <= slab.last; cell_y += gridDim.y) {
      const HomeCell cell(p, b, cell_y, blockIdx.x);
#pragma unroll 1
      for (int first = 0; first < cell.pixels; first += kCellPixels) {
        const float* weights[kCellPixels];
#pragma unroll
        for (int i = 0; i < kCellPixels; ++i) {
          const int pixel = first + i < cell.pixels ? first + i : first;
          weights[i] = weights_at(p, plan, slab, b, cell.y_of(pixel), cell.x_of(pixel));
        }
#pragma unroll 1
        for (int64_t c = (warp * kWarpSize + lane) * kVector; c < p.channels;
             c += kClusterThreads * kVector) {
          float sum[kCellPixels][kVector] = {};
#pragma unroll 1
          for (int k = 0; k < cell.count; ++k) {
            const int64_t m = b * p.clusters() + cell.cluster(p, k);
            const float mass = p.mass[m];
            if (mass == 0) continue;
            const float inverse = 1 / mass;
            float d[kVector];
            load_part<kAligned>(d, static_cast<const T*>(q.dcentroids) + m * p.channels, c,
                                p.channels);
#pragma unroll
            for (int i = 0; i < kCellPixels; ++i) {
              const float w = weights[i][k] * inverse;
#pragma unroll
              for (int v = 0; v < kVector; ++v) sum[i][v] = fmaf(w, d[v], sum[i][v]);
            }
          }
#pragma unroll
          for (int i = 0; i < kCellPixels; ++i) {
            if (first + i >= cell.pixels) continue;
            const int y = cell.y_of(first + i), x = cell.x_of(first + i);
            const int64_t pixel = (b * p.height + y) * p.width + x;
            store_part<kAligned>(static_cast<T*>(q.dx) + pixel * p.channels, sum[i], c, p.channels);
          }
        }
      }
    }
}

}  // namespace tokenmill::cuda::cluster_tokens
