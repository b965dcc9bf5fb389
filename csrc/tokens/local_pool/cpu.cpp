// Windows are separable: window columns of a line of tokens are pooled first, then the rows of the
// result. The data stays in cache from line to line.
#include "tokens/local_pool/cpu_windows.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

// Calls finish(c, n, pooled) for n channels from c.
template <DType kType, bool kMax, bool kScaled, typename Finish>
TM_INLINE void pool(const Taps& taps, int64_t channels, const Finish& finish) {
  for_vectors(channels, [&](auto vectors, int64_t c, int64_t n) TM_LAMBDA {
    constexpr int kVectors = decltype(vectors)::value;
    vf pooled[kVectors];
    TM_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) pooled[v] = set(kMax ? -kInfinity : 0);
    for (int t = 0; t < taps.count; ++t) {
      TM_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) {
        vf x = Elements<kType>::load_n(taps.rows[t], c + v * kWidth, kVectors > 1 ? kWidth : n);
        if constexpr (kScaled) x = x * set(taps.numbers[t]);
        pooled[v] = kMax ? max_or_nan(x, pooled[v]) : pooled[v] + x;
      }
    }
    TM_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) finish(c + v * kWidth, kVectors > 1 ? kWidth : n, pooled[v]);
  });
}

// Input of the pooling and its weights: x and its mask, or dout over the divisors of its means.
struct Source {
  Map map;
  const float* scales;  // [height, width] of one sequence; null: the mask
};

// A line of windows of one sequence, and channels c .. c + channels - 1 of it.
struct Line {
  int64_t b;
  int y;
  int64_t c, channels;
  float* columns;  // [width, channels]: pooled columns of the windows
};

template <DType kType, bool kMax, bool kScaled>
void pool_columns(const LocalPoolParams& p, const Source& s, const Line& at) {
  const Reach rows = reach_y(p, at.y);
  const bool all = kScaled || !p.mask;
  Taps taps;
  for (int x = 0; x < p.width; ++x) {
    if (all && x > 0) {
      for (int i = 0; i < rows.count; ++i) taps.rows[i] += s.map.token;
    } else {
      taps.count = 0;
      for (int i = 0, y = rows.first; i < rows.count; ++i, y += p.dilation_y)
        if (all || counts(p, at.b, y, x)) taps.add(s.map.at(at.b, y, x, at.c));
    }
    if (kScaled)
      for (int i = 0; i < rows.count; ++i)
        taps.numbers[i] = s.scales[(rows.first + int64_t{i} * p.dilation_y) * p.width + x];
    float* to = at.columns + x * at.channels;
    pool<kType, kMax, kScaled>(taps, at.channels, [&](int64_t c, int64_t n, vf pooled) TM_LAMBDA {
      Elements<DType::float32>::store_n(to, c, pooled, n);
    });
  }
}

// Windows of three adjacent columns without a mask: each column is pooled once and stays in
// registers while the window slides.
template <DType kType, bool kMax, bool kScaled, typename Finish>
TM_INLINE void slide_line(const LocalPoolParams& p, const Source& s, const Line& at,
                          const Finish& finish) {
  const Reach rows = reach_y(p, at.y);
  const int64_t step = p.dilation_y * s.map.line, scale_step = int64_t{p.dilation_y} * p.width;
  for_vectors(at.channels, [&](auto vectors, int64_t c, int64_t n) TM_LAMBDA {
    constexpr int kVectors = decltype(vectors)::value;
    const int64_t lanes = kVectors > 1 ? kWidth : n;
    const auto both = [](vf a, vf b) TM_LAMBDA { return kMax ? max_or_nan(b, a) : a + b; };
    const auto pool_column = [&](int x, vf(&pooled)[kVectors]) TM_LAMBDA {
      TM_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) pooled[v] = set(kMax ? -kInfinity : 0);
      if (x == p.width) return;
      const char* const first = s.map.at(at.b, rows.first, x, at.c + c);
      const float* const scales = kScaled ? s.scales + int64_t{rows.first} * p.width + x : nullptr;
      for (int i = 0; i < rows.count; ++i) {
        const vf scale = set(kScaled ? scales[i * scale_step] : 1);
        TM_UNROLL(4)
        for (int v = 0; v < kVectors; ++v) {
          const vf e = Elements<kType>::load_n(first + i * step, v * kWidth, lanes);
          pooled[v] = both(pooled[v], kScaled ? e * scale : e);
        }
      }
    };
    vf left[kVectors], here[kVectors], right[kVectors];
    TM_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) left[v] = set(kMax ? -kInfinity : 0);
    pool_column(0, here);
    for (int x = 0; x < p.width; ++x) {
      pool_column(x + 1, right);
      TM_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) {
        finish(x, at.c + c + v * kWidth, lanes, both(both(left[v], here[v]), right[v]));
        left[v] = here[v];
        here[v] = right[v];
      }
    }
  });
}

