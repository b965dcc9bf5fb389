// Warp-wide validity check of list ids, 32 at a time.
#pragma once
#include "cuda/warp.cuh"
#include "sparse/block_list.h"

namespace tokenmill::cuda {

// ListWalk over the next 32 ids, one per lane. Called by all lanes; lanes past the end pass a
// negative id.
struct WarpListWalk {
  int blocks;
  int largest = -1;  // maximum id so far

  __device__ __forceinline__ bool counts(int id) {
    const int lane = threadIdx.x % kWarpSize;
    int top = id;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const int before = __shfl_up_sync(kFullWarp, top, offset);
      if (lane >= offset) top = max(top, before);
    }
    const int before = __shfl_up_sync(kFullWarp, top, 1);
    const bool exceeds = id > (lane > 0 ? max(before, largest) : largest);
    largest = max(largest, __shfl_sync(kFullWarp, top, kWarpSize - 1));
    return exceeds && id < blocks;
  }
};

}  // namespace tokenmill::cuda
