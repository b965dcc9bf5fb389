// In-place softmax of each head's scores, and its sum over heads.
#pragma once
#include <algorithm>
#include <cmath>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "select/kv_block_scores/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kVoteColumns = 4096;

// Blocks that any query of the row sees, at least partly.
inline SeenRows seen_blocks(const BlockScoreParams& p, int64_t b, int64_t row) {
  const SeenRows seen = seen_rows(p, tokens_of(p, b), last_query(p, row));
  const int64_t begin = std::min(seen.begin / p.block_rows, p.blocks);
  const int64_t end = seen.end > seen.begin ? ceil_div(seen.end, p.block_rows) : 0;
  return {begin, std::clamp(end, begin, p.blocks)};
}

// NaN propagates, and is ignored in row_sum.
inline void softmax(float* z, int64_t n) {
  vf maximum = set(-__builtin_inff());
  for (int64_t i = 0; i < n; i += kWidth) {
    const vf x = Elements<DType::float32>::load_n(z, i, n - i);
    maximum = max_of(select(lanes(0, n - i), x, maximum), maximum);
  }
  const float row_max = max_lanes(maximum);
  const vf log2e = set(kLog2e), m = set(row_max);
  vf sum = zero();
  for (int64_t i = 0; i < n; i += kWidth) {
    const vf x = Elements<DType::float32>::load_n(z, i, n - i);
    const vf e = exp2<5>((x - m) * log2e);
    Elements<DType::float32>::store_n(z, i, e, n - i);
    sum = sum + select(equal(e, e), select(lanes(0, n - i), e, zero()), zero());
  }
  const float all = sum_lanes(sum);
  const vf factor = set(all > 0 ? 1 / all : 1.f);
  for (int64_t i = 0; i < n; i += kWidth)
    Elements<DType::float32>::store_n(z, i, Elements<DType::float32>::load_n(z, i, n - i) * factor,
                                      n - i);
}

inline void vote(const BlockScoreParams& p, int threads) {
  cpu::parallel_items(p.batch * p.heads * p.rows, threads, [&](cpu::ItemCounter& items) {
    FlushDenormals flush;
    for (int64_t item; (item = items.next()) >= 0;) {
      const SeenRows seen = seen_blocks(p, item / (p.heads * p.rows), item % p.rows);
      softmax(p.scores + item * p.blocks + seen.begin, seen.end - seen.begin);
    }
  });
  const int64_t pieces = ceil_div(p.blocks, kVoteColumns);
  cpu::parallel_items(p.batch * p.rows * pieces, threads, [&](cpu::ItemCounter& items) {
    for (int64_t item; (item = items.next()) >= 0;) {
      const int64_t row = item / pieces % p.rows, b = item / (pieces * p.rows);
      const int64_t first = item % pieces * kVoteColumns;
      const int64_t last = std::min(first + kVoteColumns, p.blocks);
      const SeenRows seen = seen_blocks(p, b, row);
      float* const out = p.out + (b * p.rows + row) * p.blocks;
      const int64_t begin = std::clamp(seen.begin, first, last);
      const int64_t end = std::clamp(seen.end, begin, last);
      std::fill(out + first, out + last, -__builtin_inff());
      std::fill(out + begin, out + end, 0.f);
      for (int64_t h = 0; h < p.heads; ++h) {
        const float* z = p.scores + ((b * p.heads + h) * p.rows + row) * p.blocks;
        for (int64_t j = begin; j < end; ++j) out[j] += z[j];
      }
    }
  });
}

}  // namespace
}  // namespace tokenmill::TOKENMILL_ISA
