#include <limits>

#include "attention/band.h"
#include "attention/mask_bounds.h"
#include "attention/score_mod.h"
#include "core/parts.h"
#include "core/qkv.h"
#include "core/stream.h"
#include "core/written.h"
#include "dense/attention/cpu_kernels.h"
#include "dense/attention/kernels.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "attention";

struct AttentionArgs : Record {
  View q, k, v;
  std::string_view kind, normalize;
  Optional<double> scale;
  View score_bias;
  double score_bias_value;
  bool score_bias_neg_log_n;
  View bias, mask_ranges, mask_q_spans, mask_k_spans, alibi_slopes;
  int64_t grid_width;
  std::string_view grid_distance;
  int64_t grid_window;
  View sink;
  double softcap;
  bool causal;
  int64_t window_left, window_right;
  View cu_seqlens_q, cu_seqlens_k;
  Optional<int64_t> max_seqlen_q, max_seqlen_k;
  std::string_view precision;
  bool post_decay;
  bool invariant;

  bool packed() const { return cu_seqlens_q || cu_seqlens_k; }
};

// Returns the number of sequences.
int64_t check_cu_seqlens(const AttentionArgs& a) {
  const std::pair<const char*, const Optional<int64_t>*> bounds[] = {
      {"max_seqlen_q", &a.max_seqlen_q}, {"max_seqlen_k", &a.max_seqlen_k}};
  if (!a.cu_seqlens_q || !a.cu_seqlens_k) {
    if (a.packed())
      fail(kOp, a.cu_seqlens_q ? "cu_seqlens_k" : "cu_seqlens_q",
           "must be given with its counterpart", "None");
    for (auto [name, bound] : bounds)
      check(!*bound, kOp, name, "requires cu_seqlens", bound->value_or(0));
    return a.q.size(0);
  }
  const View &cu_q = a.cu_seqlens_q, &cu_k = a.cu_seqlens_k;
  const std::pair<const char*, const View*> all[] = {{"cu_seqlens_q", &cu_q},
                                                     {"cu_seqlens_k", &cu_k}};
  for (auto [name, t] : all) check_cu_seqlens(kOp, name, *t, a.q);
  check(cu_k.size(0) == cu_q.size(0), kOp, "cu_seqlens_k",
        Rule("must have the length of cu_seqlens_q, ", cu_q.size(0)), cu_k.size(0));
  for (auto [name, bound] : bounds)
    check(bound->value_or(0) >= 0, kOp, name, "must not be negative", bound->value_or(0));
  return cu_q.size(0) - 1;
}

Grid grid_of(const AttentionArgs& a) {
  check(a.grid_width >= 0, kOp, "grid_width", "must not be negative (0 = no grid)", a.grid_width);
  const bool manhattan = a.grid_distance == "manhattan";
  check(manhattan || a.grid_distance == "chebyshev", kOp, "grid_distance",
        "must be 'chebyshev' or 'manhattan'", a.grid_distance);
  check(a.grid_window >= -1, kOp, "grid_window", "must be >= -1 (-1 = no limit)", a.grid_window);
  if (a.grid_width > 0) {
    check(bool(a.alibi_slopes), kOp, "grid_width", "needs alibi_slopes", a.grid_width);
    check(!a.packed(), kOp, "grid_width", "needs sequences that are not packed", a.grid_width);
    const int64_t rows = a.q.size(1), columns = a.k.size(1);
    check(rows == columns, kOp, "k", Rule("must be as long as q with a grid, ", rows), columns);
    check(rows <= kMaxCells, kOp, "q", Rule("must have at most ", kMaxCells, " tokens with a grid"),
          rows);
  }
  return {a.grid_width, manhattan, a.grid_width > 0 ? a.grid_window : -1};
}