// Calls finish(x, c, n, pooled) for each token of a line.
template <DType kType, bool kMax, bool kScaled, typename Finish>
TM_INLINE void pool_line(const LocalPoolParams& p, const Source& s, const Reach* reaches,
                         const Line& at, const Finish& finish) {
  // With more vectors of channels, each would take a separate pass along the line, with a large
  // stride between tokens.
  const bool few = p.channels <= 4 * kWidth;
  if (few && p.kernel_y > 1 && p.kernel_x == 3 && p.dilation_x == 1 && (kScaled || !p.mask))
    return slide_line<kType, kMax, kScaled>(p, s, at, finish);
  const bool columns = p.kernel_y > 1;
  if (columns) pool_columns<kType, kMax, kScaled>(p, s, at);
  Taps taps;
  for (int x = 0; x < p.width; ++x) {
    const Reach r = reaches[x];
    taps.count = 0;
    for (int i = 0, from = r.first; i < r.count; ++i, from += p.dilation_x) {
      if (columns)
        taps.add(at.columns + from * at.channels);
      else if (kScaled)
        taps.add(s.map.at(at.b, at.y, from, at.c), s.scales[int64_t{at.y} * p.width + from]);
      else if (counts(p, at.b, at.y, from))
        taps.add(s.map.at(at.b, at.y, from, at.c));
    }
    const auto finish_x = [&](int64_t c, int64_t n, vf pooled)
                              TM_LAMBDA { finish(x, at.c + c, n, pooled); };
    if (columns)
      pool<DType::float32, kMax, false>(taps, at.channels, finish_x);
    else
      pool<kType, kMax, kScaled>(taps, at.channels, finish_x);
  }
}

// Number of unmasked tokens in the window of each token of a line.
void count_line(const LocalPoolParams& p, const Reach* reaches, int64_t b, int y, int* columns,
                int* line) {
  const Reach rows = reach_y(p, y);
  std::fill(columns, columns + p.width, p.mask ? 0 : rows.count);
  for (int i = 0, from = rows.first; p.mask && i < rows.count; ++i, from += p.dilation_y)
    for (int x = 0; x < p.width; ++x) columns[x] += counts(p, b, from, x);
  for (int x = 0; x < p.width; ++x) {
    const Reach r = reaches[x];
    line[x] = 0;
    for (int i = 0; i < r.count; ++i) line[x] += columns[r.first + i * p.dilation_x];
  }
}

// Divisor of a mean; 1 if the window is empty.
float divisor(const LocalPoolParams& p, int count) {
  return p.count_include_pad ? static_cast<float>(p.kernel_y * p.kernel_x)
                             : static_cast<float>(std::max(count, 1));
}

// Calls visit(b, begin, end) for ranges of lines of a sequence: all of them with one thread.
template <typename Visit>
void for_lines(const LocalPoolParams& p, const Visit& visit) {
  const int threads = threads_for(p);
  const int64_t fair = ceil_div(p.batch * p.height, 8 * threads);
  const int64_t step = threads == 1 ? p.height : std::min<int64_t>(fair, p.height);
  const int64_t parts = ceil_div(p.height, step);
  cpu::parallel_items(p.batch * parts, threads, [&](cpu::ItemCounter& items) {
    for (int64_t item; (item = items.next()) >= 0;) {
      const int64_t begin = item % parts * step;
      visit(item / parts, static_cast<int>(begin),
            static_cast<int>(std::min<int64_t>(begin + step, p.height)));
    }
  });
}

