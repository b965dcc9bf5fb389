// Two passes over S, whose tiles stay in registers. The first, used without lse, computes row_max
// and row_sum: a worker owns rows and streams the keys past them. The second accumulates weights
// per key: a worker owns keys and streams the rows.
#include <cstring>

#include "cpu/gumbel.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "select/attention_column_scores/params.h"
#include "select/cpu_rows.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kKeyBlock = 256;   // keys per item of the second pass; a multiple of kPanel
constexpr int64_t kRowBlock = 48;    // rows packed at once; a multiple of kTileRows
constexpr int64_t kOwnedRows = 192;  // rows per item of the first pass, over all heads of a group
// Log2-unit exponents of one head of one request: scale q.k, or (scale q.k + noise) / tau.
struct Head {
  const ColumnScoresParams& p;
  ColumnScoresRequest request;
  int64_t b, h;
  float factor;

  Head(const ColumnScoresParams& p, int64_t b, int64_t h)
      : p(p),
        request(p, b),
        b(b),
        h(h),
        factor(p.scale * kLog2e * (p.inverse_tau > 0 ? p.inverse_tau : 1)) {}

  const char* query(int64_t i) const { return row_of(p.q, p.dtype, b, i, h); }
  const char* key(int64_t j) const { return row_of(p.k, p.dtype, b, j, h * p.kv_heads / p.heads); }

  // Packs query rows as A operand. Pairs of bfloat16 cannot include the factor.
  template <class Op>
  void pack_queries(int64_t i, int64_t rows, float* to, int64_t ld) const {
    pack_rows<Op>(query(i), p.dtype, p.q.seq, rows, round_up(rows, kTileRows), p.head_dim,
                  Op::kPair == 1 ? factor : 1, to, ld);
  }

  // Exponents of kRows queries from i on (at q) and the panel of keys from j on.
  template <class Op, bool kNoise, int kRows>
  TM_INLINE void exponents(vf (&t)[kRows][kTileVectors], int64_t i, const float* q, int64_t ld,
                           int64_t j, const float* panel, int64_t words) const {
    clear(t);
    multiply<Op, false>(t, q, ld, panel, kPanel, words);
    if constexpr (Op::kPair != 1) {
      TM_UNROLL(8)
      for (int m = 0; m < kRows; ++m) {
        TM_UNROLL(4)
        for (int n = 0; n < kTileVectors; ++n) t[m][n] = t[m][n] * set(factor);
      }
    }
    if constexpr (kNoise) {
      for (int m = 0; m < kRows; ++m)
        for (int n = 0; n < kTileVectors; ++n) {
          const auto position = static_cast<uint32_t>(i + m + request.diagonal);
          const vu words = philox(p.seed, static_cast<uint32_t>(b), static_cast<uint32_t>(h),
                                  position, static_cast<uint32_t>(j + n * kWidth));
          t[m][n] = fma(gumbel_bits(words), set(p.inverse_tau), t[m][n]);
        }
    }
  }

  // Writes `hidden` where a query does not see a key.
  template <int kRows>
  TM_INLINE void hide(vf (&x)[kRows][kTileVectors], int64_t i, int64_t j, vf hidden) const {
    if (j + kPanel <= request.column_end(i) && i + kRows <= request.rows) [[likely]]
      return;
    TM_UNROLL(8)
    for (int m = 0; m < kRows; ++m) {
      const int64_t end = i + m < request.rows ? request.column_end(i + m) - j : 0;
      TM_UNROLL(4)
      for (int n = 0; n < kTileVectors; ++n)
        x[m][n] = select(lanes(0, end - n * kWidth), x[m][n], hidden);
    }
  }
};

// P = 2^(t - row_max) weight.
struct Statistics {
  float *row_max, *weight;  // [B, H, Sq]

  void set_row(int64_t at, float top, float sum) const {
    // no exponent exceeds +inf: P = 0
    row_max[at] = sum == 0 ? kInf : top;
    weight[at] = sum == 0 ? 0 : 1 / sum;
  }
};

