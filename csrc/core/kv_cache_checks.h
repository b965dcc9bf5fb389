// Checks of a KV cache.
#pragma once
#include <bit>

#include "core/kv_cache.h"
#include "core/qkv.h"

namespace tokenmill {

// Latent caches: 512 channels that are also the values, and 64 that carry positions.
constexpr int64_t kMaxCacheDim = 576, kMaxCacheValueDim = 512;

// v may be absent where k also holds the values.
inline void check_cache_ranks(const char* op, const View& k, const View& v) {
  for (auto [name, t] : {std::pair{"k_cache", &k}, std::pair{"v_cache", &v}})
    check(!*t || t->dim() == 4, op, name,
          "must have 4 dimensions [B, S, Hk, D] (in pages: [P, page size, Hk, D])", t->dim());
}

inline void check_cache_shapes(const char* op, const View& k, const View& v) {
  check(std::equal(v.sizes.begin(), v.sizes.end() - 1, k.sizes.begin()), op, "v_cache",
        Rule("must have the shape of k_cache up to the head dimension, ", k.sizes), v.sizes);
}

// Checks of 4-dimensional caches that no query has checked. Without a v the values are in k.
inline void check_caches_alike(const char* op, const View& k, const View& v,
                               int64_t maximum = kMaxHeadDim, int64_t max_v = kMaxHeadDim) {
  if (!v) {
    check_last_contiguous(op, "k_cache", k);
    check_head_dim(op, "k_cache", k, maximum);
    return;
  }
  check(v.dtype == k.dtype, op, "v_cache", Rule("must have the dtype of k_cache, ", k.dtype),
        v.dtype);
  check_device_of(op, "v_cache", v, "k_cache", k);
  for (auto [name, t] : {std::pair{"k_cache", &k}, std::pair{"v_cache", &v}}) {
    check_last_contiguous(op, name, *t);
    check_head_dim(op, name, *t, t == &v ? max_v : maximum);
  }
  check_cache_shapes(op, k, v);
}

// Checks that a cache has the dtype of `rows`, or float8_e4m3fn.
inline void check_cache_dtype(const char* op, const char* name, const View& cache, const View& rows,
                              const char* of = "q") {
  check(cache.dtype == rows.dtype || cache.dtype == ScalarType::Float8_e4m3fn, op, name,
        Rule("must have the dtype of ", of, ", ", rows.dtype, ", or float8_e4m3fn"), cache.dtype);
}

// Allowed shapes of a scale: [1] and [Hk] (shared), [P, page size, Hk] (token).
enum class ScaleShapes { shared, token, any };

// Checks the scale of keys or values of a cache [P, page size, Hk, D], if given.
inline void check_cache_scale(const char* op, const char* name, const View& t, const char* of,
                              const View& cache, ScaleShapes shapes = ScaleShapes::any) {
  if (!t) return;
  check(cache.dtype == ScalarType::Float8_e4m3fn, op, name, "requires a cache in float8_e4m3fn",
        cache.dtype);
  const std::vector<int64_t> one{1}, each{cache.size(2)},
      all(cache.sizes.begin(), cache.sizes.begin() + 3);
  const bool shared = t.sizes == one || t.sizes == each;
  check(
      (shared && shapes != ScaleShapes::token) || (t.sizes == all && shapes != ScaleShapes::shared),
      op, name, Rule("must have shape [1], ", each, " or ", all), t.sizes);
  const bool wide = t.dtype == ScalarType::Double && t.framework->takes_float64();
  check(t.dtype == ScalarType::Float || wide, op, name, "must be float32", t.dtype);
  check_device_of(op, name, t, of, cache);
}

// The checked scale as kernels see it.
inline CacheScale make_cache_scale(const char* op, const char* name, const View& t, const char* of,
                                   const View& cache) {
  if (!t) return {};
  check_cache_scale(op, name, t, of, cache);
  if (t.dim() == 1) return {t.data<float>(), 0, 0, t.step(0)};
  return {t.data<float>(), t.step(0), t.step(1), t.step(2)};
}

// Checks q [B, Sq, H, D], or packed [T, H, D], and a dense cache [B, S, Hk, D] or pages [P, page
// size, Hk, D]. Returns the number of requests.
inline int64_t check_cache(const char* op, const View& q, const View& k, const View& v, bool paged,
                           const View& cu_seqlens_q = {}) {
  const std::pair<const char*, const View*> all[] = {{"q", &q}, {"k_cache", &k}, {"v_cache", &v}};
  if (cu_seqlens_q)
    check(q.dim() == 3, op, "q", "must have 3 dimensions [T, H, D] (packed)", q.dim());
  else
    check(q.dim() == 4, op, "q", "must have 4 dimensions [B, Sq, H, D]", q.dim());
  check_cache_ranks(op, k, v);
  check_dtype(op, "q", q);
  check_cache_dtype(op, "k_cache", k, q);
  check(v.dtype == k.dtype, op, "v_cache", Rule("must have the dtype of k_cache, ", k.dtype),
        v.dtype);
  for (auto [name, t] : {all[1], all[2]}) check_device_of_q(op, name, *t, q);
  for (auto [name, t] : all) {
    check_last_contiguous(op, name, *t);
    check_head_dim(op, name, *t, t == &v ? kMaxCacheValueDim : kMaxCacheDim);
  }
  check(k.size(3) == q.size(-1), op, "k_cache",
        Rule("must have the head dimension of q, ", q.size(-1)), k.size(3));
  check_cache_shapes(op, k, v);
  const int64_t heads = q.size(-2), kv_heads = k.size(2), size = k.size(1);
  check(heads == kv_heads || (kv_heads > 0 && heads % kv_heads == 0), op, "k_cache",
        Rule("number of heads must divide that of q, ", heads, " (GQA)"), kv_heads);
  if (cu_seqlens_q) check_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, q);
  const int64_t batch = cu_seqlens_q ? cu_seqlens_q.size(0) - 1 : q.size(0);
  if (paged)
    check(std::has_single_bit(static_cast<uint64_t>(size)), op, "k_cache",
          "must have pages of a power of two of tokens", size);
  else
    check(k.size(0) == batch, op, "k_cache", Rule("must have the batch size of q, ", batch),
          k.size(0));
  return batch;
}

