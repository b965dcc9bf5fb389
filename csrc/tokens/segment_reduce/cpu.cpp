// Rows reduced by segments, a segment at a time in tiles of channels that fit the registers. Long
// segments are cut into parts of a fixed length, which different workers take.
#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/workspace.h"
#include "tokens/segment_reduce/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kPart = 1024;      // places
constexpr int64_t kSumPlaces = 256;  // that one accumulator takes
constexpr int kTile = kWidth == 16 ? 16 : 8;
constexpr int64_t kParallelElements = 1 << 16;  // fewer are not worth a parallel region

TM_INLINE bool is_extreme(const SegmentReduceParams& p) {
  return p.reduce == Reduce::amax || p.reduce == Reduce::amin;
}

// kVectors vectors of channels, of which only `lanes` lanes exist if kPartial.
template <DType kType, int kVectors, bool kPartial>
struct Tile {
  using E = Elements<kType>;
  const SegmentReduceParams& p;
  int64_t b, column, lanes;

  TM_INLINE vf load(int64_t row, int v) const {
    const int64_t at = b * p.x_batch + row * p.x_row + column + v * kWidth;
    return kPartial ? E::load_n(p.x, at, lanes) : E::load(p.x, at);
  }
  TM_INLINE void store(float* to, int v, vf x) const {
    Elements<DType::float32>::store_n(to, column + v * kWidth, x, kPartial ? lanes : kWidth);
  }

  TM_INLINE void sum(PlaceRange range, float* sums) const {
    vf total[kVectors];
    TM_UNROLL(16)
    for (int v = 0; v < kVectors; ++v) total[v] = zero();
    for (int64_t begin = range.begin; begin < range.end; begin += kSumPlaces) {
      const int64_t end = std::min(range.end, begin + kSumPlaces);
      vf part[kVectors];
      TM_UNROLL(16)
      for (int v = 0; v < kVectors; ++v) part[v] = zero();
      for (int64_t i = begin; i < end; ++i) {
        const int32_t row = row_of_place(p, b, i);
        if (row < 0) continue;
        const vf w = set(p.weight ? p.weight[b * p.weight_batch + row] : 1.f);
        TM_UNROLL(16)
        for (int v = 0; v < kVectors; ++v) part[v] = fma(w, load(row, v), part[v]);
      }
      TM_UNROLL(16)
      for (int v = 0; v < kVectors; ++v) total[v] = total[v] + part[v];
    }
    TM_UNROLL(16)
    for (int v = 0; v < kVectors; ++v) store(sums, v, total[v]);
  }

  // The greatest or least of each channel, and their rows. Rows are moved as the bits of floats,
  // never computed with.
  template <bool kGreatest>
  TM_INLINE void extremes(PlaceRange range, float* values, int32_t* rows) const {
    vf best[kVectors], found[kVectors];
    while (range.begin < range.end && row_of_place(p, b, range.begin) < 0) ++range.begin;
    const int32_t first = range.begin < range.end ? row_of_place(p, b, range.begin) : -1;
    TM_UNROLL(16)
    for (int v = 0; v < kVectors; ++v) {
      best[v] = first < 0 ? zero() : load(first, v);
      found[v] = as_float(first);
    }
    // A sum is NaN where anything is.
    vf sum[4] = {};
    TM_UNROLL(16)
    for (int v = 0; v < kVectors; ++v) sum[v % 4] = sum[v % 4] + best[v];
    for (int64_t i = range.begin + 1; i < range.end; ++i) {
      const int32_t row = row_of_place(p, b, i);
      if (row < 0) continue;
      const vf bits = as_float(row);
      TM_UNROLL(16)
      for (int v = 0; v < kVectors; ++v) {
        const vf x = load(row, v);
        const vm better = kGreatest ? less(best[v], x) : less(x, best[v]);
        best[v] = select(better, x, best[v]);
        found[v] = select(better, bits, found[v]);
        sum[v % 4] = sum[v % 4] + x;
      }
    }
    const vf all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    if (any(equal(select(equal(all, all), zero(), set(1.f)), set(1.f))))
      find_nan(range, best, found);
    TM_UNROLL(16)
    for (int v = 0; v < kVectors; ++v) {
      store(values, v, best[v]);
      store(reinterpret_cast<float*>(rows), v, found[v]);
    }
  }

 private:
  static TM_INLINE vf as_float(int32_t row) { return set(std::bit_cast<float>(row)); }