AttentionParams make_params(const AttentionArgs& a) {
  const bool packed = a.packed();
  check_qkv(kOp, a.q, a.k, a.v, packed ? 3 : 4);
  const ScoreMap map = map_of(kOp, a.kind);
  const Normalize normalize = normalize_of(kOp, a.normalize, map);
  check(a.precision == "accurate" || a.precision == "fast", kOp, "precision",
        "must be 'accurate' or 'fast'", a.precision);
  check_scale(kOp, scale_of(a), a.softcap);
  check(a.window_left >= -1, kOp, "window", "left must be >= -1 (-1 = no limit)", a.window_left);
  check(a.window_right >= -1, kOp, "window", "right must be >= -1 (-1 = no limit)", a.window_right);
  AttentionParams p{};
  p.batch = check_cu_seqlens(a);
  p.heads = a.q.size(-2);
  p.kv_heads = a.k.size(-2);
  p.seqlen_q = a.q.size(packed ? 0 : 1);
  p.seqlen_k = a.k.size(packed ? 0 : 1);
  p.head_dim = a.q.size(-1);
  p.value_dim = a.v.size(-1);
  p.dtype = to_dtype(a.q.dtype);
  p.map = map;
  p.normalize = normalize;
  p.q = rows_of(a.q, packed);
  p.k = rows_of(a.k, packed);
  p.v = rows_of(a.v, packed);
  if (packed) {
    p.cu_seqlens_q = a.cu_seqlens_q.data<int32_t>();
    p.cu_seqlens_k = a.cu_seqlens_k.data<int32_t>();
  }
  p.scale = static_cast<float>(scale_of(a));
  p.softcap = static_cast<float>(a.softcap);
  p.score_bias_value = static_cast<float>(a.score_bias_value);
  p.score_bias_neg_log_n = a.score_bias_neg_log_n;
  set_score_mod(kOp, p, a.q, a.kind, a.score_bias, a.alibi_slopes, a.sink);
  p.grid = grid_of(a);
  if (a.post_decay) {
    check(map == ScoreMap::softmax, kOp, "post_decay", "needs kind 'softmax', not", a.kind);
    check(bool(a.alibi_slopes), kOp, "post_decay", "needs alibi_slopes", a.post_decay);
  }
  if (a.bias) {
    const View& t = a.bias;
    const std::vector<int64_t> full{p.batch, p.heads,
                                    packed ? a.max_seqlen_q.value_or(p.seqlen_q) : p.seqlen_q,
                                    packed ? a.max_seqlen_k.value_or(p.seqlen_k) : p.seqlen_k};
    bool ok = t.dim() == 4;
    for (int i = 0; ok && i < 4; ++i) ok = t.size(i) == 1 || t.size(i) == full[i];
    check(ok, kOp, "bias", Rule("must broadcast to [B, H, Sq, Sk] = ", full), t.sizes);
    if (a.q.dtype == ScalarType::Float)
      check(t.dtype == a.q.dtype, kOp, "bias", "must be float32", t.dtype);
    check(t.dtype == a.q.dtype || t.dtype == ScalarType::Float, kOp, "bias",
          Rule("must be ", a.q.dtype, " or float32"), t.dtype);
    check_last_contiguous(kOp, "bias", t);
    check_device_of_q(kOp, "bias", t, a.q);
    p.bias = t.data();
    p.bias_dtype = to_dtype(t.dtype);
    p.bias_batch = t.step(0);
    p.bias_head = t.step(1);
    p.bias_q = t.step(2);
    p.bias_k = t.step(3);
    p.bias_rows = t.size(2) == 1 ? Band::kUnbounded : t.size(2);
    p.bias_columns = t.size(3) == 1 ? Band::kUnbounded : t.size(3);
  }
  set_mask(kOp, p, a.q, p.seqlen_k, false, a.mask_ranges, a.mask_q_spans, a.mask_k_spans);
  p.window_left = a.window_left;
  p.window_right = a.causal ? 0 : a.window_right;
  p.fast = a.precision == "fast";
  p.post_decay = a.post_decay;
  return p;
}

