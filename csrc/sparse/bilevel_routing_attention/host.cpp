#include "dense/score_mod.h"
#include "sparse/bilevel_routing_attention/params.h"
#include "sparse/checks.h"
#include "sparse/device_backward.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "bilevel_routing_attention";
constexpr int64_t kMaxSide = int64_t{1} << 15;  // of a map: pixels and rows fit 32 bits

// [B, Y, X, H, D]
Rows pixels_of(const View& t) { return {t.mutable_data(), t.step(0), t.step(2), t.step(3)}; }

// Of a fresh tensor, whose pixels are rows y * X + x. A step says nothing of a side of one pixel.
Rows contiguous_pixels(const View& t) {
  const int64_t pixel = t.size(3) * t.size(4);
  return {t.mutable_data(), t.size(1) * t.size(2) * pixel, pixel, t.size(4)};
}

int64_t check_side(const char* name, const View& t, int64_t side) {
  check(t.size(side) <= kMaxSide, kOp, name,
        Rule("must have at most ", kMaxSide, " pixels along ", side == 1 ? "Y" : "X"),
        t.size(side));
  return t.size(side);
}

int64_t check_region(const char* name, int64_t size) {
  check(size >= 1 && size <= kMaxSide, kOp, name, Rule("must be 1 to ", kMaxSide), size);
  return size;
}

// The checks are those of python/tokenmill/sparse/bilevel_routing.py, in its order and words.
BilevelParams make_params(const View& q, const View& k, const View& v, const View& indices,
                          const View& counts, int64_t region_y, int64_t region_x,
                          int64_t key_region_y, int64_t key_region_x, double scale,
                          bool mask_padding) {
  check_qkv(kOp, q, k, v, 5);
  const auto side = [&](const char* name, const View& t, int64_t of) {
    return static_cast<int32_t>(check_side(name, t, of));
  };
  const auto size = [&](const char* name, int64_t n) {
    return static_cast<int32_t>(check_region(name, n));
  };
  BilevelParams d{};
  d.queries = {side("q", q, 1), side("q", q, 2), size("region_y", region_y),
               size("region_x", region_x)};
  d.keys = {side("k", k, 1), side("k", k, 2), size("key_region_y", key_region_y),
            size("key_region_x", key_region_x)};
  check(
      d.keys.rows() == d.queries.rows(), kOp, "key_region_y",
      Rule("must make as many regions of k along Y as there are of q, ", int64_t{d.queries.rows()}),
      int64_t{d.keys.rows()});
  check(d.keys.columns() == d.queries.columns(), kOp, "key_region_x",
        Rule("must make as many regions of k along X as there are of q, ",
             int64_t{d.queries.columns()}),
        int64_t{d.keys.columns()});
  check(std::isfinite(scale), kOp, "scale", "must be finite", scale);
  const int64_t batch = q.size(0), heads = q.size(3), kv_heads = k.size(3);
  const int64_t regions = d.queries.regions();
  const bool fits =
      indices.dim() == 4 && indices.size(0) == batch && indices.size(2) == regions &&
      (indices.size(1) == 1 || indices.size(1) == kv_heads || indices.size(1) == heads);
  d.list = check_list(
      kOp, indices, counts,
      Rule("must have shape [", batch, ", 1, ", kv_heads, " or ", heads, ", ", regions, ", K]"),
      fits, "q", q);
  d.pads_count = !mask_padding;
  AttentionParams& p = d.attention;
  p.batch = batch;
  p.seqlen_q = q.size(1) * q.size(2);
  p.seqlen_k = k.size(1) * k.size(2);
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head_dim = q.size(4);
  p.value_dim = v.size(4);
  p.dtype = to_dtype(q.dtype);
  p.map = ScoreMap::softmax;
  p.q = pixels_of(q);
  p.k = pixels_of(k);
  p.v = pixels_of(v);
  d.q_line = q.step(1);
  d.k_line = k.step(1);
  d.v_line = v.step(1);
  p.scale = static_cast<float>(scale);
  p.window_left = p.window_right = -1;
  return d;
}

