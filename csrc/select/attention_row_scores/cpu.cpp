// Few query rows against all keys: exponents per block of keys, sums per row, results per block of
// keys. Keys are read once.
#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "select/attention_row_scores/params.h"
#include "select/cpu_rows.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kKeyBlock = 256;  // keys per item; a multiple of kWidth

// Dot products of one row and kWidth keys.
template <class E>
TM_INLINE vf dot_keys(const float* q, const E& e, const typename E::type* const (&keys)[kWidth],
                      int64_t dim) {
  vf sums[kWidth] = {};
  for (int64_t d = 0; d < dim; d += kWidth) {
    const vf x = load(q + d);
    TM_UNROLL(16)
    for (int i = 0; i < kWidth; ++i) sums[i] = fma(e.load_n(keys[i], d, dim - d), x, sums[i]);
  }
  transpose(sums);
  TM_UNROLL(4)
  for (int step = kWidth / 2; step > 0; step /= 2) {
    TM_UNROLL(8)
    for (int i = 0; i < step; ++i) sums[i] = sums[i] + sums[i + step];
  }
  return sums[0];
}

// Log2-unit exponents of keys from j on, for all heads and rows, so that adjacent memory is read
// together. q holds the rows [H, R] as floats times the scale.
void find_exponents(const RowScoresParams& p, int64_t b, int64_t j, const float* q, int64_t ld) {
  const int64_t group = p.heads / p.kv_heads, length = p.length(b);
  visit_elements(p.dtype, [&](auto e) TM_LAMBDA {
    using T = typename decltype(e)::type;
    for (const int64_t end = lower(j + kKeyBlock, length); j < end; j += kWidth)
      for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head) {
        const T* keys[kWidth];
        for (int i = 0; i < kWidth; ++i)
          keys[i] = reinterpret_cast<const T*>(
              row_of(p.k, p.dtype, b, lower(j + i, length - 1), kv_head));
        for (int64_t r = kv_head * group * p.rows; r < (kv_head + 1) * group * p.rows; ++r)
          store_from_float_n(p.exponents + (b * p.heads * p.rows + r) * p.seqlen_k, DType::float32,
                             j, dot_keys(q + r * ld, e, keys, p.head_dim), end - j);
      }
  });
}

// Replaces the exponents of a row by weights P.
template <bool kCoarse>
void weigh_row(const RowScoresParams& p, int64_t b, int64_t h, int64_t r) {
  const int64_t end = p.end(r, p.length(b));
  float* t = p.exponents + ((b * p.heads + h) * p.rows + r) * p.seqlen_k;
  float row_max = 0, weight = 1;
  if (p.lse) {
    const float lse = p.lse[b * p.lse_batch + h * p.lse_head + r];
    row_max = lse == -kInf ? kInf : lse * kLog2e;
  } else {
    vf top = set(kLowest);
    for (int64_t j = 0; j < end; j += kWidth)
      top = max_of(top, select(lanes(0, end - j), load_as_float_n(t, DType::float32, j, end - j),
                               set(kLowest)));
    row_max = max_lanes(top);
  }
  // Sums of 256 keys from zero: a second level of accumulation.
  double total = 0;
  vf sum = zero();
  for (int64_t j = 0; j < p.seqlen_k; j += kWidth) {
    const int64_t there = p.seqlen_k - j;
    const vf x = power<kCoarse>(load_as_float_n(t, DType::float32, j, there) - set(row_max));
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

// Position of a row's largest exponent, the first of equal ones. NaN counts as +inf.
void find_largest(const RowScoresParams& p, int64_t b, int64_t h, int64_t r) {
  const int64_t row = (b * p.heads + h) * p.rows + r;
  const int64_t end = p.gives_nothing(b, h, r) ? 0 : p.end(r, p.length(b));
  const float* t = p.exponents + row * p.seqlen_k;
  int64_t best = -1;
  float top = -kInf;
  for (int64_t j = p.skip; j < end; ++j) {
    const float x = t[j] == t[j] ? t[j] : kInf;
    if (best < 0 || x > top) best = j, top = x;
  }
  p.largest[row] = static_cast<int32_t>(best);
}

// Results of keys j .. of one request, over all heads and rows.
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
    if (p.reduce == RowReduce::mean) score = score * set(1.f / static_cast<float>(rows));
    store_from_float_n(p.out + b * wanted, DType::float32, j, score, there);
  }
}

template <bool kCoarse>
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
  const int64_t ld = round_up(p.head_dim, kWidth);
  cpu::Workspace workspace(p.batch * rows * ld);
  float* q = workspace.take(p.batch * rows * ld);
  for (int64_t bh = 0; bh < p.batch * p.heads; ++bh)
    pack_rows<Float32>(row_of(p.q, p.dtype, bh / p.heads, 0, bh % p.heads), p.dtype, p.q.seq,
                       p.rows, p.rows, p.head_dim, p.factor(kLog2e), q + bh * p.rows * ld, ld);
  each(p.batch * blocks, [&](int64_t item) {
    const int64_t b = item / blocks;
    find_exponents(p, b, item % blocks * kKeyBlock, q + b * rows * ld, ld);
  });
  if (p.reduce == RowReduce::argmax)
    return each(p.batch * rows, [&](int64_t item) {
      find_largest(p, item / rows, item % rows / p.rows, item % p.rows);
    });
  each(p.batch * rows, [&](int64_t item) {
    weigh_row<kCoarse>(p, item / rows, item % rows / p.rows, item % p.rows);
  });
  each(p.batch * blocks,
       [&](int64_t item) { reduce_rows(p, item / blocks, item % blocks * kKeyBlock); });
}

}  // namespace

void attention_row_scores(const RowScoresParams& p) {
  p.dtype == DType::float32 ? row_scores<false>(p) : row_scores<true>(p);
}

}  // namespace tokenmill::TOKENMILL_ISA
