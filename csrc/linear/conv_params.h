// Parameters shared by the causal convolutions.
#pragma once
#include "core/dtype.h"

namespace tokenmill {

constexpr int64_t kMaxConvWidth = 8;

// [B, T, C] with a contiguous last dimension, strides in elements. Packed: batch = 0.
struct ConvRows {
  void* data;
  int64_t batch, seq;
};

// [N, C, K], any strides: K inputs per channel, the newest last.
struct ConvStates {
  void* data;
  int64_t sequence, channel, column;
};

// weight [C, W] and bias [C], each in the dtype of x or in float32. W taps, the last one of the
// token itself.
struct ConvFilter {
  int64_t width;
  void* weight;
  int64_t channel, tap;
  DType dtype;
  void* bias;  // null: 0
  int64_t bias_channel;
  DType bias_dtype;
  bool silu;
  bool quads;  // rows of four taps, each aligned as one access
};

}  // namespace tokenmill
