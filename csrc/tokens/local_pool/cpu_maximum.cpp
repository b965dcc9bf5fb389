// The gradient of a maximum, separable like the maximum: the first in a window, row by row, is the
// first in its row, of the first row whose maximum is the greatest. A gradient goes to that row of
// its window first (along Y), and there to the token (along X). Lines follow each other in rings.
#include "tokens/local_pool/cpu_windows.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

// The first greatest of the taps, a NaN being greater than any number, and its tap; -1: there is
// none.
template <DType kType>
TM_INLINE void first_maximum(const Taps& taps, int64_t channels, float* value, float* tap) {
  for_vectors(channels, [&](auto vectors, int64_t c, int64_t n) TM_LAMBDA {
    constexpr int kVectors = decltype(vectors)::value;
    const int64_t lanes = kVectors > 1 ? kWidth : n;
    vf best[kVectors], found[kVectors];
    TM_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) {
      best[v] = set(-kInfinity);
      found[v] = set(-1.f);
      if (taps.count == 0) continue;
      best[v] = Elements<kType>::load_n(taps.rows[0], c + v * kWidth, lanes);
      found[v] = set(taps.numbers[0]);
    }
    for (int t = 1; t < taps.count; ++t) {
      const vf number = set(taps.numbers[t]);
      TM_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) {
        const vf x = Elements<kType>::load_n(taps.rows[t], c + v * kWidth, lanes);
        // A NaN is neither less nor equal: it is taken, and stays.
        const vm stays = either(less(x, best[v]), equal(x, best[v]));
        const vm is_number = equal(best[v], best[v]);
        found[v] = select(is_number, select(stays, found[v], number), found[v]);
        best[v] = select(is_number, select(stays, best[v], x), best[v]);
      }
    }
    TM_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) {
      if (value) Elements<DType::float32>::store_n(value, c + v * kWidth, best[v], lanes);
      Elements<DType::float32>::store_n(tap, c + v * kWidth, found[v], lanes);
    }
  });
}

// finish(c, n, sum) of those gradients, rows of elements, whose maximum came from the tap that
// `numbers` says.
template <DType kType, typename Finish>
TM_INLINE void sum_of_taps(const Taps& gradients, const float* const* found, int64_t channels,
                           const Finish& finish) {
  for_vectors(channels, [&](auto vectors, int64_t c, int64_t n) TM_LAMBDA {
    constexpr int kVectors = decltype(vectors)::value;
    const int64_t lanes = kVectors > 1 ? kWidth : n;
    vf sum[kVectors];
    TM_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) sum[v] = zero();
    for (int t = 0; t < gradients.count; ++t) {
      const vf number = set(gradients.numbers[t]);
      TM_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) {
        const vf tap = Elements<DType::float32>::load_n(found[t], c + v * kWidth, lanes);
        const vf x = Elements<kType>::load_n(gradients.rows[t], c + v * kWidth, lanes);
        sum[v] = sum[v] + select(equal(tap, number), x, zero());
      }
    }
    TM_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) finish(c + v * kWidth, lanes, sum[v]);
  });
}

// The maximum of a row of a window, and the tap it comes from. False: the row has no token.
template <DType kType>
bool find_in_row(const LocalPoolParams& p, const Reach& r, int64_t b, int y, int64_t c,
                 int64_t channels, float* value, float* tap) {
  const Map map = map_of_x(p, sizeof(typename Elements<kType>::type));
  Taps taps;
  for (int i = 0, from = r.first; i < r.count; ++i, from += p.dilation_x)
    if (counts(p, b, y, from)) taps.add(map.at(b, y, from, c), static_cast<float>(r.tap + i));
  first_maximum<kType>(taps, channels, value, tap);
  return taps.count > 0;
}

// The sum of the gradients, elements of kFrom, whose tap was found, for one token.
template <DType kFrom, DType kType>
void store_gradient(const LocalPoolBackwardParams& q, const Taps& gradients,
                    const float* const* found, int64_t b, int y, int x, int64_t c,
                    int64_t channels) {
  using E = Elements<kType>;
  const LocalPoolParams& p = q.forward;
  const char* own = map_of_dout(q, sizeof(typename E::type)).at(b, y, x, c);
  const int64_t to = out_at(p, b, y, x, c);
  sum_of_taps<kFrom>(gradients, found, channels, [&](int64_t at, int64_t n, vf sum) TM_LAMBDA {
    if (p.subtract_input) sum = sum - E::load_n(own, at, n);
    E::store_n(p.out, to + at, sum, n);
  });
}

