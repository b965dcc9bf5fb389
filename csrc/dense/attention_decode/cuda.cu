#include <algorithm>

#include "attention/mask_bounds.cuh"
#include "core/knobs.h"
#include "cuda/refuse.cuh"
#include "dense/attention/choose_sm90.h"
#include "dense/attention_decode/cuda_launch.cuh"
#include "dense/attention_decode/launch_sm90.h"

namespace tokenmill {
namespace cuda {

extern template const char* launch_decode<__half>(const DecodeParams&, cudaStream_t);
extern template const char* launch_decode<__nv_bfloat16>(const DecodeParams&, cudaStream_t);
extern template const char* launch_decode<float>(const DecodeParams&, cudaStream_t);

// float8_launch.cuh
template <typename T>
const char* launch_float8(const DecodeParams&, cudaStream_t);
extern template const char* launch_float8<__half>(const DecodeParams&, cudaStream_t);
extern template const char* launch_float8<__nv_bfloat16>(const DecodeParams&, cudaStream_t);
extern template const char* launch_float8<float>(const DecodeParams&, cudaStream_t);

// prefill_launch.cuh
template <typename T>
const char* launch_prefill(const DecodeParams&, const MaskBounds&, int max_queries, cudaStream_t);
extern template const char* launch_prefill<__half>(const DecodeParams&, const MaskBounds&, int,
                                                   cudaStream_t);
extern template const char* launch_prefill<__nv_bfloat16>(const DecodeParams&, const MaskBounds&,
                                                          int, cudaStream_t);
extern template const char* launch_prefill<float>(const DecodeParams&, const MaskBounds&, int,
                                                  cudaStream_t);

// prefill_float8_launch.cuh
template <typename T>
const char* launch_prefill_float8(const DecodeParams&, const MaskBounds&, cudaStream_t);
extern template const char* launch_prefill_float8<__half>(const DecodeParams&, const MaskBounds&,
                                                          cudaStream_t);
extern template const char* launch_prefill_float8<__nv_bfloat16>(const DecodeParams&,
                                                                 const MaskBounds&, cudaStream_t);
extern template const char* launch_prefill_float8<float>(const DecodeParams&, const MaskBounds&,
                                                         cudaStream_t);

}  // namespace cuda

// The decode kernels require the same number of queries in each request, and a causal mask.
static bool prefills(const AttentionParams& p) { return p.cu_seqlens_q || p.window_right != 0; }

// The conditions of python/tokenmill/dense/attention_kernels.py.
static bool takes_sm90(const DecodeParams& d) {
  const AttentionParams& p = d.attention;
  if (p.seqlen_q > cuda::kMaxLength || d.max_seqlen_q < cuda::kMinSm90Tokens) return false;
  if (!prefills(p)) {
    // Where tiles do not fill a GPU, the decode kernels, which split keys, are faster.
    const int64_t tiles = p.batch * p.heads * ceil_div(p.seqlen_q, 64);
    if (!d.stream_k || tiles < knob(Knob::attention_decode_sm90_tiles)) return false;
  }
  return cuda::takes_sm90(p, d.cache);
}

// The sm_90a decode kernel.
static bool takes_few_sm90(const DecodeParams& d) {
  return !prefills(d.attention) && cuda::takes_decode_sm90(d);
}

template <typename T>
static const char* launch_few_sm90(const DecodeParams& d, cudaStream_t stream) {
  if constexpr (cuda::kHasSm90) return cuda::launch_decode_sm90<T>(d, stream);
  return cuda::kNotMapped;
}

// Workspace of the sm_80 decode kernel.
static int64_t workspace_bytes_of_every_chip(const DecodeParams& d) {
  return cuda::visit_dtype(d.attention.dtype, [&]<typename T>() {
    if (d.cache.dtype == DType::float8_e4m3fn)
      return cuda::visit_float8_bucket(d.attention, [&]<int kBucket>() {
        return cuda::workspace_bytes(
            cuda::plan_decode<cuda::CacheKeys<T, kBucket, true, cuda::Float8>>(d));
      });
    return cuda::visit_bucket(d.attention, [&]<int kBucket>() {
      using Keys = cuda::CacheKeys<T, kBucket, kBucket == cuda::kLatentBucket>;
      return cuda::workspace_bytes(cuda::plan_decode<Keys>(d));
    });
  });
}

// Depends on no knob: the launch reads knobs again, and another thread may have changed them.
int64_t workspace_bytes(const DecodeParams& d) {
  if (prefills(d.attention)) return MaskBounds::bytes(d.attention);
  const int64_t bytes = workspace_bytes_of_every_chip(d);
  if (!cuda::kHasSm90 || !takes_few_sm90(d) || cuda::compute_capability() != 90) return bytes;
  return cuda::visit_decode_sm90_dim(d.attention.head_dim, [&]<int kHeadDim>() {
    const auto planned = cuda::plan_segments<cuda::DecodeSm90Keys<kHeadDim>>(d);
    return std::max(bytes, cuda::workspace_bytes(planned));
  });
}

const char* launch_cuda(const DecodeParams& d, void* stream) {
  if (d.cache.capacity > cuda::kMaxLength)
    return cuda::refuse("k_cache", "must have room for at most 2^29 keys of a request on CUDA",
                        d.cache.capacity);
  if (d.cache.pages > 0x7fffffff)
    return cuda::refuse("k_cache", "must have at most 2^31 - 1 pages on CUDA", d.cache.pages);
  const AttentionParams& p = d.attention;
  if (prefills(p)) {
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
  const auto on = static_cast<cudaStream_t>(stream);
  int max_queries = 0;
  const bool on_sm90 =
      cuda::kHasSm90 && knob(Knob::attention_decode_sm90) && cuda::compute_capability() == 90;
  if (on_sm90 && takes_sm90(d)) {
    const char* error = cuda::launch_on_sm90(p, d.cache, on);
    if (error != cuda::kNotMapped) {
      if (error || !p.cu_seqlens_q) return error;
      max_queries = cuda::kMinSm90Tokens - 1;
    }
  } else if (on_sm90 && takes_few_sm90(d)) {
    const char* error = p.dtype == DType::float16 ? launch_few_sm90<__half>(d, on)
                                                  : launch_few_sm90<__nv_bfloat16>(d, on);
    if (error != cuda::kNotMapped) return error;
  }
  const bool float8 = d.cache.dtype == DType::float8_e4m3fn;
  if (!prefills(p))
    return cuda::visit_dtype(p.dtype, [&]<typename T>() {
      return float8 ? cuda::launch_float8<T>(d, on) : cuda::launch_decode<T>(d, on);
    });
  const MaskBounds bounds = MaskBounds::at(p, d.workspace);
  if (p.mask.any())
    if (const char* error = cuda::launch_bounds(p, bounds, on)) return error;
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    return float8 ? cuda::launch_prefill_float8<T>(d, bounds, on)
                  : cuda::launch_prefill<T>(d, bounds, max_queries, on);
  });
}

}  // namespace tokenmill
