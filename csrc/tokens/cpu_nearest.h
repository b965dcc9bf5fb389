// The k rows of a set that are nearest each of some rows. Distances are sums of squared differences
// in registers, of which no more than the k least of a row are kept.
#pragma once
#include <algorithm>
#include <cstring>

#include "cpu/tile.h"
#include "cpu/workspace.h"
#include "tokens/cluster_tokens/params.h"

namespace tokenmill::TOKENMILL_ISA {

// d[i][column] = |a[i] - column of the panel|^2, columns up to width, a multiple of kWidth.
template <int N = kTileVectors>
__attribute__((noinline)) void squared_distances(float* d, const float* a, int64_t lda,
                                                 const float* panel, int64_t words, int64_t width) {
  int64_t n = 0;
  for (; n + N * kWidth <= width; n += N * kWidth) {
    vf sum[kTileRows][N];
    clear(sum);
    TM_UNROLL(2)
    for (int64_t k = 0; k < words; ++k) {
      vf c[N];
      TM_UNROLL(8)
      for (int j = 0; j < N; ++j) c[j] = load(panel + k * kPanel + n + j * kWidth);
      TM_UNROLL(16)
      for (int i = 0; i < kTileRows; ++i) {
        const vf x = set(a[i * lda + k]);
        TM_UNROLL(8)
        for (int j = 0; j < N; ++j) {
          const vf difference = x - c[j];
          sum[i][j] = fma(difference, difference, sum[i][j]);
        }
      }
    }
    TM_UNROLL(16)
    for (int i = 0; i < kTileRows; ++i) {
      TM_UNROLL(8)
      for (int j = 0; j < N; ++j) store(d + i * kPanel + n + j * kWidth, sum[i][j]);
    }
  }
  if constexpr (N > 1)
    if (n < width) squared_distances<N - 1>(d + n, a, lda, panel + n, words, width - n);
}

class NearestFinder {
 public:
  // Rows that share a panel of the set: they stay in the second-level cache.
  static int64_t chunk_rows(int64_t rows, int64_t channels, int threads) {
    const int64_t cached = std::clamp<int64_t>(64 * 1024 / round_up(channels, kWidth), 48, 768);
    const int64_t shared = std::max<int64_t>(ceil_div(rows, 4 * threads), 48);
    return round_up(std::min({cached, shared, rows}), kTileRows);
  }

  NearestFinder(int64_t channels, int64_t chunk, int64_t k)
      : channels(channels),
        lda(round_up(channels, kWidth)),
        chunk(chunk),
        k(k),
        memory(chunk * (lda + 2 * k) + (channels + kTileRows) * kPanel + 5 * 16) {
    rows = memory.take(chunk * lda);
    distances = memory.take(chunk * k);
    ids = reinterpret_cast<int32_t*>(memory.take(chunk * k));
    panel = memory.take(channels * kPanel);
    tile = memory.take(kTileRows * kPanel);
  }

  // After this distance(r) and id(r) hold the k nearest of row r, by distance and then by number.
  template <class Rows, class Set>
  void run(const Rows from, DType dtype, int64_t count, const Set& set_at, DType set_dtype,
           int64_t set_size) {
    pack_rows<Float32>(from, dtype, count, round_up(count, kTileRows), channels, 1, rows, lda);
    std::fill(distances, distances + count * k, __builtin_inff());
    for (int64_t column = 0; column < set_size; column += kPanel) {
      const int64_t columns = std::min<int64_t>(kPanel, set_size - column);
      pack_transposed<Float32>(set_at(column), set_dtype, columns, channels, 1, panel);
      for (int64_t r = 0; r < count; r += kTileRows) {
        squared_distances(tile, rows + r * lda, lda, panel, channels, round_up(columns, kWidth));
        for (int64_t i = r; i < std::min<int64_t>(r + kTileRows, count); ++i)
          update(i, tile + (i - r) * kPanel, column, columns);
      }
    }
  }

  float* distance(int64_t r) const { return distances + r * k; }
  int32_t* id(int64_t r) const { return ids + r * k; }

 private:
  void update(int64_t r, const float* d, int64_t column, int64_t columns) const {
    const float* last = distances + r * k + k - 1;
    for (int64_t j = 0; j < columns; j += kWidth) {
      const vf raw = load(d + j);
      const vf value = select(less(raw, set(__builtin_inff())), raw, set(kMostDistance));
      if (!any(less(value, set(*last)))) continue;
      float lane[kWidth];
      store(lane, value);
      for (int64_t i = 0; i < std::min<int64_t>(kWidth, columns - j); ++i)
        if (lane[i] < *last) insert(r, lane[i], static_cast<int32_t>(column + j + i));
    }
  }

  // Numbers come in ascending order: of equal distances the first stays in front.
  void insert(int64_t r, float d, int32_t number) const {
    float* const values = distance(r);
    int32_t* const numbers = id(r);
    int64_t at = k - 1;
    for (; at > 0 && values[at - 1] > d; --at) {
      values[at] = values[at - 1];
      numbers[at] = numbers[at - 1];
    }
    values[at] = d;
    numbers[at] = number;
  }

  const int64_t channels, lda, chunk, k;
  cpu::Workspace memory;
  float *rows, *distances, *panel, *tile;
  int32_t* ids;
};

}  // namespace tokenmill::TOKENMILL_ISA