void check_values(const AttentionArgs& a, const AttentionParams& p) {
  if (!a.packed() || a.q.is_cuda) return;
  check_cu_seqlens_values(kOp, "cu_seqlens_q", a.cu_seqlens_q, p.seqlen_q, "max_seqlen_q",
                          a.max_seqlen_q);
  check_cu_seqlens_values(kOp, "cu_seqlens_k", a.cu_seqlens_k, p.seqlen_k, "max_seqlen_k",
                          a.max_seqlen_k);
}

float* float_data(const View& t) { return t.mutable_data<float>(); }

void run_forward(const AttentionParams& p, const AttentionArgs& a) {
  if (a.q.is_cuda) {
    check(!a.invariant, kOp, "invariant", "must be False on a GPU", a.invariant);
    Array bounds;
    if (p.mask.any()) bounds = empty({MaskBounds::bytes(p)}, a.q, ScalarType::Byte);
    return launch_on_device(kOp, a.q, Masked{p, MaskBounds::at(p, bounds.mutable_data())});
  }
  a.invariant ? cpu::attention_forward_in_tiles(p) : cpu::attention_forward(p);
}

std::vector<int64_t> out_sizes(const AttentionArgs& a) {
  std::vector<int64_t> sizes = a.q.sizes;
  sizes.back() = a.v.size(-1);
  return sizes;
}

// Writes out; returns lse, which is empty on a CPU if the caller does not take it.
Array forward(AttentionParams& p, const AttentionArgs& a, const View& out, bool wants_lse) {
  out.note(true);
  p.out = rows_of(out, a.packed());
  const bool makes_lse = wants_lse || a.q.is_cuda;
  Array lse = empty(makes_lse ? lse_sizes(p) : std::vector<int64_t>{0}, a.q, ScalarType::Float);
  p.lse = makes_lse && has_row_statistic(p) ? float_data(lse) : nullptr;
  if (p.batch == 0) {
    fill(0, out);
    fill(p.map == ScoreMap::softmax ? -std::numeric_limits<double>::infinity() : 0, lse);
  } else if (out.numel() > 0) {
    run_forward(p, a);
  }
  return lse;
}

std::tuple<Array, Array> attention(const AttentionArgs& a) {
  AttentionParams p = make_params(a);
  check_values(a, p);
  Array out = empty(out_sizes(a), a.q);
  Array lse = forward(p, a, out, a.wanted > 1);
  return {out, lse};
}

struct AttentionOutArgs : Record {
  AttentionArgs forward;
  View out;
};

Array attention_out(const AttentionOutArgs& a) {
  const AttentionArgs& in = a.forward;
  AttentionParams p = make_params(in);
  check_like_out(kOp, "out", a.out, out_sizes(in), in.q);
  check_written(kOp, a);
  check_values(in, p);
  return forward(p, in, a.out, a.wanted > 0);
}

void run_backward(const AttentionBackwardParams& p, const View& q) {
  if (q.is_cuda) {
    const AttentionParams& f = p.forward;
    const int64_t rows = f.cu_seqlens_q ? f.heads * f.seqlen_q : f.batch * f.heads * f.seqlen_q;
    const int64_t sums =
        f.cu_seqlens_q ? f.heads * blocks_of_sums(f) : f.batch * f.heads * blocks_of_sums(f);
    const bool wants_sums = (p.dscore_bias && f.map != ScoreMap::softmax) || p.dalibi_slopes;
    const bool statistic = has_backward_statistics(f);
    constexpr int64_t kTwo = 2 * sizeof(float);
    Parts parts;
    const int64_t statistics = parts.add(statistic ? kTwo * rows : 0);
    const int64_t partial = parts.add(wants_sums ? kTwo * sums : 0);
    const int64_t bounds = parts.add(f.mask.any() ? MaskBounds::bytes(f) : 0);
    AttentionBackwardCall call{p, {}, nullptr};
    const int64_t bytes = workspace_on_device(q, call), workspace = parts.add(bytes);
    parts.allocate(q);
    if (statistic) {
      call.params.minus_lse = parts.at<float>(statistics);
      call.params.minus_delta = call.params.minus_lse + rows;
    }
    if (wants_sums) call.params.sums = parts.at<float>(partial);
    call.bounds = MaskBounds::at(f, f.mask.any() ? parts.at(bounds) : nullptr);
    if (bytes > 0) call.workspace = parts.at(workspace);
    return launch_on_device(kOp, q, call);
  }
  cpu::attention_backward(p);
}

