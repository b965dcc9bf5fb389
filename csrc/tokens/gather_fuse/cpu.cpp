// Bound by the memory of x: each row is copied or added to f once.
#include "tokens/cpu_rows.h"
#include "tokens/gather_fuse/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kSlice = 1024;  // channels of f that one item sums
constexpr int kRowsAtOnce = 4;    // of rest
constexpr int kRowsOfChunk = 64;  // summed from zero, then added once

int64_t element_bytes(DType t) { return t == DType::float32 ? 4 : 2; }

float sum_of_weights(const GatherFuseParams& p, int64_t b) {
  double sum = 0;
  for (int64_t r = 0; r < p.rest; ++r)
    if (const int64_t j = p.rest_ids[b * p.rest_batch + r]; j >= 0)
      sum += p.weight[b * p.weight_batch + j];
  return static_cast<float>(sum);
}

// Rows of rest that are added together, as each pass over them reads and writes the sum.
struct Group {
  int64_t rows[kRowsAtOnce];  // where they lie in x
  float weights[kRowsAtOnce];
  int count = 0;
};

// From entry r of rest on, which moves behind them. Empty at the end.
Group next_group(const GatherFuseParams& p, int64_t b, int64_t first, int64_t& r) {
  Group group;
  for (; r < p.rest && group.count < kRowsAtOnce; ++r) {
    const int64_t j = p.rest_ids[b * p.rest_batch + r];
    if (j < 0) continue;
    group.rows[group.count] = b * p.x_batch + (p.prefix + j) * p.x_token + first;
    group.weights[group.count++] = p.weight[b * p.weight_batch + j];
  }
  return group;
}

// Rows times weights, added to sum, while those of `next` are fetched: the hardware cannot know
// them.
template <DType kType, int kCount>
TM_INLINE void add_rows(const GatherFuseParams& p, const Group& group, const Group& next,
                        int64_t channels, float* sum) {
  using E = Elements<kType>;
  const auto* x = static_cast<const typename E::type*>(p.x);
  for (int64_t c = 0; c < channels; c += kWidth) {
    if (c * sizeof(*x) % 64 == 0)
      for (int i = 0; i < next.count; ++i) __builtin_prefetch(x + next.rows[i] + c, 0, 3);
    vf total = load(sum + c);
    TM_UNROLL(4)
    for (int i = 0; i < kCount; ++i)
      total = fma(set(group.weights[i]), E::load_n(x, group.rows[i] + c, channels - c), total);
    store(sum + c, total);
  }
}

template <DType kType>
void fuse(const GatherFuseParams& p, int64_t b, int64_t first) {
  const int64_t channels = std::min(kSlice, p.channels - first);
  alignas(64) float sum[kSlice] = {}, chunk[kSlice] = {};
  int64_t r = 0;
  int added = 0;
  Group group = next_group(p, b, first, r);
  while (group.count > 0) {
    const Group next = next_group(p, b, first, r);
    if (group.count == kRowsAtOnce) {
      add_rows<kType, kRowsAtOnce>(p, group, next, channels, chunk);
    } else {  // the last one
      for (int i = 0; i < group.count; ++i) {
        const Group one{{group.rows[i]}, {group.weights[i]}, 1};
        add_rows<kType, 1>(p, one, next, channels, chunk);
      }
    }
    added += group.count;
    if (added >= kRowsOfChunk || next.count == 0) {
      for (int64_t c = 0; c < channels; c += kWidth) {
        store(sum + c, load(sum + c) + load(chunk + c));
        store(chunk + c, zero());
      }
      added = 0;
    }
    group = next;
  }
  const float total = sum_of_weights(p, b);
  const vf divisor = set(!p.normalize || total == 0 ? 1 : total);
  const int64_t out = b * p.out_batch + (p.rows() - 1) * p.out_row + first;
  for (int64_t c = 0; c < channels; c += kWidth) {
    const vf f = p.normalize && total == 0 ? zero() : load(sum + c) / divisor;
    Elements<kType>::store_n(p.out, out + c, f, channels - c);
  }
  if (first == 0) p.weight_sum[b] = total;
}

