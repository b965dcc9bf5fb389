// Streams rows of two tensors, from arbitrary addresses, through two stages of shared memory.
// Addresses are looked up two tiles ahead.
#pragma once
#include "attention/gmem_to_smem.cuh"
#include "attention/sequence.cuh"
#include "attention/tile_shape.cuh"

namespace tokenmill::cuda {

// kTileRows rows of both tensors per stage.
template <typename T, int kBucket>
struct StreamShape : TileShape<T, kBucket> {
  static constexpr int kTileRows = TileShape<T, kBucket>::kTileKeys;
};

// List ids that determine the addresses of two tiles, in flight to shared memory. Each thread reads
// the ids that it fetched itself.
template <int kTileRows>
struct FetchedIds {
  int ids[2 * kTileRows];

  __device__ __forceinline__ int& at(unsigned t) { return ids[t % (2 * kTileRows)]; }

  __device__ __forceinline__ void fetch(int t, const int32_t* from) {
    cp_async_word(shared_address(&at(t)), from);
  }
};

// Streams rows 0 ... source.total() - 1. fetch(t) starts reading the id that locates row t, if it
// is in global memory; store(t), called by the same thread, keeps the result in shared memory;
// load(stage, t) copies the tile that starts with row t and commits the copies. work(stage, t)
// follows for each tile. Called by all threads; on return no copy is in flight and no thread reads
// a stage.
template <int kTileRows, typename Source, typename Work>
__device__ __forceinline__ void stream_rows(Source& source, const Work& work) {
  if (source.total() <= 0) {
    cp_async_wait<0>();
    __syncthreads();
    return;
  }
  const auto each = [](int first, const auto& visit) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kTileRows; i += blockDim.x) visit(first + i);
  };
  const auto fetch = [&](int t) { source.fetch(t); };
  const auto store = [&](int t) { source.store(t); };
  each(0, fetch);
  each(kTileRows, fetch);
  cp_async_commit();
  cp_async_wait<0>();
  each(0, store);
  each(kTileRows, store);
  __syncthreads();
  source.load(0, 0);
#pragma unroll 1
  for (int first = 0; first < source.total(); first += kTileRows) {
    cp_async_wait<0>();
    __syncthreads();
    const int stage = first / kTileRows % 2, next = first + kTileRows, second = next + kTileRows;
    if (second < source.total()) {
      each(second, fetch);
      cp_async_commit();
    }
    if (next < source.total()) source.load(stage ^ 1, next);
    work(stage, first);
    if (first + 2 * kTileRows < source.total()) {
      cp_async_wait<1>();  // waits for the fetched ids, not for the tile
      each(first + 2 * kTileRows, store);
    }
  }
  __syncthreads();
}

}  // namespace tokenmill::cuda
