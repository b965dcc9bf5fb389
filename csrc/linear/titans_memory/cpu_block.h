// Per-block operands of the forward and backward CPU kernels: loads, factors of gates, and products
// over register tiles.
#pragma once
#include <algorithm>
#include <cstring>

#include "cpu/tile.h"
#include "cpu/workspace.h"
#include "linear/titans_memory/blocks.h"

namespace tokenmill::TOKENMILL_ISA {

constexpr int64_t kBlock = 64;  // tokens
// rows of an operand: the last tile may extend past the block
constexpr int64_t kRows = kBlock + kTileRows;
constexpr int kFewRows = 4;

constexpr int64_t rows_of_tile(int64_t left) {
  if (left == 1) return 1;
  return left <= kFewRows || (left > kTileRows && left <= 2 * kFewRows) ? kFewRows : kTileRows;
}

// Calls fn.template operator()<M>(row) for each tile of `rows` rows, which may extend past them.
template <typename Fn>
TM_INLINE void each_tile(int64_t rows, const Fn& fn) {
  for (int64_t row = 0, step; row < rows; row += step) {
    step = rows_of_tile(rows - row);
    if (step == kTileRows)
      fn.template operator()<kTileRows>(row);
    else if (step == 1)
      fn.template operator()<1>(row);
    else
      fn.template operator()<kFewRows>(row);
  }
}

struct Matrix {
  float* data;
  int64_t ld;
  float* row(int64_t i) const { return data + i * ld; }
};

// C[rows, width] = or += A B over `words`; transposed: A^T B.
template <bool kTransposed, bool kAssign>
inline void product(const Matrix& c, int64_t rows, const Matrix& a, const Matrix& b, int64_t words,
                    int64_t width) {
  each_tile(rows, [&]<int M>(int64_t row) TM_LAMBDA {
    multiply_rows<Float32, kTransposed, M, kAssign>(c.row(row), c.ld,
                                                    kTransposed ? a.data + row : a.row(row), a.ld,
                                                    b.data, b.ld, words, width);
  });
}

// C += A B with a lower-triangular A [n, n]: a weight of 0 masks its row of B.
inline void product_lower(const Matrix& c, int64_t n, const Matrix& a, const Matrix& b,
                          int64_t width) {
  each_tile(n, [&]<int M>(int64_t row) TM_LAMBDA {
    multiply_rows<Float32, false, M, false, true>(c.row(row), c.ld, a.row(row), a.ld, b.data, b.ld,
                                                  std::min(row + M, n), width);
  });
}

// C = or += A^T B with a lower-triangular A [n, n].
template <bool kAssign>
inline void product_upper(const Matrix& c, int64_t n, const Matrix& a, const Matrix& b,
                          int64_t width) {
  each_tile(n, [&]<int M>(int64_t row) TM_LAMBDA {
    multiply_rows<Float32, true, M, kAssign>(c.row(row), c.ld, a.row(row) + row, a.ld, b.row(row),
                                             b.ld, n - row, width);
  });
}

// Lower triangle of C [n, n] = A B, including the padding to whole vectors.
inline void product_pairs(const Matrix& c, int64_t n, const Matrix& a, const Matrix& b,
                          int64_t words) {
  each_tile(n, [&]<int M>(int64_t row) TM_LAMBDA {
    multiply_rows<Float32, false, M, true>(c.row(row), c.ld, a.row(row), a.ld, b.data, b.ld, words,
                                           std::min(round_up(row + M, kWidth), kBlock));
  });
}

// to [columns][rows rounded up to vectors] = transpose of from [rows][columns].
inline void transpose_into(const Matrix& to, const Matrix& from, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += kWidth)
    for (int64_t c = 0; c < columns; c += kWidth) {
      vf block[kWidth];
      TM_UNROLL(16)
      for (int i = 0; i < kWidth; ++i) block[i] = r + i < rows ? load(from.row(r + i) + c) : zero();
      transpose(block);
      TM_UNROLL(16)
      for (int i = 0; i < kWidth; ++i)
        if (c + i < columns) store(to.row(c + i) + r, block[i]);
    }
}

// Row i of `to` = factors[i] times row i of `from`.
inline void scale_rows(const Matrix& to, const Matrix& from, const float* factors, int64_t rows,
                       int64_t width) {
  for (int64_t i = 0; i < rows; ++i) {
    const vf factor = set(factors[i]);
    for (int64_t c = 0; c < width; c += kWidth)
      store(to.row(i) + c, load(from.row(i) + c) * factor);
  }
}