  // The first NaN of each channel is its extreme.
  TM_INLINE void find_nan(PlaceRange range, vf (&best)[kVectors], vf (&found)[kVectors]) const {
    for (int64_t i = range.end - 1; i >= range.begin; --i) {
      const int32_t row = row_of_place(p, b, i);
      if (row < 0) continue;
      TM_UNROLL(16)
      for (int v = 0; v < kVectors; ++v) {
        const vf x = load(row, v);
        const vm number = equal(x, x);
        best[v] = select(number, best[v], x);
        found[v] = select(number, found[v], as_float(row));
      }
    }
  }
};

// visit(tile) for all channels.
template <DType kType, int kMost, typename Visit>
TM_INLINE void for_each_tile(const SegmentReduceParams& p, int64_t b, const Visit& visit) {
  int64_t c = 0;
  for (; c + kMost * kWidth <= p.channels; c += kMost * kWidth)
    visit(Tile<kType, kMost, false>{p, b, c, 0});
  for (; c + 4 * kWidth <= p.channels; c += 4 * kWidth) visit(Tile<kType, 4, false>{p, b, c, 0});
  for (; c + kWidth <= p.channels; c += kWidth) visit(Tile<kType, 1, false>{p, b, c, 0});
  if (c < p.channels) visit(Tile<kType, 1, true>{p, b, c, p.channels - c});
}

// A segment or a part of one, before it is divided and rounded.
struct Partial {
  float* values;   // [C]
  int32_t* rows;   // [C], of an extreme; -1: there was no row
  double* weight;  // the sum
};

double weight_of(const SegmentReduceParams& p, int64_t b, PlaceRange range) {
  if (!p.perm && !p.weight) return static_cast<double>(range.end - range.begin);
  double sum = 0;
  for (int64_t i = range.begin; i < range.end; ++i) {
    const int32_t row = row_of_place(p, b, i);
    if (row >= 0) sum += p.weight ? p.weight[b * p.weight_batch + row] : 1.f;
  }
  return sum;
}

template <DType kType>
void reduce_places(const SegmentReduceParams& p, int64_t b, PlaceRange range, const Partial& to) {
  *to.weight = weight_of(p, b, range);
  if (is_extreme(p)) {
    for_each_tile<kType, kTile / 2>(p, b, [&](const auto& tile) TM_LAMBDA {
      if (p.reduce == Reduce::amax)
        tile.template extremes<true>(range, to.values, to.rows);
      else
        tile.template extremes<false>(range, to.values, to.rows);
    });
  } else if (p.reduce == Reduce::sum || p.reduce == Reduce::mean) {
    for_each_tile<kType, kTile>(p, b,
                                [&](const auto& tile) TM_LAMBDA { tile.sum(range, to.values); });
  }
}

// Adds a later part of the same segment.
void merge(const SegmentReduceParams& p, const Partial& to, const Partial& later) {
  *to.weight += *later.weight;
  if (!is_extreme(p)) {
    for (int64_t c = 0; c < p.channels; ++c) to.values[c] += later.values[c];
    return;
  }
  const float sign = p.reduce == Reduce::amax ? 1.f : -1.f;
  for (int64_t c = 0; c < p.channels; ++c) {
    const float x = later.values[c] * sign, best = to.values[c] * sign;
    if (later.rows[c] < 0 || (to.rows[c] >= 0 && (x <= best || best != best))) continue;
    to.values[c] = later.values[c];
    to.rows[c] = later.rows[c];
  }
}

template <DType kType>
void finish(const SegmentReduceParams& p, int64_t b, int64_t s, const Partial& from) {
  using E = Elements<kType>;
  const int64_t segment = b * p.segments + s, at = segment * p.channels;
  const float weight = static_cast<float>(*from.weight);
  p.weight_sum[segment] = weight;
  if (p.reduce == Reduce::first || p.reduce == Reduce::last) {
    auto* y = static_cast<typename E::type*>(p.y) + at;
    const auto* x = static_cast<const typename E::type*>(p.x) + b * p.x_batch;
    const int64_t row = end_row(p, b, s), bytes = p.channels * sizeof *y;
    if (row < 0)
      std::memset(y, 0, bytes);
    else
      std::memcpy(y, x + row * p.x_row, bytes);
    return;
  }
  const bool zeros = p.reduce == Reduce::mean && weight == 0;
  const vf divisor = set(p.reduce == Reduce::mean && weight != 0 ? weight : 1.f);
  for (int64_t c = 0; c < p.channels; c += kWidth) {
    const int64_t lanes = p.channels - c;
    const vf x = zeros ? zero() : Elements<DType::float32>::load_n(from.values, c, lanes) / divisor;
    E::store_n(p.y, at + c, x, lanes);
  }
  if (is_extreme(p)) std::memcpy(p.arg + at, from.rows, p.channels * sizeof(int32_t));
}

