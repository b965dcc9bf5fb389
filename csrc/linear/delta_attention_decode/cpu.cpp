// Decode of the delta rule. With S the state before a token, decayed by its own decay,
//
//   u = beta (v - k S),   S <- S + k^T u,   out = scale q S
//
// The rows of S pass through the registers once for k S of the first token, and once more for each
// token: while a token updates a row, the next one reads it. A tile of columns stays in cache
// meanwhile, so that memory is read and written once. Tokens that the state does not keep update a
// draft of the tile.
#include <cmath>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "linear/cpu_features.h"
#include "linear/cpu_matrix.h"
#include "linear/delta_attention_decode/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int kVectors = 4;  // of a row of a tile

class Worker {
 public:
  explicit Worker(const DeltaDecodeParams& p)
      : p(p),
        ldk(round_up(p.head_dim, kWidth)),
        ldv(round_up(p.value_dim, kWidth)),
        workspace(p.seqlen * (4 * ldk + 2 * ldv + 16) + ldk * kVectors * kWidth + 8 * 16),
        q{workspace.take(p.seqlen * ldk), ldk},
        k{workspace.take(p.seqlen * ldk), ldk},
        decay{workspace.take(p.seqlen * ldk), ldk},
        k_in{workspace.take(p.seqlen * ldk), ldk},
        v{workspace.take(p.seqlen * ldv), ldv},
        out{workspace.take(p.seqlen * ldv), ldv},
        draft{workspace.take(ldk * kVectors * kWidth), kVectors * kWidth},
        beta(workspace.take(p.seqlen)) {}

  void run(int64_t item) {
    const int64_t b = item / p.heads, h = item % p.heads;
    const int64_t slot = p.requests.slot(b);
    std::memset(out.data, 0, p.seqlen * ldv * sizeof(float));
    if (slot >= 0) {
      kept_tokens = p.requests.kept(b, p.seqlen);
      for (int64_t t = 0; t < p.seqlen; ++t) load_token(b, h, t);
      float* const state = p.state.data + slot * p.state.sequence + h * p.state.head;
      int64_t c = 0;
      for (; c + kVectors * kWidth <= p.value_dim; c += kVectors * kWidth)
        update<kVectors, false>(state, c);
      for (; c + kWidth <= p.value_dim; c += kWidth) update<1, false>(state, c);
      if (c < p.value_dim) update<1, true>(state, c);
    }
    for (int64_t t = 0; t < p.seqlen; ++t) store_token(b, h, t);
  }

 private:
  void load_token(int64_t b, int64_t h, int64_t t) {
    const int64_t key_head = h / (p.heads / p.key_heads);
    load_row(q.row(t), row_of(p.q, p.dtype, b, t, key_head), p.head_dim, p.l2norm, p.scale);
    load_row(k.row(t), row_of(p.k, p.dtype, b, t, key_head), p.head_dim, p.l2norm, 1);
    load_row(v.row(t), row_of(p.v, p.dtype, b, t, h), p.value_dim, false, 1);
    beta[t] = *gate(p.beta, b, h, t);
    const float* const gates = p.log_decay.data ? gate(p.log_decay, b, h, t) : nullptr;
    for (int64_t d = 0; d < ldk; d += kWidth) {
      vf kept = set(1.f);
      if (gates)
        kept = decay_of(p.per_channel ? Float::load_n(gates, d, p.head_dim - d) : set(*gates));
      store(decay.row(t) + d, kept);
      store(k_in.row(t) + d, load(k.row(t) + d) * kept);
    }
  }

  void load_row(float* to, const void* from, int64_t n, bool normalize, float factor) const {
    vf squares = zero();
    for (int64_t d = 0; d < n; d += kWidth) {
      const vf x = load_as_float_n(from, p.dtype, d, n - d);
      squares = fma(x, x, squares);
      store(to + d, x);
    }
    if (normalize) factor /= std::sqrt(sum_lanes(squares) + kL2NormEpsilon);
    for (int64_t d = 0; d < n; d += kWidth) store(to + d, load(to + d) * set(factor));
  }

