// Reduces rows by segments, one segment at a time in tiles of channels that fit in registers. Long
// segments are split into parts of fixed length, which different workers process.
#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/workspace.h"
#include "tokens/cpu_rows.h"
#include "tokens/segment_reduce/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kPart = 1024;      // places
constexpr int64_t kSumPlaces = 256;  // places per accumulator
// Vectors of channels per tile: rows are read once, front to back, which is the fastest access
// pattern. Extremes need twice the registers and spill to the L1 cache.
constexpr int kTile = kWidth == 16 ? 16 : 8;
constexpr int64_t kParallelElements = 1 << 16;  // fewer do not pay for a parallel region

TM_INLINE bool is_extreme(const SegmentReduceParams& p) {
  return p.reduce == Reduce::amax || p.reduce == Reduce::amin;
}

// kVectors vectors of channels, of which only `lanes` lanes exist if kPartial.
template <DType kType, int kVectors, bool kPartial>
struct Tile {
  using E = Elements<kType>;
  const SegmentReduceParams& p;
  int64_t b, column, lanes;

  TM_INLINE int64_t at(int v) const { return column + v * kWidth; }
  TM_INLINE int64_t count() const { return kPartial ? lanes : kWidth; }

  // Calls finish(v, sum) for each vector.
  template <typename Finish>
  TM_INLINE void sum(PlaceRange range, const Finish& finish) const {
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
    for (int v = 0; v < kVectors; ++v) finish(v, total[v]);
  }

  // Calls finish(v, value, row) for each vector: maximum or minimum of each channel, and its row.
  // Row indices are moved as float bits; no arithmetic is done on them.
  template <bool kGreatest, typename Finish>
  TM_INLINE void extremes(PlaceRange range, const Finish& finish) const {
    vf best[kVectors], found[kVectors];
    while (range.begin < range.end && row_of_place(p, b, range.begin) < 0) ++range.begin;
    const int32_t first = range.begin < range.end ? row_of_place(p, b, range.begin) : -1;
    TM_UNROLL(16)
    for (int v = 0; v < kVectors; ++v) {
      best[v] = first < 0 ? zero() : load(first, v);
      found[v] = as_float(first);
    }
    // The sum is NaN if any element is NaN.
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
    for (int v = 0; v < kVectors; ++v) finish(v, best[v], found[v]);
  }

 private:
  TM_INLINE vf load(int64_t row, int v) const {
    const int64_t from = b * p.x_batch + row * p.x_row + at(v);
    return kPartial ? E::load_n(p.x, from, lanes) : E::load(p.x, from);
  }
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

// Calls visit(tile) for all channels.
template <DType kType, typename Visit>
TM_INLINE void for_each_tile(const SegmentReduceParams& p, int64_t b, const Visit& visit) {
  int64_t c = 0;
  for (; c + kTile * kWidth <= p.channels; c += kTile * kWidth)
    visit(Tile<kType, kTile, false>{p, b, c, 0});
  for (; c + 4 * kWidth <= p.channels; c += 4 * kWidth) visit(Tile<kType, 4, false>{p, b, c, 0});
  for (; c + kWidth <= p.channels; c += kWidth) visit(Tile<kType, 1, false>{p, b, c, 0});
  if (c < p.channels) visit(Tile<kType, 1, true>{p, b, c, p.channels - c});
}

double weight_of(const SegmentReduceParams& p, int64_t b, PlaceRange range) {
  if (!p.perm && !p.weight) return static_cast<double>(range.end - range.begin);
  double sum = 0;
  for (int64_t i = range.begin; i < range.end; ++i) {
    const int32_t row = row_of_place(p, b, i);
    if (row >= 0) sum += p.weight ? p.weight[b * p.weight_batch + row] : 1.f;
  }
  return sum;
}

// Sums, or extremes and their rows, of all channels of some places: calls to.sum(at, n, x) and
// to.extreme(at, n, x, row) for n channels from `at` on.
template <DType kType, typename To>
TM_INLINE void reduce_places(const SegmentReduceParams& p, int64_t b, PlaceRange range,
                             const To& to) {
  for_each_tile<kType>(p, b, [&](const auto& tile) TM_LAMBDA {
    const auto extreme = [&](int v, vf x, vf row)
                             TM_LAMBDA { to.extreme(tile.at(v), tile.count(), x, row); };
    if (p.reduce == Reduce::amax)
      tile.template extremes<true>(range, extreme);
    else if (p.reduce == Reduce::amin)
      tile.template extremes<false>(range, extreme);
    else
      tile.sum(range, [&](int v, vf x) TM_LAMBDA { to.sum(tile.at(v), tile.count(), x); });
  });
}

// Output row of a segment.
template <DType kType>
class Result {
 public:
  Result(const SegmentReduceParams& p, int64_t segment, double weight)
      : p_(p), at_(segment * p.channels), streams_(streams(p)) {
    const float w = static_cast<float>(weight);
    p.weight_sum[segment] = w;
    divides_ = p.reduce == Reduce::mean;
    nothing_ = divides_ && w == 0;
    divisor_ = set(w);
  }

