// u_ij = v . tanh(q_i + k_j). A tanh costs two special-function operations and about twenty others,
// which bound the kernels, so operands may be loaded from shared memory one by one. The backward
// computes each tanh twice, for dq and for dk: the sums over keys and over queries then need no
// atomics.
#pragma once
#include "cuda/math.cuh"
#include "cuda/vector.cuh"
#include "cuda/warp.cuh"
#include "dense/additive_attention/params.h"

namespace tokenmill::cuda::additive_attention {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
constexpr int kBlocks = 4;  // CTAs per SM: without this bound, ptxas spills to fit more
constexpr int kStep = 32;   // elements of A in shared memory at once, one per lane

// Elements of a row from `first` on, one per lane, 0 beyond the width.
template <typename T>
__device__ __forceinline__ float element(const void* rows, int64_t row, int64_t first,
                                         int64_t width) {
  const int64_t a = first + threadIdx.x % kWarpSize;
  return a < width ? static_cast<float>(static_cast<const T*>(rows)[row + a]) : 0.f;
}

// Tile of scores: kThreadRows x kThreadKeys threads with kRows x kKeys scores each, a thread's rows
// kThreadRows apart and its keys kThreadKeys apart.
template <int kThreadRows_, int kThreadKeys_, int kRows_, int kKeys_>
struct ScoreTile {
  static_assert(kThreadRows_ * kThreadKeys_ == kThreads);
  static constexpr int kThreadRows = kThreadRows_, kThreadKeys = kThreadKeys_;
  static constexpr int kRows = kRows_, kKeys = kKeys_;
  static constexpr int kTileRows = kThreadRows * kRows, kTileKeys = kThreadKeys * kKeys;
};

// Loads rows of a tile to shared memory, transposed; missing rows become 0.
template <typename T, int kTileRows>
__device__ __forceinline__ void load_step(float (&to)[kStep][kTileRows + 1], const void* from,
                                          int64_t first_row, int64_t stride, int rows,
                                          int64_t first, int64_t width) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll 4
  for (int r = threadIdx.x / kWarpSize; r < kTileRows; r += kWarps)
    to[lane][r] = r < rows ? element<T>(from, first_row + r * stride, first, width) : 0.f;
}

// Grid: tiles of keys, tiles of queries, sequences.
template <typename T, typename Tile>
__global__ void __launch_bounds__(kThreads, kBlocks)
    scores_kernel(const __grid_constant__ AdditiveParams p) {
  constexpr int kRows = Tile::kRows, kKeys = Tile::kKeys;
  __shared__ float q[kStep][Tile::kTileRows + 1], k[kStep][Tile::kTileKeys + 1], v[kStep];
  const int thread_key = threadIdx.x % Tile::kThreadKeys;
  const int thread_row = threadIdx.x / Tile::kThreadKeys;
  const int64_t j0 = int64_t{blockIdx.x} * Tile::kTileKeys;
  const int keys = static_cast<int>(min(p.keys - j0, int64_t{Tile::kTileKeys}));
  for (int64_t b = blockIdx.z; b < p.batch; b += gridDim.z)
    for (int64_t i0 = int64_t{blockIdx.y} * Tile::kTileRows; i0 < p.rows;
         i0 += int64_t{gridDim.y} * Tile::kTileRows) {
      const int rows = static_cast<int>(min(p.rows - i0, int64_t{Tile::kTileRows}));
      unsigned seen = 0;  // one bit per score
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int c = 0; c < kKeys; ++c) {
          const int i = thread_row + r * Tile::kThreadRows, j = thread_key + c * Tile::kThreadKeys;
          if (i < rows && j < keys &&
              (!p.mask || p.mask[b * p.mask_batch + (i0 + i) * p.mask_row + j0 + j]))
            seen |= 1u << (r * kKeys + c);
        }
      float sums[kRows][kKeys] = {};
      // Skip a fully masked tile.
      const int64_t width = __syncthreads_or(seen != 0) ? p.width : 0;
#pragma unroll 1
      for (int64_t a0 = 0; a0 < width; a0 += kStep) {
        load_step<T, Tile::kTileRows>(q, p.q, b * p.q_batch + i0 * p.q_row, p.q_row, rows, a0,
                                      width);
        load_step<T, Tile::kTileKeys>(k, p.k, b * p.k_batch + j0 * p.k_row, p.k_row, keys, a0,
                                      width);
        if (threadIdx.x < kStep) v[threadIdx.x] = element<T>(p.v, 0, a0, width);
        __syncthreads();
        const int elements = static_cast<int>(min(width - a0, int64_t{kStep}));
#pragma unroll 1
        for (int a = 0; a < elements; ++a) {
          float key[kKeys];
#pragma unroll
          for (int c = 0; c < kKeys; ++c) key[c] = k[a][thread_key + c * Tile::kThreadKeys];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const float query = q[a][thread_row + r * Tile::kThreadRows];
#pragma unroll
            for (int c = 0; c < kKeys; ++c)  // u_ij += v_a tanh(q_ia + k_ja)
              sums[r][c] = fmaf(v[a], tanh_accurate(query + key[c]), sums[r][c]);
          }
        }
        __syncthreads();
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int c = 0; c < kKeys; ++c) {
          const int i = thread_row + r * Tile::kThreadRows, j = thread_key + c * Tile::kThreadKeys;
          if (i < rows && j < keys)
            p.scores[(b * p.rows + i0 + i) * p.keys + j0 + j] =
                seen >> (r * kKeys + c) & 1 ? sums[r][c] : -infinity();
        }
    }
}

