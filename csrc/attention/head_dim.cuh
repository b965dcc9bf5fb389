// Head dimensions with compiled kernels, in ascending order.
#pragma once
#include "cuda/unroll.cuh"

#ifndef TOKENMILL_HEAD_DIMS
#define TOKENMILL_HEAD_DIMS 32, 64, 96, 128, 192, 256
#endif

namespace tokenmill::cuda {

// Calls visit(Index<kDim>{}) with the smallest compiled dimension >= dim, else with the largest
// one.
template <int kDim, int... kLarger, typename Visit>
auto visit_least_dim(int64_t dim, const Visit& visit) {
  if constexpr (sizeof...(kLarger) > 0)
    if (dim > kDim) return visit_least_dim<kLarger...>(dim, visit);
  return visit(Index<kDim>{});
}

template <typename Visit>
auto visit_head_dim(int64_t dim, const Visit& visit) {
  return visit_least_dim<TOKENMILL_HEAD_DIMS>(dim, visit);
}

}  // namespace tokenmill::cuda
