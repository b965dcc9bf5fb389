// Conditions of the sm_90a kernels, and the launch of the forward.
#pragma once
#include <cuda_runtime.h>

#include "attention/score_map.cuh"
#include "core/kv_cache.h"
#include "cuda/arch/sm90/calls.h"
#include "cuda/sequences.cuh"
#include "dense/attention/head_dim.cuh"

namespace tokenmill::cuda {

// A cache without a block_table has one page per request.
inline int64_t page_size(const KvCache& cache) {
  return cache.block_table ? int64_t{1} << cache.log2_page_size : cache.capacity;
}

// out: a tensor with the shape of the output; in the backward, dout.
struct Sm90Tensors : MappedTensors {
  Sm90Tensors(const AttentionParams& p, const Rows& out)
      : Sm90Tensors(p, out, p.cu_seqlens_q ? 1 : p.batch) {}
  // Forward; with a cache, keys and values are its pages.
  Sm90Tensors(const AttentionParams& p, const KvCache& cache) : Sm90Tensors(p, p.out) {
    if (!cache.seqlens) return;
    k = {cache.k, cache.pages, page_size(cache), p.kv_heads, p.head_dim};
    v = {cache.v, cache.pages, page_size(cache), p.kv_heads, p.value_dim};
  }

 private:
  Sm90Tensors(const AttentionParams& p, const Rows& out, int64_t batch)
      : MappedTensors{{p.q, batch, p.seqlen_q, p.heads, p.head_dim},
                      {p.k, batch, p.seqlen_k, p.kv_heads, p.head_dim},
                      {p.v, batch, p.seqlen_k, p.kv_heads, p.value_dim},
                      {out, batch, p.seqlen_q, p.heads, p.value_dim}} {}
};

// The scale is a normal number, and scale / softcap is far from underflow.
inline bool has_sm90_scale(const AttentionParams& p) {
  if (!(p.scale >= 0x1p-126f)) return false;
  return !(p.softcap > 0) || (p.softcap < 1e38f && p.scale >= 0x1p-64 * p.softcap);
}

// Calls visit(Index<kDim>{}) with the smallest compiled dimension >= head_dim.
template <typename Visit>
auto visit_sm90_dim(int64_t head_dim, const Visit& visit) {
  return visit_least_dim<64, 96, 128, 192, 256>(head_dim, visit);
}
inline bool has_sm90_dim(int64_t head_dim) {
  return visit_sm90_dim(head_dim, [&](auto dim) { return dim == head_dim; });
}

// The conditions of python/tokenmill/dense/attention_kernels.py, in steps. With or without a cache:
inline bool has_sm90_form(const AttentionParams& p) {
  if (p.dtype == DType::float32 || p.head_dim != p.value_dim) return false;
  if (weights_of(p) == Weights::elementwise) return false;
  return !p.mask.any() && !p.bias && !p.alibi_slopes && p.seqlen_k > 0;
}

// Both passes:
inline bool is_sm90_attention(const AttentionParams& p) {
  return has_sm90_form(p) && has_sm90_tokens(p.seqlen_q, p.cu_seqlens_q, p.batch);
}

// 64-row tiles of all heads; batch: extent of Q's tensor map.
inline bool has_sm90_tiles(const AttentionParams& p, int64_t batch) {
  return max_tiles(p.cu_seqlens_q, p.batch, p.seqlen_q, 64) * batch * p.heads <= 1 << 30;
}

// Every forward:
inline bool is_sm90_forward(const AttentionParams& p, const Sm90Tensors& t) {
  if (!has_sm90_dim(p.head_dim) || !has_sm90_scale(p)) return false;
  return has_sm90_tiles(p, t.q.batch) && t.can_be_mapped();
}

// Forward without a cache:
inline bool takes_sm90(const AttentionParams& p) {
  return is_sm90_attention(p) && is_sm90_forward(p, {p, p.out});
}

// Min page size: a K tile then has at most three TMA boxes.
constexpr int64_t kMinSm90Page = 64;

// Forward with a KV cache. Of packed requests it takes those with kMinSm90Tokens queries or more,
// so that the bits of a request do not depend on its batch.
inline bool takes_sm90(const AttentionParams& p, const KvCache& cache) {
  if (!has_sm90_form(p) || p.seqlen_q < kMinSm90Tokens) return false;
  if (cache.dtype != p.dtype) return false;
  if (cache.block_table && page_size(cache) < kMinSm90Page) return false;
  return is_sm90_forward(p, {p, cache});
}

// cache: the KV cache (p then has no keys); without one its seqlens are null.
template <typename T, Weights kWeights>
const char* launch_forward_sm90(const AttentionParams& p, const KvCache& cache,
                                cudaStream_t stream);

}  // namespace tokenmill::cuda
