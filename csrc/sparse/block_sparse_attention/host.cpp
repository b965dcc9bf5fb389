#include "attention/score_mod.h"
#include "core/kv_cache_checks.h"
#include "core/written.h"
#include "select/checks.h"
#include "sparse/block_sparse_attention/kernels.h"
#include "sparse/block_sparse_attention/latent.h"
#include "sparse/block_sparse_attention/requests.h"
#include "sparse/checks.h"
#include "sparse/device_backward.h"
#include "sparse/gradients.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "block_sparse_attention";

struct BlockSparseAttentionArgs : Record {
  View q, k, v, indices, counts;
  int64_t block_q, block_k;
  bool causal;
  int64_t num_sink, num_recent;
  Optional<double> scale;
  double softcap;
  View seqlens_k, sink;
  bool return_mass;
  View block_table, cu_seqlens_q, cu_seqlens_k;
};

// Latent caches have wider heads; forward only.
bool is_latent(const BlockSparseAttentionArgs& a) {
  return std::max(a.q.size(-1), a.v.size(-1)) > kMaxHeadDim;
}

HeadDims head_dims(const BlockSparseAttentionArgs& a) {
  return a.block_q == 1 ? HeadDims{kMaxCacheDim, kMaxCacheValueDim} : HeadDims{};
}

// Counterpart of check_qkv for paged keys and packed queries, whose leading sizes differ from q's
// batch.
void check_rows(const BlockSparseAttentionArgs& a) {
  if (a.cu_seqlens_k && !a.cu_seqlens_q)
    fail(kOp, "cu_seqlens_q", "must be given with cu_seqlens_k", "None");
  if (a.cu_seqlens_k) return check_qkv(kOp, a.q, a.k, a.v, 3, head_dims(a));
  if (!a.cu_seqlens_q && !a.block_table) return check_qkv(kOp, a.q, a.k, a.v, 4, head_dims(a));
  std::vector<int64_t> sizes = a.q.sizes, strides = a.q.strides;
  if (a.cu_seqlens_q) {
    check(a.q.dim() == 3, kOp, "q", "must have 3 dimensions [T, H, D] (packed)", a.q.dim());
    check_last_contiguous(kOp, "q", a.q);
    sizes.insert(sizes.begin(), 0);
    strides.insert(strides.begin(), 0);
  }
  if (a.q.dim() > 0 && a.k.dim() > 0) sizes[0] = a.k.size(0);
  View q = a.q;
  q.sizes = {sizes.data(), sizes.size()};
  q.strides = {strides.data(), strides.size()};
  check_qkv(kOp, q, a.k, a.v, 4, head_dims(a));
  check_last_contiguous(kOp, "q", a.q);
  if (!a.block_table) return;
  const int64_t page = a.k.size(1);
  check(std::has_single_bit(static_cast<uint64_t>(page)), kOp, "k",
        "must have pages of a power of two of tokens", page);
}

void check_pages(const BlockSparseAttentionArgs& a, int64_t batch) {
  const View& t = a.block_table;
  if (!a.seqlens_k) fail(kOp, "seqlens_k", "must be given with block_table", "None");
  check_block_table(kOp, t, a.k);
  check(t.size(0) == batch, kOp, "block_table", Rule("must have the batch size of q, ", batch),
        t.size(0));
}

BlockList check_lists(const BlockSparseAttentionArgs& a, int64_t batch) {
  const int64_t heads = a.q.size(-2), kv_heads = a.k.size(-2), tokens = a.q.size(-3);
  const bool packed(a.cu_seqlens_q);
  const int64_t rows = packed ? tokens / a.block_q + batch : ceil_div(tokens, a.block_q);
  const View& t = a.indices;
  bool fits = t.dim() == (packed ? 3 : 4) && (packed || t.size(0) == batch) && t.size(-2) == rows;
  fits = fits && (t.size(-3) == 1 || t.size(-3) == kv_heads || t.size(-3) == heads);
  if (packed)
    return check_list(
        kOp, t, a.counts,
        Rule("must have shape [heads, ", rows, ", K] with 1, ", kv_heads, " or ", heads, " heads"),
        fits, "q", a.q);
  return check_list(kOp, t, a.counts,
                    Rule("must have shape [", batch, ", heads, ", rows, ", K] with 1, ", kv_heads,
                         " or ", heads, " heads"),
                    fits, "q", a.q);
}

// Checks of values, CPU only.
void check_values(const BlockSparseAttentionArgs& a, const BlockSparseParams& d) {
  if (a.cu_seqlens_q)
    check_cu_seqlens_values(kOp, "cu_seqlens_q", a.cu_seqlens_q, d.attention.seqlen_q);
  if (a.cu_seqlens_k)
    check_cu_seqlens_values(kOp, "cu_seqlens_k", a.cu_seqlens_k, d.attention.seqlen_k);
  if (a.block_table)
    check_block_table_values(kOp, key_rows(a.k, a.block_table), d.attention.batch, d.lengths);
}

