// Backward: a forward sweep that keeps S before each chunk and Y of each token, then a sweep from
// the last chunk to the first. A worker owns a head of q and k, with all its value heads. With dS'
// the gradient of the state after a chunk, a chunk has (cpu_chunk.h)
//
//   dU = M^T dO + k_end dS'     dZ = dU + N^T dY     dY = beta dZ
//   dv = dY                     dbeta_i = dZ_i . y_i
//   dM = dO U^T                 dN = dY U^T
//   dq_in = dO S^T              dk_in = dY S^T       dk_end = U dS'^T
//   dS = e^(G_n) dS' + q_in^T dO + k_in^T dY
//
// Without the correction U = Y = V, and dv = dU; the products with dY are not taken.
//
// log_decay of token t is in all weights from a j < t (or the state before) to an i >= t (or the
// state after): its gradient is the sum of these weights times their gradients.
#include "linear/delta_attention/cpu_chunk.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

class Worker {
 public:
  explicit Worker(const DeltaAttentionBackwardParams& p)
      : p(p),
        f(p.forward),
        dim(f.head_dim),
        group(f.heads / f.key_heads),
        ldk(round_up(dim, kWidth)),
        ldv(round_up(f.value_dim, kWidth)),
        state_size((dim + kTileRows) * ldv),
        chunks(ceil_div(longest_sequence(f), kBlock)),
        chunk(f),
        workspace(chunk.floats() + group * (chunks + 2) * state_size +
                  group * (chunks * kBlock + kTileRows) * ldv + 10 * kRows * ldk + 4 * kRows * ldv +
                  std::max(ldk, ldv) * kBlock + ldv * ldk + 2 * kRows * kBlock + 2 * ldk + 32 * 16),
        states(workspace.take(group * (chunks + 1) * state_size)),
        ys(workspace.take(group * (chunks * kBlock + kTileRows) * ldv)),
        dstates(workspace.take(group * state_size)),
        dq(keys()),
        dk(keys()),
        dq_in(keys()),
        dk_in(keys()),
        dk_end(keys()),
        decayed(keys()),
        later(keys()),
        own(keys()),
        q_tile(keys()),
        k_tile(keys()),
        scaled(values()),
        dout(values()),
        du(values()),
        dy(values()),
        transposed{workspace.take(std::max(ldk, ldv) * kBlock), kBlock},
        turned{workspace.take(ldv * ldk), ldk},
        dqueries{workspace.take(kRows * kBlock), kBlock},
        dkeys{workspace.take(kRows * kBlock), kBlock},
        crossing(workspace.take(ldk)),
        before(workspace.take(ldk)) {
    chunk.place(workspace);
    std::memset(crossing, 0, ldk * sizeof(float));
    for (const Matrix& m : {dout, dy}) std::memset(m.data, 0, kRows * ldv * sizeof(float));
    std::memset(dk_in.data, 0, kRows * ldk * sizeof(float));
  }

  void run(int64_t item) {
    const int64_t b = item / f.key_heads, key_head = item % f.key_heads;
    const Sequence s(f, b);
    for (int64_t l = 0; l < group; ++l) {
      const int64_t h = key_head * group + l;
      sweep_forward(s, b, h, l);
      load_state(dstate(l), p.dfinal, b, h, dim, f.value_dim);
    }
    for (int64_t i = ceil_div(s.length, kBlock); i-- > 0;) {
      const int64_t first = s.start + i * kBlock, n = std::min(kBlock, s.length - i * kBlock);
      std::memset(dq.data, 0, n * ldk * sizeof(float));
      std::memset(dk.data, 0, n * ldk * sizeof(float));
      for (int64_t l = 0; l < group; ++l) block(i, b, first, key_head * group + l, l, n);
      if (f.l2norm) {
        of_unnormalized(dq, chunk.q, chunk.q_norm, n);
        of_unnormalized(dk, chunk.k, chunk.k_norm, n);
      }
      for (int64_t t = 0; t < n; ++t) {
        store_row(dq.row(t), 1.f, row_of(p.dq, f.dtype, b, first + t, key_head), f.dtype, dim);
        store_row(dk.row(t), 1.f, row_of(p.dk, f.dtype, b, first + t, key_head), f.dtype, dim);
      }
    }
    if (!p.dinitial.data) return;
    for (int64_t l = 0; l < group; ++l)
      store_state(p.dinitial, dstate(l), b, key_head * group + l, dim, f.value_dim);
  }

