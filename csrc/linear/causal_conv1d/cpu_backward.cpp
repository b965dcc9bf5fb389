// Backward. A worker owns a tile of tokens and channels: it computes the gradients before the
// activation, also of the W - 1 tokens that follow, which the inputs of the tile reach. Its sums
// for the filter are one part, and the parts are added in their order.
#include "linear/causal_conv1d/cpu_rows.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kChannels = 256;   // channels of an item
constexpr int64_t kBlock = 64;       // tokens whose gradients are held at once
constexpr int64_t kAlone = 1 << 13;  // elements that one thread computes faster than two

class Worker {
 public:
  explicit Worker(const CausalConv1dBackwardParams& params)
      : params_(params),
        p_(params.forward),
        width_(p_.filter.width),
        ld_(std::min(round_up(p_.channels, 64), kChannels)),
        workspace_((3 * width_ + 2 + kBlock + width_ + 2) * ld_ + 5 * 16),
        taps_(workspace_.take((width_ + 1) * ld_), ld_),
        before_(workspace_.take(width_ * ld_), ld_) {
    sums_ = workspace_.take((width_ + 1) * ld_);
    dpre_ = workspace_.take((kBlock + width_) * ld_);
    lane_ = workspace_.take(ld_);
  }

  template <DType kType, int kTaps, bool kSilu>
  void run(int64_t item, int64_t tiles, int64_t slices) {
    const int64_t slice = item % slices, tile = item / slices;
    channel_ = slice * kChannels;
    n_ = std::min(kChannels, p_.channels - channel_);
    if (slice != slice_) taps_.load(p_.filter, channel_, n_);
    slice_ = slice;
    if (tile >= tiles) return initial_gradients<kType, kTaps, kSilu>(tile - tiles);
    std::memset(sums_, 0, (kTaps + 1) * ld_ * sizeof(float));
    const int64_t first = tile * params_.part_rows;
    const int64_t last = std::min(first + params_.part_rows, p_.rows);
    each_segment(p_, first, last, [&](const Segment& s) {
      for (int64_t i = 0; i < s.count; i += kBlock)
        block<kType, kTaps, kSilu>(s.b, s.position + i, std::min(kBlock, s.count - i), s.length);
    });
    for (int64_t j = 0; j <= kTaps; ++j)
      std::memcpy(params_.parts + (tile * (kTaps + 1) + j) * p_.channels + channel_,
                  sums_ + j * ld_, n_ * sizeof(float));
  }

 private:
  // Gradients before the activation of kRows tokens, into rows `at` and following; with kSum also
  // what they add to the gradients of the filter.
  template <DType kType, int kTaps, bool kSilu, int kRows, bool kSum>
  __attribute__((noinline)) void before_activation(int64_t b, int64_t position, int64_t at) {
    using E = Elements<kType>;
    const void *in[kRows + kTaps - 1], *dout[kRows];
    input_rows(p_, before_, b, position, kRows, channel_, in);
    for (int r = 0; r < kRows; ++r)
      dout[r] = row_at(params_.dout, p_.dtype, p_, b, position + r, channel_);
    convolve<kType, kTaps, kSilu, kRows>(in, taps_, n_,
                                         [&](int r, int64_t c, int64_t count, vf sum) TM_LAMBDA {
                                           vf d = E::load_n(dout[r], c, count);
                                           if constexpr (kSilu)
                                             d = d * feature_slope<FeatureMap::silu>(sum);
                                           store(dpre_ + (at + r) * ld_ + c, d);
                                         });
    if constexpr (kSum) {
      // dweight_j += sum_r dpre_r x_(r + j), dbias += sum_r dpre_r
      for (int64_t c = 0; c < n_; c += kWidth) {
        vf d[kRows], bias = load(sums_ + kTaps * ld_ + c);
        TM_UNROLL(8)
        for (int r = 0; r < kRows; ++r) {
          d[r] = load(dpre_ + (at + r) * ld_ + c);
          bias = bias + d[r];
        }
        store(sums_ + kTaps * ld_ + c, bias);
        vf x[kRows + kTaps - 1];
        TM_UNROLL(16)
        for (int i = 0; i < kRows + kTaps - 1; ++i) x[i] = E::load_n(in[i], c, n_ - c);
        TM_UNROLL(8)
        for (int j = 0; j < kTaps; ++j) {
          vf sum = load(sums_ + j * ld_ + c);
          TM_UNROLL(8)
          for (int r = 0; r < kRows; ++r) sum = fma(d[r], x[r + j], sum);
          store(sums_ + j * ld_ + c, sum);
        }
      }
    }
  }

  template <DType kType, int kTaps, bool kSilu, bool kSum>
  void gradients(int64_t b, int64_t position, int64_t count, int64_t at) {
    int64_t i = 0;
    for (; i + kConvRows <= count; i += kConvRows)
      before_activation<kType, kTaps, kSilu, kConvRows, kSum>(b, position + i, at + i);
    for (; i < count; ++i) before_activation<kType, kTaps, kSilu, 1, kSum>(b, position + i, at + i);
  }

