// Splits of the kernels of sparse_decode_attention, and their launch.
#pragma once
#include "dense/attention_decode/cuda_plan.cuh"
#include "sparse/sparse_decode_attention/kernel_keys.cuh"

namespace tokenmill::cuda::sparse_decode_attention {

// Maximum number of keys that a list adds.
inline int64_t listed_keys(const SparseDecodeParams& d) { return d.entries << d.log2_block; }

inline int64_t cut(int64_t keys, const KvCache& cache) {
  return keys < cache.capacity ? keys : cache.capacity;
}

struct ListedPlan : DecodeLaunch {
  int cut_keys;  // see ListedLaunch
};

// Key sequences are short: if splits of 256 keys make fewer CTAs than SMs, splits get shorter.
template <typename Keys>
ListedPlan plan_sparse(const SparseDecodeParams& d) {
  using T = typename Keys::Element;
  using Cache = typename Keys::Shape::Cache;
  const AttentionParams& p = d.attention;
  const int64_t first_and_last = cut(d.num_sink, d.cache) + cut(d.num_recent, d.cache);
  const int64_t longest = cut(first_and_last + listed_keys(d) + p.seqlen_q, d.cache) + d.extra;
  constexpr int kTileKeys = Keys::Shape::kTileKeys;
  const auto plan = [&](int64_t splits) {
    return plan_decode<Keys>(p, d.row_heads(), longest, splits, false);
  };
  ListedPlan launch{plan(d.num_splits), kTileKeys};
  for (int minimum = 128; d.num_splits == 0 && minimum >= kMinCut; minimum /= 2) {
    const int64_t splits = ceil_div(longest, minimum);
    if (launch.blocks >= multiprocessors() || splits > kMaxAutoSplits) break;
    if (splits > launch.plan.splits)
      launch = {plan(splits), minimum < kTileKeys ? minimum : kTileKeys};
  }
  launch.plan.aligned =
      has_whole_chunks<T>(p.q, p.head_dim) && has_whole_chunks<Cache>(d.cache.k, p.head_dim) &&
      has_whole_chunks<Cache>(d.cache.v, p.value_dim) &&
      (d.extra == 0 ||
       (has_whole_chunks<T>(d.extra_k, p.head_dim) && has_whole_chunks<T>(d.extra_v, p.value_dim)));
  return launch;
}

template <auto kKernel, typename Keys, typename Launch>
const char* launch_listed(Launch d, void* workspace, cudaStream_t stream) {
  const ListedPlan planned = plan_sparse<Keys>(d);
  d.cut_keys = planned.cut_keys;
  return launch_planned<kKernel>(d, planned, workspace, stream);
}

// Compiled once for each element type (kernel*.cu).
template <typename T>
const char* launch_sparse(const SparseLaunch& d, void* workspace, cudaStream_t stream);
template <typename T>
const char* launch_float8(const SparseLaunch& d, void* workspace, cudaStream_t stream);

}  // namespace tokenmill::cuda::sparse_decode_attention