using Gradients = std::tuple<Array, Array, Array, Array, Array, Array, Array>;

struct AttentionBackwardArgs : Record {
  View dout, dlse, out, lse;
  bool needs_dscore_bias, needs_dbias, needs_dalibi_slopes, needs_dsink;
  AttentionArgs forward;
};

// dscore_bias, dalibi_slopes and dsink are returned per batch entry and head, [B, H].
Gradients attention_backward(const AttentionBackwardArgs& a) {
  const AttentionArgs& in = a.forward;
  AttentionBackwardParams p{};
  p.forward = make_params(in);
  check_values(in, p.forward);
  const AttentionParams& f = p.forward;
  const bool packed = in.packed();

  const std::vector<int64_t> like_out = out_sizes(in);
  check_like_out(kOp, "dout", a.dout, like_out, in.q);
  p.dout = rows_of(a.dout, packed);
  if (has_row_statistic(f)) {
    const bool count = f.normalize == Normalize::count;  // needs no out, and is a constant
    if ((!a.out && !count) || !a.lse)
      fail(kOp, a.out || count ? "lse" : "out",
           f.map == ScoreMap::softmax
               ? "must be given with kind 'softmax'"
               : Rule("must be given with normalize ", show(in.normalize)).text(),
           "None");
    if (!count) {
      check_like_out(kOp, "out", a.out, like_out, in.q);
      p.forward.out = rows_of(a.out, packed);
      if (a.dlse) p.dlse = check_like_lse(kOp, "dlse", a.dlse, lse_sizes(f), in.q);
    }
    p.forward.lse = check_like_lse(kOp, "lse", a.lse, lse_sizes(f), in.q);
  }

  Array dq = empty(in.q.sizes, in.q), dk = empty(in.k.sizes, in.q), dv = empty(in.v.sizes, in.q);
  p.dq = rows_of(dq, packed);
  p.dk = rows_of(dk, packed);
  p.dv = rows_of(dv, packed);
  const bool wants_score_bias = a.needs_dscore_bias && in.score_bias;
  const bool wants_bias = a.needs_dbias && in.bias;
  const bool wants_alibi = a.needs_dalibi_slopes && in.alibi_slopes;
  const bool wants_sink = a.needs_dsink && in.sink;
  const std::vector<int64_t> heads{f.batch, f.heads}, none{0};
  Array dscore_bias = zeros(wants_score_bias ? heads : none, in.q, ScalarType::Float);
  Array dalibi = zeros(wants_alibi ? heads : none, in.q, ScalarType::Float);
  Array dsink = zeros(wants_sink ? heads : none, in.q, ScalarType::Float);
  Array dbias =
      zeros(wants_bias ? std::vector<int64_t>(in.bias.sizes) : none, in.q, ScalarType::Float);
  if (wants_score_bias) p.dscore_bias = float_data(dscore_bias);
  if (wants_alibi) p.dalibi_slopes = float_data(dalibi);
  if (wants_sink) p.dsink = float_data(dsink);
  if (wants_bias) {
    p.dbias = float_data(dbias);
    p.dbias_batch = dbias.step(0);
    p.dbias_head = dbias.step(1);
    p.dbias_q = dbias.step(2);
    p.dbias_k = dbias.step(3);
  }
  if (f.batch == 0 || in.q.numel() == 0)
    fill(0, dq, dk, dv);
  else
    run_backward(p, in.q);
  return {dq, dk, dv, dscore_bias, dbias, dalibi, dsink};
}

const Registration kOperators({&implement<attention>("attention"),
                               &implement<attention_out>("attention_out"),
                               &implement<attention_backward>("attention_backward")});

}  // namespace
}  // namespace tokenmill