// A segment of more than kPart places. Who finishes its last part puts the parts together.
struct LongSegment {
  int64_t b, s, first_part, parts;
  std::atomic<int64_t> missing;
};

template <DType kType>
class Work {
 public:
  explicit Work(const SegmentReduceParams& p)
      : p_(p),
        parts_(count_parts()),
        longs_(new LongSegment[parts_ / 2]),  // each has two parts or more
        memory_(parts_ * floats_of(p) + 16),
        base_(memory_.take(parts_ * floats_of(p))) {
    LongSegment* next = longs_.get();
    int64_t first_part = 0;
    visit_long([&](int64_t b, int64_t s, int64_t parts) {
      next->b = b;
      next->s = s;
      next->first_part = first_part;
      next->parts = parts;
      next->missing = parts;
      first_part += parts;
      ++next;
    });
  }

  static int64_t floats_of(const SegmentReduceParams& p) {
    return round_up(2 * p.channels + 2, 16);
  }
  static Partial partial(const SegmentReduceParams& p, float* memory) {
    auto* weight = reinterpret_cast<double*>(memory);
    float* values = memory + 2;
    return {values, reinterpret_cast<int32_t*>(values + p.channels), weight};
  }

  void run(int threads) {
    const int64_t segments = p_.batch * p_.segments;
    const int64_t group = std::clamp<int64_t>(segments / (8 * threads), 1, 64);
    cpu::parallel_items(parts_ + ceil_div(segments, group), threads, [&](cpu::ItemCounter& items) {
      cpu::Workspace memory(floats_of(p_) + 16);
      const Partial own = partial(p_, memory.take(floats_of(p_)));
      for (int64_t item; (item = items.next()) >= 0;) {
        if (item < parts_) {
          take_part(item);
          continue;
        }
        const int64_t from = (item - parts_) * group, until = std::min(segments, from + group);
        for (int64_t i = from; i < until; ++i) {
          const int64_t b = i / p_.segments, s = i % p_.segments;
          const PlaceRange range = segment_places(p_, b, s);
          if (takes_parts() && range.end - range.begin > kPart) continue;
          reduce_places<kType>(p_, b, range, own);
          finish<kType>(p_, b, s, own);
        }
      }
    });
  }

 private:
  bool takes_parts() const { return p_.reduce != Reduce::first && p_.reduce != Reduce::last; }

  template <typename Visit>
  void visit_long(const Visit& visit) const {
    if (!takes_parts()) return;
    for (int64_t b = 0; b < p_.batch; ++b)
      for (int64_t s = 0; s < p_.segments; ++s) {
        const PlaceRange range = segment_places(p_, b, s);
        if (range.end - range.begin > kPart) visit(b, s, ceil_div(range.end - range.begin, kPart));
      }
  }
  int64_t count_parts() const {
    int64_t count = 0;
    visit_long([&](int64_t, int64_t, int64_t parts) { count += parts; });
    return count;
  }

  Partial part(int64_t i) const { return partial(p_, base_ + i * floats_of(p_)); }

  void take_part(int64_t i) {
    LongSegment* segment = longs_.get();
    while (i >= segment->first_part + segment->parts) ++segment;
    const PlaceRange all = segment_places(p_, segment->b, segment->s);
    const int64_t begin = all.begin + (i - segment->first_part) * kPart;
    reduce_places<kType>(p_, segment->b, {begin, std::min(all.end, begin + kPart)}, part(i));
    if (segment->missing.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    const Partial first = part(segment->first_part);
    for (int64_t j = 1; j < segment->parts; ++j) merge(p_, first, part(segment->first_part + j));
    finish<kType>(p_, segment->b, segment->s, first);
  }

  const SegmentReduceParams& p_;
  const int64_t parts_;
  std::unique_ptr<LongSegment[]> longs_;
  cpu::Workspace memory_;
  float* const base_;
};

template <typename Visit>
void visit_dtype(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::float16:
      return visit.template operator()<DType::float16>();
    case DType::bfloat16:
      return visit.template operator()<DType::bfloat16>();
    default:
      return visit.template operator()<DType::float32>();
  }
}

