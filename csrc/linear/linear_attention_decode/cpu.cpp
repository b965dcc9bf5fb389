// Decode: one pass over the state, which is decayed, updated and multiplied row by row. Bound by
// the memory traffic of the state.
#include <cmath>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "linear/cpu_features.h"
#include "linear/linear_attention_decode/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

// Vectors of a row held in registers: this many for v, and as many for the outputs.
constexpr int kBlock = kWidth == 16 ? 8 : 4;

class Worker {
 public:
  explicit Worker(const LinearDecodeParams& p)
      : p(p),
        features(feature_dim(p.map, p.head_dim)),
        width(p.value_dim + p.normalize),
        ldf(round_up(features, kWidth)),
        ldw(round_up(width, kWidth)),
        ldd(p.decay.per_channel ? ldf : 1),
        workspace(p.seqlen * (2 * (ldf + ldw) + ldd) + 5 * 16) {
    q = workspace.take(p.seqlen * ldf);
    k = workspace.take(p.seqlen * ldf);
    v = workspace.take(p.seqlen * ldw);
    out = workspace.take(p.seqlen * ldw);
    keep = workspace.take(p.seqlen * ldd);
  }

  void run(int64_t item) {
    const int64_t b = item / p.heads, h = item % p.heads;
    const int64_t slot = p.requests.slot(b);
    std::memset(out, 0, p.seqlen * ldw * sizeof(float));
    if (slot >= 0) {
      kept_tokens = p.requests.kept(b, p.seqlen);
      load(b, h);
      float* state = p.state.data + slot * p.state.sequence + h * p.state.head;
      int64_t c = 0;
      for (; c + kBlock * kWidth <= width; c += kBlock * kWidth) update<kBlock>(state, c);
      for (; c + kWidth <= width; c += kWidth) update<1>(state, c);
      if (c < width) update_rest(state, c);
    }
    for (int64_t t = 0; t < p.seqlen; ++t) store_token(b, h, t);
  }

 private:
  const void* at(const Rows& r, int64_t b, int64_t h, int64_t t) const {
    return static_cast<char*>(r.data) +
           (b * r.batch + t * r.seq + h * r.head) * (p.dtype == DType::float32 ? 4 : 2);
  }

  void load(int64_t b, int64_t h) {
    const int64_t kv_head = h / (p.heads / p.kv_heads);
    for (int64_t t = 0; t < p.seqlen; ++t) {
      load_features<true>(at(p.q, b, h, t), p.scale, q + t * ldf);
      load_features<false>(at(p.k, b, kv_head, t), 1, k + t * ldf);
      const void* row = at(p.v, b, kv_head, t);
      for (int64_t d = 0; d < p.value_dim; d += kWidth)
        store(v + t * ldw + d, load_as_float_n(row, p.dtype, d, p.value_dim - d));
      if (p.normalize) v[t * ldw + p.value_dim] = 1;
      load_decay(b, h, t);
    }
  }

  void load_decay(int64_t b, int64_t h, int64_t t) {
    const LogDecay& decay = p.decay;
    const float* const from = decay.data + b * decay.batch + t * decay.seq + h * decay.head;
    if (!decay.per_channel) {
      keep[t] = decay.data ? std::exp(*from) : 1.f;
      return;
    }
    for (int64_t d = 0; d < ldd; d += kWidth)
      store(keep + t * ldd + d,
            decay_of(Elements<DType::float32>::load_n(from, d, p.head_dim - d)));
  }

  // Decay of row f of the state at token t.
  TM_INLINE float kept(int64_t t, int64_t f) const {
    return keep[t * ldd + (p.decay.per_channel ? f : 0)];
  }

  template <bool kQuery>
  void load_features(const void* row, float factor, float* to) {
    const int64_t n = p.head_dim;
    alignas(64) float lane[256 + kWidth];
    for (int64_t d = 0; d < n; d += kWidth)
      store(lane + d, load_as_float_n(row, p.dtype, d, n - d));
    if (p.map != FeatureMap::taylor2) {
      map_rows(p.map, factor, lane, round_up(n, kWidth), 1, n);
      std::memcpy(to, lane, n * sizeof(float));
      return;
    }
    for (int64_t i = 0; i < n; ++i) lane[i] *= factor;
    taylor_row<kQuery>(lane, n, to);
  }

