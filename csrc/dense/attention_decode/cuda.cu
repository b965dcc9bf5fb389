#include "attention/mask_bounds.cuh"
#include "cuda/choose.h"
#include "cuda/refuse.cuh"
#include "dense/attention_decode/cuda_plan.cuh"
#include "dense/attention_decode/kernel_warp.cuh"
#include "dense/attention_decode/kernels.h"
#include "dense/attention_decode/launch_sm90.h"

namespace tokenmill {
namespace cuda {
namespace {

// max_queries: see ForwardPlan; 0: any number.
const char* launch_prefills(const DecodeParams& d, int max_queries, cudaStream_t stream) {
  const AttentionParams& p = d.attention;
  const MaskBounds bounds = MaskBounds::at(p, d.workspace);
  if (p.mask.any())
    if (const char* error = launch_bounds(p, bounds, stream)) return error;
  return visit_dtype(p.dtype, [&]<typename T>() {
    return d.cache.dtype == DType::float8_e4m3fn
               ? launch_prefill_float8<T>(d, bounds, stream)
               : launch_prefill<T>(d, bounds, max_queries, stream);
  });
}

}  // namespace

const char* launch_on_sm80(const DecodeParams& d, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (prefills(d.attention)) return launch_prefills(d, 0, on);
  return visit_dtype(d.attention.dtype, [&]<typename T>() {
    return d.cache.dtype == DType::float8_e4m3fn ? launch_float8<T>(d, on)
                                                 : launch_decode<T>(d, on);
  });
}

int64_t workspace_of_sm80(const DecodeParams& d) {
  if (prefills(d.attention)) return MaskBounds::bytes(d.attention);
  return visit_dtype(d.attention.dtype, [&]<typename T>() {
    if (d.cache.dtype == DType::float8_e4m3fn)
      return visit_float8_bucket(d.attention, [&]<int kBucket>() {
        return workspace_bytes(plan_decode<CacheKeys<T, kBucket, true, Float8>>(d));
      });
    return visit_bucket(d.attention, [&]<int kBucket>() {
      using Keys = CacheKeys<T, kBucket, kBucket == kLatentBucket>;
      return workspace_bytes(plan_decode<Keys>(d));
    });
  });
}

#if defined(TOKENMILL_SM90)
// The forward takes requests with at least kMinSm90Tokens queries each.
const char* launch_forward_on_sm90(const DecodeParams& d, void* stream) {
  const char* const error = launch_forward_sm90(d.attention, d.cache, stream);
  if (error || !d.attention.cu_seqlens_q) return error;
  return launch_prefills(d, kMinSm90Tokens - 1, static_cast<cudaStream_t>(stream));
}

const char* launch_decode_on_sm90(const DecodeParams& d, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return d.attention.dtype == DType::float16 ? launch_decode_sm90<__half>(d, on)
                                             : launch_decode_sm90<__nv_bfloat16>(d, on);
}

int64_t workspace_of_decode_sm90(const DecodeParams& d) {
  return visit_decode_sm90_dim(d.attention.head_dim, [&]<int kHeadDim>() {
    return workspace_bytes(plan_segments<DecodeSm90Keys<kHeadDim>>(d));
  });
}
#endif

}  // namespace cuda

int64_t workspace_bytes(const DecodeParams& d) { return cuda::workspace_of(kernels_of(d), d); }

const char* launch_cuda(const DecodeParams& d, void* stream) {
  if (d.cache.capacity > cuda::kMaxLength)
    return cuda::refuse("k_cache", "must have room for at most 2^29 keys of a request on CUDA",
                        d.cache.capacity);
  if (d.cache.pages > 0x7fffffff)
    return cuda::refuse("k_cache", "must have at most 2^31 - 1 pages on CUDA", d.cache.pages);
  const AttentionParams& p = d.attention;
  if (cuda::prefills(p)) {
    const int64_t dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
    if (dim > 256)
      return cuda::refuse(
          "q", "must be causal and not packed with head dimensions beyond 256 on CUDA", dim);
    if (p.seqlen_q > cuda::kMaxLength)
      return cuda::refuse("q", "must have at most 2^29 tokens on CUDA", p.seqlen_q);
    if (p.batch * p.heads > 0x7fffffff)
      return cuda::refuse("q", "must have at most 2^31 - 1 heads in all requests on CUDA",
                          p.batch * p.heads);
  }
  return cuda::launch_first(kernels_of(d), d, stream);
}

}  // namespace tokenmill