void run_forward(const BilevelParams& d, const View& q) {
#if defined(TOKENMILL_WITH_CUDA)
  if (q.is_cuda) return launch_on_device(kOp, q, d);
#endif
  cpu::bilevel_routing_attention_forward(d);
}

std::tuple<Tensor, Tensor> bilevel_routing_attention(Tensor q, Tensor k, Tensor v, Tensor indices,
                                                     Tensor counts, int64_t region_y,
                                                     int64_t region_x, int64_t key_region_y,
                                                     int64_t key_region_x, double scale,
                                                     bool mask_padding) {
  const View qv(q);
  BilevelParams d = make_params(qv, View(k), View(v), View(indices), View(counts), region_y,
                                region_x, key_region_y, key_region_x, scale, mask_padding);
  AttentionParams& p = d.attention;
  const int64_t height = d.queries.height, width = d.queries.width;
  Tensor out = empty({p.batch, height, width, p.heads, p.value_dim}, q);
  Tensor lse = empty({p.batch, p.heads, height, width}, q, ScalarType::Float);
  p.out = contiguous_pixels(View(out));
  d.out_line = width * p.out.seq;
  p.lse = View(lse).mutable_data<float>();
  if (out.numel() > 0) run_forward(d, qv);
  return {out, lse};
}

void run_backward(BilevelBackwardParams& p, const View& q) {
#if defined(TOKENMILL_WITH_CUDA)
  if (q.is_cuda) return launch_with_transposed_lists(kOp, q, p, p.forward.keys.regions());
#endif
  cpu::bilevel_routing_attention_backward(p);
}

std::tuple<Tensor, Tensor, Tensor> bilevel_routing_attention_backward(
    Tensor dout, OptTensor dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
    Tensor indices, Tensor counts, int64_t region_y, int64_t region_x, int64_t key_region_y,
    int64_t key_region_x, double scale, bool mask_padding) {
  const View qv(q), kv(k), vv(v);
  BilevelBackwardParams p{};
  p.forward = make_params(qv, kv, vv, View(indices), View(counts), region_y, region_x, key_region_y,
                          key_region_x, scale, mask_padding);
  AttentionParams& f = p.forward.attention;
  const int64_t height = p.forward.queries.height, width = p.forward.queries.width;
  const std::vector<int64_t> like_out{f.batch, height, width, f.heads, f.value_dim};
  const std::vector<int64_t> like_lse{f.batch, f.heads, height, width};
  const View dout_view(dout), out_view(out);
  check_like_out(kOp, "dout", dout_view, like_out, qv);
  check_like_out(kOp, "out", out_view, like_out, qv);
  p.dout = pixels_of(dout_view);
  p.dout_line = dout_view.step(1);
  f.out = pixels_of(out_view);
  p.forward.out_line = out_view.step(1);
  f.lse = check_like_lse(kOp, "lse", lse, like_lse, qv);
  if (dlse) p.dlse = check_like_lse(kOp, "dlse", *dlse, like_lse, qv);
  Tensor dq = empty(qv.sizes, q), dk = empty(kv.sizes, q), dv = empty(vv.sizes, q);
  p.dq = contiguous_pixels(View(dq));
  p.dk = contiguous_pixels(View(dk));
  p.dv = contiguous_pixels(View(dv));
  if (q.numel() > 0 && k.numel() > 0)
    run_backward(p, qv);
  else
    fill(0, dq, dk, dv);
  return {dq, dk, dv};
}

}  // namespace

TOKENMILL_IMPL(CPU, m) {
  m.impl("bilevel_routing_attention", TOKENMILL_BOX(bilevel_routing_attention));
  m.impl("bilevel_routing_attention_backward", TOKENMILL_BOX(bilevel_routing_attention_backward));
}

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) {
  m.impl("bilevel_routing_attention", TOKENMILL_BOX(bilevel_routing_attention));
  m.impl("bilevel_routing_attention_backward", TOKENMILL_BOX(bilevel_routing_attention_backward));
}
#endif

}  // namespace tokenmill
