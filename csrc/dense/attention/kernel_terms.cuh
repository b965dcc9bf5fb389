// What the forward and the backward kernels know about a head: its rows, its band, its scores.
#pragma once
#include "cuda/load_tile.cuh"
#include "cuda/math.cuh"
#include "cuda/sequences.cuh"
#include "dense/attention/band.h"
#include "dense/attention/params.h"

namespace tokenmill::cuda {

// Positions within a sequence are ints on the device; the host rejects longer sequences.
constexpr int64_t kMaxLength = int64_t{1} << 29;

// Softmax weights are relative to the pivot of their row and may exceed it by 2^kHeadroom before
// the pivot moves: rescaling is rare, and the only key of a row has weight 1.
constexpr float kHeadroom = 8;

// Sigmoid weights are scaled: float16 cannot hold those near 1 / n from n = 16384 on. (The fast
// ones have an absolute error of 2^-12 anyway.)
template <typename T>
constexpr int kLog2Scale = std::is_same_v<T, __half> ? 15 : 0;
template <typename T>
constexpr float kScale = 1 << kLog2Scale<T>;

struct Sequence {
  int q_start, k_start, q_length, k_length;
};

// As it is read.
__device__ inline Sequence sequence_of(const AttentionParams& p, int64_t b) {
  if (!p.cu_seqlens_q) return {0, 0, static_cast<int>(p.seqlen_q), static_cast<int>(p.seqlen_k)};
  const int q = clamped_end(p.cu_seqlens_q, b, p.seqlen_q);
  const int k = clamped_end(p.cu_seqlens_k, b, p.seqlen_k);
  const int q_length = clamped_end(p.cu_seqlens_q, b + 1, p.seqlen_q) - q;
  const int k_length = clamped_end(p.cu_seqlens_k, b + 1, p.seqlen_k) - k;
  return {q, k, q_length > 0 ? q_length : 0, k_length > 0 ? k_length : 0};
}

// Of a block that writes rows of `queries`.
__device__ inline Sequence sequence_of(const AttentionParams& p, int64_t b,
                                       const PackedRows& queries) {
  Sequence s = sequence_of(p, b);
  s.q_start = queries.start;
  s.q_length = queries.length;
  return s;
}

__device__ __forceinline__ float* lse_at(const AttentionParams& p, const float* lse, int64_t b,
                                         int64_t start, int64_t h) {
  const int64_t at = p.cu_seqlens_q ? h * p.seqlen_q + start : (b * p.heads + h) * p.seqlen_q;
  return const_cast<float*>(lse) + at;
}

// Band in ints: low and high are far beyond any sequence where there is no limit.
struct WarpBand {
  int low, high, columns;

  WarpBand() = default;
  __device__ WarpBand(const AttentionParams& p, const Sequence& s) : columns(s.k_length) {
    const Band band = Band::of_window(p.window_left, p.window_right, s.q_length, s.k_length);
    low = static_cast<int>(band.low < -kMaxLength ? -kMaxLength : band.low);
    high = static_cast<int>(band.high > kMaxLength ? kMaxLength : band.high);
  }
  __device__ int begin(int row) const { return max(row + low, 0); }
  __device__ int end(int row) const { return min(row + high, columns); }
};

// What a warp of the forward needs only where there are masks, general terms and at its end.
struct alignas(16) WarpPlace {
  int b, h, q_start, k_start;
  int first, last;  // rows of the sequence
  WarpBand band;
  float shift;                 // the constant of the head, which softmax weights do not see
  int block_end;               // of the keys that any warp of the block sees
  int whole_begin, whole_end;  // of those that all rows see
};

// score_bias, score_bias_value and -log n in one.
__device__ inline float constant_of(const AttentionParams& p, int64_t b, int64_t h, int columns) {
  float constant = p.score_bias_value;
  if (p.score_bias) constant += p.score_bias[b * p.score_bias_batch + h];
  if (p.score_bias_neg_log_n && columns > 0) constant -= logf(static_cast<float>(columns));
  return constant;
}

// Bias, slope and soft cap of one head: what needs more than scale and constant.
struct GeneralTerms {
  __device__ GeneralTerms(const AttentionParams& p, int64_t b, int64_t h, const Sequence& s,
                          float constant)
      : scale(p.scale),
        softcap(p.softcap),
        slope(p.alibi_slopes ? p.alibi_slopes[b * p.alibi_batch + h] : 0),
        constant(constant),
        diagonal(s.k_length - s.q_length),
        rows(static_cast<int>(p.bias_rows < s.q_length ? p.bias_rows : s.q_length)),
        columns(static_cast<int>(p.bias_columns < s.k_length ? p.bias_columns : s.k_length)),
        bias(p.bias),
        bias_dtype(p.bias_dtype),
        bias_start(b * p.bias_batch + h * p.bias_head),
        bias_q(p.bias_q),
        bias_k(p.bias_k),
        has_slope(p.alibi_slopes != nullptr) {}

  __device__ float bias_at(int row, int column) const {
    if (row >= rows || column >= columns) return 0;
    const int64_t at = bias_start + row * bias_q + column * bias_k;
    switch (bias_dtype) {
      case DType::float16:
        return __half2float(static_cast<const __half*>(bias)[at]);
      case DType::bfloat16:
        return __bfloat162float(static_cast<const __nv_bfloat16*>(bias)[at]);
      default:
        return static_cast<const float*>(bias)[at];
    }
  }

  // The logit in nats; comparisons are written so that a NaN stays.
  __device__ float logit(float qk, int row, int column) const {
    float z = qk * scale;
    if (softcap > 0) z = softcap * tanhf(z / softcap);
    if (bias) {
      z += bias_at(row, column);
      z = z > kFloatMax ? kFloatMax : z;  // +inf counts as the largest finite logit
    }
    if (has_slope) z = fmaf(-slope, fabsf(static_cast<float>(row + diagonal - column)), z);
    return z + constant;
  }

  // The exponent of a softmax weight in base 2. A finite logit has a finite exponent (-FLT_MAX
  // log2e would not); -inf hides the pair.
  __device__ float softmax_exponent(float z) const {
    const float t = z * kLog2e;
    if (!bias || z < -kFloatMax) return t;
    return t > kFloatMax ? kFloatMax : t < -kFloatMax ? -kFloatMax : t;
  }

  float scale, softcap, slope, constant;
  int diagonal, rows, columns;
  const void* bias;
  DType bias_dtype;
  int64_t bias_start, bias_q, bias_k;
  bool has_slope;
};

inline bool needs_general(const AttentionParams& p) {
  return p.bias || p.alibi_slopes || p.softcap > 0 || !(p.scale > 0);
}

}  // namespace tokenmill::cuda
