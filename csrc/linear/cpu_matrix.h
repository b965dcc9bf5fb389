// Blocks of tokens of one head as float32 matrices, for the CPU kernels of recurrences whose state
// is a matrix: loads, products over register tiles, stores.
#pragma once
#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/tile.h"
#include "cpu/workspace.h"
#include "linear/params.h"

namespace tokenmill::TOKENMILL_ISA {

constexpr int64_t kBlock = 64;  // tokens
// rows of an operand: the last tile may extend past the block
constexpr int64_t kRows = kBlock + kTileRows;
constexpr int kFewRows = 4;

constexpr int64_t rows_of_tile(int64_t left) {
  if (left == 1) return 1;
  return left <= kFewRows || (left > kTileRows && left <= 2 * kFewRows) ? kFewRows : kTileRows;
}

// Calls fn.template operator()<M>(row) with M rows, a result of rows_of_tile.
template <typename Fn>
TM_INLINE void with_rows(int64_t rows, int64_t row, const Fn& fn) {
  if (rows == kTileRows)
    fn.template operator()<kTileRows>(row);
  else if (rows == 1)
    fn.template operator()<1>(row);
  else
    fn.template operator()<kFewRows>(row);
}

// The same for each tile of `rows` rows, which may extend past them.
template <typename Fn>
TM_INLINE void each_tile(int64_t rows, const Fn& fn) {
  for (int64_t row = 0, step; row < rows; row += step) {
    step = rows_of_tile(rows - row);
    with_rows(step, row, fn);
  }
}

// The same from the last of at most kBlock rows to the first.
template <typename Fn>
TM_INLINE void each_tile_backward(int64_t rows, const Fn& fn) {
  int64_t steps[kBlock], tiles = 0, row = 0;
  for (; row < rows; row += steps[tiles++]) steps[tiles] = rows_of_tile(rows - row);
  while (tiles > 0) {
    row -= steps[--tiles];
    with_rows(steps[tiles], row, fn);
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

// Tokens of a sequence of a call.
struct Sequence {
  int64_t start, length;
  template <typename Params>
  Sequence(const Params& p, int64_t b)
      : start(p.cu_seqlens ? p.cu_seqlens[b] : 0),
        length(p.cu_seqlens ? p.cu_seqlens[b + 1] - p.cu_seqlens[b] : p.seqlen) {}
};

template <typename Params>
int64_t longest_sequence(const Params& p) {
  int64_t found = 0;
  for (int64_t b = 0; b < p.batch; ++b) found = std::max(found, Sequence(p, b).length);
  return found;
}

// Runs `items` items of a call on a Worker per thread. p has the sizes of the call; operations: for
// each element of a state, token and head.
template <typename Worker, typename Params, typename Call>
void run_items(const Params& p, const Call& call, int64_t items, double operations) {
  const int64_t tokens = p.cu_seqlens ? p.seqlen : p.batch * p.seqlen;
  // A parallel region costs about as much as 2 Mflop on one thread.
  const double work = operations * static_cast<double>(tokens * p.heads) *
                      static_cast<double>(p.head_dim * p.value_dim);
  const int threads = work < 2e6 ? 1 : cpu::num_threads();
  cpu::parallel_items(items, threads, [&](cpu::ItemCounter& counter) {
    FlushDenormals flush;
    Worker worker(call);
    for (int64_t item; (item = counter.next()) >= 0;) worker.run(item);
  });
}

TM_INLINE char* row_of(const Rows& r, DType t, int64_t b, int64_t token, int64_t h) {
  return static_cast<char*>(r.data) +
         (b * r.batch + token * r.seq + h * r.head) * (t == DType::float32 ? 4 : 2);
}

// Prefetches rows, `stride` bytes apart: hardware prefetchers do not follow rows of a head.
template <bool kWrite = false>
inline void ask_for(const void* first, int64_t stride, int64_t rows, int64_t bytes) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < bytes; c += 64)
      __builtin_prefetch(static_cast<const char*>(first) + i * stride + c, kWrite, 2);
}
template <bool kWrite = false>
inline void ask_for(const Rows& r, DType t, int64_t b, int64_t token, int64_t h, int64_t rows,
                    int64_t length) {
  const int64_t size = t == DType::float32 ? 4 : 2;
  ask_for<kWrite>(row_of(r, t, b, token, h), r.seq * size, rows, length * size);
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