  TM_INLINE void sum(int64_t c, int64_t n, vf x) const {
    if (divides_) x = nothing_ ? zero() : x / divisor_;
    put<kType>(p_.y, c, n, x);
  }
  TM_INLINE void extreme(int64_t c, int64_t n, vf x, vf row) const {
    put<kType>(p_.y, c, n, x);
    put<DType::float32>(p_.arg, c, n, row);
  }
  static bool streams(const SegmentReduceParams& p) {
    const int64_t bytes = p.channels * static_cast<int64_t>(sizeof(float));
    return p.batch * p.segments * bytes >= kStreamBytes && bytes % 64 == 0 &&
           reinterpret_cast<uintptr_t>(p.y) % 64 == 0 &&
           reinterpret_cast<uintptr_t>(p.arg) % 64 == 0;
  }

 private:
  template <DType kTo>
  TM_INLINE void put(void* to, int64_t c, int64_t n, vf x) const {
    if (kTo == DType::float32 && streams_)
      stream(static_cast<char*>(to) + (at_ + c) * static_cast<int64_t>(sizeof(float)), x);
    else
      Elements<kTo>::store_n(to, at_ + c, x, n);
  }

  const SegmentReduceParams& p_;
  const int64_t at_;
  const bool streams_;
  bool divides_, nothing_;
  vf divisor_;
};

// Partial result of a segment.
struct Partial {
  float* values;   // [C]
  int32_t* rows;   // [C], for extremes; -1: no row
  double* weight;  // sum of weights

  TM_INLINE void sum(int64_t c, int64_t n, vf x) const {
    Elements<DType::float32>::store_n(values, c, x, n);
  }
  TM_INLINE void extreme(int64_t c, int64_t n, vf x, vf row) const {
    sum(c, n, x);
    Elements<DType::float32>::store_n(rows, c, row, n);
  }
  // Merges a later part of the same segment.
  void merge(const SegmentReduceParams& p, const Partial& later) const {
    *weight += *later.weight;
    const float sign = p.reduce == Reduce::amax ? 1.f : -1.f;
    for (int64_t c = 0; c < p.channels; ++c) {
      if (!is_extreme(p)) {
        values[c] += later.values[c];
        continue;
      }
      const float x = later.values[c] * sign, best = values[c] * sign;
      if (later.rows[c] < 0 || (rows[c] >= 0 && (x <= best || best != best))) continue;
      values[c] = later.values[c];
      rows[c] = later.rows[c];
    }
  }
};

// Permuted rows, which hardware prefetchers cannot follow, are prefetched as in cpu_rows.h.
template <DType kType>
TM_INLINE void fetch_rows(const SegmentReduceParams& p, int64_t b, PlaceRange range) {
  using Element = typename Elements<kType>::type;
  const int64_t bytes = p.channels * sizeof(Element);
  const auto fetch = [&](int64_t place, int64_t step) TM_LAMBDA {
    const int32_t row = place < p.places ? row_of_place(p, b, place) : -1;
    if (row < 0) return;
    const auto* x = static_cast<const Element*>(p.x) + b * p.x_batch + row * p.x_row;
    for (int64_t i = 0; i < bytes; i += step)
      __builtin_prefetch(reinterpret_cast<const char*>(x) + i, 0, 3);
  };
  for (int64_t i = range.begin; i < range.end; ++i) {
    fetch(i + kPagesAhead, kPageBytes);
    fetch(i + kRowsAhead, 64);
  }
}

template <DType kType>
void reduce_segment(const SegmentReduceParams& p, int64_t b, int64_t s, PlaceRange range) {
  const int64_t segment = b * p.segments + s;
  const Result<kType> result(p, segment, weight_of(p, b, range));
  if (p.perm) fetch_rows<kType>(p, b, range);
  if (p.reduce != Reduce::first && p.reduce != Reduce::last)
    return reduce_places<kType>(p, b, range, result);
  using Element = typename Elements<kType>::type;
  auto* y = static_cast<Element*>(p.y) + segment * p.channels;
  const auto* x = static_cast<const Element*>(p.x) + b * p.x_batch;
  const int64_t row = end_row(p, b, s), bytes = p.channels * sizeof *y;
  if (row < 0)
    std::memset(y, 0, bytes);
  else
    std::memcpy(y, x + row * p.x_row, bytes);
}

template <DType kType>
void finish_parts(const SegmentReduceParams& p, int64_t segment, const Partial& all) {
  const Result<kType> result(p, segment, *all.weight);
  for (int64_t c = 0; c < p.channels; c += kWidth) {
    const int64_t n = std::min<int64_t>(kWidth, p.channels - c);
    const vf x = Elements<DType::float32>::load_n(all.values, c, n);
    if (is_extreme(p))
      result.extreme(c, n, x, Elements<DType::float32>::load_n(all.rows, c, n));
    else
      result.sum(c, n, x);
  }
}

// Segment of more than kPart places. The worker that finishes the last part merges all parts.
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
        longs_(new LongSegment[parts_ / 2]),  // each has at least two parts
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

