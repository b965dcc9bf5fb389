// Decode: the new tokens of a request behind the inputs in its slot, which they push out.
#include "linear/causal_conv1d_decode/params.h"
#include "linear/cpu_conv.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kChannels = 512;   // channels of an item
constexpr int64_t kAlone = 1 << 14;  // elements that one thread computes faster than two

// The state of a slot and the new tokens, one after the other.
class Worker {
 public:
  explicit Worker(const ConvDecodeParams& p)
      : p_(p),
        ld_(std::min(round_up(p.channels, 64), kChannels)),
        kept_(std::max(p.columns, p.filter.width - 1)),
        workspace_((p.filter.width + 1 + kept_) * ld_ + 64),
        taps_(workspace_.take((p.filter.width + 1) * ld_), ld_),
        old_(reinterpret_cast<char*>(workspace_.take(kept_ * ld_))) {}

  template <DType kType, int kTaps, bool kSilu>
  void run(int64_t item) {
    const int64_t b = item % p_.batch, channel = item / p_.batch * kChannels;
    const int64_t n = std::min(kChannels, p_.channels - channel);
    const int64_t slot = p_.requests.slot(b);
    if (slot < 0) {
      for (int64_t t = 0; t < p_.seqlen; ++t)
        std::memset(token(p_.out, b, t, channel), 0, n * bytes_of(p_.dtype));
      return;
    }
    if (channel != channel_) taps_.load(p_.filter, channel, n);
    channel_ = channel;
    for (int64_t k = 0; k < p_.columns; ++k)
      load_column(p_.state, p_.dtype, slot, k, channel, n, old(k));
    int64_t t = 0;
    for (; t + kConvRows <= p_.seqlen; t += kConvRows)
      tokens<kType, kTaps, kSilu, kConvRows>(b, t, channel, n);
    for (; t < p_.seqlen; ++t) tokens<kType, kTaps, kSilu, 1>(b, t, channel, n);
    const int64_t kept = p_.requests.kept(b, p_.seqlen);
    for (int64_t k = 0; k < p_.columns; ++k)
      store_column(p_.state, p_.dtype, slot, k, channel, n, input(b, k + kept, channel));
  }

 private:
  char* old(int64_t k) const { return old_ + k * ld_ * bytes_of(p_.dtype); }
  char* token(const ConvRows& r, int64_t b, int64_t t, int64_t channel) const {
    return element(r.data, p_.dtype, b * r.batch + t * r.seq + channel);
  }
  // Input i, counted from the first column of the state.
  const char* input(int64_t b, int64_t i, int64_t channel) const {
    return i < p_.columns ? old(i) : token(p_.x, b, i - p_.columns, channel);
  }

  template <DType kType, int kTaps, bool kSilu, int kRows>
  void tokens(int64_t b, int64_t t, int64_t channel, int64_t n) {
    const void* in[kRows + kTaps - 1];
    void* out[kRows];
    for (int i = 0; i < kRows + kTaps - 1; ++i)
      in[i] = input(b, p_.columns + t - (kTaps - 1) + i, channel);
    for (int r = 0; r < kRows; ++r) out[r] = token(p_.out, b, t + r, channel);
    convolve_rows<kType, kTaps, kSilu, kRows>(in, taps_, n, out);
  }

  const ConvDecodeParams& p_;
  const int64_t ld_, kept_;
  cpu::Workspace workspace_;
  ConvTaps taps_;
  char* old_;
  int64_t channel_ = -1;
};

}  // namespace

void causal_conv1d_decode(const ConvDecodeParams& p) {
  const int64_t items = p.batch * ceil_div(p.channels, kChannels);
  const int64_t elements = p.batch * p.channels * (p.seqlen + p.columns);
  const int threads = elements < kAlone ? 1 : cpu::num_threads();
  visit_conv(p.filter, p.dtype, [&]<DType kType, int kTaps, bool kSilu>() {
    cpu::parallel_items(items, threads, [&](cpu::ItemCounter& counter) {
      Worker worker(p);
      for (int64_t item; (item = counter.next()) >= 0;) worker.run<kType, kTaps, kSilu>(item);
    });
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
