// Writes rows of new keys, values and queries, rotated and converted to the dtype of their
// destination. A few adjacent threads own a row and hold its parts in registers: load, rotate, find
// the maximum, divide, store. Products, sums and quotients are rounded separately, as on every
// backend: the input of the float8 rounding then has the same bits everywhere.
#pragma once
#include <type_traits>

#include "cuda/float8.cuh"
#include "cuda/math.cuh"
#include "cuda/vector.cuh"
#include "cuda/warp.cuh"
#include "select/kv_cache_append/params.h"

namespace tokenmill::cuda::kv_cache_append {

// Maximum threads per CTA, and CTAs per SM: 64 registers.
constexpr int kAppendThreads = 256, kAppendBlocks = 4;

// Row `row` of token t: its keys first, then its values, then its queries.
struct AppendRow {
  enum class Kind { key, value, query, none };
  Kind kind;
  int head;
  AppendParams::Place at;

  __device__ AppendRow(const AppendParams& p, int64_t t, int row) {
    const int keys = static_cast<int>(p.heads), cached = keys + static_cast<int>(p.value_heads);
    kind = row < keys                                       ? Kind::key
           : row < cached                                   ? Kind::value
           : row < cached + static_cast<int>(p.query_heads) ? Kind::query
                                                            : Kind::none;
    head = kind == Kind::key ? row : kind == Kind::value ? row - keys : row - cached;
    at = p.place(t);
    if (kind != Kind::query && at.page < 0) kind = Kind::none;
  }
  __device__ bool turns(const AppendParams& p) const { return p.cos && kind != Kind::value; }
  __device__ int dim(const AppendParams& p) const {
    return kind == Kind::none ? 0 : static_cast<int>(kind == Kind::value ? p.v.dim : p.k.dim);
  }
  template <typename T>
  __device__ const T* source(const AppendParams& p, int64_t t) const {
    const Rows& rows = kind == Kind::key ? p.k.rows : kind == Kind::value ? p.v.rows : p.q;
    return static_cast<const T*>(rows.data) + t * rows.seq + head * rows.head;
  }
  template <typename T>
  __device__ T* cached(const Rows& rows) const {
    return static_cast<T*>(rows.data) + at.page * rows.batch + at.row * rows.seq + head * rows.head;
  }
};

// cos and sin of a token's pairs, shared by all rows of a CTA.
struct Angles {
  // The last four of every eight pairs are stored 144 words further, so that threads that read two,
  // four or eight consecutive pairs have no bank conflicts.
  static constexpr int kUnbounded = 144, kWords = kUnbounded + 144;  // for 288 pairs
  alignas(16) float cosine[kWords], sine[kWords];

  static __device__ int place(int pair) {
    return pair / 8 * 4 + pair % 4 + pair / 4 % 2 * kUnbounded;
  }
  __device__ void load(const AppendParams& p, int64_t position) {
    for (int i = static_cast<int>(threadIdx.x); i < p.pairs; i += static_cast<int>(blockDim.x)) {
      cosine[place(i)] = p.cos[position * p.cos_stride + i];
      sine[place(i)] = p.sin[position * p.sin_stride + i];
    }
  }
  // (a cos - b sin, b cos + a sin)
  template <int kPairs>
  __device__ void turn(int first_pair, float* a, float* b, int stride) const {
    constexpr int kAtOnce = kPairs < 4 ? kPairs : 4;
#pragma unroll
    for (int i = 0; i < kPairs; i += kAtOnce) {
      float c[kAtOnce], s[kAtOnce];
      load_floats(c, cosine + place(first_pair + i));
      load_floats(s, sine + place(first_pair + i));
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        float &x = a[(i + j) * stride], &y = b[(i + j) * stride];
        const float old = x;
        x = __fsub_rn(__fmul_rn(old, c[j]), __fmul_rn(y, s[j]));
        y = __fadd_rn(__fmul_rn(y, c[j]), __fmul_rn(old, s[j]));
      }
    }
  }
};

// Columns of a row, in units of two chunks of kVector columns. Rotated pairs (i, i + pairs) come
// first: their halves are the two chunks of a unit. The remaining columns, on both sides of them,
// are split into halves, one chunk from each, so that adjacent threads read adjacent chunks. Pairs
// (2 i, 2 i + 1) lie within a chunk like the remaining columns, or are the two chunks of a unit
// (kVector 1).
template <int kVector>
struct Columns {
  // pairs: stored as units; rest: distance between the two chunks of other units
  int dim, offset, pairs, rest;
  bool neighbours;

