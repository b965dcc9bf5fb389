// Rules that the calls of all sm_90a kernels keep. Host code without CUDA headers.
#pragma once
#include "core/kernels.h"
#include "core/rows.h"

// In a row of a table: the launch of an sm_90a kernel, where the build has it.
#if defined(TOKENMILL_SM90)
#define TOKENMILL_IF_SM90(launch) launch
#else
#define TOKENMILL_IF_SM90(launch) nullptr
#endif

namespace tokenmill::cuda {

constexpr Chips kSm90{"90a", 90, 90};

// Shape and strides of a 4-d tensor of 16-bit elements, for its tensor map.
struct MappedRows {
  Rows rows;
  int64_t batch, tokens, heads, columns;
};

struct MappedTensors {
  MappedRows q, k, v, out;
};

// Stride in bytes. With one entry in a dimension any stride will do.
inline int64_t stride_of(int64_t stride, int64_t extent, int64_t columns) {
  return 2 * (extent > 1 ? stride : columns);
}

// With fewer tokens per sequence most of a 64-row tile would be idle.
constexpr int kMinSm90Tokens = 32;

// Compiled head dimensions.
template <int... kDims>
struct HeadDimList {
  static constexpr bool contains(int64_t dim) { return ((dim == kDims) || ...); }
  // "64, 96 or 128"
  static std::string text() {
    constexpr int kAll[] = {kDims...};
    std::string all;
    for (size_t i = 0; i < sizeof...(kDims); ++i)
      all += (i == 0 ? "" : i + 1 < sizeof...(kDims) ? ", " : " or ") + std::to_string(kAll[i]);
    return all;
  }
};

template <typename Dims>
bool check_head_dim(Rules& r, const char* name, int64_t dim) {
  return r.check(
      Dims::contains(dim), name, [] { return "must have head_dim " + Dims::text(); }, dim);
}

inline bool check_dtype(Rules& r, DType dtype) {
  return r.check(dtype == DType::float16 || dtype == DType::bfloat16, "q",
                 "must be float16 or bfloat16", dtype);
}

// Packed: tokens per sequence on average.
inline bool check_tokens(Rules& r, int64_t tokens, const int32_t* cu_seqlens, int64_t batch,
                         int64_t keys) {
  return r.check(tokens >= kMinSm90Tokens * (cu_seqlens && batch > 1 ? batch : 1), "q",
                 "must have 32 tokens for each sequence", tokens) &&
         r.check(keys > 0, "k", "must have tokens", keys);
}

// TMA requirements: address and strides are multiples of 16 bytes, no stride is shorter than a row.
inline bool check_layout(Rules& r, const char* name, const MappedRows& t) {
  const auto fits = [&](int64_t stride, int64_t extent) {
    const int64_t bytes = stride_of(stride, extent, t.columns);
    return extent <= 1 || (bytes >= 2 * t.columns && bytes % 16 == 0 && bytes < int64_t{1} << 40 &&
                           extent <= int64_t{1} << 32);
  };
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.rows.data) % 16);
  if (!r.check(past == 0, name, "must start at a multiple of 16 bytes",
               [&] { return std::to_string(past) + " bytes past one"; }))
    return false;
  return r.check(
      past > 0 ||
          (fits(t.rows.seq, t.tokens) && fits(t.rows.head, t.heads) && fits(t.rows.batch, t.batch)),
      name,
      [&] {
        return "must have strides that are multiples of 8, of " + std::to_string(t.columns) +
               " or more";
      },
      [&](const Described& call) { return call.strides(name); });
}

// A description of a call names an output only if it is given.
inline bool check_out(Rules& r, const MappedRows& t) {
  return r.described("out") == "None" || check_layout(r, "out", t);
}

// A description of a call does not know dout, and has a contiguous one.
inline bool check_dout(Rules& r, const MappedRows& t) {
  return r.broken() || check_layout(r, "dout", t);
}

}  // namespace tokenmill::cuda
