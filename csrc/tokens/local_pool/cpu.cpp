// Windows are separable: the columns of the window of a line of tokens are pooled first, then rows
// of those. What they read stays in cache from line to line.
#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/workspace.h"
#include "tokens/local_pool/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int kMostTaps = 255;
constexpr int64_t kLineFloats = 1 << 15;  // of a pooled line, at best: half of a level 2 cache

// A NaN of either survives.
TM_INLINE vf max_or_nan(vf a, vf b) { return select(equal(a, a), max_of(a, b), a); }

// What one dimension of the window reaches from a place: the first tap and how many.
struct Reach {
  int first, count;
};
TM_INLINE Reach reach(int place, int size, int kernel, int dilation) {
  const int half = kernel / 2;
  if (dilation == 0) return {0, kernel};
  const int before = std::min(half, place / dilation);
  const int after = std::min(half, (size - 1 - place) / dilation);
  return {half - before, before + 1 + after};
}
TM_INLINE int tap_at(int place, int tap, int kernel, int dilation) {
  return place + (tap - kernel / 2) * dilation;
}

// The rows of floats, or of elements, that are pooled into one.
struct Taps {
  const void* rows[kMostTaps];
  float scales[kMostTaps];
  int count = 0;

  TM_INLINE void add(const void* row, float scale = 1) {
    rows[count] = row;
    scales[count++] = scale;
  }
};

// finish(c, n, pooled) for n channels from c.
template <DType kType, bool kMax, bool kScaled, int kVectors, typename Finish>
TM_INLINE void pool_vectors(const Taps& taps, int64_t c, int64_t n, const Finish& finish) {
  vf pooled[kVectors];
  TM_UNROLL(4)
  for (int v = 0; v < kVectors; ++v) pooled[v] = set(kMax ? -kInfinity : 0);
  for (int t = 0; t < taps.count; ++t) {
    TM_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) {
      vf x = Elements<kType>::load_n(taps.rows[t], c + v * kWidth, kVectors > 1 ? kWidth : n);
      if constexpr (kScaled) x = x * set(taps.scales[t]);
      pooled[v] = kMax ? max_or_nan(x, pooled[v]) : pooled[v] + x;
    }
  }
  TM_UNROLL(4)
  for (int v = 0; v < kVectors; ++v) finish(c + v * kWidth, kVectors > 1 ? kWidth : n, pooled[v]);
}

template <DType kType, bool kMax, bool kScaled, typename Finish>
TM_INLINE void pool(const Taps& taps, int64_t channels, const Finish& finish) {
  int64_t c = 0;
  for (; c + 4 * kWidth <= channels; c += 4 * kWidth)
    pool_vectors<kType, kMax, kScaled, 4>(taps, c, kWidth, finish);
  for (; c < channels; c += kWidth)
    pool_vectors<kType, kMax, kScaled, 1>(taps, c, std::min<int64_t>(kWidth, channels - c), finish);
}

bool counts(const LocalPoolParams& p, int64_t b, int64_t y, int64_t x) {
  return !p.mask || p.mask[b * p.mask_batch + y * p.mask_line + x * p.mask_token];
}

// Tokens in the window of each token of a line.
void count_line(const LocalPoolParams& p, int64_t b, int y, int* columns, int* line) {
  const Reach rows = reach(y, p.height, p.kernel_y, p.dilation_y);
  std::fill(columns, columns + p.width, p.mask ? 0 : rows.count);
  for (int i = 0; p.mask && i < rows.count; ++i) {
    const int from = tap_at(y, rows.first + i, p.kernel_y, p.dilation_y);
    for (int x = 0; x < p.width; ++x) columns[x] += counts(p, b, from, x);
  }
  for (int x = 0; x < p.width; ++x) {
    const Reach taps = reach(x, p.width, p.kernel_x, p.dilation_x);
    line[x] = 0;
    for (int i = 0; i < taps.count; ++i)
      line[x] += columns[tap_at(x, taps.first + i, p.kernel_x, p.dilation_x)];
  }
}

