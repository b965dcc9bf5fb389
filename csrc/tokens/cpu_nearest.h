// k nearest rows of a set for each of some rows. Distances are sums of squared differences in
// registers; only the k smallest per row are kept. A screen, where it pays, leaves few distances to
// compute and does not change a bit of the result.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "core/knobs.h"
#include "tokens/cpu_screen.h"

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

// Lane i: |a[i] - b[i]|^2, summed like squared_distances, channel by channel.
template <DType kA, DType kB>
__attribute__((noinline)) vf distances_of_pairs(const char* const* a, const char* const* b,
                                                int64_t channels) {
  vf sum = zero();
  for (int64_t c = 0; c < channels; c += kWidth) {
    const int64_t n = channels - c;
    vf difference[kWidth];
    TM_UNROLL(16)
    for (int i = 0; i < kWidth; ++i)
      difference[i] = Elements<kA>::load_n(a[i], c, n) - Elements<kB>::load_n(b[i], c, n);
    transpose(difference);
    TM_UNROLL(16)
    for (int i = 0; i < kWidth; ++i) sum = fma(difference[i], difference[i], sum);
  }
  return sum;
}

// Clamps distances that are not finite to the largest float.
TM_INLINE vf finite_distance(vf d) {
  return select(less(d, set(__builtin_inff())), d, set(kMaxDistance));
}

class NearestFinder {
 public:
  // Number of rows that share a panel of the set, so that they stay in the L2 cache.
  static int64_t chunk_rows(int64_t rows, int64_t channels, int threads) {
    const int64_t cached =
        std::clamp<int64_t>(knob(Knob::nearest_floats) / round_up(channels, kWidth), 48, 768);
    const int64_t shared = std::max<int64_t>(ceil_div(rows, 4 * threads), 48);
    return round_up(std::min({cached, shared, rows}), kTileRows);
  }

  // screen: null, or a screen of the same sets. exact: distances are returned, not only indices.
  NearestFinder(const RowSets& sets, const Screen* screen, int64_t chunk, int64_t k, bool exact)
      : sets(sets),
        screen(screen),
        channels(sets.channels),
        lda(round_up(sets.channels, kWidth)),
        k(k),
        maximum(screen ? 4 * k + 28 : 0),
        exact(exact),
        candidates(screen ? chunk * maximum : 0),
        counts(chunk),
        limits(chunk),
        margins(chunk),
        memory(chunk * (lda + 2 * k) + channels * kPanel + kTileRows * kPanel + 5 * 16) {
    rows = memory.take(chunk * lda);
    distances = memory.take(chunk * k);
    ids = reinterpret_cast<int32_t*>(memory.take(chunk * k));
    panel = memory.take(channels * kPanel);
    tile = memory.take(kTileRows * kPanel);
  }

  // Afterwards id(r) holds the k nearest rows of set b to row r, by distance and then by index, and
  // distance(r) their distances.
  void run(int64_t b, const char* const* from, DType dtype, int64_t count) {
    std::fill(distances, distances + count * k, __builtin_inff());
    left.clear();
    if (screen && screens) {
      find_candidates(b, from, dtype, count);
      std::fill(distances, distances + count * k, __builtin_inff());
      choose(b, from, dtype, count);
      // Stops using the screen for sets of which it knows too little.
      if (4 * static_cast<int64_t>(left.size()) > count) screens = false;
    } else {
      for (int64_t r = 0; r < count; ++r) left.push_back(r);
    }
    if (!left.empty()) compare_with_all(b, from, dtype);
  }

  float* distance(int64_t r) const { return distances + r * k; }
  int32_t* id(int64_t r) const { return ids + r * k; }

 private:
  struct Candidate {
    float value;
    int32_t id;
  };
  static constexpr int32_t kUnknown = -1;  // value of `count`: all rows are candidates

  // Compares the rows in `left` with the whole set.
  void compare_with_all(int64_t b, const char* const* from, DType dtype) {
    const int64_t count = static_cast<int64_t>(left.size());
    std::vector<const char*> at(count);
    for (int64_t i = 0; i < count; ++i) at[i] = from[left[i]];
    pack_rows<Float32>(ScatteredRows{at.data()}, dtype, count, round_up(count, kTileRows), channels,
                       1, rows, lda);
    for (int64_t column = 0; column < sets.size; column += kPanel) {
      const int64_t columns = std::min<int64_t>(kPanel, sets.size - column);
      pack_transposed<Float32>(sets.at(b, column), sets.dtype, sets.row_step, columns, channels, 1,
                               panel);
      for (int64_t r = 0; r < count; r += kTileRows) {
        squared_distances(tile, rows + r * lda, lda, panel, channels, round_up(columns, kWidth));
        for (int64_t i = r; i < std::min<int64_t>(r + kTileRows, count); ++i)
          update(left[i], tile + (i - r) * kPanel, column, columns);
      }
    }
  }

  void update(int64_t r, const float* d, int64_t column, int64_t columns) const {
    const float* last = distances + r * k + k - 1;
    for (int64_t j = 0; j < columns; j += kWidth) {
      const vf value = finite_distance(load(d + j));
      if (!any(less(value, set(*last)))) continue;
      float lane[kWidth];
      store(lane, value);
      for (int64_t i = 0; i < std::min<int64_t>(kWidth, columns - j); ++i)
        if (lane[i] < *last) insert(r, lane[i], static_cast<int32_t>(column + j + i));
    }
  }

  // Indices arrive in ascending order: among equal distances the first stays in front.
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

