// A worker owns one head of one request and moves its tokens in order.
#include <cmath>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "select/cpu_rows.h"
#include "select/kv_cache_compact/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kSumTokens = 64;  // summed from zero: a second level of accumulation

struct Angle {
  vf cosine, sine;
};

// sin(2 pi x) for |x| <= 1/4, absolute error 1e-8.
TM_INLINE vf sine_of_turns(vf x) {
  const vf z = x * set(6.28318531f), u = z * z;
  vf p = set(1.6059044e-10f);
  p = fma(p, u, set(-2.5052108e-8f));
  p = fma(p, u, set(2.7557319e-6f));
  p = fma(p, u, set(-1.9841270e-4f));
  p = fma(p, u, set(8.3333333e-3f));
  p = fma(p, u, set(-0.166666667f));
  return fma(z * u, p, z);
}

// Angles of pairs i .. i + kWidth - 1 for a move of `delta` slots. Whole revolutions are removed
// from the two-float product, so that long moves keep their precision.
TM_INLINE Angle angle_of(const CompactParams& p, int64_t i, float delta) {
  const vf turns = load_as_float_n(p.turns, DType::float32, i, p.pairs - i);
  const vf rest = load_as_float_n(p.turns_rest, DType::float32, i, p.pairs - i);
#if defined(__FMA__)
  const vf step = set(delta), product = step * turns;
  const vf low = fma(step, turns, zero() - product) + step * rest;
#else  // without FMA: error of a product in double
  vf product, low;
  for (int l = 0; l < kWidth; ++l) {
    const double exact = static_cast<double>(delta) * static_cast<double>(turns[l]);
    product[l] = static_cast<float>(exact);
    low[l] = static_cast<float>(exact - static_cast<double>(product[l])) + delta * rest[l];
  }
#endif
  float lane[kWidth];
  store(lane, product);
  for (float& x : lane) x -= std::nearbyint(x);
  // |x| <= 1/2 plus rounding
  const vf x = load(lane) + low;
  const vf size = abs_of(x), half = set(0.5f), quarter = set(0.25f);
  const vf folded = select(less(quarter, size), half - size, size);
  const vf sine = sine_of_turns(folded);
  return {sine_of_turns(quarter - size), select(less(x, zero()), zero() - sine, sine)};
}

template <DType kType>
struct Worker {
  using E = Elements<kType>;
  using Element = typename E::type;
  const CompactParams& p;

  Element* row(const Rows& rows, int64_t at, int64_t h) const {
    return static_cast<Element*>(rows.data) + at + h * rows.head;
  }

  void rotate(const Element* from, Element* to, int64_t delta) const {
    const auto step = static_cast<float>(delta);
    const int64_t pairs = p.pairs;
    for (int64_t i = 0; i < pairs; i += kWidth) {
      const Angle a = angle_of(p, i, step);
      const int64_t there = lower(kWidth, pairs - i);
      if (!p.interleaved) {
        const vf x = E::load_n(from, i, there), y = E::load_n(from, pairs + i, there);
        E::store_n(to, i, x * a.cosine - y * a.sine, there);
        E::store_n(to, pairs + i, y * a.cosine + x * a.sine, there);
        continue;
      }
      float cosine[kWidth], sine[kWidth];
      store(cosine, a.cosine);
      store(sine, a.sine);
      for (int64_t l = 0; l < there; ++l) {
        const int64_t at = 2 * (i + l);
        const float x = first(E::load_n(from, at, 1)), y = first(E::load_n(from, at + 1, 1));
        E::store_n(to, at, set(x * cosine[l] - y * sine[l]), 1);
        E::store_n(to, at + 1, set(y * cosine[l] + x * sine[l]), 1);
      }
    }
    std::memmove(to + 2 * pairs, from + 2 * pairs, (p.key_dim - 2 * pairs) * sizeof(Element));
  }

  void move(int64_t b, int64_t h) const {
    const int32_t* list = p.list(b, h);
    for (int64_t d = 0; d < p.count(b, h); ++d) {
      const int64_t from = list[d];
      if (from == d) continue;
      const Element* key = row(p.k, p.offset(p.k, b, from), h);
      Element* to = row(p.k, p.offset(p.k, b, d), h);
      if (p.turns)
        rotate(key, to, d - from);
      else
        std::memcpy(to, key, p.key_dim * sizeof(Element));
      std::memcpy(row(p.v, p.offset(p.v, b, d), h), row(p.v, p.offset(p.v, b, from), h),
                  p.value_dim * sizeof(Element));
    }
  }

  // Adds one row to sums of `dim` floats, which have room for whole vectors.
  void add(const Element* from, int64_t dim, float* to) const {
    for (int64_t i = 0; i < dim; i += kWidth)
      store(to + i, load(to + i) + E::load_n(from, i, dim - i));
  }

  void sum_dropped(int64_t b, int64_t h) const {
    const int64_t key_width = round_up(p.key_dim, kWidth);
    const int64_t width = key_width + round_up(p.value_dim, kWidth);
    cpu::Workspace workspace(2 * round_up(width, 16));
    float *total = workspace.take(width), *part = workspace.take(width);
    std::memset(total, 0, width * sizeof(float));
    std::memset(part, 0, width * sizeof(float));
    const int32_t* list = p.list(b, h);
    const int64_t count = p.count(b, h), length = p.length(b);
    int64_t dropped = 0, next = 0;
    const auto flush = [&] {
      for (int64_t i = 0; i < width; i += kWidth)
        store(total + i, load(total + i) + load(part + i)), store(part + i, zero());
    };
    for (int64_t t = 0; t < length; ++t) {
      if (next < count && list[next] == t) {
        ++next;
        continue;
      }
      add(row(p.k, p.offset(p.k, b, t), h), p.key_dim, part);
      add(row(p.v, p.offset(p.v, b, t), h), p.value_dim, part + key_width);
      if (++dropped % kSumTokens == 0) flush();
    }
    flush();
    const int64_t at = b * p.heads + h;
    std::memcpy(p.k_sum + at * p.key_dim, total, p.key_dim * sizeof(float));
    std::memcpy(p.v_sum + at * p.value_dim, total + key_width, p.value_dim * sizeof(float));
    p.dropped[at] = static_cast<int32_t>(dropped);
  }
};

template <DType kType>
void compact(const CompactParams& p) {
  const double work = static_cast<double>(p.batch * p.heads) *
                      static_cast<double>((p.k_sum ? p.capacity : p.entries) * p.key_dim);
  const Worker<kType> worker{p};
  cpu::parallel_items(p.batch * p.heads, work < 1e5 ? 1 : cpu::num_threads(),
                      [&](cpu::ItemCounter& items) {
                        for (int64_t item; (item = items.next()) >= 0;) {
                          const int64_t b = item / p.heads, h = item % p.heads;
                          if (p.k_sum) worker.sum_dropped(b, h);
                          worker.move(b, h);
                        }
                      });
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < (p.per_head ? p.heads : 1); ++h)
      p.new_lengths[p.per_head ? b * p.heads + h : b] = static_cast<int32_t>(p.count(b, h));
}

}  // namespace

void kv_cache_compact(const CompactParams& p) {
  visit_elements(p.dtype, [&](auto e) {
    if constexpr (std::is_same_v<decltype(e), Elements<DType::float16>>)
      compact<DType::float16>(p);
    else if constexpr (std::is_same_v<decltype(e), Elements<DType::bfloat16>>)
      compact<DType::bfloat16>(p);
    else
      compact<DType::float32>(p);
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