// Rows begin to end of out, in front of f.
void copy(const GatherFuseParams& p, int64_t b, int64_t begin, int64_t end) {
  const int64_t size = element_bytes(p.dtype), bytes = p.channels * size;
  const char* x = static_cast<const char*>(p.x) + b * p.x_batch * size;
  const int32_t* ids = p.keep_ids + b * p.keep_batch;
  char* first = static_cast<char*>(p.out) + (b * p.out_batch + begin * p.out_row) * size;
  const Rows out{first, p.out_row * size, bytes, p.batch * p.rows() * bytes};
  copy_rows(out, begin, end, p.rows() - 1, [&](int64_t i) {
    const int64_t id = i < p.prefix ? i - p.prefix : ids[i - p.prefix];
    if (i >= p.prefix && id < 0) return static_cast<const char*>(nullptr);
    return x + (p.prefix + id) * p.x_token * size;
  });
}

// dweight of one patch of rest. Its row of dx is w df.
template <DType kType>
float scale_row(const GatherFuseBackwardParams& q, int64_t x, int64_t df, int64_t f, float w,
                int64_t dx) {
  const GatherFuseParams& p = q.forward;
  vf dot = zero();
  for (int64_t c = 0; c < p.channels; c += kWidth) {
    const int64_t n = p.channels - c;
    const vf g = Elements<kType>::load_n(q.dout, df + c, n);
    vf value = Elements<kType>::load_n(p.x, x + c, n);
    if (p.normalize) value = value - Elements<kType>::load_n(q.fused, f + c, n);
    dot = fma(g, value, dot);
    Elements<kType>::store_n(q.dx, dx + c, set(w) * g, n);
  }
  return sum_lanes(dot);
}

// Tokens begin to end of sequence b.
template <DType kType>
void backward(const GatherFuseBackwardParams& q, int64_t b, int64_t begin, int64_t end) {
  const GatherFuseParams& p = q.forward;
  const int64_t size = element_bytes(kType), bytes = p.channels * size;
  const int64_t dout = b * q.dout_batch, df = dout + (p.rows() - 1) * q.dout_row;
  const float total = p.normalize ? p.weight_sum[b] : 1;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t j = n - p.prefix, dx = (b * (p.prefix + p.patches) + n) * p.channels;
    const int32_t place = j < 0 ? 0 : q.places[b * p.patches + j];
    char* to = static_cast<char*>(q.dx) + dx * size;
    float dw = 0;
    if (place >= p.kept && j >= 0 && total != 0) {
      const int64_t x = b * p.x_batch + n * p.x_token;
      const float w = p.weight[b * p.weight_batch + j] / total;
      dw = scale_row<kType>(q, x, df, b * q.fused_batch, w, dx) / total;
    } else if (place < 0 || (place >= p.kept && j >= 0)) {
      std::memset(to, 0, bytes);
    } else {
      const int64_t row = j < 0 ? n : p.prefix + place;
      const char* from = static_cast<const char*>(q.dout) + (dout + row * q.dout_row) * size;
      copy_rows({to, bytes, bytes, bytes}, 0, 1, 1, [&](int64_t) { return from; });
    }
    if (j >= 0) q.dweight[b * p.patches + j] = dw;
  }
}

}  // namespace

// The items of a sequence are parts of the rows to copy, then slices of f.
void gather_fuse(const GatherFuseParams& p) {
  const int64_t bytes = p.channels * element_bytes(p.dtype);
  const int64_t step = rows_per_item(bytes), copied = p.rows() - 1;
  const int64_t copies = ceil_div(copied, step), slices = ceil_div(p.channels, kSlice);
  const int threads = threads_for(p.batch * (copied + p.rest) * bytes);
  cpu::parallel_items(p.batch * (copies + slices), threads, [&](cpu::ItemCounter& items) {
    for (int64_t item; (item = items.next()) >= 0;) {
      const int64_t b = item / (copies + slices), part = item % (copies + slices);
      if (part < copies)
        copy(p, b, part * step, std::min((part + 1) * step, copied));
      else
        visit_elements(p.dtype, [&]<DType kType>(Elements<kType>) {
          fuse<kType>(p, b, (part - copies) * kSlice);
        });
    }
  });
}

void gather_fuse_backward(const GatherFuseBackwardParams& q) {
  const GatherFuseParams& p = q.forward;
  const int64_t bytes = p.channels * element_bytes(p.dtype), tokens = p.prefix + p.patches;
  const int64_t step = rows_per_item(bytes), parts = ceil_div(tokens, step);
  const int threads = threads_for(p.batch * tokens * bytes);
  cpu::parallel_items(p.batch * parts, threads, [&](cpu::ItemCounter& items) {
    for (int64_t item; (item = items.next()) >= 0;) {
      const int64_t b = item / parts, begin = item % parts * step;
      visit_elements(p.dtype, [&]<DType kType>(Elements<kType>) {
        backward<kType>(q, b, begin, std::min(begin + step, tokens));
      });
    }
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