  template <DType kType, int kTaps, bool kSilu>
  void block(int64_t b, int64_t position, int64_t count, int64_t length) {
    if (position < kTaps - 1) before_.load(p_, b, channel_, n_);
    const int64_t left = length - position;  // tokens to the end of the sequence
    gradients<kType, kTaps, kSilu, true>(b, position, count, 0);
    const int64_t ahead = std::min<int64_t>(kTaps - 1, left - count);
    gradients<kType, kTaps, kSilu, false>(b, position + count, ahead, count);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t taps = std::min<int64_t>(kTaps, left - r);
      const float* added = nullptr;
      if (params_.dfinal.data && left - r < kTaps)
        added = dfinal_row<kType>(b, kTaps - 1 - left + r);
      void* dx = row_at(params_.dx, p_.dtype, p_, b, position + r, channel_);
      input_gradient<kType, kTaps>(r, kTaps - 1, taps, added, dx);
    }
  }

  // dx = sum over k < count of tap_(newest - k) dpre_(row + k), plus a row.
  template <DType kType, int kTaps>
  __attribute__((noinline)) void input_gradient(int64_t row, int64_t newest, int64_t count,
                                                const float* added, void* dx) {
    const auto step = [&](int64_t c, int64_t lanes) TM_LAMBDA {
      vf sum = zero();
      if (count == kTaps) {
        TM_UNROLL(8)
        for (int k = 0; k < kTaps; ++k)
          sum = fma(load(taps_.tap(kTaps - 1 - k) + c), load(dpre_ + (row + k) * ld_ + c), sum);
      } else {
        for (int64_t k = 0; k < count; ++k)
          sum = fma(load(taps_.tap(newest - k) + c), load(dpre_ + (row + k) * ld_ + c), sum);
      }
      if (added) sum = sum + load(added + c);
      Elements<kType>::store_n(dx, c, sum, lanes);
    };
    int64_t c = 0;
    for (; c + kWidth <= n_; c += kWidth) step(c, kWidth);
    if (c < n_) step(c, n_ - c);
  }

  // Column k of dfinal_state in float32.
  template <DType kType>
  const float* dfinal_row(int64_t b, int64_t k) {
    alignas(64) typename Elements<kType>::type narrow[kChannels];
    load_column(params_.dfinal, p_.dtype, b, k, channel_, n_, narrow);
    for (int64_t c = 0; c < n_; c += kWidth)
      store(lane_ + c, Elements<kType>::load_n(narrow, c, n_ - c));
    return lane_;
  }

  // dinitial_state: inputs before the sequence.
  template <DType kType, int kTaps, bool kSilu>
  void initial_gradients(int64_t b) {
    const int64_t back = kTaps - 1, length = length_of(p_, b);
    before_.load(p_, b, channel_, n_);
    gradients<kType, kTaps, kSilu, false>(b, 0, std::min<int64_t>(back, length), 0);
    for (int64_t k = 0; k < back; ++k) {
      const float* added = nullptr;
      if (params_.dfinal.data && k >= length) added = dfinal_row<kType>(b, k - length);
      // Input k meets tap k - t of token t.
      alignas(64) typename Elements<kType>::type row[kChannels];
      input_gradient<kType, kTaps>(0, k, std::min(k + 1, length), added, row);
      store_column(params_.dinitial, p_.dtype, b, k, channel_, n_, row);
    }
  }

  const CausalConv1dBackwardParams& params_;
  const CausalConv1dParams& p_;
  const int64_t width_, ld_;
  cpu::Workspace workspace_;
  ConvTaps taps_;
  Before before_;
  float *sums_, *dpre_, *lane_;
  int64_t slice_ = -1, channel_ = 0, n_ = 0;
};

// Adds the parts of a slice of channels.
void add_parts(const CausalConv1dBackwardParams& params, int64_t tiles, int64_t slice) {
  const CausalConv1dParams& p = params.forward;
  const int64_t width = p.filter.width, channel = slice * kChannels;
  const int64_t n = std::min(kChannels, p.channels - channel);
  for (int64_t j = 0; j < width + (params.dbias != nullptr); ++j) {
    alignas(64) double sum[kChannels] = {};
    alignas(64) float narrow[kChannels] = {};
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const float* part = params.parts + (tile * (width + 1) + j) * p.channels + channel;
      for (int64_t c = 0; c < n; ++c) sum[c] += part[c];
    }
    for (int64_t c = 0; c < n; ++c) narrow[c] = static_cast<float>(sum[c]);
    if (j == width) {
      void* to = element(params.dbias, p.filter.bias_dtype, channel);
      for (int64_t c = 0; c < n; c += kWidth)
        store_from_float_n(to, p.filter.bias_dtype, c, load(narrow + c), n - c);
      continue;
    }
    for (int64_t c = 0; c < n; ++c)
      store_from_float_n(params.dweight, p.filter.dtype, (channel + c) * width + j, set(narrow[c]),
                         1);
  }
}

}  // namespace

void causal_conv1d_backward(const CausalConv1dBackwardParams& params) {
  const CausalConv1dParams& p = params.forward;
  const int64_t tiles = ceil_div(p.rows, params.part_rows),
                slices = ceil_div(p.channels, kChannels);
  const int64_t items = (tiles + (params.dinitial.data ? p.batch : 0)) * slices;
  const int threads = p.rows * p.channels < kAlone ? 1 : cpu::num_threads();
  visit_conv(p.filter, p.dtype, [&]<DType kType, int kTaps, bool kSilu>() {
    cpu::parallel_items(items, threads, [&](cpu::ItemCounter& counter) {
      Worker worker(params);
      for (int64_t item; (item = counter.next()) >= 0;)
        worker.run<kType, kTaps, kSilu>(item, tiles, slices);
    });
  });
  cpu::parallel_items(slices, threads, [&](cpu::ItemCounter& counter) {
    for (int64_t slice; (slice = counter.next()) >= 0;) add_parts(params, tiles, slice);
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