// The cache as kernels see it.
inline KvCache make_cache(const char* op, const View& q, int64_t batch, const View& k,
                          const View& v, const View& seqlens, const View& table,
                          const View& k_scale, const View& v_scale) {
  const std::vector<int64_t> wanted{batch};
  check(seqlens.dtype == ScalarType::Int, op, "seqlens_k", "must be int32", seqlens.dtype);
  check(seqlens.sizes == wanted, op, "seqlens_k", Rule("must have shape ", wanted), seqlens.sizes);
  check_last_contiguous(op, "seqlens_k", seqlens);
  check_device_of_q(op, "seqlens_k", seqlens, q);
  KvCache cache{};
  cache.k = rows_of(k, false);
  cache.v = rows_of(v, false);
  cache.seqlens = seqlens.data<int32_t>();
  cache.pages = k.size(0);
  cache.capacity = k.size(1);
  if (table) {
    check(table.dtype == ScalarType::Int, op, "block_table", "must be int32", table.dtype);
    check(table.dim() == 2 && table.size(0) == batch, op, "block_table",
          Rule("must have shape [", batch, ", pages]"), table.sizes);
    check_last_contiguous(op, "block_table", table);
    check_device_of_q(op, "block_table", table, q);
    cache.block_table = table.data<int32_t>();
    cache.table_stride = table.step(0);
    cache.log2_page_size = std::countr_zero(static_cast<uint64_t>(k.size(1)));
    cache.capacity = cache.pages > 0 ? table.size(1) * k.size(1) : 0;
  }
  cache.dtype = to_dtype(k.dtype);
  cache.k_scale = make_cache_scale(op, "k_scale", k_scale, "k_cache", k);
  cache.v_scale = make_cache_scale(op, "v_scale", v_scale, "k_cache", k);
  return cache;
}

// Checks of lengths and page numbers, after all checks of metadata, and only on a CPU.
inline void check_cache_values(const char* op, const View& k, int64_t batch, const KvCache& cache,
                               bool pages_may_lack = false) {
  if (k.is_cuda) return;
  const bool all_pages = cache.block_table && !pages_may_lack;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = cache.seqlens[b];
    check(length >= 0 && length <= cache.capacity, op, "seqlens_k",
          Rule("must be 0 to what the cache holds of a request, ", cache.capacity), length);
    for (int64_t i = 0; all_pages && i < ceil_div(length, k.size(1)); ++i) {
      const int64_t page = cache.block_table[b * cache.table_stride + i];
      check(page >= 0 && page < cache.pages, op, "block_table",
            Rule("must name pages below ", cache.pages, " where keys lie"), page);
    }
  }
}

}  // namespace tokenmill
