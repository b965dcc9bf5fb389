#include <algorithm>
#include <cmath>

#include "core/kv_cache_checks.h"
#include "core/stream.h"
#include "core/written.h"
#include "select/kv_cache_append/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "kv_cache_append";

struct KvCacheAppendArgs : Record {
  View k_cache, v_cache, k, v, slots, q, cos, sin, positions;
  bool interleaved;
  View k_scale, v_scale, k_scale_out, v_scale_out;
  int64_t rope_offset;
};

void check_rows(const char* name, const View& t, const KvCacheAppendArgs& a) {
  check(t.dtype == a.k.dtype, kOp, name, Rule("must have the dtype of k, ", a.k.dtype), t.dtype);
  check_device_of(kOp, name, t, "k_cache", a.k_cache);
  check_last_contiguous(kOp, name, t);
}

void check_caches(const KvCacheAppendArgs& a) {
  check_cache_ranks(kOp, a.k_cache, a.v_cache);
  check_dtype(kOp, "k", a.k);
  check_cache_dtype(kOp, "k_cache", a.k_cache, a.k, "k");
  check_caches_alike(kOp, a.k_cache, a.v_cache, kMaxCacheDim, kMaxCacheValueDim);
}

// New keys or values [T, Hk, D] and their cache.
AppendedRows check_new(const char* name, const View& t, const View& cache,
                       const KvCacheAppendArgs& a) {
  check(t.dim() == 3, kOp, name, "must have 3 dimensions [T, Hk, D]", t.dim());
  const std::vector<int64_t> wanted{name[0] == 'k' ? t.size(0) : a.k.size(0), cache.size(2),
                                    cache.size(3)};
  check(t.sizes == wanted, kOp, name, Rule("must have shape ", wanted), t.sizes);
  check_rows(name, t, a);
  AppendedRows rows{};
  rows.dim = t.size(2);
  rows.rows = rows_of(t, true);
  rows.cache = rows_of(cache, false);
  return rows;
}

// New values, or none if rows of k contain them.
AppendedRows check_new_values(const KvCacheAppendArgs& a) {
  if (!a.v_cache) {
    check(!a.v, kOp, "v", "requires v_cache", a.v.sizes);
    return {};
  }
  if (!a.v) fail(kOp, "v", "must be given with v_cache", "None");
  return check_new("v", a.v, a.v_cache, a);
}

// One integer per token. `must` is the beginning of the rules' wording.
Ints check_ints(const char* name, const char* must, const View& t, const KvCacheAppendArgs& a) {
  const std::vector<int64_t> wanted{a.k.size(0)};
  check(t.sizes == wanted, kOp, name, Rule(must, " shape ", wanted), t.sizes);
  const bool wide = t.dtype == ScalarType::Long;
  check(wide || t.dtype == ScalarType::Int, kOp, name, Rule(must, " dtype int32 or int64"),
        t.dtype);
  check_device_of(kOp, name, t, "k_cache", a.k_cache);
  return {t.data(), t.step(0), wide};
}

void set_queries(AppendParams& p, const KvCacheAppendArgs& a) {
  if (!a.q) return;
  const View& q = a.q;
  check(q.dim() == 3 && q.size(0) == p.tokens && q.size(2) == p.k.dim, kOp, "q",
        Rule("must have shape [", p.tokens, ", H, ", p.k.dim, "]"), q.sizes);
  check_rows("q", q, a);
  check(q.size(1) == p.heads || (p.heads > 0 && q.size(1) % p.heads == 0), kOp, "k",
        Rule("number of heads must divide that of q, ", q.size(1), " (GQA)"), p.heads);
  check(bool(a.cos), kOp, "q", "requires rope", q.sizes);
  p.q = rows_of(q, true);
  p.query_heads = q.size(1);
}

void set_rope(AppendParams& p, const KvCacheAppendArgs& a) {
  const int64_t given = int64_t{bool(a.cos)} + bool(a.sin) + bool(a.positions);
  check(given == 0 || given == 3, kOp, "rope", "must be cos, sin and positions together", given);
  const int64_t offset = a.rope_offset;
  if (!a.cos) {
    check(offset == 0, kOp, "rope_offset", "requires rope", offset);
    return;
  }
  const int64_t last = std::max<int64_t>(p.k.dim - 2, 0);
  check(offset >= 0 && offset <= last, kOp, "rope_offset",
        Rule("must be 0 to ", last, ", two columns or more before the end"), offset);
  const View &c = a.cos, &s = a.sin;
  const int64_t pairs = (p.k.dim - offset) / 2;
  check(c.dim() == 2 && c.size(0) >= 1 && c.size(1) >= 1 && c.size(1) <= pairs, kOp, "rope",
        Rule("must have shape [positions, pairs], 1 position or more, 1 to ", pairs, " pairs"),
        c.sizes);
  check(s.sizes == c.sizes, kOp, "rope", "must have cos and sin of one shape", s.sizes);
  for (const View* t : {&c, &s}) {
    check_wide(kOp, "rope", *t, a.k);
    check_last_contiguous(kOp, "rope", *t);
    check_device_of(kOp, "rope", *t, "k_cache", a.k_cache);
  }
  p.positions = check_ints("rope", "must have positions of", a.positions, a);
  p.cos = c.data<float>();
  p.sin = s.data<float>();
  p.cos_stride = c.step(0);
  p.sin_stride = s.step(0);
  p.table = c.size(0);
  p.pairs = c.size(1);
  p.rope_offset = offset;
  p.interleaved = a.interleaved;
}

