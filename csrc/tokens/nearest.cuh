// Nearest rows of a set for each of some rows, by sums of squared differences. A CTA has 64 rows
// and iterates over the set 64 rows at a time; a thread has 4 x 4 distances in registers.
#pragma once
#include "cuda/fast_divmod.cuh"
#include "cuda/launch.cuh"
#include "cuda/math.cuh"
#include "cuda/vector.cuh"
#include "cuda/warp.cuh"
#include "tokens/cluster_tokens/params.h"

namespace tokenmill::cuda {

constexpr int kNearThreads = 256, kNearRows = 64, kNearDepth = 16;
// floats per slice row: the padding spreads 16-byte reads over the banks
constexpr int kNearStride = kNearRows + 4;

// Row i of batch row b is at b * batch + i / width * line + i % width * row.
template <typename T>
struct MapRows {
  const T* data;
  int64_t batch, line, row;
  FastDivmod width;
  int count;
  bool aligned;  // allows loads of four elements

  __device__ __forceinline__ const T* at(int64_t b, int i) const {
    const int y = width.divide(i);
    return data + b * batch + y * line + (i - y * width.value) * row;
  }
};

struct Nearest {
  int row_tiles;
  int channels, k;
  int32_t* labels;   // [B, rows]: the nearest, or
  float* distances;  // [B, rows, k]: lists by distance and then by index ...
  int32_t* ids;      // ... and the row indices
};

// Loads channels c .. c + 3 of a row as floats, zero past the last channel.
template <typename T>
__device__ __forceinline__ void load_four(float (&to)[4], const T* row, int c, int channels,
                                          bool aligned) {
  if (aligned && c < channels) return load_floats(to, row + c);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = c + i < channels ? static_cast<float>(row[c + i]) : 0.f;
}

// Loads a slice of 64 rows, transposed.
template <typename T>
__device__ __forceinline__ void load_slice(float (*slice)[kNearStride], const MapRows<T>& from,
                                           int64_t b, int first, int c, int channels) {
  const int row = threadIdx.x / 4, own = threadIdx.x % 4 * 4;
  float x[4] = {};
  if (first + row < from.count)
    load_four(x, from.at(b, first + row), c + own, channels, from.aligned);
#pragma unroll
  for (int i = 0; i < 4; ++i) slice[own + i][row] = x[i];
}

// Clamps distances that are not finite to the largest float.
__device__ __forceinline__ float clamped_distance(float d) {
  return d <= kMaxDistance ? d : kMaxDistance;
}

// k-nearest list of one warp.
struct NearList {
  float* d;
  int32_t* id;
  int k;

  __device__ __forceinline__ void clear() const {
    for (int e = threadIdx.x % kWarpSize; e < k; e += kWarpSize) d[e] = infinity(), id[e] = 0;
    __syncwarp();
  }
  __device__ __forceinline__ float last() const { return d[k - 1]; }

  // Indices arrive in ascending order: among equal distances the first stays in front.
  __device__ void insert(float value, int number) const {
    const int lane = threadIdx.x % kWarpSize;
    int at = 0;
    for (int e = 0; e < k; e += kWarpSize)
      at += __popc(__ballot_sync(kFullWarp, e + lane < k && d[e + lane] <= value));
    for (int e = (k - 1) / kWarpSize * kWarpSize + lane; e >= lane; e -= kWarpSize) {
      const bool moves = e > at && e < k;
      float from = 0;
      int32_t of = 0;
      if (moves) from = d[e - 1], of = id[e - 1];
      __syncwarp();
      if (moves) d[e] = from, id[e] = of;
      __syncwarp();
    }
    if (lane == 0) d[at] = value, id[at] = number;
    __syncwarp();
  }