// Channels c .. c + channels - 1 of one sequence.
template <DType kType>
class Slice {
 public:
  Slice(const LocalPoolBackwardParams& q, const Reach* reaches, int64_t lines, float* memory)
      : q_(q), p_(q.forward), reaches_(reaches), lines_(lines), memory_(memory) {}

  // Floats of memory, for so many channels.
  static int64_t floats(const LocalPoolParams& p, int64_t lines, int64_t channels) {
    return p.width * ((3 * lines + 1) * channels + lines);
  }

  void run(int64_t b, int64_t c, int64_t channels) {
    b_ = b, c_ = c, channels_ = channels;
    float* next = memory_;
    for (float** ring : {&values_, &rows_, &columns_}) {
      *ring = next;
      next += lines_ * p_.width * channels;
    }
    line_ = next;
    some_ = line_ + p_.width * channels;
    const int halo = static_cast<int>(lines_ / 2 < p_.height ? lines_ / 2 : p_.height);
    int rows_done = 0, columns_done = 0;
    for (int y = 0; y < p_.height; ++y) {
      for (; columns_done < std::min(y + halo + 1, p_.height); ++columns_done) {
        for (; rows_done < std::min(columns_done + halo + 1, p_.height); ++rows_done)
          find_in_rows(rows_done);
        find_in_columns(columns_done);
      }
      along_y(y);
      along_x(y);
    }
  }

 private:
  int64_t at(int64_t y, int64_t x) const { return (y % lines_ * p_.width + x) * channels_; }
  float& some(int64_t y, int64_t x) const { return some_[y % lines_ * p_.width + x]; }

  void find_in_rows(int y) {
    for (int x = 0; x < p_.width; ++x)
      some(y, x) = find_in_row<kType>(p_, reaches_[x], b_, y, c_, channels_, values_ + at(y, x),
                                      rows_ + at(y, x));
  }

  void find_in_columns(int y) {
    const Reach r = reach_y(p_, y);
    Taps taps;
    for (int x = 0; x < p_.width; ++x) {
      taps.count = 0;
      for (int i = 0, from = r.first; i < r.count; ++i, from += p_.dilation_y)
        if (some(from, x) != 0) taps.add(values_ + at(from, x), static_cast<float>(r.tap + i));
      first_maximum<DType::float32>(taps, channels_, nullptr, columns_ + at(y, x));
    }
  }

  // line_: what of dout goes to the row of windows that lies on line y.
  void along_y(int y) {
    const Map map = map_of_dout(q_, sizeof(typename Elements<kType>::type));
    const Reach r = reach_y(p_, y);
    Taps gradients;
    const float* found[kMostTaps];
    for (int x = 0; x < p_.width; ++x) {
      gradients.count = 0;
      for (int i = 0, from = r.first; i < r.count; ++i, from += p_.dilation_y) {
        found[gradients.count] = columns_ + at(from, x);
        gradients.add(map.at(b_, from, x, c_), static_cast<float>(p_.kernel_y - 1 - r.tap - i));
      }
      float* to = line_ + x * channels_;
      sum_of_taps<kType>(gradients, found, channels_, [&](int64_t c, int64_t n, vf sum) TM_LAMBDA {
        Elements<DType::float32>::store_n(to, c, sum, n);
      });
    }
  }

  void along_x(int y) {
    Taps gradients;
    const float* found[kMostTaps];
    for (int x = 0; x < p_.width; ++x) {
      const Reach r = reaches_[x];
      gradients.count = 0;
      for (int i = 0, from = r.first; i < r.count; ++i, from += p_.dilation_x) {
        found[gradients.count] = rows_ + at(y, from);
        gradients.add(line_ + from * channels_, static_cast<float>(p_.kernel_x - 1 - r.tap - i));
      }
      store_gradient<DType::float32, kType>(q_, gradients, found, b_, y, x, c_, channels_);
    }
  }

