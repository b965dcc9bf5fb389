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
    TM_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = c + v * kWidth, lanes = kVectors > 1 ? kWidth : n;
      vf best = set(-kInfinity), found = set(-1.f);
      if (taps.count > 0) {
        best = Elements<kType>::load_n(taps.rows[0], at, lanes);
        found = set(taps.numbers[0]);
      }
      for (int t = 1; t < taps.count; ++t) {
        const vf x = Elements<kType>::load_n(taps.rows[t], at, lanes);
        // A NaN is neither less nor equal: it is taken, and stays.
        const vm stays = either(less(x, best), equal(x, best)), is_number = equal(best, best);
        found = select(is_number, select(stays, found, set(taps.numbers[t])), found);
        best = select(is_number, select(stays, best, x), best);
      }
      if (value) Elements<DType::float32>::store_n(value, at, best, lanes);
      Elements<DType::float32>::store_n(tap, at, found, lanes);
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
    TM_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = c + v * kWidth, lanes = kVectors > 1 ? kWidth : n;
      vf sum = zero();
      for (int t = 0; t < gradients.count; ++t) {
        const vf tap = Elements<DType::float32>::load_n(found[t], at, lanes);
        const vf x = Elements<kType>::load_n(gradients.rows[t], at, lanes);
        sum = sum + select(equal(tap, set(gradients.numbers[t])), x, zero());
      }
      finish(at, lanes, sum);
    }
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
    const Map map = map_of_x(p_, sizeof(typename Elements<kType>::type));
    Taps taps;
    for (int x = 0; x < p_.width; ++x) {
      const Reach r = reaches_[x];
      taps.count = 0;
      for (int i = 0, from = r.first; i < r.count; ++i, from += p_.dilation_x)
        if (counts(p_, b_, y, from))
          taps.add(map.at(b_, y, from, c_), static_cast<float>(r.tap + i));
      some(y, x) = taps.count > 0;
      first_maximum<kType>(taps, channels_, values_ + at(y, x), rows_ + at(y, x));
    }
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
    using E = Elements<kType>;
    const Map map = map_of_dout(q_, sizeof(typename E::type));
    Taps gradients;
    const float* found[kMostTaps];
    for (int x = 0; x < p_.width; ++x) {
      const Reach r = reaches_[x];
      gradients.count = 0;
      for (int i = 0, from = r.first; i < r.count; ++i, from += p_.dilation_x) {
        found[gradients.count] = rows_ + at(y, from);
        gradients.add(line_ + from * channels_, static_cast<float>(p_.kernel_x - 1 - r.tap - i));
      }
      sum_of_taps<DType::float32>(gradients, found, channels_,
                                  [&](int64_t c, int64_t n, vf sum) TM_LAMBDA {
                                    if (p_.subtract_input)
                                      sum = sum - E::load_n(map.at(b_, y, x, c_), c, n);
                                    E::store_n(p_.out, out_at(p_, b_, y, x, c_ + c), sum, n);
                                  });
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

template <DType kType>
void backward(const LocalPoolBackwardParams& q) {
  const LocalPoolParams& p = q.forward;
  const std::vector<Reach> reaches = reaches_x(p);
  const int64_t halo = std::min<int64_t>(int64_t{p.kernel_y / 2} * p.dilation_y, p.height);
  const int64_t lines = 2 * halo + 1;
  const int64_t step = channels_at_once(p), parts = ceil_div(p.channels, step);
  cpu::parallel_items(p.batch * parts, threads_for(p), [&](cpu::ItemCounter& items) {
    cpu::Workspace memory(Slice<kType>::floats(p, lines, step));
    Slice<kType> slice(q, reaches.data(), lines, memory.take(Slice<kType>::floats(p, lines, step)));
    for (int64_t item; (item = items.next()) >= 0;) {
      const int64_t c = item % parts * step;
      slice.run(item / parts, c, std::min(step, p.channels - c));
    }
  });
}

}  // namespace

void maximum_backward(const LocalPoolBackwardParams& q) {
  visit_elements(q.forward.dtype, [&]<DType kType>(Elements<kType>) { backward<kType>(q); });
}

}  // namespace tokenmill::TOKENMILL_ISA
