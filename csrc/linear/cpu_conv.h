// Pieces of the causal convolutions on CPUs: vectors hold adjacent channels of a token.
#pragma once
#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/workspace.h"
#include "linear/conv_params.h"
#include "linear/cpu_features.h"

namespace tokenmill::TOKENMILL_ISA {

constexpr int kConvRows = 4;  // tokens computed together, which share the loads of the filter

inline int64_t bytes_of(DType t) { return t == DType::float32 ? 4 : 2; }

// A pointer to an element of a tensor.
TM_INLINE char* element(void* data, DType t, int64_t i) {
  return static_cast<char*>(data) + i * bytes_of(t);
}

// The filter of channels in float32: W rows of taps, and a row of the bias, `ld` apart.
class ConvTaps {
 public:
  ConvTaps(float* memory, int64_t ld) : rows_(memory), ld_(ld) {}

  void load(const ConvFilter& f, int64_t channel, int64_t n) {
    width_ = f.width;
    for (int64_t j = 0; j < f.width; ++j)
      load_row(f.weight, f.dtype, channel * f.channel + j * f.tap, f.channel, n, rows_ + j * ld_);
    float* bias = rows_ + width_ * ld_;
    std::memset(bias, 0, ld_ * sizeof(float));
    if (f.bias) load_row(f.bias, f.bias_dtype, channel * f.bias_channel, f.bias_channel, n, bias);
  }
  const float* tap(int64_t j) const { return rows_ + j * ld_; }
  const float* bias() const { return rows_ + width_ * ld_; }

 private:
  static void load_row(const void* from, DType t, int64_t first, int64_t step, int64_t n,
                       float* to) {
    visit_elements(t, [&](auto e) {
      using T = typename decltype(e)::type;
      alignas(64) T lane[kWidth];
      for (int64_t c = 0; c < n; c += kWidth) {
        const int64_t count = std::min<int64_t>(kWidth, n - c);
        for (int64_t l = 0; l < kWidth; ++l)
          lane[l] = l < count ? static_cast<const T*>(from)[first + (c + l) * step] : T(0);
        store(to + c, e.load(lane, 0));
      }
    });
  }

  float* rows_;
  int64_t ld_, width_ = 0;
};

// out[r] = act(bias + sum_j tap_j x[r + j]) at n channels, for kRows tokens. x: kRows + W - 1 rows
// of inputs. The taps are added from the oldest token to the newest.
template <DType kType, int kTaps, bool kSilu, int kRows, typename Emit>
TM_INLINE void convolve(const void* const* x, const ConvTaps& taps, int64_t n, const Emit& emit) {
  using E = Elements<kType>;
  const auto step = [&](int64_t c, int64_t count) TM_LAMBDA {
    vf w[kTaps], sum[kRows];
    TM_UNROLL(8)
    for (int j = 0; j < kTaps; ++j) w[j] = load(taps.tap(j) + c);
    TM_UNROLL(8)
    for (int r = 0; r < kRows; ++r) sum[r] = load(taps.bias() + c);
    TM_UNROLL(16)
    for (int i = 0; i < kRows + kTaps - 1; ++i) {
      const vf in = E::load_n(x[i], c, count);
      TM_UNROLL(8)
      for (int r = 0; r < kRows; ++r)
        if (i - r >= 0 && i - r < kTaps) sum[r] = fma(w[i - r], in, sum[r]);
    }
    TM_UNROLL(8)
    for (int r = 0; r < kRows; ++r) emit(r, c, count, sum[r]);
  };
  int64_t c = 0;
  for (; c + kWidth <= n; c += kWidth) step(c, kWidth);
  if (c < n) step(c, n - c);
}

template <DType kType, int kTaps, bool kSilu, int kRows>
__attribute__((noinline)) void convolve_rows(const void* const* x, const ConvTaps& taps, int64_t n,
                                             void* const* out) {
  convolve<kType, kTaps, kSilu, kRows>(x, taps, n,
                                       [&](int r, int64_t c, int64_t count, vf sum) TM_LAMBDA {
                                         if constexpr (kSilu) sum = sum * sigmoid_of(sum);
                                         Elements<kType>::store_n(out[r], c, sum, count);
                                       });
}

// Calls visit.operator()<kType, kTaps, kSilu>() with the kind of a call.
template <typename Visit>
void visit_conv(const ConvFilter& f, DType t, const Visit& visit) {
  const auto with_taps = [&]<DType kType, bool kSilu>() {
    switch (f.width) {
      case 1:
        return visit.template operator()<kType, 1, kSilu>();
      case 2:
        return visit.template operator()<kType, 2, kSilu>();
      case 3:
        return visit.template operator()<kType, 3, kSilu>();
      case 4:
        return visit.template operator()<kType, 4, kSilu>();
      case 5:
        return visit.template operator()<kType, 5, kSilu>();
      case 6:
        return visit.template operator()<kType, 6, kSilu>();
      case 7:
        return visit.template operator()<kType, 7, kSilu>();
      default:
        return visit.template operator()<kType, 8, kSilu>();
    }
  };
  const auto with_type = [&]<DType kType>() {
    f.silu ? with_taps.template operator()<kType, true>()
           : with_taps.template operator()<kType, false>();
  };
  t == DType::float16    ? with_type.template operator()<DType::float16>()
  : t == DType::bfloat16 ? with_type.template operator()<DType::bfloat16>()
                         : with_type.template operator()<DType::float32>();
}

// Copies elements from or to a column of states, `step` elements apart.
template <typename T>
inline void gather_elements(const T* from, int64_t step, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i * step];
}
template <typename T>
inline void scatter_elements(const T* from, int64_t n, T* to, int64_t step) {
  for (int64_t i = 0; i < n; ++i) to[i * step] = from[i];
}

// Column k of the states of sequence b, channels c .. c + n - 1, as a row.
inline void load_column(const ConvStates& s, DType t, int64_t b, int64_t k, int64_t c, int64_t n,
                        void* to) {
  const void* from = element(s.data, t, b * s.sequence + c * s.channel + k * s.column);
  if (s.channel == 1)
    std::memcpy(to, from, n * bytes_of(t));
  else if (t == DType::float32)
    gather_elements(static_cast<const float*>(from), s.channel, n, static_cast<float*>(to));
  else
    gather_elements(static_cast<const uint16_t*>(from), s.channel, n, static_cast<uint16_t*>(to));
}
inline void store_column(const ConvStates& s, DType t, int64_t b, int64_t k, int64_t c, int64_t n,
                         const void* from) {
  void* to = element(s.data, t, b * s.sequence + c * s.channel + k * s.column);
  if (s.channel == 1)
    std::memcpy(to, from, n * bytes_of(t));
  else if (t == DType::float32)
    scatter_elements(static_cast<const float*>(from), n, static_cast<float*>(to), s.channel);
  else
    scatter_elements(static_cast<const uint16_t*>(from), n, static_cast<uint16_t*>(to), s.channel);
}

}  // namespace tokenmill::TOKENMILL_ISA
