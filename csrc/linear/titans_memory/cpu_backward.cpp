// Backward: a forward sweep that recomputes the states and keeps those at block starts, then a
// sweep from the last block to the first. A worker owns a head of a sequence. With X = dO U^T,
// P = Q K^T and w, e the last rows of W and E, a block has
//
//   dU = -(W o P)^T dO - diag(w) K dM' - diag(e) K dS'          dV = -dU
//   dM = W00 dM' + (diag(W0) Q)^T dO   dS = W01 dM' + E1 dS' + (diag(W1) Q)^T dO   dG = K^T dU
//   dQ = diag(W0) dO M^T + diag(W1) dO S^T - (W o X) K
//   dK = -diag(w) U dM'^T - diag(e) U dS'^T - (W o X)^T Q + dU G^T
//
// where dM' and dS' are the gradients of the state after the block.
#include <initializer_list>

#include "linear/titans_memory/cpu_block.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

class Worker {
 public:
  explicit Worker(const TitansBackwardParams& p)
      : p(p),
        f(p.forward),
        dim(f.head_dim),
        ldk(round_up(dim, kWidth)),
        ldv(round_up(f.value_dim, kWidth)),
        state_size((dim + kTileRows) * ldv),
        longest(longest_sequence(f)),
        workspace(2 * state_size * (titans_blocks(longest, f.chunk_size, kBlock) + 1) +
                  (longest + kTileRows) * ldv + 3 * state_size + 6 * kRows * ldk + 3 * kRows * ldv +
                  std::max(ldk, ldv) * kBlock + ldv * ldk + 6 * kRows * kBlock + 32 * 16),
        states(workspace.take(2 * state_size * (titans_blocks(longest, f.chunk_size, kBlock) + 1))),
        us(workspace.take((longest + kTileRows) * ldv)),
        dmemory(state(workspace.take(state_size))),
        dmomentum(state(workspace.take(state_size))),
        dstart(state(workspace.take(state_size))),
        q(keys()),
        k(keys()),
        scaled(keys()),
        first(keys()),
        second(keys()),
        dk(keys()),
        dout(values()),
        du(values()),
        transposed{workspace.take(std::max(ldk, ldv) * kBlock), kBlock},
        turned{workspace.take(ldv * ldk), ldk},
        pairs(square()),
        dpairs(square()),
        weighted(square()),
        w(square()),
        e(square()) {}

  void run(int64_t item) {
    const int64_t b = item / f.heads, h = item % f.heads;
    const Sequence s(f, b);
    sweep_forward(s, b, h);
    load_state(dmemory, p.dmemory, b, h, dim, f.value_dim);
    load_state(dmomentum, p.dmomentum, b, h, dim, f.value_dim);
    clear(dstart);
    for (int64_t i = titans_blocks(s.length, f.chunk_size, kBlock); i-- > 0;) {
      const TitansBlock at = titans_block(i, s.length, f.chunk_size, kBlock);
      const int64_t ahead = std::min(kBlock, at.first), next = s.start + at.first - ahead;
      ask_for(f.q, f.dtype, b, next, h, ahead, dim);
      ask_for(f.k, f.dtype, b, next, h, ahead, dim);
      if (p.dout.data) ask_for(p.dout, f.dtype, b, next, h, ahead, f.value_dim);
      ask_for<true>(p.dq, f.dtype, b, s.start + at.first, h, at.tokens, dim);
      ask_for<true>(p.dk, f.dtype, b, s.start + at.first, h, at.tokens, dim);
      ask_for<true>(p.dv, f.dtype, b, s.start + at.first, h, at.tokens, f.value_dim);
      block(i, at, b, s.start + at.first, h);
      if (!at.starts) continue;
      for (int64_t j = 0; j < dim * ldv; j += kWidth)
        store(dmemory.data + j, load(dmemory.data + j) + load(dstart.data + j));
      clear(dstart);
    }
    if (!p.dinitial_memory.data) return;
    store_state(p.dinitial_memory, dmemory, b, h, dim, f.value_dim);
    store_state(p.dinitial_momentum, dmomentum, b, h, dim, f.value_dim);
  }

