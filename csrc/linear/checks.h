// Checks of the linear family.
#pragma once
#include <algorithm>

#include "core/qkv.h"
#include "linear/params.h"

namespace tokenmill {

inline FeatureMap check_linear_inputs(const char* op, const View& q, const View& k, const View& v,
                                      const View& log_decay, std::string_view feature_map,
                                      double scale, bool normalize, bool packed) {
  check_qkv(op, q, k, v, packed ? 3 : 4);
  check(k.size(-3) == q.size(-3), op, "k", Rule("must have the length of q, ", q.size(-3)),
        k.size(-3));
  constexpr std::pair<std::string_view, FeatureMap> kMaps[] = {{"identity", FeatureMap::identity},
                                                               {"elu1", FeatureMap::elu1},
                                                               {"relu", FeatureMap::relu},
                                                               {"silu", FeatureMap::silu},
                                                               {"taylor2", FeatureMap::taylor2}};
  const FeatureMap map = choose(op, "feature_map", kMaps, feature_map);
  check(map != FeatureMap::taylor2 || q.size(-1) <= kMaxTaylorHeadDim, op, "q",
        Rule("must have a head dimension of 1 to ", kMaxTaylorHeadDim, " with 'taylor2'"),
        q.size(-1));
  check_scale(op, scale);
  if (log_decay) {
    const std::vector<int64_t> head{q.size(-2)}, token(q.sizes.begin(), q.sizes.end() - 1);
    const bool per_channel = log_decay.sizes == q.sizes;
    check(log_decay.sizes == head || log_decay.sizes == token || per_channel, op, "log_decay",
          Rule("must have shape ", head, ", ", token, " or ", q.sizes), log_decay.sizes);
    check_wide(op, "log_decay", log_decay, q);
    check_device_of_q(op, "log_decay", log_decay, q);
    if (per_channel) {
      check_last_contiguous(op, "log_decay", log_decay);
      check(map == FeatureMap::identity, op, "feature_map",
            "must be 'identity' with a log_decay per channel", feature_map);
      check(!normalize, op, "normalize", "must be False with a log_decay per channel", "True");
      check(k.size(-2) == q.size(-2), op, "k",
            Rule("must have the heads of q, ", q.size(-2), ", with a log_decay per channel"),
            k.size(-2));
    }
  }
  return map;
}

inline void check_state(const char* op, const char* name, const View& t, const View& q) {
  check_wide(op, name, t, q);
  const bool rows_lie_together =
      t.numel() == 0 || ((t.size(-1) == 1 || t.strides.back() == 1) &&
                         (t.size(-2) == 1 || t.strides[t.dim() - 2] == t.size(-1)));
  check(rows_lie_together, op, name, "must have the rows of a head without gaps; strides",
        t.strides);
  check_device_of_q(op, name, t, q);
}

inline LogDecay log_decay_of(const View& t, bool packed) {
  const bool per_channel = t.dim() == (packed ? 3 : 4);
  const int64_t head = per_channel ? -2 : -1;
  LogDecay d{t.mutable_data<float>(), 0, 0, t.step(head), t.dim() > 1, per_channel};
  if (d.per_token) {
    d.seq = t.step(head - 1);
    d.batch = packed ? 0 : t.step(0);
  }
  return d;
}

// The largest of n numbers and 0; NaN is not compared. Independent maxima fill vectors.
inline float largest_of(const float* x, int64_t n, int64_t stride) {
  constexpr int64_t kMaxima = 16;
  float largest[kMaxima] = {};
  int64_t i = 0;
  for (; stride == 1 && i + kMaxima <= n; i += kMaxima)
    for (int64_t j = 0; j < kMaxima; ++j)
      largest[j] = x[i + j] > largest[j] ? x[i + j] : largest[j];
  for (; i < n; ++i) largest[0] = x[i * stride] > largest[0] ? x[i * stride] : largest[0];
  return *std::max_element(largest, largest + kMaxima);
}

// NaN propagates; it is not rejected.
inline void check_decay_values(const char* op, const View& t) {
  float largest = 0;
  const int64_t rank = t.dim();
  int64_t sizes[4] = {1, 1, 1, 1}, strides[4] = {};
  for (int64_t i = 0; i < rank; ++i) {
    sizes[4 - rank + i] = t.sizes[i];
    strides[4 - rank + i] = t.strides[i];
  }
  for (int64_t i = 0; i < sizes[0]; ++i)
    for (int64_t j = 0; j < sizes[1]; ++j)
      for (int64_t k = 0; k < sizes[2]; ++k) {
        const float* row = t.data<float>() + i * strides[0] + j * strides[1] + k * strides[2];
        largest = std::max(largest, largest_of(row, sizes[3], strides[3]));
      }
  check(!(largest > 0), op, "log_decay", "must not be positive; largest", double{largest});
}

inline TokenGates gates_of(const View& t, bool packed) {
  return {t.mutable_data<float>(), packed ? 0 : t.step(0), t.step(-2), t.step(-1)};
}

// Strides of [B, S, H], or of [B, S, H, D] with contiguous channels.
inline TokenGates decays_of(const View& t, bool packed, bool per_channel) {
  if (!per_channel) return gates_of(t, packed);
  return {t.mutable_data<float>(), packed ? 0 : t.step(0), t.step(-3), t.step(-2)};
}

inline States states_of(const View& t) { return {t.mutable_data<float>(), t.step(0), t.step(1)}; }

// log_decay of the delta rule has a number for each row of the state.
template <typename Args>
bool per_channel(const Args& a) {
  return a.log_decay && a.log_decay.dim() > a.beta.dim();
}

// q, k, v, beta and log_decay of the delta rule.
template <typename Args>
void check_delta_inputs(const char* op, const Args& a, bool packed) {
  const View &q = a.q, &k = a.k, &v = a.v;
  // q is a key: the heads of v are a multiple of them.
  check_qkv(op, q, k, k, packed ? 3 : 4);
  check(k.sizes == q.sizes, op, "k", Rule("must have the shape of q, ", q.sizes), k.sizes);
  check(v.dim() == q.dim(), op, "v", Rule("must have ", q.dim(), " dimensions"), v.dim());
  check(v.dtype == q.dtype, op, "v", Rule("must have the dtype of q, ", q.dtype), v.dtype);
  check_device_of_q(op, "v", v, q);
  check_last_contiguous(op, "v", v);
  check_head_dim(op, "v", v);
  const int64_t heads = v.size(-2), key_heads = q.size(-2);
  check(std::equal(v.sizes.begin(), v.sizes.end() - 2, q.sizes.begin()), op, "v",
        Rule("must have the shape of q up to the heads, ", q.sizes), v.sizes);
  check(heads == key_heads || (key_heads > 0 && heads % key_heads == 0), op, "v",
        Rule("number of heads must be a multiple of that of q, ", key_heads), heads);
  check_scale(op, scale_of(a));
  std::vector<int64_t> token(v.sizes.begin(), v.sizes.end() - 1);
  check(a.beta.sizes == token, op, "beta", Rule("must have shape ", token), a.beta.sizes);
  check_wide(op, "beta", a.beta, q);
  check_device_of_q(op, "beta", a.beta, q);
  if (!a.log_decay) return;
  std::vector<int64_t> channel = token;
  channel.push_back(q.size(-1));
  check(a.log_decay.sizes == token || a.log_decay.sizes == channel, op, "log_decay",
        Rule("must have shape ", token, " or ", channel), a.log_decay.sizes);
  check_wide(op, "log_decay", a.log_decay, q);
  check_device_of_q(op, "log_decay", a.log_decay, q);
  if (per_channel(a)) check_last_contiguous(op, "log_decay", a.log_decay);
}

// A given state of a shape.
inline States initial_state_of(const char* op, const View& t, const std::vector<int64_t>& sizes,
                               const View& q) {
  check(t.sizes == sizes, op, "initial_state", Rule("must have shape ", sizes), t.sizes);
  check_state(op, "initial_state", t, q);
  return states_of(t);
}

// Sizes and rows that the records of all recurrences have; heads are the operator's.
template <typename Params, typename Args>
void place_tokens(const char* op, Params& p, const Args& a) {
  const bool packed = a.packed();
  p.batch = a.q.size(0);
  if (packed) {
    check_cu_seqlens(op, "cu_seqlens", a.cu_seqlens, a.q);
    p.batch = a.cu_seqlens.size(0) - 1;
    p.cu_seqlens = a.cu_seqlens.template data<int32_t>();
  }
  p.seqlen = a.q.size(-3);
  p.head_dim = a.q.size(-1);
  p.value_dim = a.v.size(-1);
  p.dtype = to_dtype(a.q.dtype);
  p.q = rows_of(a.q, packed);
  p.k = rows_of(a.k, packed);
  p.v = rows_of(a.v, packed);
}

// Rules on values of offsets and decays.
template <typename Args>
void check_recurrence_values(const char* op, const Args& a) {
  if (a.q.is_cuda) return;
  if (a.cu_seqlens) check_cu_seqlens_values(op, "cu_seqlens", a.cu_seqlens, a.q.size(0));
  if (a.log_decay) check_decay_values(op, a.log_decay);
}

}  // namespace tokenmill
