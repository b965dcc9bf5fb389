// Memory pools of cudaMallocAsync. A pool counts what was allocated from it; freed memory goes back
// to the process at once.
#pragma once
#include <algorithm>
#include <map>
#include <memory>

#include "ptxvm/cudart.h"

struct CUmemPoolHandle_st {
  cudaMemLocation location;
  size_t maximum = 0;  // bytes; 0: none
  size_t used = 0, most_used = 0;
  uint64_t threshold = 0;    // cudaMemPoolAttrReleaseThreshold: stored, has no effect
  int reuse[3] = {1, 1, 1};  // cudaMemPoolReuse*: likewise
  std::map<int, cudaMemAccessFlags> access{};  // by device: likewise

  bool take(size_t bytes) {
    if (maximum && bytes > maximum - used) return false;
    used += bytes;
    most_used = std::max(most_used, used);
    return true;
  }
  void give_back(size_t bytes) { used -= bytes; }
};

namespace ptxvm {

using PoolOwner = std::shared_ptr<CUmemPoolHandle_st>;

// The pool of cudaMallocAsync on the current device.
PoolOwner current_pool();
// Null if there is no such pool.
PoolOwner owner_of(cudaMemPool_t);

}  // namespace ptxvm
