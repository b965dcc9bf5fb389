// Screen for the k nearest rows of a set. Half a squared distance is half the squared distance of
// the row to a point near the set, plus |c|^2 / 2 - a c relative to that point: only products, with
// a bound on their error. Rows further away than the k-th smallest value by more than the bound are
// not candidates.
#pragma once
#include <algorithm>
#include <cmath>

#include "cpu/parallel.h"
#include "cpu/tile.h"
#include "cpu/workspace.h"
#include "tokens/cluster_tokens/params.h"

namespace tokenmill::TOKENMILL_ISA {

// Rows of a set, per sequence. Strides in elements.
struct RowSets {
  const void* data;
  DType dtype;
  int64_t batch, size, channels, batch_step, row_step;

  const char* at(int64_t b, int64_t m) const {
    const int64_t bytes = dtype == DType::float32 ? 4 : 2;
    return static_cast<const char*>(data) + (b * batch_step + m * row_step) * bytes;
  }
  RowSets part(int64_t first, int64_t count) const {
    RowSets some = *this;
    some.data = at(first, 0);
    some.batch = count;
    return some;
  }
};

// Products of a screen: pairs of bfloat16 where available. csrc/cpu/isa.cpp selects them on
// machines where they are faster.
#if defined(TM_DOTS)
using ScreenOp = BFloat16;
#else
using ScreenOp = Float32;
#endif

// Upper bounds for rows relative to the point: length of a row, and of its rounding error as words.
struct Lengths {
  float whole, lost;

  void include(const Lengths& other) {  // NaN propagates
    whole = other.whole <= whole ? whole : other.whole;
    lost = other.lost <= lost ? lost : other.lost;
  }
};

// Row relative to `middle` (zero past its channels), times `sign`, as words.
template <class Op, DType kType>
TM_INLINE Lengths center_row(const void* row, const float* middle, int64_t channels, float sign,
                             float* words, int64_t count, float* squares = nullptr) {
  vf whole = zero(), lost = zero();
  const auto at = [&](int64_t c) TM_LAMBDA {
    return (Elements<kType>::load_n(row, c, std::max<int64_t>(channels - c, 0)) -
            load(middle + c)) *
           set(sign);
  };
  for (int64_t w = 0; w < count; w += kWidth) {
#if defined(__AVX512BF16__)
    if constexpr (Op::kPair == 2) {
      const vf first = at(2 * w), second = at(2 * w + kWidth);
      store(words + w, narrow_bfloat(first, second));
      const uint16_t* const narrow = reinterpret_cast<const uint16_t*>(words + w);
      const vf a = first - load_bfloat(narrow), b = second - load_bfloat(narrow + kWidth);
      whole = fma(first, first, fma(second, second, whole));
      lost = fma(a, a, fma(b, b, lost));
      continue;
    }
#endif
    const vf x = at(w);
    store(words + w, x);
    whole = fma(x, x, whole);
  }
  // 2^-10 exceeds the rounding of a sum of 2^15 squares, 2^-23 the rounding of a difference.
  constexpr float kMore = 1 + 1.f / 1024, kDifference = 1.f / (1 << 23);
  const float sum = sum_lanes(whole), length = kMore * std::sqrt(sum);
  if (squares) *squares = sum;
  return {length, kMore * std::sqrt(sum_lanes(lost)) + kDifference * length};
}

// tile[i][column] = bias[column] + rows[i] panel[column], columns up to width.
template <class Op, int N = kTileVectors>
__attribute__((noinline)) void biased_products(float* tile, const float* rows, int64_t ldw,
                                               const float* panel, const float* bias, int64_t words,
                                               int64_t width) {
  int64_t n = 0;
  for (; n + N * kWidth <= width; n += N * kWidth) {
    vf sum[kTileRows][N];
    TM_UNROLL(16)
    for (int i = 0; i < kTileRows; ++i) {
      TM_UNROLL(8)
      for (int j = 0; j < N; ++j) sum[i][j] = load(bias + n + j * kWidth);
    }
    multiply<Op, false>(sum, rows, ldw, panel + n, kPanel, words);
    TM_UNROLL(16)
    for (int i = 0; i < kTileRows; ++i) {
      TM_UNROLL(8)
      for (int j = 0; j < N; ++j) store(tile + i * kPanel + n + j * kWidth, sum[i][j]);
    }
  }
  if constexpr (N > 1)
    if (n < width)
      biased_products<Op, N - 1>(tile + n, rows, ldw, panel + n, bias + n, words, width - n);
}

// Sets of all sequences as words, in panels of kPanel columns.
class Screen {
 public:
  // True if the screen takes less time than exact distances to all rows.
  static bool pays(const RowSets& sets, int64_t rows, int64_t k) {
    return sets.size * sets.channels >= kMinWork * (k + 3) && rows >= kMinRows &&
           sets.channels <= kMaxChannels;
  }

