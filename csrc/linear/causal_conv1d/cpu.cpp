// Forward: a pass over x at the speed of memory. A worker owns a tile of tokens and channels.
#include "linear/causal_conv1d/cpu_rows.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kTile = 64;        // tokens of an item
constexpr int64_t kChannels = 2048;  // and channels
constexpr int64_t kAlone = 1 << 14;  // elements that one thread computes faster than two

struct Items {
  explicit Items(const CausalConv1dParams& p)
      : tiles(ceil_div(p.rows, kTile)), slices(ceil_div(p.channels, kChannels)) {}
  int64_t tiles, slices;
};

class Worker {
 public:
  explicit Worker(const CausalConv1dParams& p)
      : p_(p),
        ld_(std::min(round_up(p.channels, 64), kChannels)),
        workspace_((2 * p.filter.width + 1) * ld_ + 64),
        taps_(workspace_.take((p.filter.width + 1) * ld_), ld_),
        before_(workspace_.take(p.filter.width * ld_), ld_) {}

  template <DType kType, int kTaps, bool kSilu>
  void run(int64_t item, const Items& items) {
    const int64_t slice = item % items.slices, tile = item / items.slices;
    const int64_t channel = slice * kChannels, n = std::min(kChannels, p_.channels - channel);
    if (tile >= items.tiles) return leave_state(tile - items.tiles, channel, n);
    if (slice != slice_) taps_.load(p_.filter, channel, n);
    slice_ = slice;
    const int64_t first = tile * kTile, last = std::min(first + kTile, p_.rows);
    each_segment(p_, first, last, [&](const Segment& s) {
      if (s.position < kTaps - 1) before_.load(p_, s.b, channel, n);
      int64_t i = 0;
      for (; i + kConvRows <= s.count; i += kConvRows)
        rows<kType, kTaps, kSilu, kConvRows>(s, i, channel, n);
      for (; i < s.count; ++i) rows<kType, kTaps, kSilu, 1>(s, i, channel, n);
    });
  }

 private:
  template <DType kType, int kTaps, bool kSilu, int kRows>
  void rows(const Segment& s, int64_t i, int64_t channel, int64_t n) {
    const void* in[kRows + kTaps - 1];
    void* out[kRows];
    input_rows(p_, before_, s.b, s.position + i, kRows, channel, in);
    for (int r = 0; r < kRows; ++r)
      out[r] = row_at(p_.out, p_.dtype, p_, s.b, s.position + i + r, channel);
    convolve_rows<kType, kTaps, kSilu, kRows>(in, taps_, n, out);
  }

  // The last W - 1 inputs of a sequence, of which the first ones may lie before it.
  void leave_state(int64_t b, int64_t channel, int64_t n) {
    const int64_t back = p_.filter.width - 1, length = length_of(p_, b);
    if (length < back) before_.load(p_, b, channel, n);
    for (int64_t k = 0; k < back; ++k) {
      const int64_t at = length - back + k;
      const void* from =
          at < 0 ? before_.row(back + at) : row_at(p_.x, p_.dtype, p_, b, at, channel);
      store_column(p_.final, p_.dtype, b, k, channel, n, from);
    }
  }

  const CausalConv1dParams& p_;
  const int64_t ld_;
  cpu::Workspace workspace_;
  ConvTaps taps_;
  Before before_;
  int64_t slice_ = -1;
};

}  // namespace

void causal_conv1d_forward(const CausalConv1dParams& p) {
  const Items items(p);
  const int64_t count = (items.tiles + (p.final.data ? p.batch : 0)) * items.slices;
  const int threads = p.rows * p.channels < kAlone ? 1 : cpu::num_threads();
  visit_conv(p.filter, p.dtype, [&]<DType kType, int kTaps, bool kSilu>() {
    cpu::parallel_items(count, threads, [&](cpu::ItemCounter& counter) {
      Worker worker(p);
      for (int64_t item; (item = counter.next()) >= 0;)
        worker.run<kType, kTaps, kSilu>(item, items);
    });
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
