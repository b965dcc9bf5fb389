// Memory-bound: the tokens of a sequence are read once and in order, which suits hardware
// prefetchers, and each is copied to its output row or added to f.
#include "cpu/element_bytes.h"
#include "tokens/cpu_rows.h"
#include "tokens/gather_fuse/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kSlice = 1024, kMinSlice = 128;  // channels per item
constexpr int kRowsOfChunk = 64;                   // summed from zero, then added once
// Prefetch distances in x and out, so that address translations are done in time.
constexpr int64_t kTokensAhead = 4, kBytesAhead = 3 * kPageBytes;

float sum_of_weights(const GatherFuseParams& p, int64_t b) {
  double sum = 0;
  for (int64_t r = 0; r < p.rest; ++r)
    if (const int64_t j = p.rest_ids[b * p.rest_batch + r]; j >= 0)
      sum += p.weight[b * p.weight_batch + j];
  return static_cast<float>(sum);
}

// Sums the rows of rest into f, for some channels of a sequence.
template <DType kType>
class Sum {
 public:
  explicit Sum(int64_t channels) : channels_(channels) {}

  TM_INLINE void add(const void* x, int64_t row, float weight) {
    for (int64_t c = 0; c < channels_; c += kWidth)
      store(chunk_ + c,
            fma(set(weight), Elements<kType>::load_n(x, row + c, channels_ - c), load(chunk_ + c)));
    if (++added_ == kRowsOfChunk) end_chunk();
  }

  void write(const GatherFuseParams& p, int64_t b, int64_t first) {
    end_chunk();
    const float total = sum_of_weights(p, b);
    const vf divisor = set(!p.normalize || total == 0 ? 1 : total);
    const int64_t out = b * p.out_batch + (p.rows() - 1) * p.out_row + first;
    for (int64_t c = 0; c < channels_; c += kWidth) {
      const vf f = p.normalize && total == 0 ? zero() : load(sum_ + c) / divisor;
      Elements<kType>::store_n(p.out, out + c, f, channels_ - c);
    }
    if (first == 0) p.weight_sum[b] = total;
  }

 private:
  void end_chunk() {
    for (int64_t c = 0; c < channels_; c += kWidth) {
      store(sum_ + c, load(sum_ + c) + load(chunk_ + c));
      store(chunk_ + c, zero());
    }
    added_ = 0;
  }

  const int64_t channels_;
  int added_ = 0;
  alignas(64) float sum_[kSlice] = {}, chunk_[kSlice] = {};
};

// Channels first to first + channels of sequence b.
template <DType kType, bool kStream>
void fuse(const GatherFuseParams& p, int64_t b, int64_t first, int64_t channels) {
  const int64_t size = element_bytes(kType), bytes = channels * size;
  const char* x = static_cast<const char*>(p.x);
  const int32_t *places = p.places + b * p.patches, *ids = p.keep_ids + b * p.keep_batch;
  const auto out = [&](int64_t row) {
    return static_cast<char*>(p.out) + (b * p.out_batch + row * p.out_row + first) * size;
  };
  const int64_t tokens = p.prefix + p.patches;
  const auto copy_of = [&](int64_t n) -> int64_t {  // a row of out, or -1
    if (n < p.prefix) return n;
    const int32_t place = n < tokens ? places[n - p.prefix] : -1;
    return place >= 0 && place < p.kept ? p.prefix + place : -1;
  };
  const int64_t row_bytes = std::max<int64_t>(p.x_token * size, 1);
  const int64_t ahead = std::max(kTokensAhead, kBytesAhead / row_bytes) * row_bytes;
  Sum<kType> sum(channels);
  for (int64_t n = 0; n < tokens; ++n) {
    const int64_t row = b * p.x_batch + n * p.x_token + first, j = n - p.prefix;
    const char* from = x + row * size;
    __builtin_prefetch(from + ahead, 0, 3);
    if (const int64_t later = copy_of(n + kTokensAhead); later >= 0)
      __builtin_prefetch(out(later), 1, 3);
    if (const int64_t to = copy_of(n); to >= 0)
      copy_row<kStream>(out(to), from, bytes);
    else if (places[j] >= p.kept)
      sum.add(p.x, row, p.weight[b * p.weight_batch + j]);
  }
  for (int64_t k = 0; k < p.kept; ++k)
    if (ids[k] < 0) std::memset(out(p.prefix + k), 0, bytes);
  sum.write(p, b, first);
  if constexpr (kStream) end_stream();
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

// An item is a slice of the channels of a sequence, narrow only if there would be too few items.
// Slices do not change the order of a sum.
void gather_fuse(const GatherFuseParams& p) {
  const int64_t size = element_bytes(p.dtype), bytes = p.channels * size;
  const int threads = threads_for(p.batch * (p.rows() - 1 + p.rest) * bytes);
  const int64_t wanted = threads > 1 ? ceil_div(4 * threads, p.batch) : 1;
  const int64_t width = round_up(ceil_div(std::max<int64_t>(p.channels, 1), wanted), kMinSlice);
  const int64_t slice = std::min(kSlice, width),
                slices = std::max<int64_t>(1, ceil_div(p.channels, slice));
  const bool aligned =
      (reinterpret_cast<uintptr_t>(p.out) | p.out_batch * size | p.out_row * size | bytes) % 64 ==
      0;
  const bool streams = aligned && p.batch * p.rows() * bytes >= kStreamBytes;
  cpu::parallel_items(p.batch * slices, threads, [&](cpu::ItemCounter& items) {
    for (int64_t item; (item = items.next()) >= 0;) {
      const int64_t b = item / slices, first = item % slices * slice;
      const int64_t channels = std::min(slice, p.channels - first);
      visit_elements(p.dtype, [&]<DType kType>(Elements<kType>) {
        if (streams)
          fuse<kType, true>(p, b, first, channels);
        else
          fuse<kType, false>(p, b, first, channels);
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