 private:
  Matrix state(float* data) const { return {data, ldv}; }
  Matrix keys() { return {workspace.take(kRows * ldk), ldk}; }
  Matrix values() { return {workspace.take(kRows * ldv), ldv}; }
  Matrix square() { return {workspace.take(kRows * kBlock), kBlock}; }
  void clear(const Matrix& m) const { std::memset(m.data, 0, dim * ldv * sizeof(float)); }
  Matrix memory_before(int64_t i) const { return state(states + 2 * i * state_size); }
  Matrix momentum_before(int64_t i) const { return state(states + (2 * i + 1) * state_size); }

  void pack(const Matrix& to, const Rows& r, int64_t b, int64_t token, int64_t h, int64_t n,
            int64_t length, float factor = 1.f) const {
    pack_rows<Float32>(row_of(r, f.dtype, b, token, h), f.dtype, r.seq, n, n, length, factor,
                       to.data, to.ld);
  }

  void sweep_forward(const Sequence& s, int64_t b, int64_t h) {
    load_state(memory_before(0), f.initial_memory, b, h, dim, f.value_dim);
    load_state(momentum_before(0), f.initial_momentum, b, h, dim, f.value_dim);
    const int64_t blocks = titans_blocks(s.length, f.chunk_size, kBlock);
    for (int64_t i = 0; i < blocks; ++i) {
      const TitansBlock at = titans_block(i, s.length, f.chunk_size, kBlock);
      const int64_t token = s.start + at.first, n = at.tokens;
      const int64_t next = at.first + n, ahead = std::min(kBlock, s.length - next);
      ask_for(f.k, f.dtype, b, s.start + next, h, ahead, dim);
      ask_for(f.v, f.dtype, b, s.start + next, h, ahead, f.value_dim);
      const Matrix u{us + at.first * ldv, ldv};
      pack(k, f.k, b, token, h, n, dim);
      pack(u, f.v, b, token, h, n, f.value_dim, -1.f);
      product<false, false>(u, n, k, memory_before(at.number_of_start), dim, ldv);
      gates.read(f, b, h, token, n);
      weigh<false>(gates, n, factors, w.data, e.data);
      const Matrix memory = memory_before(i), momentum = momentum_before(i);
      const Matrix memory_after = memory_before(i + 1), momentum_after = momentum_before(i + 1);
      const vf of_memory = set(factors.memory[n - 1]), of_momentum = set(factors.momentum[n - 1]);
      const vf kept = set(factors.kept[n - 1]);
      for (int64_t j = 0; j < dim * ldv; j += kWidth) {
        const vf x = load(momentum.data + j);
        store(memory_after.data + j, fma(load(memory.data + j), of_memory, x * of_momentum));
        store(momentum_after.data + j, x * kept);
      }
      for (const bool to_memory : {true, false}) {
        negate((to_memory ? w : e).data);
        scale_rows(scaled, k, negative, n, ldk);
        product<true, false>(to_memory ? memory_after : momentum_after, dim, scaled, u, n, ldv);
      }
    }
  }

  void negate(const float* row) {
    for (int64_t j = 0; j < kBlock; j += kWidth) store(negative + j, zero() - load(row + j));
  }