  const LocalPoolBackwardParams& q_;
  const LocalPoolParams& p_;
  const Reach* reaches_;
  int64_t lines_;  // of a ring
  float* memory_;
  int64_t b_, c_, channels_;
  // [lines, width, channels]: the maxima of the rows of windows and their taps, and which row of
  // its window has a token's maximum.
  float *values_, *rows_, *columns_;
  float* line_;  // [width, channels]
  float* some_;  // [lines, width]: whether the row of a window has a token
};

// Slices of channels that leave enough items for the threads; what fits into `floats` at best.
int64_t slice_of(const LocalPoolParams& p, int64_t items, int64_t rows) {
  constexpr int64_t kLeast = 4 * kWidth;
  int64_t step = std::max<int64_t>(kLineFloats / rows / kLeast, 1) * kLeast;
  while (step > kLeast && items * ceil_div(p.channels, step) < 4 * threads_for(p))
    step = ceil_div(step / kLeast, 2) * kLeast;
  return std::min(step, p.channels);
}

template <DType kType>
void backward(const LocalPoolBackwardParams& q) {
  const LocalPoolParams& p = q.forward;
  const std::vector<Reach> reaches = reaches_x(p);
  const int64_t halo = std::min<int64_t>(int64_t{p.kernel_y / 2} * p.dilation_y, p.height);
  const int64_t lines = 2 * halo + 1;
  const int64_t step = slice_of(p, p.batch, p.width), parts = ceil_div(p.channels, step);
  cpu::parallel_items(p.batch * parts, threads_for(p), [&](cpu::ItemCounter& items) {
    const int64_t floats = Slice<kType>::floats(p, lines, step);
    cpu::Workspace memory(floats);
    Slice<kType> slice(q, reaches.data(), lines, memory.take(floats));
    for (int64_t item; (item = items.next()) >= 0;) {
      const int64_t c = item % parts * step;
      slice.run(item / parts, c, std::min(step, p.channels - c));
    }
  });
}

// Windows of one row: the taps of a run of tokens are enough, and gradients go to tokens at once.
template <DType kType>
void backward_of_lines(const LocalPoolBackwardParams& q) {
  const LocalPoolParams& p = q.forward;
  const std::vector<Reach> reaches = reaches_x(p);
  const Map map = map_of_dout(q, sizeof(typename Elements<kType>::type));
  const int halo =
      static_cast<int>(std::min<int64_t>(int64_t{p.kernel_x / 2} * p.dilation_x, p.width));
  const int ring = std::min(2 * halo + 1, p.width);
  const int64_t lines = p.batch * p.height;
  const int64_t step = slice_of(p, lines, ring), parts = ceil_div(p.channels, step);
  cpu::parallel_items(lines * parts, threads_for(p), [&](cpu::ItemCounter& items) {
    cpu::Workspace memory(ring * step);
    float* taps = memory.take(ring * step);
    Taps gradients;
    const float* found[kMostTaps];
    for (int64_t item; (item = items.next()) >= 0;) {
      const int64_t line = item / parts, b = line / p.height, c = item % parts * step;
      const int64_t channels = std::min(step, p.channels - c);
      const int y = static_cast<int>(line % p.height);
      int done = 0;
      for (int x = 0; x < p.width; ++x) {
        for (; done < p.width && done <= x + halo; ++done)
          find_in_row<kType>(p, reaches[done], b, y, c, channels, nullptr,
                             taps + done % ring * step);
        const Reach r = reaches[x];
        gradients.count = 0;
        for (int i = 0, from = r.first; i < r.count; ++i, from += p.dilation_x) {
          found[gradients.count] = taps + from % ring * step;
          gradients.add(map.at(b, y, from, c), static_cast<float>(p.kernel_x - 1 - r.tap - i));
        }
        store_gradient<kType, kType>(q, gradients, found, b, y, x, c, channels);
      }
    }
  });
}

}  // namespace

void maximum_backward(const LocalPoolBackwardParams& q) {
  visit_elements(q.forward.dtype, [&]<DType kType>(Elements<kType>) {
    q.forward.kernel_y == 1 ? backward_of_lines<kType>(q) : backward<kType>(q);
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
