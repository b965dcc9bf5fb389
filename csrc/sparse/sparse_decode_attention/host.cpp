#include <bit>

#include "core/kv_cache_checks.h"
#include "core/stream.h"
#include "dense/score_mod.h"
#include "sparse/sparse_decode_attention/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "sparse_decode_attention";
constexpr int64_t kMaxSplits = 1024, kMaxBlock = 128;

void run(SparseDecodeParams& d, const View& q) {
#if defined(TOKENMILL_WITH_CUDA)
  if (q.is_cuda) {
    const int64_t bytes = (CudaScope(q.device), workspace_bytes(d));
    Tensor workspace = empty({bytes}, q.tensor, ScalarType::Byte);
    d.workspace = workspace.mutable_data_ptr();
    return launch_on_device(kOp, q, d);
  }
#endif
  cpu::sparse_decode_attention(d);
}

void set_lists(SparseDecodeParams& d, const View& q, const View& k, const View& indices,
               const View& counts) {
  const int64_t batch = q.size(0), heads = q.size(2), kv_heads = k.size(2);
  check(indices.dim() == 3 && indices.size(0) == batch &&
            (indices.size(1) == 1 || indices.size(1) == kv_heads || indices.size(1) == heads),
        kOp, "indices", Rule("must have shape [", batch, ", 1, ", kv_heads, " or ", heads, ", K]"),
        indices.sizes);
  const std::vector<int64_t> wanted{batch, indices.size(1)};
  check(counts.sizes == wanted, kOp, "counts", Rule("must have shape ", wanted), counts.sizes);
  const std::pair<const char*, const View*> all[] = {{"indices", &indices}, {"counts", &counts}};
  for (auto [name, t] : all) {
    check(t->dtype == ScalarType::Int, kOp, name, "must be int32", t->dtype);
    check_last_contiguous(kOp, name, *t);
    check_device_of_q(kOp, name, *t, q);
  }
  d.indices = indices.data<int32_t>();
  d.indices_batch = indices.step(0);
  d.indices_head = indices.step(1);
  d.list_heads = indices.size(1);
  d.entries = indices.size(2);
  d.counts = counts.data<int32_t>();
  d.counts_batch = counts.step(0);
  d.counts_head = counts.size(1) > 1 ? counts.step(1) : 0;
}

void set_rope(SparseDecodeParams& d, const View& q, const OptTensor& cos, const OptTensor& sin) {
  if (!cos || !sin) return;
  int64_t longest = d.cache.capacity;
  if (d.cache_positions) {
    const int64_t attended = d.num_sink + (d.entries << d.log2_block) + d.num_recent;
    longest = attended < longest ? attended : longest;
  }
  if (longest < 1) longest = 1;
  const View c(*cos), s(*sin);
  const int64_t pairs = q.size(3) / 2;
  check(c.dim() == 2 && c.size(0) >= longest && c.size(1) >= 1 && c.size(1) <= pairs, kOp, "rope",
        Rule("must have shape [positions, pairs], ", longest, " positions or more, 1 to ", pairs,
             " pairs"),
        c.sizes);
  check(s.sizes == c.sizes, kOp, "rope", "must have cos and sin of one shape", s.sizes);
  for (const View* t : {&c, &s}) check_small(kOp, "rope", *t, q);
  d.cos = c.data<float>();
  d.sin = s.data<float>();
  d.cos_stride = c.step(0);
  d.sin_stride = s.step(0);
  d.positions = c.size(0);
  d.pairs = c.size(1);
}

void set_extra(SparseDecodeParams& d, const View& q, const View& k, const View& v,
               const OptTensor& extra_k, const OptTensor& extra_v, const OptTensor& log_count) {
  check(extra_k.has_value() == extra_v.has_value(), kOp, "extra_v",
        "must be given with extra_k, and only then", extra_v.has_value());
  if (!extra_k) {
    check(!log_count, kOp, "extra_log_count", "needs extra_k and extra_v",
          log_count ? View(*log_count).sizes : std::vector<int64_t>{});
    return;
  }
  const View ek(*extra_k), ev(*extra_v);
  const int64_t entries = ek.dim() == 4 ? ek.size(1) : 0;
  const auto check_extra = [&](const char* name, const View& t, const View& cache) {
    const std::vector<int64_t> wanted{q.size(0), entries, cache.size(2), cache.size(3)};
    check(t.sizes == wanted, kOp, name, Rule("must have shape ", wanted), t.sizes);
    check(t.dtype == q.dtype, kOp, name, Rule("must have the dtype of q, ", q.dtype), t.dtype);
    check_last_contiguous(kOp, name, t);
    check_device_of_q(kOp, name, t, q);
    return rows_of(t, false);
  };
  d.extra_k = check_extra("extra_k", ek, k);
  d.extra_v = check_extra("extra_v", ev, v);
  d.extra = entries;
  if (!log_count) return;
  const View n(*log_count);
  const std::vector<int64_t> wanted{q.size(0), k.size(2), entries};
  check(n.sizes == wanted, kOp, "extra_log_count", Rule("must have shape ", wanted), n.sizes);
  check_small(kOp, "extra_log_count", n, q);
  d.extra_log_count = n.data<float>();
  d.extra_log_count_batch = n.step(0);
  d.extra_log_count_head = n.step(1);
}

