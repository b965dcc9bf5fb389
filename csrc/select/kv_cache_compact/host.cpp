#include <bit>

#include "core/kv_cache_checks.h"
#include "core/stream.h"
#include "core/written.h"
#include "select/checks.h"
#include "select/kv_cache_compact/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "kv_cache_compact";

void check_ints(const char* name, const View& t, const View& k) {
  check(t.dtype == ScalarType::Int, kOp, name, "must be int32", t.dtype);
  check_last_contiguous(kOp, name, t);
  check_device_of(kOp, name, t, "k_cache", k);
}

void check_values(const CompactParams& p) {
  for (int64_t b = 0; b < p.batch && p.lengths; ++b)
    check(p.lengths[b] >= 0 && p.lengths[b] <= p.capacity, kOp, "seqlens_k",
          Rule("must be 0 to what the cache holds of a request, ", p.capacity),
          int64_t{p.lengths[b]});
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < (p.per_head ? p.heads : 1); ++h) {
      const int64_t count = p.counts[b * p.counts_batch + h * p.counts_head];
      check(count >= 0 && count <= p.entries, kOp, "counts",
            Rule("must be 0 to the entries of keep, ", p.entries), count);
      const int32_t* list = p.list(b, h);
      for (int64_t d = 0; d < count; ++d) {
        check(list[d] >= 0 && list[d] < p.length(b), kOp, "keep",
              Rule("must name slots below the length of the request, ", p.length(b)),
              int64_t{list[d]});
        check(d == 0 || list[d] > list[d - 1], kOp, "keep", "must ascend", int64_t{list[d]});
      }
    }
  std::vector<bool> taken(p.block_table ? p.pages : 0);
  for (int64_t b = 0; b < p.batch && p.block_table; ++b)
    for (int64_t i = 0; i < ceil_div(p.length(b), int64_t{1} << p.log2_page_size); ++i) {
      const int64_t page = p.block_table[b * p.table_stride + i];
      check(page >= 0 && page < p.pages, kOp, "block_table",
            Rule("must name pages below ", p.pages, " where keys lie"), page);
      check(!taken[page], kOp, "block_table", "must not name a page twice where keys lie", page);
      taken[page] = true;
    }
}

void run(const CompactParams& p, const View& k) {
  if (k.is_cuda) return launch_on_device(kOp, k, p);
  cpu::kv_cache_compact(p);
}

struct KvCacheCompactArgs : Record {
  View k_cache, v_cache, keep, counts, seqlens_k, block_table, turns;
  bool interleaved, compensation;
};

std::tuple<Array, Array, Array, Array> kv_cache_compact(const KvCacheCompactArgs& a) {
  check_cache_ranks(kOp, a.k_cache, a.v_cache);
  check_dtype(kOp, "k_cache", a.k_cache);
  check_caches_alike(kOp, a.k_cache, a.v_cache);
  CompactParams p{};
  p.heads = a.k_cache.size(2);
  check(a.keep.dim() == 2 || (a.keep.dim() == 3 && a.keep.size(1) == p.heads), kOp, "keep",
        Rule("must have shape [B, K] or [B, ", p.heads, ", K]"), a.keep.sizes);
  check_ints("keep", a.keep, a.k_cache);
  p.batch = a.keep.size(0);
  p.per_head = a.keep.dim() == 3;
  const std::vector<int64_t> wanted(a.keep.sizes.begin(), a.keep.sizes.end() - 1);
  check(a.counts.sizes == wanted, kOp, "counts", Rule("must have shape ", wanted), a.counts.sizes);
  check_ints("counts", a.counts, a.k_cache);
  p.capacity = a.k_cache.size(1);
  p.pages = a.k_cache.size(0);
  if (a.block_table) {
    const View& t = a.block_table;
    check(t.dim() == 2 && t.size(0) == p.batch, kOp, "block_table",
          Rule("must have shape [", p.batch, ", pages]"), t.sizes);
    check_ints("block_table", t, a.k_cache);
    check(!p.per_head, kOp, "keep", "per head requires a dense cache", a.keep.sizes);
    check(std::has_single_bit(static_cast<uint64_t>(a.k_cache.size(1))), kOp, "k_cache",
          "must have pages of a power of two of tokens", a.k_cache.size(1));
    p.block_table = t.data<int32_t>();
    p.table_stride = t.step(0);
    p.log2_page_size = std::countr_zero(static_cast<uint64_t>(a.k_cache.size(1)));
    p.capacity = t.size(1) * a.k_cache.size(1);
  } else {
    check(a.k_cache.size(0) == p.batch, kOp, "k_cache",
          Rule("must have the requests of keep, ", p.batch), a.k_cache.size(0));
  }
  if (a.seqlens_k) {
    const View& t = a.seqlens_k;
    const std::vector<int64_t> each{p.batch};
    check(t.sizes == each, kOp, "seqlens_k", Rule("must have shape ", each), t.sizes);
    check_ints("seqlens_k", t, a.k_cache);
    p.lengths = t.data<int32_t>();
  }
  if (a.turns) {
    const View& t = a.turns;
    check(t.dim() == 2 && t.size(0) == 2 && t.size(1) >= 1 && 2 * t.size(1) <= a.k_cache.size(3),
          kOp, "rerotate", Rule("must have 1 to ", a.k_cache.size(3) / 2, " frequencies"), t.sizes);
    check_wide(kOp, "rerotate", t, a.k_cache);
    check_last_contiguous(kOp, "rerotate", t);
    check_device_of(kOp, "rerotate", t, "k_cache", a.k_cache);
    p.turns = t.data<float>();
    p.turns_rest = p.turns + t.step(0);
    p.pairs = t.size(1);
  }
  check_written(kOp, a);
  p.key_dim = a.k_cache.size(3);
  p.value_dim = a.v_cache.size(3);
  p.dtype = to_dtype(a.k_cache.dtype);
  p.k = rows_of(a.k_cache, false);
  p.v = rows_of(a.v_cache, false);
  p.keep = a.keep.data<int32_t>();
  p.entries = a.keep.size(-1);
  p.keep_batch = a.keep.step(0);
  p.keep_head = p.per_head ? a.keep.step(1) : 0;
  p.counts = a.counts.data<int32_t>();
  p.counts_batch = a.counts.step(0);
  p.counts_head = p.per_head ? a.counts.step(1) : 0;
  p.interleaved = a.interleaved;
  if (!a.k_cache.is_cuda) check_values(p);
  a.k_cache.note(true);
  a.v_cache.note(true);
  const auto sums = [&](std::vector<int64_t> sizes, ScalarType type) {
    return empty(a.compensation ? sizes : std::vector<int64_t>{0}, a.k_cache, type);
  };
  Array new_lengths = empty(wanted, a.k_cache, ScalarType::Int);
  Array k_sum = sums({p.batch, p.heads, p.key_dim}, ScalarType::Float);
  Array v_sum = sums({p.batch, p.heads, p.value_dim}, ScalarType::Float);
  Array dropped = sums({p.batch, p.heads}, ScalarType::Int);
  p.new_lengths = new_lengths.mutable_data<int32_t>();
  if (a.compensation) {
    p.k_sum = k_sum.mutable_data<float>();
    p.v_sum = v_sum.mutable_data<float>();
    p.dropped = dropped.mutable_data<int32_t>();
  }
  if (p.batch > 0) run(p, a.k_cache);
  return {new_lengths, k_sum, v_sum, dropped};
}

const Registration kOperators({&implement<kv_cache_compact>("kv_cache_compact")});

}  // namespace
}  // namespace tokenmill
