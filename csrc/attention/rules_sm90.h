// Rules of the calls that the sm_90a kernels of attention take. Host code without CUDA headers.
#pragma once
#include "attention/params.h"
#include "core/kv_cache.h"
#include "cuda/arch/sm90/calls.h"
#include "cuda/tiles.h"

namespace tokenmill::cuda {

using Sm90HeadDims = HeadDimList<64, 96, 128, 192, 256>;

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

// Dtype and head dimensions.
template <typename Dims>
bool check_heads(Rules& r, const AttentionParams& p, const char* values = "v") {
  return check_dtype(r, p.dtype) && check_head_dim<Dims>(r, "q", p.head_dim) &&
         r.check(p.value_dim == p.head_dim, values, "must have the head_dim of q", p.value_dim);
}

// With and without a cache.
template <typename Dims>
bool check_form(Rules& r, const AttentionParams& p, const Sm90Tensors& t, const char* keys = "k",
                const char* values = "v") {
  const bool known = p.map == ScoreMap::softmax || p.map == ScoreMap::sigmoid;
  return check_heads<Dims>(r, p, values) &&
         r.check(known, "kind", "must be 'softmax' or 'sigmoid'") &&
         r.check(p.normalize == Normalize::none, "normalize", "must be 'none'") &&
         r.check(!p.mask.ranges, "mask_ranges", "must be None") &&
         r.check(!p.mask.q_spans, "mask_q_spans", "must be None") &&
         r.check(!p.bias, "bias", "must be None") &&
         r.check(!p.alibi_slopes, "alibi_slopes", "must be None") && check_layout(r, "q", t.q) &&
         check_layout(r, keys, t.k) && check_layout(r, values, t.v);
}

// The scale is a normal number, and scale / softcap is far from underflow.
inline bool check_scale(Rules& r, const AttentionParams& p) {
  const bool capped = !(p.softcap > 0) || (p.softcap < 1e38f && p.scale >= 0x1p-64 * p.softcap);
  return r.check(p.scale >= 0x1p-126f, "scale", "must be 2^-126 or more in float32") &&
         r.check(capped, "softcap", "must be below 1e38 and at most 2^64 scale");
}

// Tiles of `rows` queries over all heads; packed: an upper bound.
inline int64_t query_tiles(const AttentionParams& p, int64_t rows) {
  return (p.cu_seqlens_q ? 1 : p.batch) * p.heads *
         max_tiles(p.cu_seqlens_q, p.batch, p.seqlen_q, rows);
}

inline bool check_tiles(Rules& r, const AttentionParams& p) {
  const int64_t tiles = query_tiles(p, 64);
  return r.check(tiles <= 1 << 30, "q", "must have at most 2^30 tiles of 64 rows", tiles);
}

// Launches the forward of attention (csrc/dense/attention). cache: the KV cache (p then has no
// keys); without one its seqlens are null. Of packed requests with a cache it takes those with
// kMinSm90Tokens queries or more, so that the bits of a request do not depend on its batch. Returns
// null, kNotMapped, or an error message.
const char* launch_forward_sm90(const AttentionParams& p, const KvCache& cache, void* stream);

// Every forward.
inline bool check_forward(Rules& r, const AttentionParams& p, const Sm90Tensors& t) {
  return check_scale(r, p) && check_tiles(r, p) && check_out(r, t.out);
}

// Min page size: a K tile then has at most three TMA boxes.
constexpr int64_t kMinSm90Page = 64;

template <typename Dims>
bool check_cached_form(Rules& r, const AttentionParams& p, const KvCache& cache,
                       const Sm90Tensors& t) {
  const int64_t size = page_size(cache);
  const bool paged = cache.block_table;
  return check_form<Dims>(r, p, t, "k_cache", "v_cache") &&
         r.check(
             cache.dtype == p.dtype, "k_cache",
             [&] { return std::string("must have the dtype of q, ") + name_of(p.dtype); },
             cache.dtype) &&
         r.check(!paged || size >= kMinSm90Page, "k_cache", "must have pages of 64 tokens or more",
                 size) &&
         r.check(!paged || cache.pages == 0 || cache.capacity > 0, "block_table", "must have pages",
                 0) &&
         r.check(cache.pages > 0 && size > 0, "k_cache", "must have tokens",
                 [](const Described& call) { return call.shape("k_cache"); });
}

// Backward: rows of a query tile.
constexpr int sm90_tile_queries(int64_t head_dim) { return head_dim <= 64 ? 128 : 64; }
// Number of query tiles, each with its own dQ accumulator.
inline int64_t sm90_query_tiles(const AttentionParams& p) {
  return query_tiles(p, sm90_tile_queries(p.head_dim));
}
// Floats in one tile's dQ accumulator, head_dim rounded up to whole 64-column boxes.
constexpr int sm90_tile_floats(int64_t head_dim) {
  return static_cast<int>(sm90_tile_queries(head_dim) * ((head_dim + 63) / 64 * 64));
}
// dQ accumulators, then the number of CTAs started and one turn counter per accumulator.
inline int64_t sm90_workspace_bytes(const AttentionParams& p) {
  return 4 * (sm90_query_tiles(p) * (sm90_tile_floats(p.head_dim) + 1) + 1);
}

}  // namespace tokenmill::cuda