  __device__ Columns(int dim, int offset, int pairs, bool interleaved)
      : dim(dim),
        offset(offset),
        pairs(kVector > 1 && interleaved ? 0 : pairs),
        rest(static_cast<int>(round_up((dim - 2 * this->pairs + 1) / 2, kVector))),
        neighbours(kVector == 1 && interleaved) {}

  // First column of a chunk; dim or more if there is none.
  __device__ int at(int unit, int chunk) const {
    const int i = unit * kVector;
    if (i < pairs) return offset + (neighbours ? 2 * i + chunk : i + chunk * pairs);
    if (i - pairs >= rest) return dim;
    const int other = i - pairs + chunk * rest;
    return other < offset ? other : other + 2 * pairs;
  }
};

// T: type of k, v and q; Cache: T or Float8. 2^log2_lanes threads, up to a warp, own a row, with
// kUnits units each.
template <typename T, typename Cache, int kVector, int kUnits>
__global__ void __launch_bounds__(kAppendThreads, kAppendBlocks)
    append_kernel(const __grid_constant__ AppendParams p, int log2_lanes) {
  constexpr bool kScaled = !std::is_same_v<T, Cache>;
  using Kind = AppendRow::Kind;
  const int lanes = 1 << log2_lanes, lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int64_t t = blockIdx.x;
  const AppendRow row(p, t,
                      static_cast<int>((blockIdx.y * blockDim.x + threadIdx.x) >> log2_lanes));
  const int dim = row.dim(p), turned = row.turns(p) ? static_cast<int>(p.pairs) : 0;
  const int offset = static_cast<int>(p.rope_offset);
  const Columns<kVector> columns(dim, offset, turned, p.interleaved);

  float x[kUnits][2][kVector] = {};
  const T* from = row.source<T>(p, t);
#pragma unroll
  for (int u = 0; u < kUnits; ++u)
#pragma unroll
    for (int chunk = 0; chunk < 2; ++chunk)
      if (const int c = columns.at(lane + u * lanes, chunk); c < dim)
        load_floats(x[u][chunk], from + c);
  if (p.cos) {
    __shared__ Angles angles;
    angles.load(p, p.position(t));
    __syncthreads();
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = lane + u * lanes;
      if (kVector == 1 || !p.interleaved) {
        if (unit * kVector < turned) angles.turn<kVector>(unit * kVector, x[u][0], x[u][1], 1);
      } else {
#pragma unroll
        for (int chunk = 0; chunk < 2; ++chunk)
          if (const int c = columns.at(unit, chunk) - offset; c >= 0 && c < 2 * turned)
            angles.turn<kVector == 1 ? 1 : kVector / 2>(c / 2, x[u][chunk], x[u][chunk] + 1, 2);
      }
    }
  }

  float scale = 1;
  if constexpr (kScaled) {
    const AppendedRows& a = row.kind == Kind::value ? p.v : p.k;
    float maximum = 0;
    if (a.token_scale.data) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u)
#pragma unroll
        for (int i = 0; i < 2 * kVector; ++i) {
          const float size = fabsf(x[u][i / kVector][i % kVector]);
          maximum = size <= kFloatMax ? fmaxf(maximum, size) : maximum;
        }
    }
    if (p.k.token_scale.data || p.v.token_scale.data)
      for (int offset = lanes / 2; offset > 0; offset /= 2)
        maximum = fmaxf(maximum, __shfl_xor_sync(kFullWarp, maximum, offset));
    if (row.kind == Kind::key || row.kind == Kind::value) {
      if (a.token_scale.data) {
        scale = __fdiv_rn(maximum, kFloat8Max);
        if (scale < kMinScale) scale = 1;
        if (lane == 0) *row.cached<float>(a.token_scale) = scale;
      } else if (a.scale) {
        scale = a.scale[row.head * a.scale_head];
      }
    }
  }

  const int64_t at = (t * p.query_heads + row.head) * dim;  // row in q_out
#pragma unroll
  for (int u = 0; u < kUnits; ++u)
#pragma unroll
    for (int chunk = 0; chunk < 2; ++chunk) {
      const int c = columns.at(lane + u * lanes, chunk);
      if (c >= dim) continue;
      float (&y)[kVector] = x[u][chunk];
      if (row.kind == Kind::query) {
        store_floats(static_cast<T*>(p.q_out) + at + c, y);
        continue;
      }
      if (kScaled && scale != 1)
#pragma unroll
        for (int i = 0; i < kVector; ++i) y[i] = __fdiv_rn(y[i], scale);
      store_floats(row.cached<Cache>(row.kind == Kind::value ? p.v.cache : p.k.cache) + c, y);
    }
}

}  // namespace tokenmill::cuda::kv_cache_append