  // Inserts the distances of columns first .. first + 63 that are smaller than the last of the
  // list.
  __device__ __forceinline__ void update(const float* row, int first, int columns) const {
    const int lane = threadIdx.x % kWarpSize;
    float minimum = last();
#pragma unroll 1
    for (int half = 0; half < kNearRows; half += kWarpSize) {
      const int column = first + half + lane;
      const float value = column < columns ? clamped_distance(row[half + lane]) : infinity();
      unsigned better = __ballot_sync(kFullWarp, value < minimum);
      for (; better; better &= better - 1) {
        const int from = __ffs(static_cast<int>(better)) - 1;
        const float candidate = __shfl_sync(kFullWarp, value, from);
        if (!(candidate < minimum)) continue;
        insert(candidate, first + half + from);
        minimum = last();
      }
    }
  }
};

template <typename T, typename S, bool kLabels>
__global__ void __launch_bounds__(kNearThreads, 2)
    nearest_kernel(const __grid_constant__ MapRows<T> rows, const __grid_constant__ MapRows<S> set,
                   const __grid_constant__ Nearest near) {
  __shared__ float4 shared[2 * kNearDepth * kNearStride / 4];
  __shared__ float tile[kLabels ? 1 : kNearRows][kNearRows + 1];
  auto* const slice_a = reinterpret_cast<float (*)[kNearStride]>(shared);
  auto* const slice_b = slice_a + kNearDepth;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t b = blockIdx.x / static_cast<unsigned>(near.row_tiles);
  const int first = blockIdx.x % static_cast<unsigned>(near.row_tiles) * kNearRows;
  const auto list_of = [&](int i) {
    const int row = warp + i * (kNearThreads / kWarpSize);
    const int64_t at = (b * rows.count + first + row) * near.k;
    return NearList{near.distances + at, near.ids + at, near.k};
  };
  constexpr int kListsOfWarp = kNearRows / (kNearThreads / kWarpSize);
  const auto exists = [&](int i) {
    return first + warp + i * (kNearThreads / kWarpSize) < rows.count;
  };
  if constexpr (!kLabels)
    for (int i = 0; i < kListsOfWarp && exists(i); ++i) list_of(i).clear();

  float best[4];
  int place[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) best[i] = infinity(), place[i] = 0;

#pragma unroll 1
  for (int column = 0; column < set.count; column += kNearRows) {
    float d[4][4] = {};
#pragma unroll 1
    for (int c = 0; c < near.channels; c += kNearDepth) {
      __syncthreads();  // the previous slices have been read
      load_slice(slice_a, rows, b, first, c, near.channels);
      load_slice(slice_b, set, b, column, c, near.channels);
      __syncthreads();
#pragma unroll 4
      for (int e = 0; e < kNearDepth; ++e) {
        float x[4], y[4];
        load_floats(x, &slice_a[e][4 * ty]);
        load_floats(y, &slice_b[e][4 * tx]);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float difference = x[i] - y[j];
            d[i][j] = fmaf(difference, difference, d[i][j]);
          }
      }
    }
    if constexpr (kLabels) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int at = column + 4 * tx + j;
          const float value = clamped_distance(d[i][j]);
          const bool better = at < set.count && value < best[i];
          best[i] = better ? value : best[i];
          place[i] = better ? at : place[i];
        }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) tile[4 * ty + i][4 * tx + j] = d[i][j];
      __syncthreads();
#pragma unroll 1
      for (int i = 0; i < kListsOfWarp && exists(i); ++i)
        list_of(i).update(tile[warp + i * (kNearThreads / kWarpSize)], column, set.count);
    }
  }

  if constexpr (kLabels) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int offset = 1; offset < 16; offset *= 2) {
        const float other = __shfl_xor_sync(kFullWarp, best[i], offset);
        const int at = __shfl_xor_sync(kFullWarp, place[i], offset);
        const bool better = other < best[i] || (other == best[i] && at < place[i]);
        best[i] = better ? other : best[i];
        place[i] = better ? at : place[i];
      }
      const int row = first + 4 * ty + i;
      if (tx == 0 && row < rows.count) near.labels[b * rows.count + row] = place[i];
    }
  }
}

// `rows` and `set` have `batch` batch rows; returns null, or an error message.
template <bool kLabels, typename T, typename S>
const char* launch_nearest(const MapRows<T>& rows, const MapRows<S>& set, Nearest near,
                           int64_t batch, cudaStream_t stream) {
  near.row_tiles = static_cast<int>(ceil_div(rows.count, kNearRows));
  return launch<nearest_kernel<T, S, kLabels>>(batch * near.row_tiles, kNearThreads, 0, stream,
                                               rows, set, near);
}

// True if rows can be read four elements at a time.
template <typename T, typename... Strides>
bool reads_fours(const void* p, int64_t channels, Strides... strides) {
  return reinterpret_cast<uintptr_t>(p) % (4 * sizeof(T)) == 0 && channels % 4 == 0 &&
         (... && (strides % 4 == 0));
}

}  // namespace tokenmill::cuda