  // Columns c .. c + N * kWidth - 1 of all rows of the state.
  template <int N>
  __attribute__((noinline)) void update(float* state, int64_t c) {
    if (p.seqlen > 1) return update_tokens<N>(state, c);
    vf value[N], acc[N];
    TM_UNROLL(8)
    for (int j = 0; j < N; ++j) {
      value[j] = TOKENMILL_ISA::load(v + c + j * kWidth);
      acc[j] = zero();
    }
    for (int64_t f = 0; f < features; ++f) {
      float* row = state + f * width + c;
      const vf decay = set(kept(0, f)), key = set(k[f]), query = set(q[f]);
      TM_UNROLL(8)
      for (int j = 0; j < N; ++j) {
        const vf s = fma(TOKENMILL_ISA::load(row + j * kWidth), decay, key * value[j]);
        if (kept_tokens > 0) store(row + j * kWidth, s);
        acc[j] = fma(query, s, acc[j]);
      }
    }
    TM_UNROLL(8)
    for (int j = 0; j < N; ++j) store(out + c + j * kWidth, acc[j]);
  }

  // A row of the state stays in registers for all tokens.
  template <int N>
  void update_tokens(float* state, int64_t c) {
    for (int64_t f = 0; f < features; ++f) {
      float* row = state + f * width + c;
      vf s[N];
      TM_UNROLL(8)
      for (int j = 0; j < N; ++j) s[j] = TOKENMILL_ISA::load(row + j * kWidth);
      for (int64_t t = 0; t < p.seqlen; ++t) {
        const vf decay = set(kept(t, f)), key = set(k[t * ldf + f]), query = set(q[t * ldf + f]);
        TM_UNROLL(8)
        for (int j = 0; j < N; ++j) {
          s[j] = fma(s[j], decay, key * TOKENMILL_ISA::load(v + t * ldw + c + j * kWidth));
          float* sum = out + t * ldw + c + j * kWidth;
          store(sum, fma(query, s[j], TOKENMILL_ISA::load(sum)));
        }
        if (t + 1 != kept_tokens) continue;
        TM_UNROLL(8)
        for (int j = 0; j < N; ++j) store(row + j * kWidth, s[j]);
      }
    }
  }

  // Columns from c on, fewer than a vector.
  __attribute__((noinline)) void update_rest(float* state, int64_t c) {
    for (int64_t f = 0; f < features; ++f)
      for (int64_t i = c; i < width; ++i) {
        float s = state[f * width + i];
        for (int64_t t = 0; t < p.seqlen; ++t) {
          s = s * kept(t, f) + k[t * ldf + f] * v[t * ldw + i];
          out[t * ldw + i] += q[t * ldf + f] * s;
          if (t + 1 == kept_tokens) state[f * width + i] = s;
        }
      }
  }

  void store_token(int64_t b, int64_t h, int64_t t) {
    const float* row = out + t * ldw;
    const float factor = p.normalize ? 1 / (row[p.value_dim] + kNormalizerEpsilon) : 1;
    void* to = const_cast<void*>(at(p.out, b, h, t));
    const vf f = set(factor);
    visit_elements(p.dtype, [&](auto e) TM_LAMBDA {
      for (int64_t d = 0; d < p.value_dim; d += kWidth)
        e.store_n(to, d, TOKENMILL_ISA::load(row + d) * f, p.value_dim - d);
    });
  }

  const LinearDecodeParams& p;
  int64_t features, width, ldf, ldw, ldd;
  cpu::Workspace workspace;
  float *q, *k, *v, *out, *keep;
  int64_t kept_tokens = 0;  // of the request
};

}  // namespace

void linear_attention_decode(const LinearDecodeParams& p) {
  const int64_t heads = p.batch * p.heads;
  const int64_t state = feature_dim(p.map, p.head_dim) * (p.value_dim + p.normalize);
  // A parallel region costs about as much as processing this many floats on one thread.
  const int threads = heads * state * p.seqlen < (1 << 17) ? 1 : cpu::num_threads();
  cpu::parallel_items(heads, threads, [&](cpu::ItemCounter& items) {
    FlushDenormals flush;
    Worker worker(p);
    for (int64_t item; (item = items.next()) >= 0;) worker.run(item);
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