  void run(int threads) {
    const int64_t segments = p_.batch * p_.segments;
    const int64_t group = std::clamp<int64_t>(segments / (8 * threads), 1, 64);
    cpu::parallel_items(parts_ + ceil_div(segments, group), threads, [&](cpu::ItemCounter& items) {
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
          reduce_segment<kType>(p_, b, s, range);
        }
      }
      end_stream();
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

  Partial part(int64_t i) const {
    float* const memory = base_ + i * floats_of(p_);
    float* const values = memory + 2;
    return {values, reinterpret_cast<int32_t*>(values + p_.channels),
            reinterpret_cast<double*>(memory)};
  }

  void take_part(int64_t i) {
    LongSegment* segment = longs_.get();
    while (i >= segment->first_part + segment->parts) ++segment;
    const PlaceRange all = segment_places(p_, segment->b, segment->s);
    const int64_t begin = all.begin + (i - segment->first_part) * kPart;
    const PlaceRange places{begin, std::min(all.end, begin + kPart)};
    const Partial own = part(i);
    *own.weight = weight_of(p_, segment->b, places);
    reduce_places<kType>(p_, segment->b, places, own);
    if (segment->missing.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    const Partial first = part(segment->first_part);
    for (int64_t j = 1; j < segment->parts; ++j) first.merge(p_, part(segment->first_part + j));
    finish_parts<kType>(p_, segment->b * p_.segments + segment->s, first);
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
    if (q.dweight) q.dweight[index] = 0;
    return;
  }
  const int64_t segment = b * p.segments + s, dy_at = b * q.dy_batch + s * q.dy_row;
  const Element* const dy = static_cast<const Element*>(q.dy) + dy_at;
  if (p.reduce == Reduce::first || p.reduce == Reduce::last) {
    std::memcpy(dx, dy, bytes * sizeof(Element));
    return;
  }
  if (is_extreme(p)) {
    // Vectorizable loop: no aliasing, and 32-bit indices, since 64 bits would halve the lanes.
    const int32_t* __restrict arg = p.arg + segment * p.channels;
    const Element* __restrict from = dy;
    Element* __restrict to = dx;
    const int32_t own = static_cast<int32_t>(row);
    const int64_t channels = p.channels;
    for (int64_t c = 0; c < channels; ++c) {
      const Element g = from[c];
      to[c] = arg[c] == own ? g : Element{0};
    }
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
    if (!q.dweight || total == 0) continue;
    vf x = E::load_n(p.x, x_at + c, lanes);
    if (mean) x = x - E::load_n(p.y, y_at + c, lanes);
    dot = fma(x, g, dot);
  }
  if (!q.dweight) return;
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