BlockSparseParams make_params(const BlockSparseAttentionArgs& a) {
  check_rows(a);
  int64_t batch = a.q.size(0);
  if (a.cu_seqlens_q)
    batch =
        check_sequences(kOp, a.q, a.k, a.seqlens_k, a.cu_seqlens_q, a.cu_seqlens_k, a.block_table);
  BlockSparseParams d{};
  d.log2_block_q = check_block(kOp, "block_q", a.block_q);
  d.log2_block_k = check_block(kOp, "block_k", a.block_k);
  check(a.num_sink >= 0, kOp, "num_sink", "must not be negative", a.num_sink);
  check(a.num_recent >= 0, kOp, "num_recent", "must not be negative", a.num_recent);
  check(a.num_recent == 0 || a.causal, kOp, "num_recent", "requires causal", a.num_recent);
  check_scale(kOp, scale_of(a), a.softcap);
  d.list = check_lists(a, batch);
  d.lengths = per_request(kOp, "seqlens_k", a.seqlens_k, batch, "q", a.q);
  d.causal = a.causal;
  set_inputs(d.attention, a);
  d.attention.batch = batch;
  if (a.cu_seqlens_q) d.attention.cu_seqlens_q = a.cu_seqlens_q.data<int32_t>();
  if (a.cu_seqlens_k) d.attention.cu_seqlens_k = a.cu_seqlens_k.data<int32_t>();
  d.lse_rows = d.attention.seqlen_q;
  d.attention.softcap = static_cast<float>(a.softcap);
  d.attention.sink = sink_of(kOp, d.attention, a.q, a.sink);
  if (a.block_table) {
    check_pages(a, batch);
    const View& t = a.block_table;
    d.attention.seqlen_k = a.k.size(0) > 0 ? t.size(1) * a.k.size(1) : 0;
    d.pages = {t.data<int32_t>(), t.step(0), a.k.size(0),
               std::countr_zero(static_cast<uint64_t>(a.k.size(1)))};
  }
  if (!a.q.is_cuda) check_values(a, d);
  // bound on sums with positions, to avoid overflow
  const int64_t all = d.attention.seqlen_q + d.attention.seqlen_k;
  d.num_sink = std::min(a.num_sink, all);
  d.num_recent = std::min(a.num_recent, all);
  return d;
}

// Splits a packed call into one call per request, stored in `requests`.
template <typename Calls, typename Params>
Calls calls_of(const Params& d, const AttentionParams& p, std::vector<Params>& requests) {
  if (!p.cu_seqlens_q) return {&d, 1};
  requests.reserve(p.batch);
  for (int64_t b = 0; b < p.batch; ++b)
    requests.push_back(block_sparse_attention::request_of(d, b));
  return {requests.data(), p.batch};
}

LatentBlockSparse latent_call(const BlockSparseParams& d) {
  const BlockList& list = d.list;
  LatentBlockSparse l{};
  l.attention = d.attention;
  l.attention.batch = (d.attention.cu_seqlens_q ? 1 : d.attention.batch) * d.attention.seqlen_q;
  l.attention.seqlen_q = 1;
  l.attention.cu_seqlens_q = l.attention.cu_seqlens_k = nullptr;
  l.queries = d.attention.seqlen_q;
  l.cu_seqlens_q = d.attention.cu_seqlens_q;
  l.cu_seqlens_k = d.attention.cu_seqlens_k;
  l.num_requests = d.attention.batch;
  l.lse_rows = d.lse_rows;
  l.causal = d.causal;
  l.cache.k = d.attention.k;
  l.cache.v = d.attention.v;
  l.cache.dtype = d.attention.dtype;
  l.cache.seqlens = d.lengths;
  l.cache.pages = d.pages.table ? d.pages.count : d.attention.batch;
  l.cache.capacity = d.attention.seqlen_k;
  l.cache.block_table = d.pages.table;
  l.cache.table_stride = d.pages.stride;
  l.cache.log2_page_size = d.pages.log2_size;
  l.indices = list.indices;
  l.indices_batch = list.indices_batch;
  l.indices_head = list.indices_head;
  l.indices_row = list.indices_row;
  l.counts = list.counts;
  l.counts_batch = list.counts_batch;
  l.counts_head = list.counts_head;
  l.counts_row = list.counts_row;
  l.list_heads = list.heads;
  l.entries = list.entries;
  l.log2_block = d.log2_block_k;
  l.num_sink = d.num_sink;
  l.num_recent = d.num_recent;
  return l;
}

void run_latent_on_cpu(LatentBlockSparse l) {
  std::vector<int32_t> requests;
  for (int64_t n = 0; l.cu_seqlens_q && n < l.attention.batch; ++n)
    requests.push_back(l.find_request(n));
  l.requests = requests.data();
  cpu::block_sparse_attention_latent(l);
}

