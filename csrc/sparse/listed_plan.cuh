// Host-side launch planning of the kernels on lists.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "sparse/listed.h"

namespace tokenmill::cuda {

template <typename T, typename... Lines>
bool has_whole_chunks(const Rows& rows, int64_t columns, Lines... lines) {
  return is_vectorizable<T>(rows.data, columns, rows.batch, rows.seq, rows.head, lines...);
}

// True if this number of elements makes fewer than 2^32 chunks.
template <typename T>
bool is_compact(int64_t elements) {
  return elements / (16 / static_cast<int64_t>(sizeof(T))) < int64_t{1} << 32;
}

// Calls visit.operator()<bucket>() with the rounded-up head_dim.
template <typename Visit>
auto visit_bucket(const AttentionParams& p, const Visit& visit) {
  const int64_t dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if (dim <= 64) return visit.template operator()<64>();
  if (dim <= 128) return visit.template operator()<128>();
  return visit.template operator()<256>();
}

}  // namespace tokenmill::cuda
