#include "attention/score_mod.h"
#include "sparse/bilevel_routing_attention/params.h"
#include "sparse/checks.h"
#include "sparse/device_backward.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "bilevel_routing_attention";
// maximum height and width of a map: pixels and rows fit 32 bits
constexpr int64_t kMaxSide = int64_t{1} << 15;

// [B, Y, X, H, D]
Rows pixels_of(const View& t) { return {t.mutable_data(), t.step(0), t.step(2), t.step(3)}; }

// Row-major pixels y * X + x of a new tensor. Strides are computed, since the stride of a dimension
// of size 1 is arbitrary.
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

struct BilevelRoutingAttentionArgs : Record {
  View q, k, v, indices, counts;
  int64_t region_y, region_x, key_region_y, key_region_x;
  Optional<double> scale;
  bool mask_padding;
};

BilevelParams make_params(const BilevelRoutingAttentionArgs& a) {
  check_qkv(kOp, a.q, a.k, a.v, 5);
  const auto side = [&](const char* name, const View& t, int64_t of) {
    return static_cast<int32_t>(check_side(name, t, of));
  };
  const auto size = [&](const char* name, int64_t n) {
    return static_cast<int32_t>(check_region(name, n));
  };
  BilevelParams d{};
  d.queries = {side("q", a.q, 1), side("q", a.q, 2), size("region_y", a.region_y),
               size("region_x", a.region_x)};
  d.keys = {side("k", a.k, 1), side("k", a.k, 2), size("key_region_y", a.key_region_y),
            size("key_region_x", a.key_region_x)};
  check(
      d.keys.rows() == d.queries.rows(), kOp, "key_region_y",
      Rule("must make as many regions of k along Y as there are of q, ", int64_t{d.queries.rows()}),
      int64_t{d.keys.rows()});
  check(d.keys.columns() == d.queries.columns(), kOp, "key_region_x",
        Rule("must make as many regions of k along X as there are of q, ",
             int64_t{d.queries.columns()}),
        int64_t{d.keys.columns()});
  check_scale(kOp, scale_of(a));
  const int64_t batch = a.q.size(0), heads = a.q.size(3), kv_heads = a.k.size(3);
  const int64_t regions = d.queries.regions();
  const bool fits =
      a.indices.dim() == 4 && a.indices.size(0) == batch && a.indices.size(2) == regions &&
      (a.indices.size(1) == 1 || a.indices.size(1) == kv_heads || a.indices.size(1) == heads);
  d.list = check_list(kOp, a.indices, a.counts,
                      Rule("must have shape [", batch, ", heads, ", regions, ", K] with 1, ",
                           kv_heads, " or ", heads, " heads"),
                      fits, "q", a.q);
  d.pads_count = !a.mask_padding;
  AttentionParams& p = d.attention;
  p.batch = batch;
  p.seqlen_q = a.q.size(1) * a.q.size(2);
  p.seqlen_k = a.k.size(1) * a.k.size(2);
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head_dim = a.q.size(4);
  p.value_dim = a.v.size(4);
  p.dtype = to_dtype(a.q.dtype);
  p.map = ScoreMap::softmax;
  p.q = pixels_of(a.q);
  p.k = pixels_of(a.k);
  p.v = pixels_of(a.v);
  d.q_line = a.q.step(1);
  d.k_line = a.k.step(1);
  d.v_line = a.v.step(1);
  p.scale = static_cast<float>(scale_of(a));
  p.window_left = p.window_right = -1;
  return d;
}

void run_forward(const BilevelParams& d, const View& q) {
  if (q.is_cuda) return launch_on_device(kOp, q, d);
  cpu::bilevel_routing_attention_forward(d);
}

std::tuple<Array, Array> bilevel_routing_attention(const BilevelRoutingAttentionArgs& a) {
  BilevelParams d = make_params(a);
  AttentionParams& p = d.attention;
  const int64_t height = d.queries.height, width = d.queries.width;
  Array out = empty({p.batch, height, width, p.heads, p.value_dim}, a.q);
  Array lse = empty({p.batch, p.heads, height, width}, a.q, ScalarType::Float);
  p.out = contiguous_pixels(out);
  d.out_line = width * p.out.seq;
  p.lse = lse.mutable_data<float>();
  if (out.numel() > 0) run_forward(d, a.q);
  return {out, lse};
}

void run_backward(BilevelBackwardParams& p, const View& q) {
  if (q.is_cuda) return launch_with_transposed_lists(kOp, q, p, p.forward.keys.regions());
  cpu::bilevel_routing_attention_backward(p);
}

struct BilevelRoutingAttentionBackwardArgs : Record {
  View dout, dlse, out, lse;
  BilevelRoutingAttentionArgs forward;
};

std::tuple<Array, Array, Array> bilevel_routing_attention_backward(
    const BilevelRoutingAttentionBackwardArgs& a) {
  const BilevelRoutingAttentionArgs& in = a.forward;
  BilevelBackwardParams p{};
  p.forward = make_params(in);
  AttentionParams& f = p.forward.attention;
  const int64_t height = p.forward.queries.height, width = p.forward.queries.width;
  const std::vector<int64_t> like_out{f.batch, height, width, f.heads, f.value_dim};
  const std::vector<int64_t> like_lse{f.batch, f.heads, height, width};
  check_like_out(kOp, "dout", a.dout, like_out, in.q);
  check_like_out(kOp, "out", a.out, like_out, in.q);
  p.dout = pixels_of(a.dout);
  p.dout_line = a.dout.step(1);
  f.out = pixels_of(a.out);
  p.forward.out_line = a.out.step(1);
  f.lse = check_like_lse(kOp, "lse", a.lse, like_lse, in.q);
  if (a.dlse) p.dlse = check_like_lse(kOp, "dlse", a.dlse, like_lse, in.q);
  Array dq = empty(in.q.sizes, in.q), dk = empty(in.k.sizes, in.q), dv = empty(in.v.sizes, in.q);
  p.dq = contiguous_pixels(dq);
  p.dk = contiguous_pixels(dk);
  p.dv = contiguous_pixels(dv);
  if (in.q.numel() > 0 && in.k.numel() > 0)
    run_backward(p, in.q);
  else
    fill(0, dq, dk, dv);
  return {dq, dk, dv};
}

const Registration kOperators(
    {&implement<bilevel_routing_attention>("bilevel_routing_attention"),
     &implement<bilevel_routing_attention_backward>("bilevel_routing_attention_backward")});

}  // namespace
}  // namespace tokenmill