// Of a mean. 1 where there is nothing to divide.
float divisor(const LocalPoolParams& p, int count) {
  return p.count_include_pad ? static_cast<float>(p.kernel_y * p.kernel_x)
                             : static_cast<float>(std::max(count, 1));
}

// What is pooled, and with which weights: x and its mask, or dout over the divisors of its means.
struct Source {
  const char* data;
  int64_t batch, line, token, size;  // bytes
  const float* scales;               // [height, width] of one sequence, or null: the mask

  const char* row(int64_t b, int64_t y, int64_t x, int64_t c) const {
    return data + b * batch + y * line + x * token + c * size;
  }
};

// Channels c .. c + channels - 1 of a line pooled over the columns of its windows.
template <DType kType, bool kMax, bool kScaled>
void pool_columns(const LocalPoolParams& p, const Source& s, int64_t b, int y, int64_t c,
                  int64_t channels, float* line) {
  const Reach rows = reach(y, p.height, p.kernel_y, p.dilation_y);
  Taps taps;
  for (int x = 0; x < p.width; ++x) {
    taps.count = 0;
    for (int i = 0; i < rows.count; ++i) {
      const int from = tap_at(y, rows.first + i, p.kernel_y, p.dilation_y);
      if (kScaled)
        taps.add(s.row(b, from, x, c), s.scales[int64_t{from} * p.width + x]);
      else if (counts(p, b, from, x))
        taps.add(s.row(b, from, x, c));
    }
    pool<kType, kMax, kScaled>(taps, channels, [&](int64_t at, int64_t n, vf pooled) TM_LAMBDA {
      Elements<DType::float32>::store_n(line, x * channels + at, pooled, n);
    });
  }
}

// finish(x, c, n, pooled) for each token of a line.
template <DType kType, bool kMax, bool kScaled, typename Finish>
TM_INLINE void pool_line(const LocalPoolParams& p, const Source& s, int64_t b, int y, int64_t c,
                         int64_t channels, float* line, const Finish& finish) {
  const bool columns = p.kernel_y > 1;
  if (columns) pool_columns<kType, kMax, kScaled>(p, s, b, y, c, channels, line);
  Taps taps;
  for (int x = 0; x < p.width; ++x) {
    const Reach reached = reach(x, p.width, p.kernel_x, p.dilation_x);
    taps.count = 0;
    for (int i = 0; i < reached.count; ++i) {
      const int from = tap_at(x, reached.first + i, p.kernel_x, p.dilation_x);
      if (columns)
        taps.add(line + from * channels);
      else if (kScaled)
        taps.add(s.row(b, y, from, c), s.scales[int64_t{y} * p.width + from]);
      else if (counts(p, b, y, from))
        taps.add(s.row(b, y, from, c));
    }
    const auto finish_x = [&](int64_t at, int64_t n, vf pooled)
                              TM_LAMBDA { finish(x, c + at, n, pooled); };
    if (columns)
      pool<DType::float32, kMax, false>(taps, channels, finish_x);
    else
      pool<kType, kMax, kScaled>(taps, channels, finish_x);
  }
}

// Lines that one item pools: all of a sequence where there are sequences enough.
int64_t lines_per_item(const LocalPoolParams& p, int threads) {
  if (threads == 1) return p.height;
  return std::max<int64_t>(1, ceil_div(p.batch * p.height, 8 * threads));
}

int threads_for(const LocalPoolParams& p) {
  const int64_t elements = p.batch * p.height * p.width * p.channels;
  return elements < 1 << 16 ? 1 : cpu::num_threads();
}

// visit(b, begin, end): lines of a sequence.
template <typename Visit>
void for_lines(const LocalPoolParams& p, const Visit& visit) {
  const int threads = threads_for(p);
  const int64_t step = std::min<int64_t>(lines_per_item(p, threads), p.height);
  const int64_t parts = ceil_div(p.height, step);
  cpu::parallel_items(p.batch * parts, threads, [&](cpu::ItemCounter& items) {
    for (int64_t item; (item = items.next()) >= 0;) {
      const int64_t begin = item % parts * step;
      visit(item / parts, static_cast<int>(begin),
            static_cast<int>(std::min<int64_t>(begin + step, p.height)));
    }
  });
}

