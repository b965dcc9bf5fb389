// Gradient of max pooling, separable like the maximum: the first maximum of a window in row-major
// order is the first maximum of its row, in the first row that attains the window's maximum. A
// gradient is routed first to that row of its window (along Y), then to the token (along X).
// Elements are compared as integers of the same width; lines are kept in ring buffers.
#include <initializer_list>

#include "tokens/local_pool/cpu_lanes.h"
#include "tokens/local_pool/cpu_windows.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

// Calls visit(Count<n>()), with n known at compile time for small windows; else 0.
template <int kCount>
struct Count {
  static constexpr int value = kCount;
};
template <typename Visit>
TM_INLINE void visit_count(int count, const Visit& visit) {
  switch (count) {
    case 2:
      return visit(Count<2>());
    case 3:
      return visit(Count<3>());
    default:
      return visit(Count<0>());
  }
}

// Rows that windows gather from; the first one is tap `tap`.
template <typename Row>
struct Rows {
  Rows(int count, int tap) : count(count), tap(tap) {}

  const Row* at[kMaxTaps];
  int count, tap;
};

// Prefetches the row of the next line, which hardware prefetchers do not follow, while this one is
// read.
TM_INLINE void fetch(const char* from, int64_t bytes) {
  constexpr int64_t kLineBytes = 64;
  for (int64_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(from + i, 0, 3);
}

// First maximum over rows of keys and its tap, -1 if there is none.
template <class L>
TM_INLINE void first_maximum(const Rows<typename L::Key>& rows, int64_t length,
                             typename L::Key* value, typename L::Key* tap) {
  using Key = typename L::Key;
  visit_count(rows.count, [&](auto known) TM_LAMBDA {
    constexpr int kCount = decltype(known)::value;
    const int count = kCount ? kCount : rows.count;
    for (int64_t c = 0; c < length; c += L::kCount) {
      typename L::vk best = L::all(L::kNone), found = L::all(-1);
      TM_UNROLL(4)
      for (int t = 0; t < count; ++t) {
        const typename L::vk x = L::load(rows.at[t] + c);
        const auto greater = x > best;
        best = greater ? x : best;
        found = greater ? L::all(static_cast<Key>(rows.tap + t)) : found;
      }
      if (value) L::store(value + c, best);
      L::store(tap + c, found);
    }
  });
}

// Calls finish(k, sum) with the sums of gradients, rows of elements, whose tap was found, for
// channels from k. The tap of row i is tap - i.
template <class L, int kCount, typename Finish>
TM_INLINE void sum_elements(const Rows<char>& gradients, const Rows<typename L::Key>& found,
                            int64_t channels, const Finish& finish) {
  using Key = typename L::Key;
  const int count = kCount ? kCount : gradients.count;
  for (int64_t k = 0; k < channels; k += L::kCount) {
    vf sum[L::kHalves] = {}, wide[L::kHalves];
    TM_UNROLL(4)
    for (int i = 0; i < count; ++i) {
      const auto number = L::all(static_cast<Key>(gradients.tap - i));
      const typename L::vk here = L::load(found.at[i] + k) == number;
      L::widen(L::load_n(gradients.at[i] + k * sizeof(Key), channels - k) & here, wide);
      TM_UNROLL(2)
      for (int h = 0; h < L::kHalves; ++h) sum[h] = sum[h] + wide[h];
    }
    finish(k, sum);
  }
}

// Channels of sequences in input and output layout.
template <DType kType>
struct Maps {
  using L = Lanes<kType>;
  using Key = typename L::Key;

  explicit Maps(const LocalPoolBackwardParams& q)
      : p(q.forward), x(map_of_x(p, sizeof(Key))), dout(map_of_dout(q, sizeof(Key))) {}

  // Keys of a token; a masked token is smaller than all others.
  TM_INLINE void load_keys(int64_t b, int64_t y, int64_t at_x, int64_t c, int64_t channels,
                           Key* to) const {
    const char* const from = x.at(b, y, at_x, c);
    const bool some = counts(p, b, y, at_x);
    for (int64_t k = 0; k < channels; k += L::kCount)
      L::store(to + k,
               some ? L::keys(L::load_n(from + k * sizeof(Key), channels - k)) : L::all(L::kNone));
  }

  // Stores the gradient of n channels from c of a token.
  TM_INLINE void store(int64_t b, int64_t y, int64_t at_x, int64_t c, int64_t n,
                       const vf (&gradient)[L::kHalves]) const {
    vf sum[L::kHalves], own[L::kHalves];
    TM_UNROLL(2)
    for (int h = 0; h < L::kHalves; ++h) sum[h] = gradient[h];
    if (p.subtract_input) {
      L::widen(L::load_n(dout.at(b, y, at_x, c), n), own);
      TM_UNROLL(2)
      for (int h = 0; h < L::kHalves; ++h) sum[h] = sum[h] - own[h];
    }
    L::store_n(static_cast<Key*>(p.out) + out_at(p, b, y, at_x, c), L::narrow(sum), n);
  }

  const LocalPoolParams& p;
  const Map x, dout;
};

// Channels c .. c + channels - 1 of one sequence. Rows of channels are padded to whole vectors.
template <DType kType>
class Slice {
  using L = Lanes<kType>;
  using Key = typename L::Key;

 public:
  Slice(const LocalPoolBackwardParams& q, const Reach* reaches, int64_t lines, int64_t channels)
      : maps_(q),
        p_(q.forward),
        reaches_(reaches),
        lines_(lines),
        step_(round_up(channels, L::kCount)),
        memory_(p_.width * step_ * (ceil_div((3 * lines + 1) * sizeof(Key), sizeof(float)) + 1) +
                5 * 16) {
    const int64_t line = p_.width * step_;
    keys_ = take(line);
    for (Key** ring : {&values_, &rows_, &columns_}) *ring = take(lines * line);
    line_ = memory_.take(line);
  }

  void run(int64_t b, int64_t c, int64_t channels) {
    b_ = b, c_ = c, channels_ = channels;
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
  Key* take(int64_t keys) {
    return reinterpret_cast<Key*>(memory_.take(ceil_div(keys * sizeof(Key), sizeof(float))));
  }
  int64_t at(int64_t y, int64_t x) const { return (y % lines_ * p_.width + x) * step_; }

  // Calls visit(begin, end, reach of begin) for runs of tokens of a line whose windows have the
  // same extent.
  template <typename Visit>
  TM_INLINE void for_each_run(const Visit& visit) const {
    for (int x = 0, end; x < p_.width; x = end) {
      const Reach r = reaches_[x];
      for (end = x + 1;
           end < p_.width && reaches_[end].count == r.count && reaches_[end].tap == r.tap;)
        ++end;
      visit(x, end, r);
    }
  }

  void find_in_rows(int y) {
    for (int x = 0; x < p_.width; ++x) {
      fetch(maps_.x.at(b_, y + 1, x, c_), channels_ * sizeof(Key));
      maps_.load_keys(b_, y, x, c_, channels_, keys_ + x * step_);
    }
    for_each_run([&](int begin, int end, const Reach& r) TM_LAMBDA {
      Rows<Key> rows(r.count, r.tap);
      for (int i = 0; i < r.count; ++i)
        rows.at[i] = keys_ + (r.first + int64_t{i} * p_.dilation_x) * step_;
      first_maximum<L>(rows, (end - begin) * step_, values_ + at(y, begin), rows_ + at(y, begin));
    });
  }

  void find_in_columns(int y) {
    const Reach r = reach_y(p_, y);
    Rows<Key> rows(r.count, r.tap);
    for (int i = 0; i < r.count; ++i)
      rows.at[i] = values_ + at(r.first + int64_t{i} * p_.dilation_y, 0);
    first_maximum<L>(rows, p_.width * step_, nullptr, columns_ + at(y, 0));
  }

  // line_: gradient of dout routed to the rows of windows on line y.
  void along_y(int y) {
    const Reach r = reach_y(p_, y);
    Rows<char> gradients(r.count, p_.kernel_y - 1 - r.tap);
    Rows<Key> found(r.count, 0);
    for (int i = 0, from = r.first; i < r.count; ++i, from += p_.dilation_y) {
      gradients.at[i] = maps_.dout.at(b_, from, 0, c_);
      found.at[i] = columns_ + at(from, 0);
    }
    float* to = line_;
    visit_count(r.count, [&](auto known) TM_LAMBDA {
      for (int x = 0; x < p_.width; ++x, to += step_) {
        fetch(gradients.at[r.count - 1] + maps_.dout.line, channels_ * sizeof(Key));
        sum_elements<L, decltype(known)::value>(
            gradients, found, channels_, [&](int64_t k, const vf(&sum)[L::kHalves]) TM_LAMBDA {
              TM_UNROLL(2)
              for (int h = 0; h < L::kHalves; ++h) store(to + k + h * kWidth, sum[h]);
            });
        for (int i = 0; i < r.count; ++i) {
          gradients.at[i] += maps_.dout.token;
          found.at[i] += step_;
        }
      }
    });
  }

  void along_x(int y) {
    const Key* const taps = rows_ + at(y, 0);
    const int64_t next = p_.dilation_x * step_;
    for_each_run([&](int begin, int end, const Reach& r) TM_LAMBDA {
      visit_count(r.count, [&](auto known) TM_LAMBDA {
        constexpr int kCount = decltype(known)::value;
        const int count = kCount ? kCount : r.count, tap = p_.kernel_x - 1 - r.tap;
        int64_t first = r.first * step_;
        for (int x = begin; x < end; ++x, first += step_)
          for (int64_t k = 0; k < channels_; k += L::kCount) {
            vf sum[L::kHalves] = {};
            TM_UNROLL(4)
            for (int i = 0; i < count; ++i) {
              const int64_t from = first + i * next + k;
              const auto number = L::all(static_cast<Key>(tap - i));
              const typename L::vk found = L::load(taps + from);
              TM_UNROLL(2)
              for (int h = 0; h < L::kHalves; ++h)
                sum[h] = sum[h] + L::where_equal(found, number, h, load(line_ + from + h * kWidth));
            }
            maps_.store(b_, y, x, c_ + k, channels_ - k, sum);
          }
      });
    });
  }

  const Maps<kType> maps_;
  const LocalPoolParams& p_;
  const Reach* reaches_;
  const int64_t lines_, step_;  // lines per ring, channels per row
  cpu::Workspace memory_;
  int64_t b_, c_, channels_;
  Key* keys_;  // [width, step]
  // [lines, width, step]: maxima of the rows of windows, their taps, and the row of the window that
  // contains a token's maximum.
  Key *values_, *rows_, *columns_;
  float* line_;  // [width, step], in the half order of widen
};

// Channels per slice: small enough to give all threads items, and to fit kLineFloats if possible.
int64_t slice_of(const LocalPoolParams& p, int64_t items, int64_t rows) {
  constexpr int64_t kMinimum = 4 * kWidth;
  int64_t step = std::max<int64_t>(kLineFloats / rows / kMinimum, 1) * kMinimum;
  while (step > kMinimum && items * ceil_div(p.channels, step) < 4 * threads_for(p))
    step = ceil_div(step / kMinimum, 2) * kMinimum;
  return std::min(step, p.channels);
}

template <DType kType>
void backward(const LocalPoolBackwardParams& q) {
  const LocalPoolParams& p = q.forward;
  const std::vector<Reach> reaches = reaches_x(p);
  const int64_t halo = std::min<int64_t>(int64_t{p.kernel_y / 2} * p.dilation_y, p.height);
  const int64_t step = slice_of(p, p.batch, p.width), parts = ceil_div(p.channels, step);
  cpu::parallel_items(p.batch * parts, threads_for(p), [&](cpu::ItemCounter& items) {
    Slice<kType> slice(q, reaches.data(), 2 * halo + 1, step);
    for (int64_t item; (item = items.next()) >= 0;) {
      const int64_t c = item % parts * step;
      slice.run(item / parts, c, std::min(step, p.channels - c));
    }
  });
}

// Windows of one row: only keys and taps of a run of tokens are needed, and gradients are routed
// directly to tokens.
template <DType kType>
void backward_of_lines(const LocalPoolBackwardParams& q) {
  using L = Lanes<kType>;
  using Key = typename L::Key;
  const LocalPoolParams& p = q.forward;
  const Maps<kType> maps(q);
  const std::vector<Reach> reaches = reaches_x(p);
  const int halo =
      static_cast<int>(std::min<int64_t>(int64_t{p.kernel_x / 2} * p.dilation_x, p.width));
  const int ring = std::min(2 * halo + 1, p.width);
  const int64_t lines = p.batch * p.height;
  const int64_t step = slice_of(p, lines, ring), parts = ceil_div(p.channels, step);
  const int64_t row = round_up(step, L::kCount);
  cpu::parallel_items(lines * parts, threads_for(p), [&](cpu::ItemCounter& items) {
    cpu::Workspace memory(2 * ring * row);
    Key* const keys = reinterpret_cast<Key*>(memory.take(2 * ring * row));
    Key* const taps = keys + ring * row;
    for (int64_t item; (item = items.next()) >= 0;) {
      const int64_t line = item / parts, b = line / p.height, c = item % parts * step;
      const int64_t channels = std::min(step, p.channels - c);
      const int y = static_cast<int>(line % p.height);
      int loaded = 0, done = 0;
      for (int x = 0; x < p.width; ++x) {
        for (; done < p.width && done <= x + halo; ++done) {
          for (; loaded < p.width && loaded <= done + halo; ++loaded) {
            fetch(maps.x.at(b, y, loaded + 1, c), channels * sizeof(Key));
            maps.load_keys(b, y, loaded, c, channels, keys + loaded % ring * row);
          }
          const Reach r = reaches[done];
          Rows<Key> rows(r.count, r.tap);
          for (int i = 0, from = r.first; i < r.count; ++i, from += p.dilation_x)
            rows.at[i] = keys + from % ring * row;
          first_maximum<L>(rows, channels, nullptr, taps + done % ring * row);
        }
        const Reach r = reaches[x];
        Rows<char> gradients(r.count, p.kernel_x - 1 - r.tap);
        Rows<Key> found(r.count, 0);
        for (int i = 0, from = r.first; i < r.count; ++i, from += p.dilation_x) {
          gradients.at[i] = maps.dout.at(b, y, from, c);
          found.at[i] = taps + from % ring * row;
        }
        visit_count(r.count, [&](auto known) TM_LAMBDA {
          sum_elements<L, decltype(known)::value>(
              gradients, found, channels, [&](int64_t k, const vf(&sum)[L::kHalves]) TM_LAMBDA {
                maps.store(b, y, x, c + k, channels - k, sum);
              });
        });
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