// Adds a panel to row_max and row_sum, kept as kWidth partial results per row.
template <class Op, bool kCoarse, bool kNoise, int kRows>
__attribute__((noinline)) void add_to_rows(const Head& head, int64_t i, const float* q, int64_t ld,
                                           int64_t j, const float* panel, int64_t words,
                                           float* tops, float* sums) {
  vf t[kRows][kTileVectors];
  head.exponents<Op, kNoise, kRows>(t, i, q, ld, j, panel, words);
  head.hide(t, i, j, set(-kInf));
  TM_UNROLL(8)
  for (int m = 0; m < kRows; ++m) {
    const vf old = load(tops + m * kWidth);
    vf top = old;
    TM_UNROLL(4)
    for (int n = 0; n < kTileVectors; ++n) top = max_of(top, t[m][n]);
    // 2^0 is not exactly 1 (cpu/simd.h), and the error would accumulate.
    const vf rescale = select(less(old, top), power<kCoarse>(old - top), set(1.f));
    vf sum = load(sums + m * kWidth) * rescale;
    TM_UNROLL(4)
    for (int n = 0; n < kTileVectors; ++n) sum = sum + power<kCoarse>(t[m][n] - top);
    store(tops + m * kWidth, top);
    store(sums + m * kWidth, sum);
  }
}

template <class Op, bool kCoarse, bool kNoise>
void find_statistics(const ColumnScoresParams& p, const Statistics& to, int threads) {
  const int64_t group = p.heads / p.kv_heads;
  const int64_t owned = round_up(ceil_div(kOwnedRows, group), kTileRows);
  const int64_t blocks = ceil_div(p.window_queries, owned);
  const int64_t words = words_of<Op>(p.head_dim), ld = round_up(words, kWidth);
  cpu::parallel_items(p.batch * p.kv_heads * blocks, threads, [&](cpu::ItemCounter& items) {
    FlushDenormals flush;
    cpu::Workspace workspace(group * owned * (ld + 2 * kWidth) + words * kPanel + 4 * 16);
    float* q = workspace.take(group * owned * ld);
    float* tops = workspace.take(group * owned * kWidth);
    float* sums = workspace.take(group * owned * kWidth);
    float* panel = workspace.take(words * kPanel);
    for (int64_t item; (item = items.next()) >= 0;) {
      const int64_t kv_head = item / blocks % p.kv_heads, b = item / blocks / p.kv_heads;
      const ColumnScoresRequest request(p, b);
      const int64_t first = request.first_row + item % blocks * owned;
      const int64_t rows = lower(owned, request.rows - first);
      if (rows <= 0) continue;
      for (int64_t g = 0; g < group; ++g)
        Head(p, b, kv_head * group + g).pack_queries<Op>(first, rows, q + g * owned * ld, ld);
      for (int64_t i = 0; i < group * owned * kWidth; ++i) tops[i] = kLowest, sums[i] = 0;
      const int64_t end = request.column_end(first + rows - 1);
      for (int64_t j = 0; j < end; j += kPanel) {
        const Head keys(p, b, kv_head * group);
        pack_transposed<Op>(keys.key(j), p.dtype, p.k.seq, lower(kPanel, request.columns - j),
                            p.head_dim, 1, panel);
        for (int64_t g = 0; g < group; ++g) {
          const Head head(p, b, kv_head * group + g);
          each_tile(rows, [&](int64_t r, auto count) {
            const int64_t at = g * owned + r;
            if (request.column_end(first + r + count - 1) > j)
              add_to_rows<Op, kCoarse, kNoise, count>(head, first + r, q + at * ld, ld, j, panel,
                                                      words, tops + at * kWidth,
                                                      sums + at * kWidth);
          });
        }
      }
      for (int64_t g = 0; g < group; ++g)
        for (int64_t r = 0; r < rows; ++r) {
          const vf top = load(tops + (g * owned + r) * kWidth);
          const float maximum = max_lanes(top);
          const float sum =
              sum_lanes(load(sums + (g * owned + r) * kWidth) * exp2<5>(top - set(maximum)));
          to.set_row((b * p.heads + kv_head * group + g) * p.seqlen_q + first + r, maximum, sum);
        }
    }
  });
}