  // Number of sets that fit into a few MB, which the allocator keeps between calls.
  static int64_t sets_at_once(const RowSets& sets) {
    constexpr int64_t kFloats = 1 << 21;
    return std::max<int64_t>(kFloats / (sets.size * sets.channels), 1);
  }

  Screen(const RowSets& of, int threads)
      : sets(of),
        words(ceil_div(sets.channels, ScreenOp::kPair)),
        ldw(round_up(words, kWidth)),
        panels(ceil_div(sets.size, kPanel)),
        panel_floats((words + 1) * kPanel),
        memory(sets.batch * (panels * (panel_floats + 2) + channels()) + 4 * 16) {
    packed = memory.take(sets.batch * panels * panel_floats);
    middles = memory.take(sets.batch * channels());
    lengths = reinterpret_cast<Lengths*>(memory.take(sets.batch * panels * 2));
    cpu::parallel_items(sets.batch * panels, threads, [&](cpu::ItemCounter& counter) {
      FlushDenormals flush;
      cpu::Workspace own(kPanel * ldw + channels() + 2 * 16);
      float* const rows = own.take(kPanel * ldw);
      float* const middle = own.take(channels());
      for (int64_t item; (item = counter.next()) >= 0;) {
        const int64_t b = item / panels, panel = item % panels;
        find_middle(b, middle);
        if (panel == 0) std::copy(middle, middle + channels(), middles + b * channels());
        pack_panel(b, panel, middle, rows);
      }
    });
  }

  // Floats per row relative to the point, including zero padding.
  int64_t channels() const { return ScreenOp::kPair * ldw; }
  const float* middle(int64_t b) const { return middles + b * channels(); }
  const float* panel(int64_t b, int64_t n) const {
    return packed + (b * panels + n) * panel_floats;
  }
  const float* bias(int64_t b, int64_t n) const { return panel(b, n) + words * kPanel; }

  Lengths lengths_of(int64_t b) const {
    Lengths maximum{0, 0};
    for (int64_t n = 0; n < panels; ++n) maximum.include(lengths[b * panels + n]);
    return maximum;
  }
  // Margin above a row's k-th smallest value within which a row is a candidate. NaN: no bound.
  float margin(const Lengths& row, const Lengths& set) const {
    if (!(row.whole < kMaxLength && set.whole < kMaxLength)) return __builtin_nanf("");
    // Each term of a sum of C products has at most C + 1 roundings, in any order. The term is a
    // product or half a square here, and a square in an exact distance.
    const float rounding = static_cast<float>(sets.channels + 16) / (1 << 24);
    const float a = row.whole + row.lost, c = set.whole + set.lost;
    const float products = row.lost * c + a * set.lost;
    return 1.01f * (2 * products + rounding * (a + c) * (a + 3 * c)) + kMinMargin;
  }

  const RowSets sets;
  const int64_t words, ldw, panels;

 private:
  static constexpr int64_t kMinWork = 1 << 13, kMinRows = 256;
  static constexpr int64_t kMaxChannels = 1 << 15;  // for which the rounding bounds hold
  static constexpr int kSamples = 16;
  static constexpr float kMaxLength = 1e15f;
  static constexpr float kMinMargin = 1e-30f;  // absorbs flushed denormals

  void find_middle(int64_t b, float* middle) const {
    const int64_t samples = std::min<int64_t>(kSamples, sets.size);
    visit_elements(sets.dtype, [&](auto e) TM_LAMBDA {
      for (int64_t c = 0; c < channels(); c += kWidth) {
        vf sum = zero();
        for (int64_t i = 0; i < samples && c < sets.channels; ++i)
          sum = sum + e.load_n(sets.at(b, i * sets.size / samples), c, sets.channels - c);
        store(middle + c, sum * set(1 / static_cast<float>(samples)));
      }
    });
  }

  void pack_panel(int64_t b, int64_t panel, const float* middle, float* rows) const {
    const int64_t first = panel * kPanel, count = std::min<int64_t>(kPanel, sets.size - first);
    float* const to = packed + (b * panels + panel) * panel_floats;
    float* const bias = to + words * kPanel;
    Lengths maximum{0, 0};
    visit_elements(sets.dtype, [&]<DType kType>(Elements<kType>) TM_LAMBDA {
      for (int64_t i = 0; i < count; ++i) {
        maximum.include(center_row<ScreenOp, kType>(sets.at(b, first + i), middle, sets.channels, 1,
                                                    rows + i * ldw, ldw, bias + i));
        bias[i] *= 0.5f;
      }
    });
    for (int64_t i = count; i < kPanel; ++i) bias[i] = kMaxDistance;
    constexpr DType kWords = ScreenOp::kPair == 2 ? DType::bfloat16 : DType::float32;
    pack_transposed<ScreenOp>(rows, kWords, channels(), count, sets.channels, 1, to);
    lengths[b * panels + panel] = maximum;
  }

  const int64_t panel_floats;
  cpu::Workspace memory;
  float *packed, *middles;
  Lengths* lengths;
};

}  // namespace tokenmill::TOKENMILL_ISA
