#include <bit>

#include "core/qkv.h"
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
    check(p.lengths[b] >= 0 && p.lengths[b] <= p.capacity, kOp, "lengths",
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
#if defined(TOKENMILL_WITH_CUDA)
  if (k.is_cuda) return launch_on_device(kOp, k, p);
#endif
  cpu::kv_cache_compact(p);
}

// The checks are those of python/tokenmill/select/cache_compact.py, in its order and words.
std::tuple<Tensor, Tensor, Tensor, Tensor> kv_cache_compact(Tensor k_cache, Tensor v_cache,
                                                            Tensor keep, Tensor counts,
                                                            OptTensor lengths,
                                                            OptTensor block_table, OptTensor turns,
                                                            bool interleaved, bool compensation) {
  const View k(k_cache), v(v_cache), list(keep), n(counts);
  const std::pair<const char*, const View*> caches[] = {{"k_cache", &k}, {"v_cache", &v}};
  for (auto [name, t] : caches)
    check(t->dim() == 4, kOp, name,
          "must have 4 dimensions [B, S, Hk, D] (in pages: [P, page size, Hk, D])", t->dim());
  check(is_kernel_dtype(k.dtype), kOp, "k_cache", "must be float16, bfloat16 or float32", k.dtype);
  check(v.dtype == k.dtype, kOp, "v_cache", Rule("must have the dtype of k_cache, ", k.dtype),
        v.dtype);
  check_device_of(kOp, "v_cache", v, "k_cache", k);
  for (auto [name, t] : caches) {
    check_last_contiguous(kOp, name, *t);
    check(t->size(3) >= 1 && t->size(3) <= kMaxHeadDim, kOp, name,
          Rule("must have a head dimension of 1 to ", kMaxHeadDim), t->size(3));
  }
  check(std::equal(v.sizes.begin(), v.sizes.end() - 1, k.sizes.begin()), kOp, "v_cache",
        Rule("must have the shape of k_cache up to the head dimension, ", k.sizes), v.sizes);
  std::optional<View> table, held, rotations;
  CompactParams p{};
  p.heads = k.size(2);
  check(list.dim() == 2 || (list.dim() == 3 && list.size(1) == p.heads), kOp, "keep",
        Rule("must have shape [B, K] or [B, ", p.heads, ", K]"), list.sizes);
  check_ints("keep", list, k);
  p.batch = list.size(0);
  p.per_head = list.dim() == 3;
  const std::vector<int64_t> wanted(list.sizes.begin(), list.sizes.end() - 1);
  check(n.sizes == wanted, kOp, "counts", Rule("must have shape ", wanted), n.sizes);
  check_ints("counts", n, k);
  p.capacity = k.size(1);
  p.pages = k.size(0);
  if (block_table) {
    const View& t = table.emplace(*block_table);
    check(t.dim() == 2 && t.size(0) == p.batch, kOp, "block_table",
          Rule("must have shape [", p.batch, ", pages]"), t.sizes);
    check_ints("block_table", t, k);
    check(!p.per_head, kOp, "keep", "per head goes with a dense cache alone", list.sizes);
    check(std::has_single_bit(static_cast<uint64_t>(k.size(1))), kOp, "k_cache",
          "must have pages of a power of two of tokens", k.size(1));
    p.block_table = t.data<int32_t>();
    p.table_stride = t.step(0);
    p.log2_page_size = std::countr_zero(static_cast<uint64_t>(k.size(1)));
    p.capacity = t.size(1) * k.size(1);
  } else {
    check(k.size(0) == p.batch, kOp, "k_cache", Rule("must have the requests of keep, ", p.batch),
          k.size(0));
  }
  if (lengths) {
    const View& t = held.emplace(*lengths);
    const std::vector<int64_t> each{p.batch};
    check(t.sizes == each, kOp, "lengths", Rule("must have shape ", each), t.sizes);
    check_ints("lengths", t, k);
    p.lengths = t.data<int32_t>();
  }
  if (turns) {
    const View& t = rotations.emplace(*turns);
    check(t.dim() == 2 && t.size(0) == 2 && t.size(1) >= 1 && 2 * t.size(1) <= k.size(3), kOp,
          "rerotate", Rule("must have 1 to ", k.size(3) / 2, " frequencies"), t.sizes);
    check(t.dtype == ScalarType::Float, kOp, "rerotate", "must be float32", t.dtype);
    check_last_contiguous(kOp, "rerotate", t);
    check_device_of(kOp, "rerotate", t, "k_cache", k);
    p.turns = t.data<float>();
    p.turns_rest = p.turns + t.step(0);
    p.pairs = t.size(1);
  }
  check_written(kOp, "k_cache", k,
                {{"keep", list},
                 {"counts", n},
                 {"lengths", held},
                 {"block_table", table},
                 {"rerotate", rotations}});
  check_written(kOp, "v_cache", v,
                {{"k_cache", k},
                 {"keep", list},
                 {"counts", n},
                 {"lengths", held},
                 {"block_table", table},
                 {"rerotate", rotations}});
  p.key_dim = k.size(3);
  p.value_dim = v.size(3);
  p.dtype = to_dtype(k.dtype);
  p.k = rows_of(k, false);
  p.v = rows_of(v, false);
  p.keep = list.data<int32_t>();
  p.entries = list.size(-1);
  p.keep_batch = list.step(0);
  p.keep_head = p.per_head ? list.step(1) : 0;
  p.counts = n.data<int32_t>();
  p.counts_batch = n.step(0);
  p.counts_head = p.per_head ? n.step(1) : 0;
  p.interleaved = interleaved;
  if (!k.is_cuda) check_values(p);
  k.note(true);
  v.note(true);
  const auto sums = [&](std::vector<int64_t> sizes, ScalarType type) {
    return empty(compensation ? sizes : std::vector<int64_t>{0}, k_cache, type);
  };
  Tensor new_lengths = empty(wanted, k_cache, ScalarType::Int);
  Tensor k_sum = sums({p.batch, p.heads, p.key_dim}, ScalarType::Float);
  Tensor v_sum = sums({p.batch, p.heads, p.value_dim}, ScalarType::Float);
  Tensor dropped = sums({p.batch, p.heads}, ScalarType::Int);
  p.new_lengths = static_cast<int32_t*>(new_lengths.mutable_data_ptr());
  if (compensation) {
    p.k_sum = static_cast<float*>(k_sum.mutable_data_ptr());
    p.v_sum = static_cast<float*>(v_sum.mutable_data_ptr());
    p.dropped = static_cast<int32_t*>(dropped.mutable_data_ptr());
  }
  if (p.batch > 0) run(p, k);
  return {new_lengths, k_sum, v_sum, dropped};
}

}  // namespace

TOKENMILL_IMPL(CPU, m) { m.impl("kv_cache_compact", TOKENMILL_BOX(kv_cache_compact)); }

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) { m.impl("kv_cache_compact", TOKENMILL_BOX(kv_cache_compact)); }
#endif

}  // namespace tokenmill