 private:
  Matrix keys() { return {workspace.take(kRows * ldk), ldk}; }
  Matrix values() { return {workspace.take(kRows * ldv), ldv}; }
  Matrix state_before(int64_t l, int64_t i) const {
    return {states + (l * (chunks + 1) + i) * state_size, ldv};
  }
  Matrix dstate(int64_t l) const { return {dstates + l * state_size, ldv}; }
  Matrix y_of(int64_t l, int64_t i) const { return {ys + (l * chunks + i) * kBlock * ldv, ldv}; }

  void load_values(const Matrix& to, const Rows& rows, int64_t b, int64_t first, int64_t h,
                   int64_t n) const {
    pack_rows<Float32>(row_of(rows, f.dtype, b, first, h), f.dtype, rows.seq, n, n, f.value_dim,
                       1.f, to.data, ldv);
  }

  void sweep_forward(const Sequence& s, int64_t b, int64_t h, int64_t l) {
    load_state(state_before(l, 0), f.initial, b, h, dim, f.value_dim);
    for (int64_t i = 0; i * kBlock < s.length; ++i) {
      const int64_t first = s.start + i * kBlock, n = std::min(kBlock, s.length - i * kBlock);
      const int64_t ahead = std::min(kBlock, s.length - i * kBlock - n);
      chunk.ask_for_tokens(b, first + n, h, ahead);
      ask_for(f.v, f.dtype, b, first + n, h, ahead, f.value_dim);
      chunk.load_tokens(b, first, h, n);
      load_values(y_of(l, i), f.v, b, first, h, n);
      const Matrix u = chunk.solve(y_of(l, i), scaled, state_before(l, i), n);
      chunk.carry(state_before(l, i + 1), state_before(l, i), u, n);
    }
  }

  // Adds chunk i of value head h, the l-th of the worker, to dq and dk.
  void block(int64_t i, int64_t b, int64_t first, int64_t h, int64_t l, int64_t n) {
    const Matrix y = y_of(l, i), state = state_before(l, i), ds = dstate(l);
    const bool corrects = chunk.corrects;
    const Matrix &u = corrects ? scaled : y, &dv = corrects ? dy : du;
    if (i > 0) {
      chunk.ask_for_tokens(b, first - kBlock, h, kBlock);
      if (p.dout.data) ask_for(p.dout, f.dtype, b, first - kBlock, h, kBlock, f.value_dim);
    }
    chunk.load_tokens(b, first, h, n);
    if (corrects) scale_rows(scaled, y, chunk.beta, n, ldv);
    if (p.dout.data)
      load_values(dout, p.dout, b, first, h, n);
    else
      std::memset(dout.data, 0, n * ldv * sizeof(float));

    product_upper<true>(du, n, chunk.of_queries, dout, ldv);
    product<true, false>(du, n, chunk.k_end, ds, dim, ldv);
    if (corrects) solve_backward(n);
    for (int64_t t = 0; t < n; ++t) {
      if (corrects) *Chunk::gate(p.dbeta, b, first + t, h) = dot(du.row(t), y.row(t), ldv);
      store_row(dv.row(t), 1.f, row_of(p.dv, f.dtype, b, first + t, h), f.dtype, f.value_dim);
    }

    transpose_into(transposed, u, n, f.value_dim);
    product_pairs(dqueries, n, dout, transposed, f.value_dim);
    if (corrects) product_pairs(dkeys, n, dy, transposed, f.value_dim);
    transpose_into(turned, state, dim, f.value_dim);
    product<false, true>(dq_in, n, dout, turned, f.value_dim, ldk);
    if (corrects) product<false, true>(dk_in, n, dy, turned, f.value_dim, ldk);
    transpose_into(turned, ds, dim, f.value_dim);
    product<false, true>(dk_end, n, u, turned, f.value_dim, ldk);
    for (int64_t d = 0; d < dim; ++d)
      crossing[d] = chunk.total[d] * dot(state.row(d), ds.row(d), ldv);
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t c = 0; c < ldv; c += kWidth)
        store(ds.row(d) + c, load(ds.row(d) + c) * set(chunk.total[d]));
    product<true, false>(ds, dim, chunk.q_in, dout, n, ldv);
    if (corrects) product<true, false>(ds, dim, chunk.k_in, dy, n, ldv);

