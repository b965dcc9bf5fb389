// Rows of a, in cache as words, times panels of transposed rows of b. Products are reduced to the
// maximum per row and lane, so that their matrix is never stored.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "core/knobs.h"
#include "cpu/element_bytes.h"
#include "cpu/parallel.h"
#include "cpu/tile.h"
#include "cpu/workspace.h"
#include "tokens/best_match/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kSliceWords = 512;              // words of a reduction summed at once
constexpr int64_t kMinRows = 96, kMaxRows = 768;  // rows of a that share a panel

float factor_of(float squares) {
  if (squares < kMinSquares) return 0;
  return squares <= kMaxSquares ? 1 / std::sqrt(squares) : __builtin_nanf("");
}

// Rows of a per item: a share of the L2 cache, and fewer if there would not be items for all
// threads, at the cost of transposing b again. The result does not depend on it.
int64_t chunk_rows(const MatchParams& p, int64_t words, int threads) {
  const int64_t cached = std::clamp(knob(Knob::best_match_words) / words, kMinRows, kMaxRows);
  const int64_t shared = ceil_div(p.rows * p.batch, threads);
  const int64_t rows = std::min({cached, std::max(shared, kMinRows), p.rows});
  return round_up(rows, kTileRows);
}

template <class Op>
class Matcher {
 public:
  Matcher(const MatchParams& p, int64_t chunk)
      : p(p),
        chunk(chunk),
        words(words_of<Op>(p.channels)),
        lda(round_up(words, kWidth)),
        slice(std::min(words, kSliceWords)),
        whole(words == slice),
        element_size(element_bytes(p.dtype)),
        memory(chunk * (lda + 2 * kWidth + 1) + (whole ? kTileRows : chunk) * kPanel +
               kPanel * (slice + 1) + 6 * 16) {
    a = memory.take(chunk * lda);
    best = memory.take(chunk * kWidth);
    place = memory.take(chunk * kWidth);
    factors_a = memory.take(chunk);
    products = memory.take((whole ? kTileRows : chunk) * kPanel);
    panel = memory.take(kPanel * slice);
    factors_b = memory.take(kPanel);
  }

  void run(int64_t b, int64_t first) {
    count = std::min(chunk, p.rows - first);
    load_rows(row(p.a, b * p.a_batch + first * p.a_row));
    for (int64_t column = 0; column < p.partners; column += kPanel) match_panel(b, column);
    for (int64_t r = 0; r < count; ++r) finish(b * p.rows + first + r, r);
  }

 private:
  const char* row(const void* data, int64_t offset) const {
    return static_cast<const char*>(data) + offset * element_size;
  }

  void load_rows(const char* from) {
    pack_rows<Op>(from, p.dtype, p.a_row, count, round_up(count, kTileRows), p.channels, 1, a, lda);
    for (int64_t r = 0; r < count; ++r) {
      factors_a[r] = p.normalize ? factor_of(squares_of(a + r * lda)) : 1.f;
      if (factors_a[r] == 0) std::memset(a + r * lda, 0, lda * sizeof(float));
    }
    for (int64_t i = 0; i < chunk * kWidth; i += kWidth) {
      store(best + i, set(-__builtin_inff()));
      store(place + i, zero());
    }
  }

  float squares_of(const float* x) const {
    vf sum = zero();
    for (int64_t w = 0; w < lda; w += kWidth) sum = Op::madd(sum, load(x + w), load(x + w));
    return sum_lanes(sum);
  }

  void match_panel(int64_t b, int64_t column) {
    const int64_t columns = std::min<int64_t>(kPanel, p.partners - column);
    const int64_t width = round_up(columns, kWidth);
    vf squares[kTileVectors] = {};
    for (int64_t word = 0; word < words; word += slice) {
      const int64_t length = std::min(slice, words - word), element = word * Op::kPair;
      pack_transposed<Op>(row(p.b, b * p.b_batch + column * p.b_row + element), p.dtype, p.b_row,
                          columns, std::min(length * Op::kPair, p.channels - element), 1, panel);
      if (p.normalize) add_squares(squares, length);
      const bool last = word + length == words;
      if (last) find_factors(squares, columns);
      for (int64_t r = 0; r < count; r += kTileRows) {
        float* const c = products + (whole ? 0 : r * kPanel);
        const float* const rows = a + r * lda + word;
        if (word == 0)
          multiply_rows<Op, false, kTileRows, true>(c, kPanel, rows, lda, panel, kPanel, length,
                                                    width);
        else
          multiply_rows<Op, false, kTileRows, false>(c, kPanel, rows, lda, panel, kPanel, length,
                                                     width);
        if (last) update(r, c, column / kWidth, width);
      }
    }
  }