void read_statistics(const ColumnScoresParams& p, const Statistics& to) {
  for (int64_t bh = 0; bh < p.batch * p.heads; ++bh) {
    const float* lse = p.lse + bh / p.heads * p.lse_batch + bh % p.heads * p.lse_head;
    for (int64_t i = 0; i < p.seqlen_q; ++i)
      to.set_row(bh * p.seqlen_q + i, lse[i] * kLog2e, lse[i] == -kInf ? 0.f : 1.f);
  }
}

// Adds the weights of kRows rows to the column sums of a panel.
template <class Op, bool kCoarse, bool kNoise, int kRows>
__attribute__((noinline)) void add_to_columns(const Head& head, int64_t i, const float* q,
                                              int64_t ld, int64_t j, const float* panel,
                                              int64_t words, const float* row_max,
                                              const float* weight, float* sums) {
  vf t[kRows][kTileVectors];
  head.exponents<Op, kNoise, kRows>(t, i, q, ld, j, panel, words);
  TM_UNROLL(8)
  for (int m = 0; m < kRows; ++m) {
    TM_UNROLL(4)
    for (int n = 0; n < kTileVectors; ++n)
      t[m][n] = power<kCoarse>(t[m][n] - set(row_max[m])) * set(weight[m]);
  }
  head.hide(t, i, j, zero());  // also replaces the NaN of pairs in which the row does not exist
  TM_UNROLL(4)
  for (int n = 0; n < kTileVectors; ++n) {
    vf sum = t[0][n];
    TM_UNROLL(8)
    for (int m = 1; m < kRows; ++m) sum = sum + t[m][n];
    store(sums + n * kWidth, load(sums + n * kWidth) + sum);
  }
}

// Packed keys of one worker, and the rows that stream past them.
template <class Op, bool kCoarse, bool kNoise>
struct ColumnWorker {
  const ColumnScoresParams& p;
  const Statistics& statistics;
  int64_t words, ld;
  cpu::Workspace workspace;
  float *keys, *q, *row_max, *weight, *block, *column;

  ColumnWorker(const ColumnScoresParams& p, const Statistics& statistics)
      : p(p),
        statistics(statistics),
        words(words_of<Op>(p.head_dim)),
        ld(round_up(words, kWidth)),
        workspace(kKeyBlock * (words + 2) + kRowBlock * (ld + 2) + 6 * 16) {
    keys = workspace.take(kKeyBlock * words);
    q = workspace.take(kRowBlock * ld);
    row_max = workspace.take(kRowBlock);
    weight = workspace.take(kRowBlock);
    block = workspace.take(kKeyBlock);
    column = workspace.take(kKeyBlock);
  }

  // Column sums of keys j .. j + count - 1 for one head, in `column`.
  void add_head(const Head& head, int64_t j, int64_t count) {
    const ColumnScoresRequest& request = head.request;
    std::memset(column, 0, kKeyBlock * sizeof(float));
    for (int64_t i = request.row_begin(j); i < request.rows; i += kRowBlock) {
      const int64_t rows = lower(kRowBlock, request.rows - i);
      head.pack_queries<Op>(i, rows, q, ld);
      const int64_t at = (head.b * p.heads + head.h) * p.seqlen_q + i;
      for (int64_t r = 0; r < kRowBlock; ++r) {  // P = 0 for nonexistent rows
        row_max[r] = r < rows ? statistics.row_max[at + r] : kInf;
        weight[r] = r < rows ? statistics.weight[at + r] : 0;
      }
      std::memset(block, 0, kKeyBlock * sizeof(float));
      for (int64_t c = 0; c < count; c += kPanel)
        each_tile(rows, [&](int64_t r, auto tile) {
          if (request.column_end(i + r + tile - 1) > j + c)
            add_to_columns<Op, kCoarse, kNoise, tile>(head, i + r, q + r * ld, ld, j + c,
                                                      keys + c * words, words, row_max + r,
                                                      weight + r, block + c);
        });
      for (int64_t c = 0; c < kKeyBlock; c += kWidth)
        store(column + c, load(column + c) + load(block + c));
    }
  }