// The checks are those of python/tokenmill/select/sparse_decode.py, in its order and words.
std::tuple<Tensor, Tensor, Tensor> sparse_decode_attention(
    Tensor q, Tensor k_cache, Tensor v_cache, Tensor indices, Tensor counts, Tensor seqlens_k,
    OptTensor block_table, int64_t block_k, int64_t num_sink, int64_t num_recent,
    std::string pos_mode, OptTensor cos, OptTensor sin, bool interleaved, OptTensor extra_k,
    OptTensor extra_v, OptTensor extra_log_count, double scale, double softcap, OptTensor sink,
    int64_t num_splits, bool return_mass) {
  const View qv(q), kv(k_cache), vv(v_cache), lengths(seqlens_k);
  const std::optional<View> table = block_table ? std::optional<View>(*block_table) : std::nullopt;
  check_cache(kOp, qv, kv, vv, table.has_value());
  check_scale(kOp, scale, softcap);
  check(block_k >= 1 && block_k <= kMaxBlock && std::has_single_bit(static_cast<uint64_t>(block_k)),
        kOp, "block_k", Rule("must be a power of two up to ", kMaxBlock), block_k);
  check(num_sink >= 0, kOp, "num_sink", "must not be negative", num_sink);
  check(num_recent >= 0, kOp, "num_recent", "must not be negative", num_recent);
  check(num_splits >= 0 && num_splits <= kMaxSplits, kOp, "num_splits",
        Rule("must be 0 (automatic) to ", kMaxSplits), num_splits);
  check(pos_mode == "absolute" || pos_mode == "cache", kOp, "pos_mode",
        "must be 'absolute' or 'cache'", pos_mode);
  check(pos_mode == "absolute" || qv.size(1) <= 1, kOp, "pos_mode",
        "'cache' goes with one query token; q has", qv.size(1));
  SparseDecodeParams d{};
  d.cache = make_cache(kOp, qv, kv, vv, lengths, table);
  d.log2_block = std::countr_zero(static_cast<uint64_t>(block_k));
  d.num_sink = std::min(num_sink, d.cache.capacity);  // sums with them stay in range
  d.num_recent = std::min(num_recent, d.cache.capacity);
  d.num_splits = num_splits;
  d.cache_positions = pos_mode == "cache";
  d.interleaved = interleaved;
  set_lists(d, qv, kv, View(indices), View(counts));
  set_rope(d, qv, cos, sin);
  set_extra(d, qv, kv, vv, extra_k, extra_v, extra_log_count);
  AttentionParams& p = d.attention;
  p.batch = qv.size(0);
  p.seqlen_q = qv.size(1);
  p.heads = qv.size(2);
  p.kv_heads = kv.size(2);
  p.head_dim = qv.size(3);
  p.value_dim = vv.size(3);
  p.dtype = to_dtype(qv.dtype);
  p.map = ScoreMap::softmax;
  p.q = rows_of(qv, false);
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.window_left = -1;
  set_score_mod(kOp, p, qv, "softmax", std::nullopt, std::nullopt, sink);
  check_cache_values(kOp, qv, kv, d.cache, true);

  Tensor out = empty({p.batch, p.seqlen_q, p.heads, p.value_dim}, q);
  Tensor lse = empty({p.batch, p.heads, p.seqlen_q}, q, ScalarType::Float);
  Tensor mass =
      empty(return_mass ? std::vector{p.batch, d.row_heads(), d.entries} : std::vector<int64_t>{0},
            q, ScalarType::Float);
  p.out = rows_of(View(out), false);
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (mass.numel() > 0) d.mass = static_cast<float*>(mass.mutable_data_ptr());
  if (p.batch > 0 && p.heads > 0 && p.seqlen_q > 0)
    run(d, qv);
  else if (mass.numel() > 0)
    torch::stable::zero_(mass);
  return {out, lse, mass};
}

}  // namespace

TOKENMILL_IMPL(CPU, m) {
  m.impl("sparse_decode_attention", TOKENMILL_BOX(sparse_decode_attention));
}

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) {
  m.impl("sparse_decode_attention", TOKENMILL_BOX(sparse_decode_attention));
}
#endif

}  // namespace tokenmill