int64_t channels_at_once(const LocalPoolParams& p) {
  if (p.kernel_y == 1) return p.channels;
  const int64_t fit = std::max<int64_t>(kLineFloats / p.width / (4 * kWidth), 1) * 4 * kWidth;
  return std::min(fit, p.channels);
}

template <DType kType, bool kMax>
void forward(const LocalPoolParams& p) {
  const int64_t size = sizeof(typename Elements<kType>::type), step = channels_at_once(p);
  const Source source{static_cast<const char*>(p.x),
                      p.x_batch * size,
                      p.x_line * size,
                      p.x_token * size,
                      size,
                      nullptr};
  for_lines(p, [&](int64_t b, int begin, int end) {
    std::vector<int> numbers(2 * p.width);
    cpu::Workspace memory(p.kernel_y > 1 ? step * p.width : 16);
    float* line = memory.take(p.kernel_y > 1 ? step * p.width : 16);
    int* count = numbers.data() + p.width;
    for (int y = begin; y < end; ++y) {
      count_line(p, b, y, numbers.data(), count);
      for (int64_t c = 0; c < p.channels; c += step) {
        const int64_t channels = std::min(step, p.channels - c);
        pool_line<kType, kMax, false>(
            p, source, b, y, c, channels, line,
            [&](int x, int64_t at, int64_t n, vf pooled) TM_LAMBDA {
              const int64_t to = ((b * p.height + y) * p.width + x) * p.channels + at;
              if (!kMax) pooled = pooled / set(divisor(p, count[x]));
              if (count[x] == 0) pooled = zero();
              if (p.subtract_input)
                pooled = pooled - Elements<kType>::load_n(source.row(b, y, x, 0), at, n);
              Elements<kType>::store_n(p.out, to, pooled, n);
            });
      }
    }
  });
}

Source gradient(const LocalPoolBackwardParams& q, int64_t size) {
  return {static_cast<const char*>(q.dout),
          q.dout_batch * size,
          q.dout_line * size,
          q.dout_token * size,
          size,
          nullptr};
}

// A token is in the windows of those that are in its own, were none masked.
template <DType kType>
void mean_backward(const LocalPoolBackwardParams& q) {
  const LocalPoolParams& p = q.forward;
  const int64_t size = sizeof(typename Elements<kType>::type), step = channels_at_once(p);
  const int64_t line_floats = p.kernel_y > 1 ? step * p.width : 16;
  for_lines(p, [&](int64_t b, int begin, int end) {
    std::vector<int> numbers(2 * p.width);
    cpu::Workspace memory(int64_t{p.height} * p.width + 16 + line_floats);
    float* line = memory.take(line_floats);
    float* scales = memory.take(int64_t{p.height} * p.width);
    int* count = numbers.data() + p.width;
    const int64_t halo = int64_t{p.kernel_y / 2} * p.dilation_y;
    for (int64_t y = std::max<int64_t>(begin - halo, 0);
         y < std::min<int64_t>(end + halo, p.height); ++y) {
      count_line(p, b, static_cast<int>(y), numbers.data(), count);
      for (int x = 0; x < p.width; ++x)
        scales[y * p.width + x] = count[x] ? 1 / divisor(p, count[x]) : 0;
    }
    Source source = gradient(q, size);
    source.scales = scales;
    for (int y = begin; y < end; ++y)
      for (int64_t c = 0; c < p.channels; c += step) {
        const int64_t channels = std::min(step, p.channels - c);
        pool_line<kType, false, true>(
            p, source, b, y, c, channels, line,
            [&](int x, int64_t at, int64_t n, vf pooled) TM_LAMBDA {
              const int64_t to = ((b * p.height + y) * p.width + x) * p.channels + at;
              if (!counts(p, b, y, x)) pooled = zero();
              if (p.subtract_input)
                pooled = pooled - Elements<kType>::load_n(source.row(b, y, x, 0), at, n);
              Elements<kType>::store_n(p.out, to, pooled, n);
            });
      }
  });
}

