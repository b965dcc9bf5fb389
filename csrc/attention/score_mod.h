// Checks of score_mod arguments, for operators with a score map.
#pragma once
#include <cmath>

#include "attention/params.h"
#include "core/qkv.h"

namespace tokenmill {

inline void check_small(const char* op, const char* name, const View& t, const View& q) {
  check_wide(op, name, t, q);
  check_last_contiguous(op, name, t);
  check_device_of_q(op, name, t, q);
}

inline ScoreMap map_of(const char* op, std::string_view kind) {
  constexpr std::pair<std::string_view, ScoreMap> all[] = {
      {"softmax", ScoreMap::softmax}, {"sigmoid", ScoreMap::sigmoid},
      {"relu", ScoreMap::relu},       {"elu1", ScoreMap::elu1},
      {"linear", ScoreMap::linear},   {"taylor2", ScoreMap::taylor2}};
  return choose(op, "kind", all, kind);
}

inline Normalize normalize_of(const char* op, std::string_view normalize, ScoreMap map) {
  if (normalize == "none") return Normalize::none;
  check(normalize == "sum" || normalize == "count", op, "normalize",
        "must be None, 'sum' or 'count'", normalize);
  check(map != ScoreMap::softmax, op, "normalize", "needs a kind other than 'softmax'", normalize);
  return normalize == "sum" ? Normalize::sum : Normalize::count;
}

inline void check_scale(const char* op, double scale, double softcap) {
  check_scale(op, scale);
  check(std::isfinite(softcap) && softcap >= 0, op, "softcap",
        "must be finite and not negative (0 = off)", softcap);
}

// [H] or [B, H]; sets the stride between batch entries.
inline const float* per_head(const char* op, const char* name, const View& tensor, const View& q,
                             int64_t batch, int64_t heads, int64_t& batch_stride) {
  batch_stride = 0;
  if (!tensor) return nullptr;
  const View& t = tensor;
  const std::vector<int64_t> one{heads}, each{batch, heads};
  check(t.sizes == one || t.sizes == each, op, name, Rule("must have shape ", one, " or ", each),
        t.sizes);
  check_small(op, name, t, q);
  if (t.dim() == 2) batch_stride = t.step(0);
  return t.data<float>();
}

// [H], or null.
inline const float* sink_of(const char* op, const AttentionParams& p, const View& q,
                            const View& sink) {
  if (!sink) return nullptr;
  const std::vector<int64_t> wanted{p.heads};
  check(sink.sizes == wanted, op, "sink", Rule("must have shape ", wanted), sink.sizes);
  check_small(op, "sink", sink, q);
  return sink.data<float>();
}

// Requires batch, heads and map of p.
inline void set_score_mod(const char* op, AttentionParams& p, const View& q, std::string_view kind,
                          const View& score_bias, const View& alibi_slopes, const View& sink) {
  p.score_bias = per_head(op, "score_bias", score_bias, q, p.batch, p.heads, p.score_bias_batch);
  p.alibi_slopes = per_head(op, "alibi_slopes", alibi_slopes, q, p.batch, p.heads, p.alibi_batch);
  if (sink) check(p.map == ScoreMap::softmax, op, "sink", "needs kind 'softmax', not", kind);
  p.sink = sink_of(op, p, q, sink);
}

// Shape of lse. Requires map, normalize and lengths of p.
inline std::vector<int64_t> lse_sizes(const AttentionParams& p) {
  if (!has_row_statistic(p)) return {0};
  if (p.cu_seqlens_q) return {p.heads, p.seqlen_q};
  return {p.batch, p.heads, p.seqlen_q};
}

inline void check_integers(const char* op, const char* name, const View& t, const View& q) {
  check(t.dtype == ScalarType::Int, op, name, "must be int32", t.dtype);
  check(t.contiguous(), op, name, "must be contiguous; strides", t.strides);
  check_device_of_q(op, name, t, q);
}

// keys: rows of k_spans, or the minimum where `more` are allowed. Requires batch, heads and lengths
// of p.
inline void set_mask(const char* op, AttentionParams& p, const View& q, int64_t keys, bool more,
                     const View& ranges, const View& q_spans, const View& k_spans) {
  const int64_t batch = q.dim() == 3 ? 1 : p.batch, rows = p.seqlen_q;
  const auto is_one_or = [](int64_t size, int64_t all) { return size == 1 || size == all; };
  const auto stride = [](const View& t, int i) { return t.size(i) == 1 ? 0 : t.step(i); };
  PairMask& mask = p.mask;
  if (ranges) {
    const View& t = ranges;
    check(t.dim() == 5 && is_one_or(t.size(0), batch) && is_one_or(t.size(1), p.heads) &&
              t.size(2) == rows && t.size(3) >= 1 && t.size(3) <= kMaxRanges && t.size(4) == 2,
          op, "mask_ranges",
          Rule("must have shape [", batch, " or 1, ", p.heads, " or 1, ", rows, ", 1 to ",
               kMaxRanges, ", 2]"),
          t.sizes);
    check_integers(op, "mask_ranges", t, q);
    mask.ranges = t.data<int32_t>();
    mask.count = t.size(3);
    mask.ranges_batch = stride(t, 0);
    mask.ranges_head = stride(t, 1);
  }
  if (!q_spans && !k_spans) return;
  const auto check_spans = [&](const char* name, const View& t, int64_t length, bool longer) {
    if (!t) fail(op, name, "must be given with its counterpart", "None");
    check(t.dim() == 3 && is_one_or(t.size(0), batch) && t.size(2) == 2 &&
              (t.size(1) == length || (longer && t.size(1) > length)),
          op, name,
          Rule("must have shape [", batch, " or 1, ", length, longer ? " or more" : "", ", 2]"),
          t.sizes);
    check_integers(op, name, t, q);
  };
  check_spans("mask_q_spans", q_spans, rows, false);
  check_spans("mask_k_spans", k_spans, keys, more);
  mask.q_spans = q_spans.data<int32_t>();
  mask.k_spans = k_spans.data<int32_t>();
  mask.q_spans_batch = stride(q_spans, 0);
  mask.k_spans_batch = stride(k_spans, 0);
}

}  // namespace tokenmill
