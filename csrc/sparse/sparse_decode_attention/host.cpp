#include "attention/score_mod.h"
#include "core/kv_cache_checks.h"
#include "core/stream.h"
#include "core/written.h"
#include "sparse/checks.h"
#include "sparse/sparse_decode_attention/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "sparse_decode_attention";
constexpr int64_t kMaxSplits = 1024;

void run(SparseDecodeParams& d, const View& q, const View& k, const View& v) {
  if (q.is_cuda) return launch_with_workspace(kOp, q, d, d.workspace);
  cpu::sparse_decode_attention(d);
}

void set_lists(SparseDecodeParams& d, const View& q, const View& k, const View& indices,
               const View& counts) {
  const int64_t batch = q.size(0), heads = q.size(2), kv_heads = k.size(2);
  check(indices.dim() == 3 && indices.size(0) == batch &&
            (indices.size(1) == 1 || indices.size(1) == kv_heads || indices.size(1) == heads),
        kOp, "indices",
        Rule("must have shape [", batch, ", heads, K] with 1, ", kv_heads, " or ", heads, " heads"),
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

void set_rope(SparseDecodeParams& d, const View& q, const View& cos, const View& sin) {
  if (!cos || !sin) return;
  int64_t longest = d.cache.capacity;
  if (d.cache_positions) {
    const int64_t attended = d.num_sink + (d.entries << d.log2_block) + d.num_recent;
    longest = attended < longest ? attended : longest;
  }
  if (longest < 1) longest = 1;
  const View &c = cos, &s = sin;
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
               const View& extra_k, const View& extra_v, const View& log_count) {
  check(bool(extra_k) == bool(extra_v), kOp, "extra_v", "must be given with extra_k, and only then",
        bool(extra_v));
  if (!extra_k) {
    check(!log_count, kOp, "extra_log_count", "needs extra_k and extra_v", log_count.sizes);
    return;
  }
  const View &ek = extra_k, &ev = extra_v;
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
  const View& n = log_count;
  const std::vector<int64_t> wanted{q.size(0), k.size(2), entries};
  check(n.sizes == wanted, kOp, "extra_log_count", Rule("must have shape ", wanted), n.sizes);
  check_small(kOp, "extra_log_count", n, q);
  d.extra_log_count = n.data<float>();
  d.extra_log_count_batch = n.step(0);
  d.extra_log_count_head = n.step(1);
}

struct SparseDecodeAttentionArgs : Record {
  View q, k_cache, v_cache, indices, counts, seqlens_k, block_table;
  int64_t block_k, num_sink, num_recent;
  std::string_view pos_mode;
  View cos, sin;
  bool interleaved;
  View extra_k, extra_v, extra_log_count;
  Optional<double> scale;
  double softcap;
  View sink;
  int64_t num_splits;
  bool return_mass;
  View k_scale, v_scale;
};

SparseDecodeParams make_params(const SparseDecodeAttentionArgs& a) {
  check_cache(kOp, a.q, a.k_cache, a.v_cache, bool(a.block_table));
  check_scale(kOp, scale_of(a), a.softcap);
  const int32_t log2_block = check_block(kOp, "block_k", a.block_k);
  check(a.num_sink >= 0, kOp, "num_sink", "must not be negative", a.num_sink);
  check(a.num_recent >= 0, kOp, "num_recent", "must not be negative", a.num_recent);
  check(a.num_splits >= 0 && a.num_splits <= kMaxSplits, kOp, "num_splits",
        Rule("must be 0 (automatic) to ", kMaxSplits), a.num_splits);
  check(a.pos_mode == "absolute" || a.pos_mode == "cache", kOp, "pos_mode",
        "must be 'absolute' or 'cache'", a.pos_mode);
  check(a.pos_mode == "absolute" || a.q.size(1) <= 1, kOp, "pos_mode",
        "'cache' requires one query token; q has", a.q.size(1));
  SparseDecodeParams d{};
  d.cache = make_cache(kOp, a.q, a.q.size(0), a.k_cache, a.v_cache, a.seqlens_k, a.block_table,
                       a.k_scale, a.v_scale);
  d.log2_block = log2_block;
  d.num_sink = std::min(a.num_sink, d.cache.capacity);  // bounds sums with them, to avoid overflow
  d.num_recent = std::min(a.num_recent, d.cache.capacity);
  d.num_splits = a.num_splits;
  d.cache_positions = a.pos_mode == "cache";
  d.interleaved = a.interleaved;
  set_lists(d, a.q, a.k_cache, a.indices, a.counts);
  set_rope(d, a.q, a.cos, a.sin);
  set_extra(d, a.q, a.k_cache, a.v_cache, a.extra_k, a.extra_v, a.extra_log_count);
  AttentionParams& p = d.attention;
  p.batch = a.q.size(0);
  p.seqlen_q = a.q.size(1);
  p.heads = a.q.size(2);
  p.kv_heads = a.k_cache.size(2);
  p.head_dim = a.q.size(3);
  p.value_dim = a.v_cache.size(3);
  p.dtype = to_dtype(a.q.dtype);
  p.map = ScoreMap::softmax;
  p.q = rows_of(a.q, false);
  p.scale = static_cast<float>(scale_of(a));
  p.softcap = static_cast<float>(a.softcap);
  p.window_left = -1;
  set_score_mod(kOp, p, a.q, "softmax", {}, {}, a.sink);
  return d;
}

std::vector<int64_t> out_sizes(const SparseDecodeParams& d) {
  const AttentionParams& p = d.attention;
  return {p.batch, p.seqlen_q, p.heads, p.value_dim};
}

// Writes out; returns lse and mass.
std::tuple<Array, Array> answer(SparseDecodeParams& d, const SparseDecodeAttentionArgs& a,
                                const View& out) {
  AttentionParams& p = d.attention;
  out.note(true);
  Array lse = empty({p.batch, p.heads, p.seqlen_q}, a.q, ScalarType::Float);
  Array mass = empty(
      a.return_mass ? std::vector{p.batch, d.row_heads(), d.entries} : std::vector<int64_t>{0}, a.q,
      ScalarType::Float);
  p.out = rows_of(out, false);
  p.lse = lse.mutable_data<float>();
  if (mass.numel() > 0) d.mass = mass.mutable_data<float>();
  if (p.batch > 0 && p.heads > 0 && p.seqlen_q > 0)
    run(d, a.q, a.k_cache, a.v_cache);
  else if (mass.numel() > 0)
    fill(0, mass);
  return {lse, mass};
}

std::tuple<Array, Array, Array> sparse_decode_attention(const SparseDecodeAttentionArgs& a) {
  SparseDecodeParams d = make_params(a);
  check_cache_values(kOp, a.k_cache, a.q.size(0), d.cache, true);
  Array out = empty(out_sizes(d), a.q);
  auto [lse, mass] = answer(d, a, out);
  return {out, lse, mass};
}

struct SparseDecodeAttentionOutArgs : Record {
  SparseDecodeAttentionArgs forward;
  View out;
};

std::tuple<Array, Array> sparse_decode_attention_out(const SparseDecodeAttentionOutArgs& a) {
  const SparseDecodeAttentionArgs& in = a.forward;
  SparseDecodeParams d = make_params(in);
  check_like_out(kOp, "out", a.out, out_sizes(d), in.q);
  check_written(kOp, a);
  check_cache_values(kOp, in.k_cache, in.q.size(0), d.cache, true);
  return answer(d, in, a.out);
}

const Registration kOperators(
    {&implement<sparse_decode_attention>("sparse_decode_attention"),
     &implement<sparse_decode_attention_out>("sparse_decode_attention_out")});

}  // namespace
}  // namespace tokenmill
