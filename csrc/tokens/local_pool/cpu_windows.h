// Helpers shared by the CPU passes over windows of tokens: extent of a window along one dimension,
// and pooling of rows of channels.
#pragma once
#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/workspace.h"
#include "tokens/local_pool/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int kMaxTaps = 255;
// floats of a pooled line, if possible: half of an L2 cache
constexpr int64_t kLineFloats = 1 << 15;

// NaN if either is NaN.
TM_INLINE vf max_or_nan(vf a, vf b) { return select(equal(a, a), max_of(a, b), a); }

// Extent of a window along one dimension: first tap, its position, and the number of taps.
struct Reach {
  int tap, first, count;
};
inline Reach reach(int place, int size, int kernel, int dilation) {
  const int half = kernel / 2;
  if (dilation == 0) return {0, place, kernel};
  const int before = std::min(half, place / dilation);
  const int after = std::min(half, (size - 1 - place) / dilation);
  return {half - before, place - before * dilation, before + 1 + after};
}
inline Reach reach_y(const LocalPoolParams& p, int y) {
  return reach(y, p.height, p.kernel_y, p.dilation_y);
}
// Extents for every position of a line.
inline std::vector<Reach> reaches_x(const LocalPoolParams& p) {
  std::vector<Reach> found(p.width);
  for (int x = 0; x < p.width; ++x) found[x] = reach(x, p.width, p.kernel_x, p.dilation_x);
  return found;
}

TM_INLINE bool counts(const LocalPoolParams& p, int64_t b, int64_t y, int64_t x) {
  return !p.mask || p.mask[b * p.mask_batch + y * p.mask_line + x * p.mask_token];
}

// Rows of elements to be pooled, each with a number attached.
struct Taps {
  const char* rows[kMaxTaps];
  float numbers[kMaxTaps];
  int count = 0;

  TM_INLINE void add(const void* row, float number = 1) {
    rows[count] = static_cast<const char*>(row);
    numbers[count++] = number;
  }
};

// Calls body(Vectors<N>, c, n) for N vectors of channels from c, with n channels each.
template <int kCount>
struct Vectors {
  static constexpr int value = kCount;
};
template <typename Body>
TM_INLINE void for_vectors(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + 4 * kWidth <= channels; c += 4 * kWidth) body(Vectors<4>(), c, int64_t{kWidth});
  for (; c < channels; c += kWidth) body(Vectors<1>(), c, std::min<int64_t>(kWidth, channels - c));
}

// Tensor [B, Y, X, C] of elements; strides in bytes.
struct Map {
  const char* data;
  int64_t batch, line, token, size;

  TM_INLINE const char* at(int64_t b, int64_t y, int64_t x, int64_t c) const {
    return data + b * batch + y * line + x * token + c * size;
  }
};
inline Map map_of_x(const LocalPoolParams& p, int64_t size) {
  return {static_cast<const char*>(p.x), p.x_batch * size, p.x_line * size, p.x_token * size, size};
}
inline Map map_of_dout(const LocalPoolBackwardParams& q, int64_t size) {
  return {static_cast<const char*>(q.dout), q.dout_batch * size, q.dout_line * size,
          q.dout_token * size, size};
}
TM_INLINE int64_t out_at(const LocalPoolParams& p, int64_t b, int64_t y, int64_t x, int64_t c) {
  return ((b * p.height + y) * p.width + x) * p.channels + c;
}

inline int threads_for(const LocalPoolParams& p) {
  const int64_t elements = p.batch * p.height * p.width * p.channels;
  return elements < 1 << 16 ? 1 : cpu::num_threads();
}

inline int64_t channels_at_once(const LocalPoolParams& p) {
  const int64_t fit = std::max<int64_t>(kLineFloats / p.width / (4 * kWidth), 1) * 4 * kWidth;
  return std::min(fit, p.channels);
}

}  // namespace

void mean_backward(const LocalPoolBackwardParams&);
void maximum_backward(const LocalPoolBackwardParams&);

}  // namespace tokenmill::TOKENMILL_ISA