// Scores of one query. A warp takes kStep elements of A, one per lane, for kRowWarpKeys keys; the
// tanh values pass through shared memory to the thread that sums over A for its key, in the order
// of scores_kernel.
constexpr int kRowTile = 16, kRowSteps = 4, kRowWarpKeys = kRowTile * kRowSteps / kWarps;
constexpr int kRowStep = kRowSteps * kStep;  // elements of A in shared memory at once
constexpr int kRowPitch = kRowStep + 4;  // the 16-byte accesses of 8 keys fall into different banks
constexpr int kRowBlocks = 3;            // CTAs per SM: with 4, ptxas spills

// Grid: tiles of keys, queries, sequences.
template <typename T>
__global__ void __launch_bounds__(kThreads, kRowBlocks)
    row_scores_kernel(const __grid_constant__ AdditiveParams p) {
  __shared__ __align__(16) float tangents[kRowTile][kRowPitch], v[kRowStep];
  const int own = threadIdx.x, warp = own / kWarpSize;
  const int first_key = warp / kRowSteps * kRowWarpKeys;
  const int64_t j0 = int64_t{blockIdx.x} * kRowTile;
  const int keys = static_cast<int>(min(p.keys - j0, int64_t{kRowTile}));
  for (int64_t b = blockIdx.z; b < p.batch; b += gridDim.z)
    for (int64_t i = blockIdx.y; i < p.rows; i += gridDim.y) {
      const bool seen =
          own < keys && (!p.mask || p.mask[b * p.mask_batch + i * p.mask_row + j0 + own]);
      float sum = 0;
      // Skip a fully masked tile.
      const int64_t width = __syncthreads_or(seen) ? p.width : 0;
#pragma unroll 1
      for (int64_t a0 = 0; a0 < width; a0 += kRowStep) {
        const int64_t first = a0 + warp % kRowSteps * kStep;
        const float query = element<T>(p.q, b * p.q_batch + i * p.q_row, first, width);
        float key[kRowWarpKeys];
#pragma unroll
        for (int c = 0; c < kRowWarpKeys; ++c) {
          const int64_t j = j0 + min(first_key + c, keys - 1);
          key[c] = element<T>(p.k, b * p.k_batch + j * p.k_row, first, width);
        }
        if (warp < kRowSteps) v[own] = element<T>(p.v, 0, first, width);
#pragma unroll
        for (int c = 0; c < kRowWarpKeys; ++c)
          tangents[first_key + c][own % kRowStep] = tanh_accurate(query + key[c]);
        __syncthreads();
        if (seen) {
          const int elements = static_cast<int>(min(width - a0, int64_t{kRowStep}));
          // Four at once; beyond the width nothing may be added, not even 0 to a sum of -0.
          int a = 0;
#pragma unroll 4
          for (; a + 4 <= elements; a += 4) {
            const float4 e = *reinterpret_cast<const float4*>(&tangents[own][a]);
            const float4 w = *reinterpret_cast<const float4*>(&v[a]);
            sum = fmaf(w.x, e.x, sum);
            sum = fmaf(w.y, e.y, sum);
            sum = fmaf(w.z, e.z, sum);
            sum = fmaf(w.w, e.w, sum);
          }
#pragma unroll 1
          for (; a < elements; ++a) sum = fmaf(v[a], tangents[own][a], sum);
        }
        __syncthreads();
      }
      if (own < keys) p.scores[(b * p.rows + i) * p.keys + j0 + own] = seen ? sum : -infinity();
    }
}

constexpr int kOwn = 4;                  // rows per warp whose gradients are summed
constexpr int kOwnTile = kWarps * kOwn;  // per CTA
constexpr int kOtherTile = 32;           // rows of the other side in shared memory at once

// One side of the pairs, queries or keys; dscores, mask: its strides there.
struct Side {
  const void* data;
  int64_t batch, row, count, dscores, mask;
};

// Gradients of one side, as partial sums over `parts` parts of the other.
struct SidePass {
  Side own, other;
  int64_t tiles, parts, part_rows;  // tiles of the own side; rows of the other side per part
  float* sums;                      // [parts, B, own.count, A]
  float* dv;                        // [B, tiles, parts, A]; null: not wanted
};