struct Gates {
  float decay[kBlock], eta[kBlock], theta[kBlock];

  void read(const TitansParams& p, int64_t b, int64_t h, int64_t first, int64_t n) {
    const auto at = [&](const TokenGates& g, int64_t t) TM_LAMBDA {
      return g.data[b * g.batch + (first + t) * g.seq + h * g.head];
    };
    for (int64_t t = 0; t < n; ++t) {
      decay[t] = 1 - at(p.alpha, t);
      eta[t] = at(p.eta, t);
      theta[t] = at(p.theta, t);
    }
  }
};

// Factors of M and S in the memory, and of S in the momentum, after each token; the factors of the
// gradients are separate rows of W and E.
struct Factors {
  float memory[kBlock], momentum[kBlock], kept[kBlock];
};

// Rows of W and E without their first two columns: [n][kBlock] with kAll, else only the last row.
template <bool kAll>
inline void weigh(const Gates& g, int64_t n, Factors& f, float* w, float* e) {
  float memory = 1, momentum = 0, kept = 1;
  for (int64_t t = 0; t < n; ++t) {
    const float a = g.decay[t], b = g.eta[t];
    kept *= b;
    momentum = a * momentum + kept;
    memory *= a;
    f.memory[t] = memory, f.momentum[t] = momentum, f.kept[t] = kept;
    float *wt = kAll ? w + t * kBlock : w, *et = kAll ? e + t * kBlock : e;
    const float *w_before = kAll ? wt - kBlock : w, *e_before = kAll ? et - kBlock : e;
    const int64_t vector = t / kWidth * kWidth, lane = t - vector;
    for (int64_t j = 0; j < vector; j += kWidth) {
      const vf ev = load(e_before + j) * set(b);
      store(et + j, ev);
      store(wt + j, fma(load(w_before + j), set(a), ev));
    }
    vf ev = zero(), wv = zero();
    if (lane > 0) {
      ev = load(e_before + vector) * set(b);
      wv = fma(load(w_before + vector), set(a), ev);
    }
    const vm earlier = lanes(0, lane), own = lanes(lane, lane + 1);
    const vf step = select(own, set(g.theta[t]), zero());
    store(et + vector, select(earlier, ev, step));
    store(wt + vector, select(earlier, wv, step));
    if (kAll || t == 0)
      for (int64_t j = vector + kWidth; j < kBlock; j += kWidth)
        store(et + j, zero()), store(wt + j, zero());
  }
}

// Negated contribution of a pair of tokens: 0 without weight, even if the product is not finite.
TM_INLINE vf negative_product(vf weight, vf x) {
  return select(equal(weight, zero()), zero(), zero() - weight * x);
}

struct Sequence {
  int64_t start, length;
  Sequence(const TitansParams& p, int64_t b)
      : start(p.cu_seqlens ? p.cu_seqlens[b] : 0),
        length(p.cu_seqlens ? p.cu_seqlens[b + 1] - p.cu_seqlens[b] : p.seqlen) {}
};

TM_INLINE char* row_of(const Rows& r, DType t, int64_t b, int64_t token, int64_t h) {
  return static_cast<char*>(r.data) +
         (b * r.batch + token * r.seq + h * r.head) * (t == DType::float32 ? 4 : 2);
}

// Prefetches rows of a head: they are far apart, which hardware prefetchers do not follow.
template <bool kWrite = false>
inline void ask_for(const Rows& r, DType t, int64_t b, int64_t token, int64_t h, int64_t rows,
                    int64_t length) {
  const int64_t size = t == DType::float32 ? 4 : 2;
  const char* const first = row_of(r, t, b, token, h);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < length * size; c += 64)
      __builtin_prefetch(first + i * r.seq * size + c, kWrite, 2);
}

// Copies a state in memory, whose rows are contiguous, to rows of `to`.
inline void load_state(const Matrix& to, const States& from, int64_t b, int64_t h, int64_t rows,
                       int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    std::memset(to.row(r), 0, to.ld * sizeof(float));
    if (from.data)
      std::memcpy(to.row(r), from.data + b * from.sequence + h * from.head + r * columns,
                  columns * sizeof(float));
  }
}
inline void store_state(const States& to, const Matrix& from, int64_t b, int64_t h, int64_t rows,
                        int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(to.data + b * to.sequence + h * to.head + r * columns, from.row(r),
                columns * sizeof(float));
}

}  // namespace tokenmill::TOKENMILL_ISA
