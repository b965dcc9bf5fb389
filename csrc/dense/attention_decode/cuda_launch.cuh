// Launches one instance of the decode kernel.
#pragma once
#include "dense/attention_decode/cuda_plan.cuh"
#include "dense/attention_decode/kernel.cuh"

namespace tokenmill::cuda {

template <typename T>
bool has_whole_chunks(const Rows& rows, int64_t columns) {
  return is_vectorizable<T>(rows.data, columns, rows.batch, rows.seq, rows.head);
}

template <typename Keys>
DecodeLaunch plan_decode(const DecodeParams& d) {
  using Cache = typename Keys::Shape::Cache;
  const AttentionParams& p = d.attention;
  DecodeLaunch launch = plan_segments<Keys>(d);
  launch.plan.aligned = has_whole_chunks<typename Keys::Element>(p.q, p.head_dim) &&
                        has_whole_chunks<Cache>(d.cache.k, p.head_dim) &&
                        has_whole_chunks<Cache>(d.cache.v, p.value_dim);
  return launch;
}

// Launches kKernel(d, plan), with partial sums and counters at `workspace`.
template <auto kKernel, typename Params>
const char* launch_planned(const Params& d, DecodeLaunch planned, void* workspace,
                           cudaStream_t stream) {
  if (const char* error = place_partials(planned.plan, planned, workspace, stream)) return error;
  return launch<kKernel>(planned.blocks, kDecodeThreads, planned.shared_bytes, stream, d,
                         planned.plan);
}

template <typename T, int kBucket>
const char* launch_decode(const DecodeParams& d, cudaStream_t stream) {
  constexpr bool kLatent = kBucket == kLatentBucket;
  const DecodeLaunch planned = plan_decode<CacheKeys<T, kBucket, kLatent>>(d);
  if constexpr (kLatent)
    return launch_planned<attention_decode_kernel<T, kBucket, true>>(d, planned, d.workspace,
                                                                     stream);
  else
    return d.attention.mask.any() ? launch_planned<attention_decode_kernel<T, kBucket, true>>(
                                        d, planned, d.workspace, stream)
                                  : launch_planned<attention_decode_kernel<T, kBucket, false>>(
                                        d, planned, d.workspace, stream);
}

// Calls visit.operator()<bucket>() with the smallest bucket that holds both head dimensions.
template <typename Visit>
auto visit_bucket(const AttentionParams& p, const Visit& visit) {
  const int64_t dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if (dim <= 64) return visit.template operator()<64>();
  if (dim <= 128) return visit.template operator()<128>();
  if (dim <= 256) return visit.template operator()<256>();
  return visit.template operator()<kLatentBucket>();
}
// The same for Float8 caches, with one instance for all narrow heads.
template <typename Visit>
auto visit_float8_bucket(const AttentionParams& p, const Visit& visit) {
  const int64_t dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if (dim <= 128) return visit.template operator()<128>();
  if (dim <= 256) return visit.template operator()<256>();
  return visit.template operator()<kLatentBucket>();
}

template <typename T>
const char* launch_decode(const DecodeParams& d, cudaStream_t stream) {
  return visit_bucket(d.attention,
                      [&]<int kBucket>() { return launch_decode<T, kBucket>(d, stream); });
}

}  // namespace tokenmill::cuda
