// Few rows against all keys: exponents of blocks of keys, sums of each row, results of blocks of
// keys. Keys are read once.
#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "select/attention_row_scores/params.h"
#include "select/cpu_rows.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kKeyBlock = 512;  // of a worker; a multiple of kPanel

// Exponents, in bits, of kRows rows at q and the panel at hand.
template <class Op, int kRows>
__attribute__((noinline)) void row_tile(const float* q, int64_t ld, const float* panel,
                                        int64_t words, float factor, float (*to)[kPanel],
                                        int64_t rows) {
  vf t[kRows][kTileVectors];
  clear(t);
  multiply<Op, false>(t, q, ld, panel, kPanel, words);
  for (int64_t m = 0; m < lower(kRows, rows); ++m)
    for (int n = 0; n < kTileVectors; ++n) store(to[m] + n * kWidth, t[m][n] * set(factor));
}

// Exponents of keys j .. of one key head, for all rows of its group.
template <class Op>
void find_exponents(const RowScoresParams& p, int64_t b, int64_t kv_head, int64_t j,
                    cpu::Workspace& workspace) {
  const int64_t group = p.heads / p.kv_heads, rows = group * p.rows;
  const int64_t words = words_of<Op>(p.head_dim), ld = round_up(words, kWidth);
  float* q = workspace.take(round_up(rows, kTileRows) * ld);
  float* panel = workspace.take(words * kPanel);
  for (int64_t g = 0; g < group; ++g)
    pack_rows<Op>(row_of(p.q, p.dtype, b, 0, kv_head * group + g), p.dtype, p.q.seq, p.rows, p.rows,
                  p.head_dim, 1, q + g * p.rows * ld, ld);
  for (int64_t i = rows * ld; i < round_up(rows, kTileRows) * ld; ++i) q[i] = 0;
  const int64_t length = p.length(b), end = lower(j + kKeyBlock, length);
  for (; j < end; j += kPanel) {
    const int64_t keys = lower(kPanel, end - j);
    pack_transposed<Op>(row_of(p.k, p.dtype, b, j, kv_head), p.dtype, p.k.seq, keys, p.head_dim, 1,
                        panel);
    each_tile(rows, [&](int64_t r, auto tile) {
      float t[tile][kPanel];
      row_tile<Op, tile>(q + r * ld, ld, panel, words, p.scale * kLog2e, t, rows - r);
      for (int64_t m = 0; m < lower(tile, rows - r); ++m) {
        float* to = p.exponents + ((b * p.heads + kv_head * group) * p.rows + r + m) * p.seqlen_k;
        for (int64_t c = 0; c < keys; ++c) to[j + c] = t[m][c];
      }
    });
  }
}

// Replaces the exponents of a row by weights P.
template <bool kCoarse>
void finish_row(const RowScoresParams& p, int64_t b, int64_t h, int64_t r) {
  const int64_t end = p.end(r, p.length(b));
  float* t = p.exponents + ((b * p.heads + h) * p.rows + r) * p.seqlen_k;
  float pivot = 0, weight = 1;
  if (p.lse) {
    const float lse = p.lse[b * p.lse_batch + h * p.lse_head + r];
    pivot = lse == -kInf ? kInf : lse * kLog2e;
  } else {
    vf top = set(kLowest);
    for (int64_t j = 0; j < end; j += kWidth)
      top = max_of(top, select(lanes(0, end - j), load_as_float_n(t, DType::float32, j, end - j),
                               set(kLowest)));
    pivot = max_lanes(top);
  }
  // Sums of 256 keys from zero: a second level of accumulation.
  double total = 0;
  vf sum = zero();
  for (int64_t j = 0; j < p.seqlen_k; j += kWidth) {
    const int64_t there = p.seqlen_k - j;
    const vf x = power<kCoarse>(load_as_float_n(t, DType::float32, j, there) - set(pivot));
    const vf e = select(lanes(0, end - j), x, zero());
    store_from_float_n(t, DType::float32, j, e, there);
    sum = sum + e;
    if (j % 256 == 0) total += sum_lanes(sum), sum = zero();
  }
  if (p.lse) return;
  total += sum_lanes(sum);
  weight = total == 0 ? 0 : static_cast<float>(1 / total);
  for (int64_t j = 0; j < end; j += kWidth)
    store_from_float_n(t, DType::float32, j,
                       load_as_float_n(t, DType::float32, j, end - j) * set(weight), end - j);
}

// Results of keys j .. of one request, of all heads and rows.
void reduce_rows(const RowScoresParams& p, int64_t b, int64_t first) {
  const int64_t rows = p.heads * p.rows, wanted = p.seqlen_k - p.skip;
  const float* weights = p.exponents + b * rows * p.seqlen_k + p.skip;
  for (int64_t j = first; j < lower(first + kKeyBlock, wanted); j += kWidth) {
    const int64_t there = wanted - j;
    vf score = zero();
    for (int64_t r = 0; r < rows; ++r) {
      const vf w = load_as_float_n(weights + r * p.seqlen_k, DType::float32, j, there);
      if (p.reduce == RowReduce::none)
        store_from_float_n(p.out + (b * rows + r) * wanted, DType::float32, j, w, there);
      else
        score = p.reduce == RowReduce::max ? max_of(score, w) : score + w;
    }
    if (p.reduce == RowReduce::none) continue;
    if (p.reduce == RowReduce::mean) score = score * set(1 / static_cast<float>(rows));
    store_from_float_n(p.out + b * wanted, DType::float32, j, score, there);
  }
}

template <class Op, bool kCoarse>
void row_scores(const RowScoresParams& p) {
  const double work = static_cast<double>(p.batch * p.heads * p.rows) *
                      static_cast<double>(p.seqlen_k * p.head_dim);
  const int threads = work < 5e5 ? 1 : cpu::num_threads();
  const int64_t blocks = ceil_div(p.seqlen_k, kKeyBlock), rows = p.heads * p.rows;
  const auto each = [&](int64_t items, const auto& run) {
    cpu::parallel_items(items, threads, [&](cpu::ItemCounter& counter) {
      FlushDenormals flush;
      for (int64_t item; (item = counter.next()) >= 0;) run(item);
    });
  };
  const int64_t ld = round_up(words_of<Op>(p.head_dim), kWidth);
  const int64_t floats = round_up(rows / p.kv_heads, kTileRows) * ld + ld * kPanel + 2 * 16;
  each(p.batch * p.kv_heads * blocks, [&](int64_t item) {
    cpu::Workspace workspace(floats);
    find_exponents<Op>(p, item / blocks / p.kv_heads, item / blocks % p.kv_heads,
                       item % blocks * kKeyBlock, workspace);
  });
  each(p.batch * rows, [&](int64_t item) {
    finish_row<kCoarse>(p, item / rows, item % rows / p.rows, item % p.rows);
  });
  each(p.batch * blocks,
       [&](int64_t item) { reduce_rows(p, item / blocks, item % blocks * kKeyBlock); });
}

}  // namespace

void attention_row_scores(const RowScoresParams& p) {
#if defined(__AVX512BF16__)
  if (p.dtype == DType::bfloat16) return row_scores<BFloat16, true>(p);
#endif
  p.dtype == DType::float32 ? row_scores<Float32, false>(p) : row_scores<Float32, true>(p);
}

}  // namespace tokenmill::TOKENMILL_ISA