  static float* gate(const TokenGates& g, int64_t b, int64_t h, int64_t t) {
    return g.data + b * g.batch + t * g.seq + h * g.head;
  }

  // All tokens on N vectors of columns from c on; kTail: on the columns that are left.
  template <int N, bool kTail>
  __attribute__((noinline)) void update(float* state, int64_t c) {
    const int64_t left = p.value_dim - c;
    const auto load_state = [&](const float* row) TM_LAMBDA {
      return kTail ? Float::load_n(row, 0, left) : load(row);
    };
    vf of_key[N];
    TM_UNROLL(4)
    for (int j = 0; j < N; ++j) of_key[j] = zero();
    for (int64_t d = 0; d < p.head_dim; ++d) {
      const float* const row = state + d * p.value_dim + c;
      const vf key = set(k_in.row(0)[d]);
      TM_UNROLL(4)
      for (int j = 0; j < N; ++j) of_key[j] = fma(key, load_state(row + j * kWidth), of_key[j]);
    }
    for (int64_t t = 0; t < p.seqlen; ++t) {
      const int64_t next = std::min(t + 1, p.seqlen - 1);
      const Matrix tile{state + c, p.value_dim};
      const Matrix from = t <= kept_tokens ? tile : draft, to = t < kept_tokens ? tile : draft;
      vf u[N], y[N];
      TM_UNROLL(4)
      for (int j = 0; j < N; ++j) {
        u[j] = set(beta[t]) * (load(v.row(t) + c + j * kWidth) - of_key[j]);
        y[j] = of_key[j] = zero();
      }
      for (int64_t d = 0; d < p.head_dim; ++d) {
        const float* const old = from.row(d);
        float* const row = to.row(d);
        const vf kept = set(decay.row(t)[d]), key = set(k.row(t)[d]), query = set(q.row(t)[d]);
        const vf next_key = set(k_in.row(next)[d]);
        TM_UNROLL(4)
        for (int j = 0; j < N; ++j) {
          const vf s = fma(load_state(old + j * kWidth), kept, key * u[j]);
          if constexpr (kTail)
            Float::store_n(row, 0, s, left);
          else
            store(row + j * kWidth, s);
          y[j] = fma(query, s, y[j]);
          of_key[j] = fma(next_key, s, of_key[j]);
        }
      }
      TM_UNROLL(4)
      for (int j = 0; j < N; ++j) store(out.row(t) + c + j * kWidth, y[j]);
    }
  }

  void store_token(int64_t b, int64_t h, int64_t t) {
    void* const to = row_of(p.out, p.dtype, b, t, h);
    visit_elements(p.dtype, [&](auto e) TM_LAMBDA {
      for (int64_t d = 0; d < p.value_dim; d += kWidth)
        e.store_n(to, d, load(out.row(t) + d), p.value_dim - d);
    });
  }

  using Float = Elements<DType::float32>;
  const DeltaDecodeParams& p;
  const int64_t ldk, ldv;
  cpu::Workspace workspace;
  const Matrix q, k, decay, k_in;  // [S][ldk]; k_in: keys times decays
  const Matrix v, out;             // [S][ldv]
  const Matrix draft;              // [ldk][kVectors * kWidth]
  float* const beta;
  int64_t kept_tokens = 0;  // of the request
};

}  // namespace

void delta_attention_decode(const DeltaDecodeParams& p) {
  const int64_t heads = p.batch * p.heads;
  // A parallel region costs about as much as processing this many floats on one thread.
  const bool small = heads * p.head_dim * p.value_dim * p.seqlen < (1 << 17);
  cpu::parallel_items(heads, small ? 1 : cpu::num_threads(), [&](cpu::ItemCounter& items) {
    FlushDenormals flush;
    Worker worker(p);
    for (int64_t item; (item = items.next()) >= 0;) worker.run(item);
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
