// Row copies on CUDA: a CTA processes as many rows as fill it, with at most a warp of threads per
// row, so that rows of any length are read in whole cache lines.
#pragma once
#include "core/dtype.h"
#include "cuda/launch.cuh"
#include "cuda/warp.cuh"

namespace tokenmill::cuda {

constexpr int kRowThreads = 256;
constexpr int kRowChunks = 4;  // loads in flight per thread
constexpr int64_t kMaxBatches = 65535;

// Threads along a row, and rows per CTA, for rows of `chunks` accesses; a grid of (rows, batch).
// With few rows CTAs are smaller, so that every SM has one.
struct RowGrid {
  dim3 block, grid;
  bool fits;

  RowGrid(int64_t chunks, int64_t rows, int64_t batch) {
    int lanes = 1;
    while (lanes < kWarpSize && lanes < chunks) lanes *= 2;
    int at_once = kRowThreads / lanes;
    while (at_once * lanes > kWarpSize && ceil_div(rows, at_once) * batch < multiprocessors())
      at_once /= 2;
    block = dim3(lanes, at_once);
    const int64_t blocks = ceil_div(rows, at_once);
    fits = blocks <= kMaxGrid;
    grid = dim3(static_cast<unsigned>(fits ? blocks : 1),
                static_cast<unsigned>(batch < kMaxBatches ? batch : kMaxBatches));
  }
};

// Row of this thread.
__device__ __forceinline__ int64_t row_of_thread() {
  return int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
}

// from: null for zeros.
template <typename T>
__device__ __forceinline__ void copy_row(T* __restrict__ to, const T* __restrict__ from,
                                         int64_t chunks, int lane, int lanes) {
  for (int64_t c = lane; c < chunks; c += int64_t{lanes} * kRowChunks) {
    T x[kRowChunks] = {};
#pragma unroll
    for (int i = 0; i < kRowChunks; ++i)
      if (from && c + i * lanes < chunks) x[i] = from[c + i * lanes];
#pragma unroll
    for (int i = 0; i < kRowChunks; ++i)
      if (c + i * lanes < chunks) to[c + i * lanes] = x[i];
  }
}

// Calls visit.operator()<T>() with the widest type by which all addresses and strides are
// divisible.
template <typename Visit>
auto visit_width(uint64_t bits, const Visit& visit) {
  if (bits % 16 == 0) return visit.template operator()<uint4>();
  if (bits % 8 == 0) return visit.template operator()<uint2>();
  if (bits % 4 == 0) return visit.template operator()<uint32_t>();
  return visit.template operator()<uint16_t>();
}

inline uint64_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

}  // namespace tokenmill::cuda