    if (!f.per_channel)
      heads(b, first, h, n);
    else if (corrects)
      channels<true>(b, first, h, n);
    else
      channels<false>(b, first, h, n);
  }

  // du becomes dZ.
  void solve_backward(int64_t n) const {
    each_tile_backward(n, [&]<int M>(int64_t row) TM_LAMBDA {
      const int64_t last = std::min(row + M, n);
      multiply_rows<Float32, true, M, false>(du.row(row), ldv, chunk.of_keys.row(last) + row,
                                             kBlock, dy.row(last), ldv, n - last, ldv);
      for (int64_t j = last; j-- > row;)
        for (int64_t c = 0; c < ldv; c += kWidth) {
          vf sum = load(du.row(j) + c);
          for (int64_t i = j + 1; i < last; ++i)
            sum = fma(set(chunk.of_keys.row(i)[j]), load(dy.row(i) + c), sum);
          store(du.row(j) + c, sum);
          store(dy.row(j) + c, sum * set(chunk.beta[j]));
        }
    });
  }

  TM_INLINE static float dot(const float* x, const float* y, int64_t length) {
    vf sum = zero();
    for (int64_t c = 0; c < length; c += kWidth) sum = fma(load(x + c), load(y + c), sum);
    return sum_lanes(sum);
  }

  // Gradients of q, k and log_decay per head, or without it.
  void heads(int64_t b, int64_t first, int64_t h, int64_t n) {
    const float scale = f.scale;
    float row_sums[kBlock + 1] = {}, sums[kBlock + 1] = {};
    for (int64_t i = 0; i < n; ++i) {
      if (p.dlog_decay.data) add_crossings(i, sums);
      for (int64_t j = 0; j < std::min(round_up(i + kTileRows, kWidth), kBlock); j += kWidth) {
        const vf weight = load(chunk.pair.row(i) + j);
        const vm hidden = equal(weight, zero());
        const vf m = load(dqueries.row(i) + j) * (weight * set(scale));
        const vf k_pair = zero() - load(dkeys.row(i) + j) * weight;
        store(dqueries.row(i) + j, select(hidden, zero(), m));
        store(dkeys.row(i) + j, select(either(hidden, lanes(i - j, i + 1 - j)), zero(), k_pair));
      }
    }
    if (p.dlog_decay.data) {
      float all = 0;
      for (int64_t d = 0; d < dim; ++d) all += crossing[d];
      // From the state before to token i, and from token i to the state after.
      for (int64_t i = 0; i < n; ++i)
        row_sums[i] =
            dot(dq_in.row(i), chunk.q_in.row(i), ldk) + dot(dk_in.row(i), chunk.k_in.row(i), ldk);
      for (int64_t i = n; i-- > 0;) row_sums[i] += row_sums[i + 1];
      for (int64_t t = 0; t < n; ++t) {
        *Chunk::gate(p.dlog_decay, b, first + t, h) = sums[t] + row_sums[t] + all;
        all += chunk.to_end[t] * dot(dk_end.row(t), chunk.k.row(t), ldk);
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      const vf in = set(chunk.from_start[i]), end = set(chunk.to_end[i]);
      for (int64_t d = 0; d < ldk; d += kWidth) {
        const vf of_q = load(dq_in.row(i) + d) * (in * set(scale));
        store(dq.row(i) + d, load(dq.row(i) + d) + of_q);
        const vf of_k = load(dk_end.row(i) + d) * end - load(dk_in.row(i) + d) * in;
        store(dk.row(i) + d, load(dk.row(i) + d) + of_k);
      }
    }
    product_lower(dq, n, dqueries, chunk.k, ldk);
    product_lower(dk, n, dkeys, chunk.k, ldk);
    product_upper<false>(dk, n, dqueries, chunk.q, ldk);
    product_upper<false>(dk, n, dkeys, chunk.k, ldk);
  }

  // Adds to sums[t] the weights times gradients of the pairs (i, j) with j < t <= i.
  void add_crossings(int64_t i, float* sums) const {
    float sum = 0;
    for (int64_t j = 0; j < i; ++j) {
      if (chunk.pair.row(i)[j] != 0)
        sum += chunk.of_queries.row(i)[j] * dqueries.row(i)[j] +
               chunk.of_keys.row(i)[j] * dkeys.row(i)[j];
      sums[j + 1] += sum;
    }
  }

  // Gradients of q, k and log_decay per channel. dq_in and dk_in become the gradients of q and k as
  // the later token of a pair, `later` of k as the earlier one, dk_end of k in the state after.
  template <bool kCorrects>
  void channels(int64_t b, int64_t first, int64_t h, int64_t n) {
    std::memset(later.data, 0, n * ldk * sizeof(float));
    for (int64_t d = 0; d < ldk; d += kWidth) store(before + d, set(1.f));
    each_tile(n, [&]<int M>(int64_t row) TM_LAMBDA {
      const int64_t last = std::min(row + M, n);
      for (int64_t i = row; i < last; ++i)
        for (int64_t d = 0; d < ldk; d += kWidth) {
          store(dq_in.row(i) + d, load(dq_in.row(i) + d) * load(before + d));
          if constexpr (kCorrects)
            store(dk_in.row(i) + d, load(dk_in.row(i) + d) * load(before + d));
        }
      multiply_rows<Float32, false, M, false>(dq_in.row(row), ldk, dqueries.row(row), kBlock,
                                              decayed.data, ldk, row, ldk);
      if constexpr (kCorrects)
        multiply_rows<Float32, false, M, false>(dk_in.row(row), ldk, dkeys.row(row), kBlock,
                                                decayed.data, ldk, row, ldk);
      own_channels<kCorrects>(row, last);
    });
    each_tile_backward(n, [&]<int M>(int64_t row) TM_LAMBDA {
      earlier_channels<kCorrects>(row, std::min(row + M, n));
    });
    store_channels(b, first, h, n);
  }

  // The rows of a tile, whose keys join `decayed`, the keys as they are at the end of the tile.
  template <bool kCorrects>
  void own_channels(int64_t row, int64_t last) {
    for (int64_t d = 0; d < ldk; d += kWidth) {
      vf tile = set(1.f);
      for (int64_t i = row; i < last; ++i) {
        tile = tile * load(chunk.decays.row(i) + d);
        const vf q_decay = tile * set(f.scale), k_decay = zero() - tile;
        store(q_tile.row(i) + d, load(chunk.q.row(i) + d) * q_decay);
        store(dq_in.row(i) + d, load(dq_in.row(i) + d) * q_decay);
        if constexpr (kCorrects) {
          store(k_tile.row(i) + d, load(chunk.k.row(i) + d) * k_decay);
          store(dk_in.row(i) + d, load(dk_in.row(i) + d) * k_decay);
        }
      }
      for (int64_t j = 0; j < row; ++j) store(decayed.row(j) + d, load(decayed.row(j) + d) * tile);
      store(before + d, load(before + d) * tile);
      for (int64_t j = row; j < last; ++j) {
        const vf key = load(chunk.k.row(j) + d);
        vf of_key = zero(), decay = set(1.f);
        for (int64_t i = j + 1; i < last; ++i) {
          decay = decay * load(chunk.decays.row(i) + d);
          const vf dm = set(f.scale * dqueries.row(i)[j]), decayed_key = key * decay;
          vf of_rows = dm * load(chunk.q.row(i) + d);
          store(dq_in.row(i) + d, fma(dm, decayed_key, load(dq_in.row(i) + d)));
          if constexpr (kCorrects) {
            const vf dn = set(-dkeys.row(i)[j]);
            of_rows = fma(dn, load(chunk.k.row(i) + d), of_rows);
            store(dk_in.row(i) + d, fma(dn, decayed_key, load(dk_in.row(i) + d)));
          }
          of_key = fma(of_rows, decay, of_key);
        }
        store(own.row(j) + d, of_key);
        store(decayed.row(j) + d, key * decay);
      }
    }
  }

  // `later` of the rows before the tile, as they are at its beginning, from those at its end.
  template <bool kCorrects>
  void earlier_channels(int64_t row, int64_t last) {
    for (int64_t d = 0; d < ldk; d += kWidth) {
      vf decay = set(1.f);
      for (int64_t j = last; j-- > row;) {
        store(later.row(j) + d, fma(load(later.row(j) + d), decay, load(own.row(j) + d)));
        store(dk_end.row(j) + d, load(dk_end.row(j) + d) * decay);
        decay = decay * load(chunk.decays.row(j) + d);
      }
      for (int64_t j = 0; j < row; ++j) {
        store(later.row(j) + d, load(later.row(j) + d) * decay);
        store(dk_end.row(j) + d, load(dk_end.row(j) + d) * decay);
      }
    }
    each_tile(row, [&]<int M>(int64_t j) TM_LAMBDA {
      multiply_rows<Float32, true, M, false>(later.row(j), ldk, dqueries.row(row) + j, kBlock,
                                             q_tile.row(row), ldk, last - row, ldk);
      if constexpr (kCorrects)
        multiply_rows<Float32, true, M, false>(later.row(j), ldk, dkeys.row(row) + j, kBlock,
                                               k_tile.row(row), ldk, last - row, ldk);
    });
  }

  void store_channels(int64_t b, int64_t first, int64_t h, int64_t n) {
    for (int64_t d = 0; d < ldk; d += kWidth) {
      vf after = load(crossing + d);
      for (int64_t t = 0; p.dlog_decay.data && t < n; ++t) {
        store(decayed.row(t) + d, after);
        after = fma(load(chunk.k.row(t) + d), load(dk_end.row(t) + d), after);
      }
      vf pairs = zero();
      for (int64_t t = n; t-- > 0;) {
        const vf q = load(chunk.q.row(t) + d), k = load(chunk.k.row(t) + d);
        const vf dq_row = load(dq_in.row(t) + d), dk_row = load(dk_in.row(t) + d);
        const vf dk_later = load(later.row(t) + d);
        if (p.dlog_decay.data) {
          pairs = pairs + (fma(q, dq_row, k * dk_row) - k * dk_later);
          Elements<DType::float32>::store_n(Chunk::gate(p.dlog_decay, b, first + t, h), d,
                                            load(decayed.row(t) + d) + pairs, dim - d);
        }
        const vf own = set(f.scale * dqueries.row(t)[t]);
        store(dq.row(t) + d, load(dq.row(t) + d) + fma(own, k, dq_row));
        store(dk.row(t) + d,
              load(dk.row(t) + d) + (fma(own, q, dk_row) + (dk_later + load(dk_end.row(t) + d))));
      }
    }
  }

  // dx of x r with r = (|x|^2 + epsilon)^-1/2, from its gradient and the normalized rows.
  void of_unnormalized(const Matrix& dx, const Matrix& normalized, const float* norm,
                       int64_t n) const {
    for (int64_t t = 0; t < n; ++t) {
      const vf along = set(dot(dx.row(t), normalized.row(t), ldk)), r = set(norm[t]);
      for (int64_t d = 0; d < ldk; d += kWidth)
        store(dx.row(t) + d, (load(dx.row(t) + d) - along * load(normalized.row(t) + d)) * r);
    }
  }

  const DeltaAttentionBackwardParams& p;
  const DeltaAttentionParams& f;
  const int64_t dim, group, ldk, ldv, state_size, chunks;
  Chunk chunk;
  cpu::Workspace workspace;
  float *const states, *const ys, *const dstates;
  const Matrix dq, dk, dq_in, dk_in, dk_end;
  const Matrix decayed, later, own, q_tile, k_tile;
  const Matrix scaled, dout, du, dy;  // scaled: U = beta Y
  const Matrix transposed;            // [D or Dv][kBlock]
  const Matrix turned;                // a state, [Dv][D]
  const Matrix dqueries, dkeys;
  float *const crossing, *const before;  // [D] gradient times value of e^(G_n); e^(G) before a tile
};

}  // namespace

void delta_attention_backward(const DeltaAttentionBackwardParams& p) {
  const DeltaAttentionParams& f = p.forward;
  run_items<Worker>(f, p, f.batch * f.key_heads, 24);
}

}  // namespace tokenmill::TOKENMILL_ISA