  void add_squares(vf (&squares)[kTileVectors], int64_t length) const {
    for (int64_t w = 0; w < length; ++w) TM_UNROLL(8)
    for (int j = 0; j < kTileVectors; ++j) {
      const vf x = load(panel + w * kPanel + j * kWidth);
      squares[j] = Op::madd(squares[j], x, x);
    }
  }

  // Factors of the columns; NaN past the last row of b.
  void find_factors(const vf (&squares)[kTileVectors], int64_t columns) {
    for (int j = 0; j < kTileVectors; ++j) store(factors_b + j * kWidth, squares[j]);
    for (int64_t i = 0; i < kPanel; ++i)
      factors_b[i] = i >= columns   ? __builtin_nanf("")
                     : !p.normalize ? 1.f
                                    : factor_of(factors_b[i]);
  }

  // Strictly greater: among equal products in a lane the first stays.
  TM_INLINE void update(int64_t first, const float* c, int64_t vector, int64_t width) const {
    for (int64_t r = first; r < first + kTileRows; ++r, c += kPanel) {
      vf maximum = load(best + r * kWidth), at = load(place + r * kWidth);
      for (int64_t j = 0; j < width; j += kWidth) {
        const vf x = load(c + j) * load(factors_b + j);
        const vm greater = less(maximum, x);
        maximum = select(greater, x, maximum);
        // integer bits, so that vector indices are exact
        const auto number = static_cast<int32_t>(vector + j / kWidth);
        at = select(greater, set(std::bit_cast<float>(number)), at);
      }
      store(best + r * kWidth, maximum);
      store(place + r * kWidth, at);
    }
  }

  void finish(int64_t out, int64_t r) const {
    const vf values = load(best + r * kWidth);
    const float maximum = max_lanes(values);
    const bool some = maximum > -__builtin_inff() && factors_a[r] == factors_a[r];
    int32_t vectors[kWidth], equals[kWidth];
    std::memcpy(vectors, place + r * kWidth, sizeof vectors);
    const int count = store_lane_numbers(equals, 0, equal(values, set(maximum)));
    int32_t found = INT32_MAX;
    for (int i = 0; i < count; ++i)
      found = std::min(found, vectors[equals[i]] * kWidth + equals[i]);
    p.index[out] = some ? found : p.partners > 0 ? 0 : -1;
    p.score[out] = some ? maximum * factors_a[r] : -__builtin_inff();
  }

  const MatchParams& p;
  const int64_t chunk, words, lda, slice;
  const bool whole;  // one slice
  const int64_t element_size;
  cpu::Workspace memory;
  float *a, *best, *place, *factors_a, *products, *panel, *factors_b;
  int64_t count = 0;  // rows of the item
};

template <class Op>
void match(const MatchParams& p) {
  // Below about 64 Ki products a parallel region costs more than it gains.
  const int64_t work = p.batch * p.rows * (p.partners + 1) * p.channels;
  const int threads = work < (1 << 16) ? 1 : cpu::num_threads();
  const int64_t chunk = chunk_rows(p, words_of<Op>(p.channels), threads);
  const int64_t chunks = ceil_div(p.rows, chunk);
  cpu::parallel_items(p.batch * chunks, threads, [&](cpu::ItemCounter& counter) {
    FlushDenormals flush;
    Matcher<Op> matcher(p, chunk);
    for (int64_t item; (item = counter.next()) >= 0;)
      matcher.run(item / chunks, item % chunks * chunk);
  });
}

}  // namespace

void best_match(const MatchParams& p) {
#if defined(TM_DOTS)
  if (p.dtype == DType::bfloat16) return match<BFloat16>(p);
#endif
  match<Float32>(p);
}

}  // namespace tokenmill::TOKENMILL_ISA
