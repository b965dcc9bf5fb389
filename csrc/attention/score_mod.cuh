// score_mod: from q.k to the logit by scale, softcap, bias, ALiBi and the constant of a head.
#pragma once
#include "attention/sequence.cuh"
#include "cuda/math.cuh"

namespace tokenmill::cuda {

// Constant of a head's logits: score_bias + score_bias_value - log n.
__device__ inline float constant_of(const AttentionParams& p, int64_t b, int64_t h, int columns) {
  float constant = p.score_bias_value;
  if (p.score_bias) constant += p.score_bias[b * p.score_bias_batch + h];
  if (p.score_bias_neg_log_n && columns > 0) constant -= logf(static_cast<float>(columns));
  return constant;
}

// unit cap tanh(z / cap)
__device__ __forceinline__ float apply_softcap(float z, float cap, float unit = 1) {
  return unit * cap * tanhf(z / cap);
}

// score_mod of one head beyond scale and constant: softcap, bias, ALiBi. What all heads share is
// read from the kernel parameters, where it takes no registers.
struct ScoreMod {
  __device__ ScoreMod(const AttentionParams& p, int64_t b, int64_t h, const Sequence& s,
                      float constant)
      : p(p),
        slope(p.alibi_slopes ? p.alibi_slopes[b * p.alibi_batch + h] : 0),
        constant(constant),
        diagonal(s.k_length - s.q_length),
        rows(static_cast<int>(p.bias_rows < s.q_length ? p.bias_rows : s.q_length)),
        columns(static_cast<int>(p.bias_columns < s.k_length ? p.bias_columns : s.k_length)),
        bias_start(b * p.bias_batch + h * p.bias_head) {}

  __device__ ScoreMod& operator=(const ScoreMod& other) {  // both belong to the same call
    slope = other.slope;
    constant = other.constant;
    diagonal = other.diagonal;
    rows = other.rows;
    columns = other.columns;
    bias_start = other.bias_start;
    return *this;
  }

  __device__ float distance(int row, int column) const {
    if (p.grid.width == 0) return fabsf(static_cast<float>(row + diagonal - column));
    const float w = static_cast<float>(p.grid.width), inverse = reciprocal_approx(w);
    const float i = static_cast<float>(row), j = static_cast<float>(column);
    const float yi = floorf((i + 0.5f) * inverse), yj = floorf((j + 0.5f) * inverse);
    const float dy = fabsf(yi - yj), dx = fabsf(fmaf(-yi, w, i) - fmaf(-yj, w, j));
    return p.grid.manhattan ? dy + dx : fmaxf(dy, dx);
  }
  __device__ bool is_beyond(float distance) const {  // outside the window of a grid
    return p.grid.window >= 0 && distance > static_cast<float>(p.grid.window);
  }
  // ALiBi on logits; otherwise slopes are a decay of the weights (post_decay).
  __device__ bool has_alibi() const { return p.alibi_slopes && !p.post_decay; }
  // z - slope distance, or -inf outside the window.
  __device__ float with_alibi(float z, int row, int column) const {
    const float d = distance(row, column);
    return is_beyond(d) ? -infinity() : fmaf(-slope, d, z);
  }
  // Decay applied to a softmax weight after the row sum.
  __device__ float fade(float distance) const {
    return is_beyond(distance) ? 0 : exp2_approx(-kLog2e * slope * distance);
  }

  __device__ float bias_at(int row, int column) const {
    if (row >= rows || column >= columns) return 0;
    const int64_t at = bias_start + row * p.bias_q + column * p.bias_k;
    switch (p.bias_dtype) {
      case DType::float16:
        return __half2float(static_cast<const __half*>(p.bias)[at]);
      case DType::bfloat16:
        return __bfloat162float(static_cast<const __nv_bfloat16*>(p.bias)[at]);
      default:
        return static_cast<const float*>(p.bias)[at];
    }
  }

  // The logit, in nats; comparisons are written so that a NaN stays.
  __device__ float logit(float qk, int row, int column) const {
    float z = qk * p.scale;
    if (p.softcap > 0) z = apply_softcap(z, p.softcap);
    if (p.bias) {
      z += bias_at(row, column);
      z = z > kFloatMax ? kFloatMax : z;  // +inf counts as the largest finite logit
    }
    if (has_alibi()) z = with_alibi(z, row, column);
    return z + constant;
  }

  // Exponent of a softmax weight in base 2. A finite logit has a finite exponent (-FLT_MAX log2e
  // would not); -inf hides the pair.
  __device__ float softmax_exponent(float z) const {
    const float t = z * kLog2e;
    if (!p.bias || z < -kFloatMax) return t;
    return t > kFloatMax ? kFloatMax : t < -kFloatMax ? -kFloatMax : t;
  }

  const AttentionParams& p;
  float slope, constant;
  int diagonal, rows, columns;
  int64_t bias_start;
};

inline bool needs_general(const AttentionParams& p) {
  return p.mask.any() || p.bias || p.alibi_slopes || p.softcap > 0 || !(p.scale > 0);
}

}  // namespace tokenmill::cuda