  void block(int64_t i, const TitansBlock& at, int64_t b, int64_t token, int64_t h) {
    const int64_t n = at.tokens;
    const Matrix u{us + at.first * ldv, ldv};
    const Matrix memory = memory_before(i), momentum = momentum_before(i);
    const Matrix start = memory_before(at.number_of_start);
    pack(q, f.q, b, token, h, n, dim);
    pack(k, f.k, b, token, h, n, dim);
    if (p.dout.data)
      pack(dout, p.dout, b, token, h, n, f.value_dim);
    else
      std::memset(dout.data, 0, n * ldv * sizeof(float));
    gates.read(f, b, h, token, n);
    weigh<true>(gates, n, factors, w.data, e.data);
    const float *w_end = w.row(n - 1), *e_end = e.row(n - 1);

    transpose_into(transposed, k, n, dim);
    product_pairs(pairs, n, q, transposed, dim);
    transpose_into(transposed, u, n, f.value_dim);
    product_pairs(dpairs, n, dout, transposed, f.value_dim);
    // pairs becomes the gradient of W, dpairs the gradient of the products.
    for (int64_t t = 0; t < n; ++t)
      for (int64_t j = 0; j < kBlock; j += kWidth) {
        const vf weight = load(w.row(t) + j);
        const vf pair = load(pairs.row(t) + j), x = load(dpairs.row(t) + j);
        const vm hidden = lanes(t + 1 - j, kWidth);
        store(weighted.row(t) + j, negative_product(weight, pair));
        store(dpairs.row(t) + j, negative_product(weight, x));
        store(pairs.row(t) + j, select(hidden, zero(), zero() - pair * x));
      }

    // dU, dV, dG
    product_upper<true>(du, n, weighted, dout, ldv);
    negate(w_end);
    scale_rows(scaled, k, negative, n, ldk);
    product<false, false>(du, n, scaled, dmemory, dim, ldv);
    negate(e_end);
    scale_rows(scaled, k, negative, n, ldk);
    product<false, false>(du, n, scaled, dmomentum, dim, ldv);
    for (int64_t t = 0; t < n; ++t)
      store_row(du.row(t), -1.f, row_of(p.dv, f.dtype, b, token + t, h), f.dtype, f.value_dim);
    product<true, false>(dstart, dim, k, du, n, ldv);

    // dK
    transpose_into(turned, dmemory, dim, f.value_dim);
    product<false, true>(first, n, u, turned, f.value_dim, ldk);
    transpose_into(turned, dmomentum, dim, f.value_dim);
    product<false, true>(second, n, u, turned, f.value_dim, ldk);
    for (int64_t t = 0; t < n; ++t) {
      dots(first.row(t), second.row(t), k.row(t), dw_end[t], de_end[t]);
      combine(dk.row(t), first.row(t), -w_end[t], second.row(t), -e_end[t]);
    }
    product_upper<false>(dk, n, dpairs, q, ldk);
    transpose_into(turned, start, dim, f.value_dim);
    product<false, false>(dk, n, du, turned, f.value_dim, ldk);
    for (int64_t t = 0; t < n; ++t)
      store_row(dk.row(t), 1.f, row_of(p.dk, f.dtype, b, token + t, h), f.dtype, dim);

    // dQ
    if (!at.starts) transpose_into(turned, memory, dim, f.value_dim);
    product<false, true>(first, n, dout, turned, f.value_dim, ldk);
    transpose_into(turned, momentum, dim, f.value_dim);
    product<false, true>(second, n, dout, turned, f.value_dim, ldk);
    for (int64_t t = 0; t < n; ++t) {
      dots(first.row(t), second.row(t), q.row(t), dmemory_factor[t], dmomentum_factor[t]);
      combine(first.row(t), first.row(t), factors.memory[t], second.row(t), factors.momentum[t]);
    }
    product_lower(first, n, dpairs, k, ldk);
    for (int64_t t = 0; t < n; ++t)
      store_row(first.row(t), 1.f, row_of(p.dq, f.dtype, b, token + t, h), f.dtype, dim);

    // dM, dS, and the gradients of the gates
    carry_back(memory, momentum, n);
    scale_rows(scaled, q, factors.memory, n, ldk);
    product<true, false>(dmemory, dim, scaled, dout, n, ldv);
    scale_rows(scaled, q, factors.momentum, n, ldk);
    product<true, false>(dmomentum, dim, scaled, dout, n, ldv);
    gate_gradients(b, token, h, n);
  }

  TM_INLINE void dots(const float* x, const float* y, const float* with, float& xs, float& ys) {
    vf a = zero(), b = zero();
    for (int64_t c = 0; c < ldk; c += kWidth) {
      a = fma(load(x + c), load(with + c), a);
      b = fma(load(y + c), load(with + c), b);
    }
    xs = sum_lanes(a);
    ys = sum_lanes(b);
  }
  TM_INLINE void combine(float* to, const float* x, float a, const float* y, float b) {
    for (int64_t c = 0; c < ldk; c += kWidth)
      store(to + c, fma(load(x + c), set(a), load(y + c) * set(b)));
  }