// visit(tap, y, x) for the taps of a window that are on the map, in row-major order; kBack: for the
// tokens of whose window (y, x) is that tap.
template <bool kBack, typename Visit>
TM_INLINE void for_taps(const LocalPoolParams& p, int y, int x, const Visit& visit) {
  const Reach rows = reach(y, p.height, p.kernel_y, p.dilation_y);
  const Reach columns = reach(x, p.width, p.kernel_x, p.dilation_x);
  for (int i = rows.first; i < rows.first + rows.count; ++i)
    for (int j = columns.first; j < columns.first + columns.count; ++j) {
      const int back_i = p.kernel_y - 1 - i, back_j = p.kernel_x - 1 - j;
      visit(kBack ? back_i * p.kernel_x + back_j : i * p.kernel_x + j,
            tap_at(y, i, p.kernel_y, p.dilation_y), tap_at(x, j, p.kernel_x, p.dilation_x));
    }
}

// The tap that each window's maximum comes from, as a float; -1: the window has none.
template <DType kType>
void find_maxima(const LocalPoolParams& p, int64_t b, int64_t c, int64_t n, float* found) {
  using E = Elements<kType>;
  for (int y = 0; y < p.height; ++y)
    for (int x = 0; x < p.width; ++x) {
      vf best = set(-kInfinity), tap = set(-1.f);
      bool none = true;
      for_taps<false>(p, y, x, [&](int t, int64_t at_y, int64_t at_x) TM_LAMBDA {
        if (!counts(p, b, at_y, at_x)) return;
        const vf value = E::load_n(p.x, b * p.x_batch + at_y * p.x_line + at_x * p.x_token + c, n);
        const vf number = set(static_cast<float>(t));
        if (none) {
          best = value;
          tap = number;
          none = false;
          return;
        }
        // A NaN is neither less nor equal: it is taken, and stays.
        const vm stays = either(less(value, best), equal(value, best)),
                 is_number = equal(best, best);
        tap = select(is_number, select(stays, tap, number), tap);
        best = select(is_number, select(stays, best, value), best);
      });
      store(found + (int64_t{y} * p.width + x) * kWidth, tap);
    }
}

template <DType kType>
void maximum_backward(const LocalPoolBackwardParams& q) {
  using E = Elements<kType>;
  const LocalPoolParams& p = q.forward;
  const int64_t vectors = ceil_div(p.channels, kWidth);
  cpu::parallel_items(p.batch * vectors, threads_for(p), [&](cpu::ItemCounter& items) {
    cpu::Workspace memory(int64_t{p.height} * p.width * kWidth);
    float* found = memory.take(int64_t{p.height} * p.width * kWidth);
    for (int64_t item; (item = items.next()) >= 0;) {
      const int64_t b = item / vectors, c = item % vectors * kWidth;
      const int64_t n = std::min<int64_t>(kWidth, p.channels - c);
      const auto dout = [&](int64_t y, int64_t x) TM_LAMBDA {
        return E::load_n(q.dout, b * q.dout_batch + y * q.dout_line + x * q.dout_token + c, n);
      };
      find_maxima<kType>(p, b, c, n, found);
      for (int y = 0; y < p.height; ++y)
        for (int x = 0; x < p.width; ++x) {
          vf sum = zero();
          for_taps<true>(p, y, x, [&](int t, int64_t at_y, int64_t at_x) TM_LAMBDA {
            const vm mine =
                equal(load(found + (at_y * p.width + at_x) * kWidth), set(static_cast<float>(t)));
            sum = sum + select(mine, dout(at_y, at_x), zero());
          });
          if (p.subtract_input) sum = sum - dout(y, x);
          E::store_n(p.out, ((b * p.height + y) * p.width + x) * p.channels + c, sum, n);
        }
    }
  });
}

}  // namespace

void local_pool(const LocalPoolParams& p) {
  visit_elements(p.dtype, [&]<DType kType>(Elements<kType>) {
    p.is_max ? forward<kType, true>(p) : forward<kType, false>(p);
  });
}

void local_pool_backward(const LocalPoolBackwardParams& q) {
  visit_elements(q.forward.dtype, [&]<DType kType>(Elements<kType>) {
    q.forward.is_max ? maximum_backward<kType>(q) : mean_backward<kType>(q);
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