int threads_for(const SegmentReduceParams& p) {
  return p.batch * std::max(p.places, p.tokens) * p.channels < kParallelElements
             ? 1
             : cpu::num_threads();
}

void find_segments(const SegmentReduceParams& p, int32_t* segment_of_row) {
  for (int64_t b = 0; b < p.batch; ++b) {
    int32_t* const found = segment_of_row + b * p.tokens;
    std::fill(found, found + p.tokens, -1);
    for (int64_t s = 0; s < p.segments; ++s) {
      const int32_t number = static_cast<int32_t>(s);
      if (p.reduce == Reduce::first || p.reduce == Reduce::last) {
        if (const int32_t row = end_row(p, b, s); row >= 0) found[row] = number;
        continue;
      }
      const PlaceRange range = segment_places(p, b, s);
      for (int64_t i = range.begin; i < range.end; ++i)
        if (const int32_t row = row_of_place(p, b, i); row >= 0) found[row] = number;
    }
  }
}

// dx and dweight of a row of x from dy of its segment.
template <DType kType>
void row_gradient(const SegmentReduceBackwardParams& q, int64_t b, int64_t row) {
  using E = Elements<kType>;
  using Element = typename E::type;
  const SegmentReduceParams& p = q.forward;
  const int64_t index = b * p.tokens + row, at = index * p.channels, bytes = p.channels;
  const int32_t s = q.segment_of_row[index];
  Element* const dx = static_cast<Element*>(q.dx) + at;
  if (s < 0) {
    std::memset(dx, 0, bytes * sizeof(Element));
    if (p.weight) q.dweight[index] = 0;
    return;
  }
  const int64_t segment = b * p.segments + s, dy_at = b * q.dy_batch + s * q.dy_row;
  const Element* const dy = static_cast<const Element*>(q.dy) + dy_at;
  if (p.reduce == Reduce::first || p.reduce == Reduce::last) {
    std::memcpy(dx, dy, bytes * sizeof(Element));
    return;
  }
  if (is_extreme(p)) {
    const int32_t* const arg = p.arg + segment * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) dx[c] = arg[c] == row ? dy[c] : Element{0};
    return;
  }
  const bool mean = p.reduce == Reduce::mean;
  const float total = mean ? p.weight_sum[segment] : 1.f;
  const float w = p.weight ? p.weight[b * p.weight_batch + row] : 1.f;
  const vf factor = set(total == 0 ? 0 : w / total);
  const int64_t x_at = b * p.x_batch + row * p.x_row, y_at = segment * p.channels;
  vf dot = zero();
  for (int64_t c = 0; c < p.channels; c += kWidth) {
    const int64_t lanes = p.channels - c;
    const vf g = total == 0 ? zero() : E::load_n(q.dy, dy_at + c, lanes);
    E::store_n(q.dx, at + c, g * factor, lanes);
    if (!p.weight || total == 0) continue;
    vf x = E::load_n(p.x, x_at + c, lanes);
    if (mean) x = x - E::load_n(p.y, y_at + c, lanes);
    dot = fma(x, g, dot);
  }
  if (!p.weight) return;
  const float through_y = total == 0 ? 0 : sum_lanes(dot) / total;
  q.dweight[index] = through_y + (q.dweight_sum ? q.dweight_sum[segment] : 0);
}

}  // namespace

void segment_reduce(const SegmentReduceParams& p) {
  visit_dtype(p.dtype, [&]<DType kType>() { Work<kType>(p).run(threads_for(p)); });
}

void segment_reduce_backward(const SegmentReduceBackwardParams& q) {
  const SegmentReduceParams& p = q.forward;
  constexpr int64_t kRows = 64;
  find_segments(p, q.segment_of_row);
  const int64_t groups = ceil_div(p.tokens, kRows);
  visit_dtype(p.dtype, [&]<DType kType>() {
    cpu::parallel_items(p.batch * groups, threads_for(p), [&](cpu::ItemCounter& items) {
      for (int64_t item; (item = items.next()) >= 0;) {
        const int64_t b = item / groups, from = item % groups * kRows;
        for (int64_t row = from; row < std::min(p.tokens, from + kRows); ++row)
          row_gradient<kType>(q, b, row);
      }
    });
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