  // Propagates the gradients of the state to the start of the block, and computes the gradients of
  // the factors that carried the state.
  void carry_back(const Matrix& memory, const Matrix& momentum, int64_t n) {
    const vf of_memory = set(factors.memory[n - 1]), of_momentum = set(factors.momentum[n - 1]);
    const vf kept = set(factors.kept[n - 1]);
    vf of[3] = {zero(), zero(), zero()};
    for (int64_t i = 0; i < dim * ldv; i += kWidth) {
      const vf dm = load(dmemory.data + i), ds = load(dmomentum.data + i);
      const vf m = load(memory.data + i), s = load(momentum.data + i);
      of[0] = fma(m, dm, of[0]);
      of[1] = fma(s, dm, of[1]);
      of[2] = fma(s, ds, of[2]);
      store(dmemory.data + i, dm * of_memory);
      store(dmomentum.data + i, fma(dm, of_momentum, ds * kept));
    }
    dmemory_factor[n - 1] += sum_lanes(of[0]);
    dmomentum_factor[n - 1] += sum_lanes(of[1]);
    dkept = sum_lanes(of[2]);
  }

  // Rows of W and E in reverse.
  void gate_gradients(int64_t b, int64_t token, int64_t h, int64_t n) {
    vf gw[kBlock / kWidth], ge[kBlock / kWidth];  // gradients of the next row
    float gw_memory = 0, gw_momentum = 0, ge_kept = 0;
    for (int64_t j = 0; j < kBlock / kWidth; ++j) {
      gw[j] = zero() - load(dw_end + j * kWidth);
      ge[j] = zero() - load(de_end + j * kWidth);
      gw[j] = select(lanes(n - j * kWidth, kWidth), zero(), gw[j]);
      ge[j] = select(lanes(n - j * kWidth, kWidth), zero(), ge[j]);
    }
    const auto put = [&](const TokenGates& g, int64_t t, float x)
                         TM_LAMBDA { g.data[b * g.batch + (token + t) * g.seq + h * g.head] = x; };
    for (int64_t t = n; t-- > 0;) {
      const bool last = t == n - 1;
      const float a_next = last ? 1 : gates.decay[t + 1], b_next = last ? 1 : gates.eta[t + 1];
      gw_memory = a_next * gw_memory + dmemory_factor[t];
      gw_momentum = a_next * gw_momentum + dmomentum_factor[t];
      ge_kept = (last ? dkept : b_next * ge_kept) + gw_momentum;
      vf da = zero(), db = zero();
      for (int64_t j = 0; j <= t / kWidth; ++j) {
        gw[j] = fma(gw[j], set(a_next), load(pairs.row(t) + j * kWidth));
        ge[j] = fma(ge[j], set(b_next), gw[j]);
        if (t > 0) {
          da = fma(gw[j], load(w.row(t - 1) + j * kWidth), da);
          db = fma(ge[j], load(e.row(t - 1) + j * kWidth), db);
        }
      }
      float own[kWidth];
      store(own, ge[t / kWidth]);
      const float memory = t > 0 ? factors.memory[t - 1] : 1;
      const float momentum = t > 0 ? factors.momentum[t - 1] : 0;
      const float kept = t > 0 ? factors.kept[t - 1] : 1;
      put(p.dalpha, t, -(sum_lanes(da) + gw_memory * memory + gw_momentum * momentum));
      put(p.deta, t, sum_lanes(db) + ge_kept * kept);
      put(p.dtheta, t, own[t % kWidth]);
    }
  }

  const TitansBackwardParams& p;
  const TitansParams& f;
  const int64_t dim, ldk, ldv, state_size, longest;
  cpu::Workspace workspace;
  float *const states, *const us;
  const Matrix dmemory, dmomentum, dstart;
  const Matrix q, k, scaled, first, second, dk;
  const Matrix dout, du;
  const Matrix transposed;  // [D or Dv][kBlock]
  const Matrix turned;      // a state, [Dv][D]
  const Matrix pairs, dpairs, weighted, w, e;
  Gates gates;
  Factors factors;
  float negative[kBlock], dw_end[kBlock], de_end[kBlock];
  float dmemory_factor[kBlock], dmomentum_factor[kBlock], dkept = 0;
};

}  // namespace

void titans_memory_backward(const TitansBackwardParams& p) {
  const TitansParams& f = p.forward;
  run_items<Worker>(f, p, f.batch * f.heads, 26);
}

}  // namespace tokenmill::TOKENMILL_ISA