  void run(int64_t b, int64_t kv_head, int64_t j) {
    const int64_t group = p.heads / p.kv_heads;
    const int64_t there = lower(kKeyBlock, p.seqlen_k - j);
    const ColumnScoresRequest request(p, b);
    const int64_t count = lower(kKeyBlock, request.columns - j);
    for (int64_t c = 0; c < count; c += kPanel)
      pack_transposed<Op>(row_of(p.k, p.dtype, b, j + c, kv_head), p.dtype, p.k.seq,
                          lower(kPanel, request.columns - j - c), p.head_dim, 1, keys + c * words);
    const bool together = p.head_reduce != HeadReduce::none;
    for (int64_t g = 0; g < group; ++g) {
      const int64_t h = kv_head * group + g;
      float* out = p.out + (together ? b * p.kv_heads + kv_head : b * p.heads + h) * p.seqlen_k + j;
      if (count > 0) add_head(Head(p, b, h), j, count);
      for (int64_t c = 0; c < there; ++c) {
        const float score =
            c < count ? column[c] / static_cast<float>(request.divisor(p.reduce, j + c)) : 0;
        if (!together || g == 0)
          out[c] = score;
        else if (p.head_reduce == HeadReduce::group_mean)
          out[c] += score;
        else
          out[c] = score > out[c] || score != score ? score : out[c];
        if (p.head_reduce == HeadReduce::group_mean && g == group - 1)
          out[c] /= static_cast<float>(group);
      }
    }
  }
};

template <class Op, bool kCoarse, bool kNoise>
void column_scores(const ColumnScoresParams& p) {
  const double pairs =
      static_cast<double>(p.window_queries) * static_cast<double>(p.seqlen_k * p.heads);
  const int threads =
      pairs * static_cast<double>(p.batch * p.head_dim) < 5e5 ? 1 : cpu::num_threads();
  const int64_t rows = p.batch * p.heads * p.seqlen_q;
  cpu::Workspace workspace(2 * rows + 2 * 16);
  const Statistics statistics{workspace.take(rows), workspace.take(rows)};
  if (p.lse)
    read_statistics(p, statistics);
  else
    find_statistics<Op, kCoarse, kNoise>(p, statistics, threads);
  const int64_t blocks = ceil_div(p.seqlen_k, kKeyBlock);
  cpu::parallel_items(p.batch * p.kv_heads * blocks, threads, [&](cpu::ItemCounter& items) {
    FlushDenormals flush;
    ColumnWorker<Op, kCoarse, kNoise> worker(p, statistics);
    for (int64_t item; (item = items.next()) >= 0;)
      worker.run(item / blocks / p.kv_heads, item / blocks % p.kv_heads, item % blocks * kKeyBlock);
  });
}

template <class Op, bool kCoarse>
void column_scores(const ColumnScoresParams& p) {
  p.inverse_tau > 0 ? column_scores<Op, kCoarse, true>(p) : column_scores<Op, kCoarse, false>(p);
}

}  // namespace

void attention_column_scores(const ColumnScoresParams& p) {
#if defined(TM_DOTS)
  if (p.dtype == DType::bfloat16) return column_scores<BFloat16, true>(p);
#endif
  p.dtype == DType::float32 ? column_scores<Float32, false>(p) : column_scores<Float32, true>(p);
}

}  // namespace tokenmill::TOKENMILL_ISA