void set_scale(AppendedRows& rows, const char* name, const View& read, const View& written,
               const KvCacheAppendArgs& a) {
  if (!read && !written) return;
  const View& t = read ? read : written;
  check(!read || !written, kOp, name, "must be read or written, not both", t.sizes);
  check(rows.dim > 0, kOp, name, "requires v_cache", t.sizes);
  check_cache_scale(kOp, name, t, "k_cache", a.k_cache,
                    read ? ScaleShapes::shared : ScaleShapes::token);
  if (read) {
    rows.scale = t.data<float>();
    rows.scale_head = t.step(0);
  } else {
    rows.token_scale = rows_of(t, false);
  }
}

void check_values(const AppendParams& p) {
  std::vector<int64_t> taken;
  bool ascending = true;
  for (int64_t t = 0; t < p.tokens; ++t) {
    const int64_t slot = p.slots.at(t);
    check(slot >= -1 && slot < p.pages * p.page_size, kOp, "slots",
          Rule("must be -1 or below the slots of the cache, ", p.pages * p.page_size), slot);
    if (slot < 0) continue;
    ascending = ascending && (taken.empty() || slot > taken.back());
    taken.push_back(slot);
  }
  if (!ascending) {
    std::sort(taken.begin(), taken.end());
    const auto twice = std::adjacent_find(taken.begin(), taken.end());
    check(twice == taken.end(), kOp, "slots", "must not name a slot twice",
          twice == taken.end() ? 0 : *twice);
  }
  for (int64_t t = 0; t < p.tokens && p.cos; ++t) {
    const int64_t at = p.positions.at(t);
    check(at >= 0 && at < p.table, kOp, "rope",
          Rule("must have positions of 0 to below the rows of cos and sin, ", p.table), at);
  }
  const std::pair<const char*, const AppendedRows*> both[] = {{"k_scale", &p.k}, {"v_scale", &p.v}};
  for (auto [name, rows] : both)
    for (int64_t h = 0; h < (rows->scale_head ? p.heads : 1) && rows->scale; ++h) {
      const double scale = rows->scale[h * rows->scale_head];
      check(scale > 0 && std::isfinite(scale), kOp, name, "must be above 0 and finite",
            std::isnan(scale) ? std::fabs(scale) : scale);  // as Python shows it
    }
}

void run(const AppendParams& p, const View& cache) {
  if (cache.is_cuda) return launch_on_device(kOp, cache, p);
  cpu::kv_cache_append(p);
}

Array kv_cache_append(const KvCacheAppendArgs& a) {
  check_caches(a);
  AppendParams p{};
  p.k = check_new("k", a.k, a.k_cache, a);
  p.v = check_new_values(a);
  p.tokens = a.k.size(0);
  p.heads = a.k_cache.size(2);
  p.value_heads = a.v_cache ? p.heads : 0;
  p.pages = a.k_cache.size(0);
  p.page_size = a.k_cache.size(1);
  p.dtype = to_dtype(a.k.dtype);
  p.cache_dtype = to_dtype(a.k_cache.dtype);
  p.slots = check_ints("slots", "must have", a.slots, a);
  set_queries(p, a);
  set_rope(p, a);
  set_scale(p.k, "k_scale", a.k_scale, a.k_scale_out, a);
  set_scale(p.v, "v_scale", a.v_scale, a.v_scale_out, a);
  check_written(kOp, a);
  if (!a.k_cache.is_cuda) check_values(p);
  for (const View* t : {&a.k_cache, &a.v_cache, &a.k_scale_out, &a.v_scale_out})
    if (*t) t->note(true);
  Array turned = a.q ? empty(a.q.sizes, a.k) : empty({0}, a.k);
  p.q_out = turned.mutable_data();
  if (p.tokens > 0) run(p, a.k_cache);
  return turned;
}

const Registration kOperators({&implement<kv_cache_append>("kv_cache_append")});

}  // namespace
}  // namespace tokenmill
