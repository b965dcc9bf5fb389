// Checks of the causal convolutions.
#pragma once
#include "core/qkv.h"
#include "linear/conv_params.h"

namespace tokenmill {

inline void check_conv_dtype(const char* op, const char* name, const View& t, const View& x) {
  check(t.dtype == x.dtype || t.dtype == wide_dtype(x), op, name,
        Rule("must have the dtype of x, ", x.dtype, ", or ", wide_dtype(x)), t.dtype);
  check_device_of(op, name, t, "x", x);
}

inline ConvFilter conv_filter(const char* op, const View& x, const View& weight, const View& bias,
                              std::string_view activation) {
  const int64_t channels = x.size(-1);
  check(weight.dim() == 2 && weight.size(0) == channels, op, "weight",
        Rule("must have shape [", channels, ", W]"), weight.sizes);
  check(weight.size(1) >= 1 && weight.size(1) <= kMaxConvWidth, op, "weight",
        Rule("must have a width of 1 to ", kMaxConvWidth), weight.size(1));
  check_conv_dtype(op, "weight", weight, x);
  if (bias) {
    const std::vector<int64_t> wanted{channels};
    check(bias.sizes == wanted, op, "bias", Rule("must have shape ", wanted), bias.sizes);
    check_conv_dtype(op, "bias", bias, x);
  }
  check(activation == "none" || activation == "silu", op, "activation", "must be None or 'silu'",
        activation);
  ConvFilter f{};
  f.width = weight.size(1);
  f.weight = weight.mutable_data();
  f.channel = weight.step(0);
  f.tap = weight.step(1);
  f.dtype = to_dtype(weight.dtype);
  f.silu = activation == "silu";
  const uintptr_t row_bytes = f.dtype == DType::float32 ? 16 : 8;
  f.quads = f.width == 4 && f.tap == 1 && f.channel == 4 &&
            reinterpret_cast<uintptr_t>(f.weight) % row_bytes == 0;
  if (!bias) return f;
  f.bias = bias.mutable_data();
  f.bias_channel = bias.step(0);
  f.bias_dtype = to_dtype(bias.dtype);
  return f;
}

inline ConvStates conv_states_of(const View& t) {
  return {t.mutable_data(), t.step(0), t.step(1), t.step(2)};
}

}  // namespace tokenmill