  // Applies the screen to each row; its k smallest values so far are in `distances`.
  void find_candidates(int64_t b, const char* const* from, DType dtype, int64_t count) {
    const int64_t words = screen->words, ldw = screen->ldw;  // at most lda
    const Lengths reach = screen->lengths_of(b);
    visit_elements(dtype, [&]<DType kType>(Elements<kType>) TM_LAMBDA {
      for (int64_t r = 0; r < count; ++r) {
        margins[r] = screen->margin(center_row<ScreenOp, kType>(from[r], screen->middle(b),
                                                                channels, -1, rows + r * ldw, ldw),
                                    reach);
        const bool known = margins[r] == margins[r];
        counts[r] = known ? 0 : kUnknown;
        limits[r] = known ? __builtin_inff() : -__builtin_inff();
      }
    });
    const int64_t padded = round_up(count, kTileRows);
    std::memset(rows + count * ldw, 0, (padded - count) * ldw * sizeof(float));
    for (int64_t n = 0; n < screen->panels; ++n) {
      const int64_t column = n * kPanel, columns = std::min<int64_t>(kPanel, sets.size - column);
      for (int64_t r = 0; r < count; r += kTileRows) {
        biased_products<ScreenOp>(tile, rows + r * ldw, ldw, screen->panel(b, n),
                                  screen->bias(b, n), words, round_up(columns, kWidth));
        for (int64_t i = r; i < std::min<int64_t>(r + kTileRows, count); ++i)
          note_candidates(i, tile + (i - r) * kPanel, column, columns);
      }
    }
  }

  void note_candidates(int64_t r, const float* d, int64_t column, int64_t columns) {
    for (int64_t j = 0; j < columns; j += kWidth) {
      const vf value = load(d + j);
      if (!any(less(value, set(limits[r])))) continue;
      float lane[kWidth];
      store(lane, value);
      for (int64_t i = 0; i < std::min<int64_t>(kWidth, columns - j); ++i)
        if (lane[i] < limits[r]) note(r, lane[i], static_cast<int32_t>(column + j + i));
    }
  }

  void note(int64_t r, float value, int32_t number) {
    float* const values = distance(r);
    if (value < values[k - 1]) {
      int64_t at = k - 1;
      for (; at > 0 && values[at - 1] > value; --at) values[at] = values[at - 1];
      values[at] = value;
      limits[r] = values[k - 1] + margins[r];
    }
    if (counts[r] == maximum) drop_candidates(r);
    if (counts[r] == maximum) {
      counts[r] = kUnknown;
      limits[r] = -__builtin_inff();
      return;
    }
    candidates[r * maximum + counts[r]++] = {value, number};
  }

  // Drops candidates that no longer qualify.
  void drop_candidates(int64_t r) {
    Candidate* const own = candidates.data() + r * maximum;
    int32_t kept = 0;
    for (int32_t i = 0; i < counts[r]; ++i)
      if (own[i].value < limits[r]) own[kept++] = own[i];
    counts[r] = kept;
  }

  // Selects the k nearest candidates. Rows without information go to `left`.
  void choose(int64_t b, const char* const* from, DType dtype, int64_t count) {
    pairs = 0;
    for (int64_t r = 0; r < count; ++r) {
      if (counts[r] == kUnknown) {
        left.push_back(r);
        continue;
      }
      drop_candidates(r);
      const Candidate* const own = candidates.data() + r * maximum;
      if (!exact && counts[r] == 1) {
        *id(r) = own->id;
        continue;
      }
      for (int32_t i = 0; i < counts[r]; ++i) {
        pair_row[pairs] = r;
        pair_id[pairs] = own[i].id;
        if (++pairs == kWidth) measure_pairs(b, from, dtype);
      }
    }
    if (pairs > 0) measure_pairs(b, from, dtype);
  }

  void measure_pairs(int64_t b, const char* const* from, DType dtype) {
    const char *first[kWidth], *second[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      const int at = i < pairs ? i : 0;
      first[i] = from[pair_row[at]];
      second[i] = sets.at(b, pair_id[at]);
    }
    float d[kWidth];
    visit_elements(dtype, [&]<DType kA>(Elements<kA>) TM_LAMBDA {
      visit_elements(sets.dtype, [&]<DType kB>(Elements<kB>) TM_LAMBDA {
        if constexpr (kA == kB || kB == DType::float32)
          store(d, finite_distance(distances_of_pairs<kA, kB>(first, second, channels)));
      });
    });
    for (int i = 0; i < pairs; ++i)
      if (d[i] < distance(pair_row[i])[k - 1]) insert(pair_row[i], d[i], pair_id[i]);
    pairs = 0;
  }

  const RowSets sets;
  const Screen* const screen;
  const int64_t channels, lda, k, maximum;  // `most`: maximum number of candidates per row
  const bool exact;
  bool screens = true;
  std::vector<Candidate> candidates;
  std::vector<int32_t> counts;
  std::vector<float> limits, margins;
  std::vector<int64_t> left;
  int pairs = 0;
  int64_t pair_row[kWidth];
  int32_t pair_id[kWidth];
  cpu::Workspace memory;
  float *rows, *distances, *panel, *tile;
  int32_t* ids;
};

// Calls body(sets, screen, first) for all sets at once or, where a screen pays, for the sets from
// `first` on that one screen holds. `rows` rows are compared with each set.
template <typename Body>
void for_screened_sets(const RowSets& sets, int64_t rows, int64_t k, int threads,
                       const Body& body) {
  if (!Screen::pays(sets, rows, k)) return body(sets, nullptr, int64_t{0});
  const int64_t step = Screen::sets_at_once(sets);
  for (int64_t first = 0; first < sets.batch; first += step) {
    const RowSets some = sets.part(first, std::min(step, sets.batch - first));
    const Screen screen(some, threads);
    body(some, &screen, first);
  }
}

}  // namespace tokenmill::TOKENMILL_ISA
