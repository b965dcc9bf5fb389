// Operand rows of a chunk for the backward CPU kernel.
#pragma once
#include "linear/linear_attention/cpu_rows.h"

namespace tokenmill::TOKENMILL_ISA {

// Features of q and k, v, and the gradient dy of the sums, each with its column if there is a
// normalizer: read from the tensors (`plain`: q excludes the scale), or packed as float rows, zero
// past the tokens (q includes the scale).
struct GradientRows {
  const LinearAttentionParams& p;
  bool plain;
  float q_factor;  // factor included in q
  int64_t features, width, ldf, ldw;
  Span q, k, v, dy;
  float *packed_q, *packed_k, *packed_v, *packed_dy;

  GradientRows(const LinearAttentionParams& p, bool plain)
      : p(p),
        plain(plain),
        q_factor(plain ? p.scale : 1),
        features(feature_dim(p.map, p.head_dim)),
        width(p.value_dim + p.normalize),
        ldf(round_up(features, kWidth)),
        ldw(round_up(width, kWidth)) {}

  int64_t size() const { return kPaddedRows * 2 * (ldf + ldw) + 4 * 16; }
  void place(cpu::Workspace& workspace) {
    packed_q = ChunkOperands::zeros(workspace, kPaddedRows * ldf);
    packed_k = ChunkOperands::zeros(workspace, kPaddedRows * ldf);
    packed_v = ChunkOperands::zeros(workspace, kPaddedRows * ldw);
    packed_dy = ChunkOperands::zeros(workspace, kPaddedRows * ldw);
  }

  void load_keys(int64_t b, int64_t head, int64_t first, int64_t n, bool backward) {
    k = in_order(span_of(p.k, p.dtype, b, head, first, n), backward);
    v = in_order(span_of(p.v, p.dtype, b, head, first, n), backward);
    if (plain) return;
    load_features<false>(k, 1, packed_k);
    load(v, 1, p.value_dim, packed_v, ldw);
    if (p.normalize)
      for (int64_t r = 0; r < n; ++r) packed_v[r * ldw + p.value_dim] = 1;
    k = span_of(packed_k, ldf, n);
    v = span_of(packed_v, ldw, n);
  }

  void load_queries(const LinearAttentionBackwardParams& bp, int64_t b, int64_t head, int64_t first,
                    int64_t n, bool backward) {
    q = in_order(span_of(p.q, p.dtype, b, head, first, n), backward);
    if (bp.dout.data) dy = in_order(span_of(bp.dout, p.dtype, b, head, first, n), backward);
    if (plain) return;
    load_features<true>(q, p.scale, packed_q);
    q = span_of(packed_q, ldf, n);
    if (bp.dout.data) load(dy, 1, p.value_dim, packed_dy, ldw);  // otherwise it stays zero
    dy = span_of(packed_dy, ldw, n);
    if (!bp.dout.data || !p.normalize) return;
    const Span os = span_of(p.out, p.dtype, b, head, first, n);
    const float* z = p.normalizer + (p.cu_seqlens ? head : b * p.heads + head) * p.seqlen + first;
    for (int64_t r = 0; r < n; ++r) {
      const int64_t t = backward ? n - 1 - r : r;
      float* row = packed_dy + r * ldw;
      const vf factor = set(1 / z[t]);
      vf dot = zero();
      for (int64_t d = 0; d < p.value_dim; d += kWidth) {
        const vf g = TOKENMILL_ISA::load(row + d) * factor;
        dot = fma(g, load_as_float_n(os.row(t), p.dtype, d, p.value_dim - d), dot);
        store(row + d, g);
      }
      row[p.value_dim] = -sum_lanes(dot);
    }
  }

  // Tiles of a full chunk read only its own rows.
  void as_x(ChunkOperands& o, const Span& s, float* packed) const {
    const bool in_place = !plain || (s.dtype == DType::float32 && s.n == kChunk);
    o.ldx = in_place ? s.step : round_up(o.features, kWidth);
    o.x = in_place ? reinterpret_cast<float*>(s.data) : packed;
    if (!in_place) load(s, 1, o.features, packed, o.ldx);
  }
  static void as_y(const ChunkOperands& o, const Span& s, float factor = 1) {
    pack_y(o, s, FeatureMap::identity, factor, o.features);
  }
  static void as_z(const ChunkOperands& o, const Span& s, float factor = 1) {
    pack_z(o, s, factor, o.width);
  }

 private:
  static Span in_order(const Span& s, bool backward) { return backward ? s.reversed() : s; }

  static void load(const Span& s, float factor, int64_t length, float* to, int64_t ld) {
    pack_rows<Float32>(s.data, s.dtype, s.step, s.n, rows_of_tiles(s.n), length, factor, to, ld);
  }

  template <bool kQuery>
  void load_features(const Span& s, float factor, float* to) const {
    if (p.map == FeatureMap::identity) return load(s, factor, p.head_dim, to, ldf);
    if (p.map != FeatureMap::taylor2) {
      load(s, 1, p.head_dim, to, ldf);
      return map_rows(p.map, factor, to, ldf, s.n, p.head_dim);
    }
    float x[kMaxTaylorHeadDim + kWidth];
    for (int64_t r = 0; r < s.n; ++r) {
      for (int64_t d = 0; d < p.head_dim; d += kWidth)
        store(x + d, load_as_float_n(s.row(r), s.dtype, d, p.head_dim - d) * set(factor));
      taylor_row<kQuery>(x, p.head_dim, to + r * ldf);
    }
    std::memset(to + s.n * ldf, 0, (kPaddedRows - s.n) * ldf * sizeof(float));
  }
};

}  // namespace tokenmill::TOKENMILL_ISA
