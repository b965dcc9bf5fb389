// Rows that are rotated or scaled are widened to float32 and rounded in the L1 cache. Products and
// sums of the rotation are rounded separately (CMakeLists.txt: no contraction), as on every
// backend: the input of the float8 rounding then has the same bits everywhere.
#include <cstring>

#include "cpu/float8.h"
#include "cpu/parallel.h"
#include "select/kv_cache_append/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kRoom = 576 + kWidth;  // floats per row: the largest head_dim, in whole vectors
constexpr int64_t kTokensAtOnce = 8;     // tokens per item

template <DType kType, DType kCache>
struct Worker {
  using E = Elements<kType>;
  using C = Elements<kCache>;
  static constexpr bool kScaled = kType != kCache;
  const AppendParams& p;

  template <typename Element>
  static Element* row(const Rows& rows, int64_t b, int64_t s, int64_t h) {
    return static_cast<Element*>(rows.data) + b * rows.batch + s * rows.seq + h * rows.head;
  }

  // Lanes past the end of the row are 0.
  static void widen(const void* from, int64_t dim, float* x) {
    for (int64_t i = 0; i < dim; i += kWidth) store(x + i, E::load_n(from, i, dim - i));
  }

  // x: the rotated columns
  void rotate(int64_t t, float* x) const {
    using F = Elements<DType::float32>;
    const float* cosine = p.cos + p.position(t) * p.cos_stride;
    const float* sine = p.sin + p.position(t) * p.sin_stride;
    if (p.interleaved) {
      for (int64_t i = 0; i < p.pairs; ++i) {
        const float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * cosine[i] - b * sine[i];
        x[2 * i + 1] = b * cosine[i] + a * sine[i];
      }
      return;
    }
    for (int64_t i = 0; i < p.pairs; i += kWidth) {
      const int64_t n = p.pairs - i;
      const vf c = F::load_n(cosine, i, n), s = F::load_n(sine, i, n);
      const vf a = F::load_n(x, i, n), b = F::load_n(x, p.pairs + i, n);
      F::store_n(x, i, a * c - b * s, n);
      F::store_n(x, p.pairs + i, b * c + a * s, n);
    }
  }

  static float scale_of_row(const float* x, int64_t dim) {
    vf maximum = zero();
    for (int64_t i = 0; i < dim; i += kWidth) {
      const vf size = abs_of(load(x + i));
      maximum = max_of(maximum, select(less(size, set(__builtin_inff())), size, zero()));
    }
    const float scale = max_lanes(maximum) / kFloat8Max;
    return scale < kMinScale ? 1.f : scale;
  }

  template <typename To>
  static void narrow(const float* x, int64_t dim, To to) {
    for (int64_t i = 0; i < dim; i += kWidth) to(i, load(x + i), dim - i);
  }

  // Copies a row in its own dtype; columns that are not rotated keep their bits.
  void copy(int64_t t, const typename E::type* from, int64_t dim, bool rotated,
            typename E::type* to) const {
    const int64_t before = rotated ? p.rope_offset : dim, turning = 2 * p.pairs;
    std::memcpy(to, from, before * sizeof *from);
    if (!rotated) return;
    float x[kRoom];
    widen(from + before, turning, x);
    rotate(t, x);
    auto* turned = to + before;
    narrow(x, turning, [&](int64_t i, vf y, int64_t n) TM_LAMBDA { E::store_n(turned, i, y, n); });
    const int64_t after = before + turning;
    std::memcpy(to + after, from + after, (dim - after) * sizeof *from);
  }

  void append(const AppendedRows& a, int64_t t, AppendParams::Place at, bool rotated) const {
    for (int64_t h = 0; h < p.heads; ++h) {
      const auto* from = row<const typename E::type>(a.rows, 0, t, h);
      auto* to = row<typename C::type>(a.cache, at.page, at.row, h);
      if constexpr (!kScaled) {
        copy(t, from, a.dim, rotated, to);
        continue;
      }
      float x[kRoom];
      widen(from, a.dim, x);
      if (rotated) rotate(t, x + p.rope_offset);
      float scale = 1;
      if (a.token_scale.data)
        scale = *row<float>(a.token_scale, at.page, at.row, h) = scale_of_row(x, a.dim);
      else if (a.scale)
        scale = a.scale[h * a.scale_head];
      if (scale != 1)
        narrow(x, a.dim,
               [&](int64_t i, vf y, int64_t n) TM_LAMBDA { C::store_n(to, i, y / set(scale), n); });
      else
        narrow(x, a.dim, [&](int64_t i, vf y, int64_t n) TM_LAMBDA { C::store_n(to, i, y, n); });
    }
  }

  void rotate_queries(int64_t t) const {
    for (int64_t h = 0; h < p.query_heads; ++h)
      copy(t, row<const typename E::type>(p.q, 0, t, h), p.k.dim, true,
           static_cast<typename E::type*>(p.q_out) + (t * p.query_heads + h) * p.k.dim);
  }

  void run(int64_t t) const {
    const AppendParams::Place at = p.place(t);
    if (at.page >= 0) {
      append(p.k, t, at, p.cos);
      if (p.value_heads > 0) append(p.v, t, at, false);
    }
    rotate_queries(t);
  }
};

template <DType kType, DType kCache>
void append(const AppendParams& p) {
  const double rows = static_cast<double>(p.tokens * (p.heads + p.value_heads + p.query_heads));
  const Worker<kType, kCache> worker{p};
  cpu::parallel_items(ceil_div(p.tokens, kTokensAtOnce),
                      rows * static_cast<double>(p.k.dim) < 1e5 ? 1 : cpu::num_threads(),
                      [&](cpu::ItemCounter& items) {
                        for (int64_t item; (item = items.next()) >= 0;) {
                          const int64_t first = item * kTokensAtOnce;
                          for (int64_t i = 0; i < kTokensAtOnce && first + i < p.tokens; ++i)
                            worker.run(first + i);
                        }
                      });
}

template <DType kType>
void append_to(const AppendParams& p) {
  p.cache_dtype == kType ? append<kType, kType>(p) : append<kType, DType::float8_e4m3fn>(p);
}

}  // namespace

void kv_cache_append(const AppendParams& p) {
  p.dtype == DType::float16    ? append_to<DType::float16>(p)
  : p.dtype == DType::bfloat16 ? append_to<DType::bfloat16>(p)
                               : append_to<DType::float32>(p);
}

}  // namespace tokenmill::TOKENMILL_ISA
