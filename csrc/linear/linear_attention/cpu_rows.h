// Conversion between tensors and the operands of a chunk, for the CPU kernels.
#pragma once
#include "linear/cpu_features.h"
#include "linear/linear_attention/cpu_chunk.h"
#include "linear/linear_attention/params.h"

namespace tokenmill::TOKENMILL_ISA {

TM_INLINE int64_t size_of(DType t) { return t == DType::float32 ? 4 : 2; }

struct Sequence {
  int64_t start, length;
  Sequence(const LinearAttentionParams& p, int64_t b)
      : start(p.cu_seqlens ? p.cu_seqlens[b] : 0),
        length(p.cu_seqlens ? p.cu_seqlens[b + 1] - start : p.seqlen) {}
};

// Number of heads that a worker runs through a sequence together, chunk by chunk: their rows are
// adjacent in memory, their states stay in L2.
inline int64_t heads_per_item(int64_t batch, int64_t heads, int64_t threads, int64_t state_floats) {
  constexpr int64_t kStates = 1 << 17;
  int64_t size = heads > 0 ? heads : 1;
  const auto uneven = [&] {
    const int64_t items = batch * ceil_div(heads, size);
    return items < 4 * threads && items % threads != 0;
  };
  while (size > 1 && (size * state_floats > kStates || uneven())) size = ceil_div(size, 2);
  return size;
}

// n rows of one head, `step` elements apart; a negative step runs backward in time.
struct Span {
  char* data;
  DType dtype;
  int64_t step, n;

  char* row(int64_t r) const { return data + r * step * size_of(dtype); }
  Span columns(int64_t first) const { return {data + first * size_of(dtype), dtype, step, n}; }
  Span rows(int64_t first, int64_t count) const { return {row(first), dtype, step, count}; }
  Ahead::Rows ahead(int64_t length) const {
    return {data, step * size_of(dtype), n, length * size_of(dtype)};
  }
  Span reversed() const { return {row(n - 1), dtype, -step, n}; }
};

// Tokens first .. first + n - 1 of a tensor, counted along seq.
TM_INLINE Span span_of(const Rows& r, DType t, int64_t b, int64_t h, int64_t first, int64_t n) {
  return {static_cast<char*>(r.data) + (b * r.batch + first * r.seq + h * r.head) * size_of(t), t,
          r.seq, n};
}
TM_INLINE Span span_of(float* rows, int64_t step, int64_t n) {
  return {reinterpret_cast<char*>(rows), DType::float32, step, n};
}

// x = factor * features of rows with `length` elements.
inline void pack_x(const ChunkOperands& o, const Span& s, FeatureMap map, float factor,
                   int64_t length) {
  if (map != FeatureMap::taylor2) {
    const bool plain = map == FeatureMap::identity;
    pack_rows<Float32>(s.data, s.dtype, s.step, s.n, rows_of_tiles(s.n), length,
                       plain ? factor : 1.f, o.x, o.ldx);
    if (!plain) map_rows(map, factor, o.x, o.ldx, s.n, length);
    return;
  }
  const int64_t rows = round_up(rows_of_tiles(s.n), kWidth);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < length; d += kWidth) {
      float lane[kWidth];
      store(lane, r < s.n ? load_as_float_n(s.row(r), s.dtype, d, length - d) : zero());
      for (int64_t l = 0; l < kWidth && d + l < length; ++l)
        o.x[(1 + d + l) * o.ldx + r] = lane[l] * factor;
    }
  taylor_features<true>(o.x, o.ldx, length, rows, s.n);
}

// y = features of rows with `length` elements.
inline void pack_y(const ChunkOperands& o, const Span& s, FeatureMap map, float factor,
                   int64_t length) {
  const bool taylor = map == FeatureMap::taylor2;
  for (int64_t t = 0; t < s.n; t += kTokenPanel) {
    const int64_t tokens = s.n - t < kTokenPanel ? s.n - t : kTokenPanel;
    float* y = o.y_panel(t);
    float* first = y + (taylor ? kTokenPanel : 0);
    const bool scaled = map == FeatureMap::identity || taylor;
    pack_transposed<Float32, kTokenPanel>(s.row(t), s.dtype, s.step, tokens, length,
                                          scaled ? factor : 1.f, first);
    if (taylor)
      taylor_features<false>(y, kTokenPanel, length, kTokenPanel, tokens);
    else if (!scaled)
      map_rows(map, factor, first, kTokenPanel, length, tokens);
  }
}

// z = factor * rows with `length` elements.
inline void pack_z(const ChunkOperands& o, const Span& s, float factor, int64_t length) {
  for (int64_t c = 0; c < o.width; c += kPanel) {
    const int64_t ld = o.width - c < kPanel ? round_up(o.width - c, kWidth) : kPanel;
    const Span from = s.columns(c);
    if (ld == kPanel) {
      pack_rows<Float32>(from.data, from.dtype, from.step, from.n, from.n, length - c, factor,
                         o.z_panel(c), kPanel);
      continue;
    }
    visit_elements(from.dtype, [&](auto e) TM_LAMBDA {
      for (int64_t r = 0; r < from.n; ++r)
        for (int64_t w = 0; w < ld; w += kWidth)
          store(o.z_panel(c) + r * kPanel + w,
                e.load_n(from.row(r), w, length - c - w) * set(factor));
    });
  }
}

// Fills column `column` of z.
inline void fill_z(const ChunkOperands& o, int64_t column, int64_t n, float value) {
  float* to = o.z_panel(column / kPanel * kPanel) + column % kPanel;
  for (int64_t r = 0; r < n; ++r) to[r * kPanel] = value;
}

// Copies columns first .. first + count - 1 of `rows` rows of a state in memory, each of ld floats,
// from or to column `at` of the operand.
template <bool kStore>
inline void move_state(const ChunkOperands& o, float* memory, int64_t ld, int64_t rows,
                       int64_t first, int64_t count, int64_t at) {
  for (int64_t c = 0; c < count;) {
    const int64_t column = at + c, panel = column / kPanel * kPanel;
    const int64_t left = panel + kPanel - column, n = count - c < left ? count - c : left;
    for (int64_t f = 0; f < rows; ++f) {
      float* ours = o.state_panel(panel) + f * kPanel + column - panel;
      float* theirs = memory + f * ld + first + c;
      kStore ? std::memcpy(theirs, ours, n * sizeof(float))
             : std::memcpy(ours, theirs, n * sizeof(float));
    }
    c += n;
  }
}

}  // namespace tokenmill::TOKENMILL_ISA