// Grid: tiles of the own side and parts of the other, steps of A, sequences. One lane per element
// of A.
template <typename T, bool kDv>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gradients_kernel(const __grid_constant__ AdditiveBackwardParams backward,
                     const __grid_constant__ SidePass pass) {
  __shared__ float other[kOtherTile][kStep], g[kOwnTile][kOtherTile + 1], dvs[kWarps][kStep];
  const AdditiveParams& p = backward.forward;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t part = blockIdx.x % pass.parts, tile = blockIdx.x / pass.parts;
  const int64_t first = tile * kOwnTile;
  const int own_rows = static_cast<int>(min(pass.own.count - first, int64_t{kOwnTile}));
  const int64_t begin = part * pass.part_rows;
  const int64_t end = min(pass.other.count, begin + pass.part_rows);
  for (int64_t b = blockIdx.z; b < p.batch; b += gridDim.z)
    for (int64_t a0 = int64_t{blockIdx.y} * kStep; a0 < p.width; a0 += int64_t{gridDim.y} * kStep) {
      const float v = element<T>(p.v, 0, a0, p.width);
      float own[kOwn], total[kOwn] = {}, dv = 0;
#pragma unroll
      for (int m = 0; m < kOwn; ++m) {
        const int r = warp * kOwn + m;
        const int64_t at = b * pass.own.batch + (first + r) * pass.own.row;
        own[m] = r < own_rows ? element<T>(pass.own.data, at, a0, p.width) : 0.f;
      }
#pragma unroll 1
      for (int64_t from = begin; from < end; from += kOtherTile) {
        const int others = static_cast<int>(min(end - from, int64_t{kOtherTile}));
        bool any = false;
        // Neighbouring threads read neighbouring keys, whichever side the keys are.
        const bool keys_outside = pass.own.dscores == 1;
#pragma unroll 1
        for (int t = threadIdx.x; t < kOwnTile * kOtherTile; t += kThreads) {
          const int r = keys_outside ? t % kOwnTile : t / kOtherTile;
          const int o = keys_outside ? t / kOwnTile : t % kOtherTile;
          float x = 0;
          if (r < own_rows && o < others) {
            const int64_t at =
                b * p.mask_batch + (first + r) * pass.own.mask + (from + o) * pass.other.mask;
            if (!p.mask || p.mask[at])
              x = backward.dscores[b * backward.dscores_batch + (first + r) * pass.own.dscores +
                                   (from + o) * pass.other.dscores];
          }
          g[r][o] = x;
          any |= !(x == 0);
        }
        if (__syncthreads_or(any)) {
#pragma unroll
          for (int o = warp; o < kOtherTile; o += kWarps) {
            const int64_t at = b * pass.other.batch + (from + o) * pass.other.row;
            other[o][lane] = o < others ? element<T>(pass.other.data, at, a0, p.width) : 0.f;
          }
          __syncthreads();
          float sums[kOwn] = {}, tile_dv = 0;
#pragma unroll 1
          for (int o = 0; o < others; ++o) {
            const float x = other[o][lane];
#pragma unroll
            for (int m = 0; m < kOwn; ++m) {
              const float gm = g[warp * kOwn + m][o], e = tanh_accurate(own[m] + x), gv = gm * v;
              const bool counts = !(gm == 0);  // d += g v (1 - e^2), dv += g e
              sums[m] += counts ? fmaf(-gv * e, e, gv) : 0.f;
              if constexpr (kDv) tile_dv += counts ? gm * e : 0.f;
            }
          }
#pragma unroll
          for (int m = 0; m < kOwn; ++m) total[m] += sums[m];
          if constexpr (kDv) dv += tile_dv;
        }
        __syncthreads();
      }
      const int64_t a = a0 + lane;
#pragma unroll
      for (int m = 0; m < kOwn; ++m) {
        const int r = warp * kOwn + m;
        if (r < own_rows && a < p.width)
          pass.sums[((part * p.batch + b) * pass.own.count + first + r) * p.width + a] = total[m];
      }
      if constexpr (kDv) {
        dvs[warp][lane] = dv;
        __syncthreads();
        if (warp == 0 && a < p.width) {
          float sum = 0;
#pragma unroll
          for (int w = 0; w < kWarps; ++w) sum += dvs[w][lane];
          pass.dv[((b * pass.tiles + tile) * pass.parts + part) * p.width + a] = sum;
        }
        __syncthreads();
      }
    }
}

// out[i] = sum over parts of in[part][i].
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sum_parts_kernel(const float* in, T* out, int64_t count, int64_t parts) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kThreads) {
    float sum = 0;
#pragma unroll 4
    for (int64_t part = 0; part < parts; ++part) sum += in[part * count + i];
    out[i] = static_cast<T>(sum);
  }
}

// out[a] = sum over rows of in[row][a]. One lane per column, the rows are split among the warps.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sum_rows_kernel(const float* in, T* out, int64_t rows, int64_t width) {
  __shared__ float sums[kWarps][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  for (int64_t a0 = int64_t{blockIdx.x} * kWarpSize; a0 < width;
       a0 += int64_t{gridDim.x} * kWarpSize) {
    const int64_t a = a0 + lane;
    float sum = 0;
#pragma unroll 4
    for (int64_t row = warp; row < rows; row += kWarps) sum += a < width ? in[row * width + a] : 0;
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && a < width) {
      float all = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) all += sums[w][lane];
      out[a] = static_cast<T>(all);
    }
    __syncthreads();
  }
}

}  // namespace tokenmill::cuda::additive_attention
