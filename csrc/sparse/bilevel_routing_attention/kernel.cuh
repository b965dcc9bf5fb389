// Forward over the keys of listed regions.
#pragma once
#include "sparse/bilevel_routing_attention/kernel_keys.cuh"
#include "sparse/listed_forward.cuh"

namespace tokenmill::cuda::bilevel_routing_attention {

template <typename T, int kBucket>
__global__ void __launch_bounds__(ListedShape<T, kBucket>::kMaxThreads,
                                  ListedShape<T, kBucket>::kMinBlocks)
    bilevel_forward_kernel(const __grid_constant__ RegionLaunch d) {
  listed_forward<T, kBucket, RegionWalk>(d);
}

}  // namespace tokenmill::cuda::bilevel_routing_attention