template <DType kType, bool kMax>
void forward(const LocalPoolParams& p) {
  // 16-bit outputs hide the rounding of a reciprocal
  constexpr bool kDivides = kType == DType::float32;
  const Source source{map_of_x(p, sizeof(typename Elements<kType>::type)), nullptr};
  const int64_t step = p.kernel_y > 1 ? channels_at_once(p) : p.channels;
  const int64_t floats = p.kernel_y > 1 ? step * p.width : 0;
  const std::vector<Reach> reaches = reaches_x(p);
  for_lines(p, [&](int64_t b, int begin, int end) {
    cpu::Workspace memory(floats + 3 * p.width + 48);
    float *columns = memory.take(floats), *factors = memory.take(p.width);
    int *numbers = reinterpret_cast<int*>(memory.take(2 * p.width)), *count = numbers + p.width;
    for (int y = begin; y < end; ++y) {
      count_line(p, reaches.data(), b, y, numbers, count);
      for (int x = 0; x < p.width; ++x)
        factors[x] = kDivides ? divisor(p, count[x]) : 1 / divisor(p, count[x]);
      for (int64_t c = 0; c < p.channels; c += step) {
        const Line line{b, y, c, std::min(step, p.channels - c), columns};
        pool_line<kType, kMax, false>(
            p, source, reaches.data(), line,
            [&](int x, int64_t at, int64_t n, vf pooled) TM_LAMBDA {
              if (!kMax) pooled = kDivides ? pooled / set(factors[x]) : pooled * set(factors[x]);
              if (kMax && count[x] == 0) pooled = zero();
              if (p.subtract_input)
                pooled = pooled - Elements<kType>::load_n(source.map.at(b, y, x, 0), at, n);
              Elements<kType>::store_n(p.out, out_at(p, b, y, x, at), pooled, n);
            });
      }
    }
  });
}

// Without a mask, a token is in the windows of exactly the tokens in its own window.
template <DType kType>
void backward(const LocalPoolBackwardParams& q) {
  const LocalPoolParams& p = q.forward;
  const int64_t step = p.kernel_y > 1 ? channels_at_once(p) : p.channels;
  const int64_t floats = p.kernel_y > 1 ? step * p.width : 0;
  const int64_t halo = int64_t{p.kernel_y / 2} * p.dilation_y, height = p.height;
  const std::vector<Reach> reaches = reaches_x(p);
  for_lines(p, [&](int64_t b, int begin, int end) {
    cpu::Workspace memory(height * p.width + floats + 2 * p.width + 48);
    float *columns = memory.take(floats), *scales = memory.take(height * p.width);
    int *numbers = reinterpret_cast<int*>(memory.take(2 * p.width)), *count = numbers + p.width;
    for (int64_t y = std::max<int64_t>(begin - halo, 0); y < std::min(end + halo, height); ++y) {
      count_line(p, reaches.data(), b, static_cast<int>(y), numbers, count);
      for (int x = 0; x < p.width; ++x)
        scales[y * p.width + x] = count[x] ? 1 / divisor(p, count[x]) : 0;
    }
    const Source source{map_of_dout(q, sizeof(typename Elements<kType>::type)), scales};
    for (int y = begin; y < end; ++y)
      for (int64_t c = 0; c < p.channels; c += step) {
        const Line line{b, y, c, std::min(step, p.channels - c), columns};
        pool_line<kType, false, true>(
            p, source, reaches.data(), line,
            [&](int x, int64_t at, int64_t n, vf pooled) TM_LAMBDA {
              if (!counts(p, b, y, x)) pooled = zero();
              if (p.subtract_input)
                pooled = pooled - Elements<kType>::load_n(source.map.at(b, y, x, 0), at, n);
              Elements<kType>::store_n(p.out, out_at(p, b, y, x, at), pooled, n);
            });
      }
  });
}

}  // namespace

void mean_backward(const LocalPoolBackwardParams& q) {
  visit_elements(q.forward.dtype, [&]<DType kType>(Elements<kType>) { backward<kType>(q); });
}

void local_pool(const LocalPoolParams& p) {
  visit_elements(p.dtype, [&]<DType kType>(Elements<kType>) {
    p.is_max ? forward<kType, true>(p) : forward<kType, false>(p);
  });
}

void local_pool_backward(const LocalPoolBackwardParams& q) {
  q.forward.is_max ? maximum_backward(q) : mean_backward(q);
}

}  // namespace tokenmill::TOKENMILL_ISA