// mass is null if it is not requested.
void run_forward(const BlockSparseMass& d, const BlockSparseAttentionArgs& a) {
  if (a.q.is_cuda) {
    // A question about the call ends at the table, which has no row for latent heads but the last.
    if (is_latent(a) && !a.q.framework->inquiry()) {
      LatentBlockSparse l = latent_call(d);
      launch_with_workspace(kOp, a.q, l, l.workspace);
    } else {
      launch_on_device(kOp, a.q, static_cast<const BlockSparseParams&>(d));
    }
    if (d.mass) launch_on_device(kOp, a.q, d);
    return;
  }
  std::vector<BlockSparseMass> requests;
  const auto calls = calls_of<BlockSparseCalls>(d, d.attention, requests);
  if (is_latent(a)) {
    run_latent_on_cpu(latent_call(d));
  } else if (d.pages.table) {
    cpu::block_sparse_attention_pages(calls);
  } else {
    cpu::block_sparse_attention_forward(calls);
  }
  if (!d.mass) return;
  d.pages.table ? cpu::block_sparse_attention_pages_mass(calls)
                : cpu::block_sparse_attention_mass(calls);
}

// Writes out; returns lse and mass (size 0 if not requested).
std::tuple<Array, Array> answer(BlockSparseParams& d, const BlockSparseAttentionArgs& a,
                                const View& out) {
  std::vector<int64_t> sizes{0};
  if (a.return_mass) sizes = a.indices.sizes;
  Array mass = empty(sizes, a.q, ScalarType::Float);
  if (out.numel() == 0 || a.cu_seqlens_q) fill(0, mass);  // a list may have no queries
  float* const to = mass.numel() > 0 ? mass.mutable_data<float>() : nullptr;
  Array lse = forward_into(d.attention, a.q, out, [&] { run_forward({d, to, d.list.rows}, a); });
  return {lse, mass};
}

std::tuple<Array, Array, Array> block_sparse_attention(const BlockSparseAttentionArgs& a) {
  BlockSparseParams d = make_params(a);
  Array out = empty(out_sizes(a), a.q);
  auto [lse, mass] = answer(d, a, out);
  return {out, lse, mass};
}

struct BlockSparseAttentionOutArgs : Record {
  BlockSparseAttentionArgs forward;
  View out;
};

std::tuple<Array, Array> block_sparse_attention_out(const BlockSparseAttentionOutArgs& a) {
  const BlockSparseAttentionArgs& in = a.forward;
  BlockSparseParams d = make_params(in);
  check_like_out(kOp, "out", a.out, out_sizes(in), in.q);
  check_written(kOp, a);
  return answer(d, in, a.out);
}

void run_backward(BlockSparseBackwardParams& p, const View& q) {
  if (q.is_cuda) return launch_with_transposed_lists(kOp, q, p, p.forward.key_blocks());
  std::vector<BlockSparseBackwardParams> requests;
  cpu::block_sparse_attention_backward(
      calls_of<BlockSparseBackwardCalls>(p, p.forward.attention, requests));
}

struct BlockSparseAttentionBackwardArgs : Record {
  View dout, dlse, out, lse;
  bool needs_dsink;
  BlockSparseAttentionArgs forward;
};

// dsink sums over the rows of each request, [B, H].
std::tuple<Array, Array, Array, Array> block_sparse_attention_backward(
    const BlockSparseAttentionBackwardArgs& a) {
  const View& q = a.forward.q;
  BlockSparseBackwardParams p{};
  check(!a.forward.block_table, kOp, "block_table", "must be None: keys in pages have no gradient",
        a.forward.block_table.sizes);
  p.forward = make_params(a.forward);
  for (auto [name, t] : {std::pair{"q", &q}, {"v", &a.forward.v}})
    check(t->size(-1) <= kMaxHeadDim, kOp, name,
          Rule("must have a head dimension of 1 to ", kMaxHeadDim, " for a gradient"), t->size(-1));
  const AttentionParams& f = p.forward.attention;
  const bool wants_sink = a.needs_dsink && a.forward.sink;
  Array dsink = zeros(wants_sink ? std::vector<int64_t>{f.batch, f.heads} : std::vector<int64_t>{0},
                      q, ScalarType::Float);
  Array delta;
  if (wants_sink) {
    p.dsink = dsink.mutable_data<float>();
    if (!q.is_cuda) {
      const int64_t rows = f.cu_seqlens_q ? f.seqlen_q : f.batch * f.seqlen_q;
      delta = empty({f.heads * rows}, q, ScalarType::Float);
      p.delta = delta.mutable_data<float>();
    }
  }
  auto [dq, dk, dv] = gradients_of(kOp, p, p.forward.attention, a, [&] { run_backward(p, q); });
  return {dq, dk, dv, dsink};
}

const Registration kOperators(
    {&implement<block_sparse_attention>("block_sparse_attention"),
     &implement<block_sparse_attention_out>("block_sparse_attention_out"),
     &implement<block_sparse_attention_backward>("block_sparse_attention_backward")});

}  // namespace
}  // namespace tokenmill
