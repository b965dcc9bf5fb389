// Backward: three recurrences of the same form as the forward. With y the sums before normalization
// and q including the scale,
//
//   dq_i = sum_{j <= i} pair (dy_i . v_j) k_j    forward in time, transposed state
//   dv_j = sum_{i >= j} pair (k_j . q_i) dy_i    backward in time
//   dk_j = sum_{i >= j} pair (v_j . dy_i) q_i    backward in time, transposed state
//
// Memory does not grow with the length, unless the gradient of the decay is wanted. At token t that
// gradient is the sum over all i >= t > j of pair (q_i . k_j) (dy_i . v_j): from pairs within the
// chunk of t, from q_i . dq_i and k_j . dk_j as far as they come from the state, and from <S, dS>
// of the states before and after the chunk, between which the chunk's decay lies. No terms cancel
// (the difference of q.dq and k.dk, summed over the later tokens, would leave the rounding error of
// both). S is saved before each segment and recomputed from there.
#include <initializer_list>

#include "cpu/parallel.h"
#include "linear/linear_attention/cpu_gradients.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kSegment = 256, kChunksOfSegment = kSegment / kChunk;
static_assert(kSegment % kChunk == 0);

// One recurrence: its operands, and the decay of the current chunk.
struct Recurrence {
  ChunkOperands o;
  ChunkDecay decay;
  Recurrence(const LogDecay& log_decay, int64_t features, int64_t width, bool backward,
             float scale = 1)
      : o(features, width, false), decay(log_decay, backward, scale) {}
};

enum class Part { all, queries, keys };

class Worker {
 public:
  Worker(const LinearAttentionBackwardParams& bp, int64_t longest, int64_t kv_heads)
      : bp(bp),
        p(bp.forward),
        group(p.heads / p.kv_heads),
        heads(kv_heads * group),
        // At least one segment, so that the gradient of a decay is written even without tokens.
        segments(bp.ddecay.data ? ceil_div(longest > 0 ? longest : 1, kSegment) : 0),
        rows(p, p.map == FeatureMap::identity && !p.normalize && bp.dout.data && segments == 0),
        to_queries(p.decay, rows.width, rows.features, false, rows.q_factor),
        to_keys(p.decay, rows.width, rows.features, true),
        to_values(p.decay, rows.features, p.value_dim, true),
        undecayed(no_decay, true, 1),
        ldo(round_up(rows.features > rows.width ? rows.features : rows.width, kWidth)),
        workspace(floats_needed()) {
    rows.place(workspace);
    for (Recurrence* r : {&to_queries, &to_keys, &to_values}) {
      r->o.y = r == &to_queries ? workspace.take(operand_size()) : to_queries.o.y;
      r->o.z = r == &to_queries ? workspace.take(operand_size()) : to_queries.o.z;
      r->o.weights = r == &to_queries ? workspace.take(kPaddedRows * kChunk) : to_queries.o.weights;
    }
    std::memset(to_queries.o.y, 0, operand_size() * sizeof(float));
    std::memset(to_queries.o.weights, 0, kPaddedRows * kChunk * sizeof(float));
    to_queries.o.x = to_queries.o.state = nullptr;
    transposed_states = workspace.take(heads * to_keys.o.state_size());
    value_states = workspace.take(heads * to_values.o.state_size());
    tables = workspace.take(3 * heads * ChunkDecay::kTable);
    out = workspace.take(kChunk * ldo);
    spare = workspace.take(kTileRows * ldo);
    by_state = workspace.take(segments > 0 ? kChunk * ldo : 0);
    kept_weights = workspace.take(kChunk * kChunk);
    undecayed_table = workspace.take(ChunkDecay::kTable);
    undecayed.fill_table(undecayed_table, 0, 0);
    packed_dk = workspace.take(kChunk * ldo);
    packed_dv = workspace.take(kChunk * ldo);
    saved = workspace.take(heads * segments * to_keys.o.state_size());
    before_chunks =
        workspace.take(segments > 0 ? heads * kChunksOfSegment * to_keys.o.state_size() : 0);
    decay_gradients = workspace.take(heads * segments * kSegment);
  }

  // Processes KV heads kv .. kv + count - 1 of sequence b.
  void run(int64_t b, int64_t kv, int64_t count, Part part) {
    const Sequence s(p, b);
    for (int64_t l = 0; l < count * group; ++l)
      for (const Recurrence* r : {&to_queries, &to_keys, &to_values})
        r->decay.fill_table(table(*r, l), b, kv * group + l);
    if (part != Part::keys) queries(s, b, kv, count);
    if (part != Part::queries) keys(s, b, kv, count);
    if (segments > 0)
      for (int64_t l = 0; l < count * group; ++l) store_decay(s, b, kv * group + l, l);
  }

 private:
  // Maximum size of y and z over the three recurrences.
  int64_t operand_size() const {
    int64_t size = 0;
    for (const Recurrence* r : {&to_queries, &to_keys, &to_values}) {
      size = r->o.y_size() > size ? r->o.y_size() : size;
      size = r->o.z_size() > size ? r->o.z_size() : size;
    }
    return size;
  }

  int64_t floats_needed() const {
    return rows.size() + 2 * operand_size() + kPaddedRows * kChunk +
           heads * (to_keys.o.state_size() * (1 + segments) + to_values.o.state_size() +
                    segments * kSegment + 3 * ChunkDecay::kTable) +
           (segments > 0 ? heads * kChunksOfSegment * to_keys.o.state_size() + kChunk * ldo : 0) +
           ChunkDecay::kTable + kChunk * kChunk + (3 * kChunk + kTileRows) * ldo + 16 * 16;
  }

  // Destination of gradient rows: the output tensor itself, or rows that are stored to it at the
  // end.
  struct Target {
    float* rows;
    int64_t step;
    bool final;
  };
  Target target(const Span& to, int64_t length, float* packed) const {
    if (rows.plain && to.dtype == DType::float32 && to.n == kChunk && length % kWidth == 0)
      return {reinterpret_cast<float*>(to.data), to.step, true};
    return {packed, ldo, false};
  }

  static int64_t rows_at(const Sequence& s, int64_t t) {
    return s.length - t < kChunk ? s.length - t : kChunk;
  }

  // Copies the transposed state from or to memory [features][width].
  template <bool kStore>
  void move_transposed(const ChunkOperands& o, float* memory) const {
    for (int64_t c = 0; c < o.width; c += kPanel)
      for (int64_t e = 0; e < o.features; ++e) {
        float* ours = o.state_panel(c) + e * kPanel;
        for (int64_t f = c; f < o.width && f < c + kPanel; ++f) {
          float& theirs = memory[f * rows.width + e];
          kStore ? theirs = ours[f - c] : ours[f - c] = theirs;
        }
      }
  }

  // Outputs of a chunk, in rows `step` apart; if the gradient of the decay is wanted, also
  // crossing[r] = the state's contribution to row r times row r of `factors`.
  void outputs(const Recurrence& r, int64_t n, bool state, float* to, int64_t step,
               const float* factors, float* crossing, const Ahead& ahead) {
    if (segments == 0) return chunk_outputs<false>(r.o, r.decay, n, state, to, step, spare, ahead);
    chunk_scores<false>(r.o, r.decay, n, ahead);
    chunk_products<false>(r.o, r.decay, n, true, false, to, step, spare, ahead);
    std::memset(crossing, 0, n * sizeof(float));
    if (!state) return;
    chunk_products<false>(r.o, r.decay, n, false, true, by_state, ldo, spare, Ahead());
    for (int64_t i = 0; i < n; ++i) {
      vf dot = zero();
      for (int64_t f = 0; f < rows.features; f += kWidth) {
        const vf x = load(by_state + i * ldo + f);
        dot = fma(x, load(factors + i * rows.ldf + f), dot);
        store(to + i * step + f, load(to + i * step + f) + x);
      }
      crossing[i] = sum_lanes(dot);
    }
  }

  // Computes dq, and saves the states before segments.
  void queries(const Sequence& s, int64_t b, int64_t kv, int64_t count) {
    std::memset(transposed_states, 0, heads * to_queries.o.state_size() * sizeof(float));
    for (int64_t l = 0; p.initial.data && l < count * group; ++l) {
      const int64_t h = kv * group + l;
      use_states(l);
      move_transposed<false>(to_queries.o,
                             p.initial.data + b * p.initial.sequence + h * p.initial.head);
    }
    for (int64_t t = 0; t < s.length; t += kChunk)
      for (int64_t l = 0; l < count * group; ++l) {
        if (l % group == 0) rows.load_keys(b, kv + l / group, s.start + t, rows_at(s, t), false);
        const bool more = l + 1 < count * group;
        query_chunk(s, b, kv * group + l, l, t,
                    ahead_of(s, b, kv * group + (more ? l + 1 : 0), more ? t : t + kChunk, false));
      }
  }

  // Rows to prefetch for the chunk of query head h at t. dq only needs queries for feature maps.
  Ahead ahead_of(const Sequence& s, int64_t b, int64_t h, int64_t t, bool keys) const {
    Ahead a;
    if (t < 0 || t >= s.length) return a;
    const int64_t n = rows_at(s, t), first = s.start + t, kv = h / group;
    if (bp.dout.data) a.scores = span_of(bp.dout, p.dtype, b, h, first, n).ahead(p.value_dim);
    a.outputs = span_of(p.v, p.dtype, b, kv, first, n).ahead(p.value_dim);
    a.state = span_of(p.k, p.dtype, b, kv, first, n).ahead(p.head_dim);
    a.written =
        span_of(keys || !rows.plain ? p.q : bp.dq, p.dtype, b, h, first, n).ahead(p.head_dim);
    return a;
  }

  // Gradient rows written by the chunk of query head h at t.
  Ahead written_ahead(const Sequence& s, int64_t b, int64_t h, int64_t t) const {
    Ahead a;
    if (t < 0 || t >= s.length) return a;
    const int64_t n = rows_at(s, t), first = s.start + t, kv = h / group;
    a.outputs = span_of(bp.dv, p.dtype, b, kv, first, n).ahead(p.value_dim);
    a.written = span_of(bp.dk, p.dtype, b, kv, first, n).ahead(p.head_dim);
    return a;
  }

  // Chunk of query head h, the l-th of this worker.
  void query_chunk(const Sequence& s, int64_t b, int64_t h, int64_t l, int64_t t,
                   const Ahead& ahead) {
    ChunkOperands& o = to_queries.o;
    const int64_t n = rows_at(s, t), first = s.start + t;
    use_states(l);
    rows.load_queries(bp, b, h, first, n, false);
    rows.as_x(o, rows.dy, rows.packed_dy);
    rows.as_y(o, rows.v);
    rows.as_z(o, rows.k);
    to_queries.decay.start_chunk(table(to_queries, l), b, h, first, n);
    const bool state = t > 0 || p.initial.data;
    const Span dq = span_of(bp.dq, p.dtype, b, h, first, n);
    const Target to = target(dq, p.head_dim, out);
    if (segments > 0 && t % kSegment == 0) copy_state(saved_state(l, t / kSegment), o.state);
    outputs(to_queries, n, state, to.rows, to.step, rows.packed_q, decay_gradient(l, t), ahead);
    if (!to.final) store_gradients<true>(dq, span_of(p.q, p.dtype, b, h, first, n), out);
    if (t + n < s.length) chunk_state(o, to_queries.decay, n, ahead);
  }

  // Recomputes the query-side states before each chunk of the segment from t on.
  void restore_states(const Sequence& s, int64_t b, int64_t kv, int64_t count, int64_t t) {
    for (int64_t l = 0; l < count * group; ++l)
      copy_state(state_before(l, 0), saved_state(l, t / kSegment));
    for (int64_t c = 1; c < kChunksOfSegment && t + c * kChunk < s.length; ++c)
      for (int64_t l = 0; l < count * group; ++l) {
        const int64_t first = s.start + t + (c - 1) * kChunk;
        if (l % group == 0) rows.load_keys(b, kv + l / group, first, kChunk, false);
        ChunkOperands& o = to_queries.o;
        o.state = state_before(l, c);
        copy_state(o.state, state_before(l, c - 1));
        rows.as_y(o, rows.v);
        rows.as_z(o, rows.k);
        to_queries.decay.start_chunk(table(to_queries, l), b, kv * group + l, first, kChunk);
        chunk_state(o, to_queries.decay, kChunk, Ahead());
      }
  }

  void copy_state(float* to, const float* from) const {
    std::memcpy(to, from, to_keys.o.state_size() * sizeof(float));
  }
  float* table(const Recurrence& r, int64_t l) const {
    const int64_t which = &r == &to_queries ? 0 : &r == &to_keys ? 1 : 2;
    return tables + (which * heads + l) * ChunkDecay::kTable;
  }
  float* saved_state(int64_t l, int64_t segment) const {
    return saved + (l * segments + segment) * to_keys.o.state_size();
  }
  float* state_before(int64_t l, int64_t chunk) const {
    return before_chunks + (l * kChunksOfSegment + chunk) * to_keys.o.state_size();
  }
  // Decay gradient at token t. The forward pass leaves the contribution of the state there.
  float* decay_gradient(int64_t l, int64_t t) const {
    return decay_gradients + l * segments * kSegment + t;
  }

  // Computes dk, dv and dinitial; dk and dv are summed over the query heads of a KV head.
  void keys(const Sequence& s, int64_t b, int64_t kv, int64_t count) {
    ChunkOperands &ok = to_keys.o, &ov = to_values.o;
    std::memset(transposed_states, 0, heads * ok.state_size() * sizeof(float));
    std::memset(value_states, 0, heads * ov.state_size() * sizeof(float));
    for (int64_t l = 0; bp.dfinal.data && l < count * group; ++l) {
      float* from = bp.dfinal.data + b * bp.dfinal.sequence + (kv * group + l) * bp.dfinal.head;
      use_states(l);
      move_transposed<false>(ok, from);
      move_state<false>(ov, from, rows.width, rows.features, 0, p.value_dim, 0);
    }
    for (int64_t t = (s.length - 1) / kChunk * kChunk; s.length > 0 && t >= 0; t -= kChunk) {
      const int64_t end = t + rows_at(s, t);
      if (segments > 0 && (end == s.length || end % kSegment == 0))
        restore_states(s, b, kv, count, t / kSegment * kSegment);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t n = rows_at(s, t), first = s.start + t;
        rows.load_keys(b, kv + i, first, n, true);
        const Span to_k = span_of(bp.dk, p.dtype, b, kv + i, first, n).reversed();
        const Span to_v = span_of(bp.dv, p.dtype, b, kv + i, first, n).reversed();
        dk = target(to_k, p.head_dim, packed_dk);
        dv = target(to_v, p.value_dim, packed_dv);
        for (int64_t l = i * group; l < (i + 1) * group; ++l)
          key_chunk(s, b, kv * group + l, l, t, l == i * group,
                    l + 1 < count * group ? ahead_of(s, b, kv * group + l + 1, t, true)
                                          : ahead_of(s, b, kv * group, t - kChunk, true),
                    l + 1 < count * group ? written_ahead(s, b, kv * group + l + 1, t)
                                          : written_ahead(s, b, kv * group, t - kChunk));
        if (!dk.final)
          store_gradients<false>(to_k, span_of(p.k, p.dtype, b, kv + i, first, n).reversed(),
                                 packed_dk);
        for (int64_t r = 0; !dv.final && r < n; ++r)
          store_row(packed_dv + r * ldo, 1.f, to_v.row(r), p.dtype, p.value_dim);
      }
    }
    for (int64_t l = 0; bp.dinitial.data && l < count * group; ++l) {
      use_states(l);
      move_transposed<true>(
          ok, bp.dinitial.data + b * bp.dinitial.sequence + (kv * group + l) * bp.dinitial.head);
    }
  }

  // Adds the chunk of query head h, the l-th of this worker, to dk and dv.
  void key_chunk(const Sequence& s, int64_t b, int64_t h, int64_t l, int64_t t, bool assign,
                 const Ahead& ahead, const Ahead& written) {
    ChunkOperands &ok = to_keys.o, &ov = to_values.o;
    const int64_t n = rows_at(s, t), first = s.start + t;
    const bool at_end = t + n == s.length, state = !at_end || bp.dfinal.data;
    use_states(l);
    rows.load_queries(bp, b, h, first, n, true);
    for (Recurrence* r : {&to_keys, &to_values}) r->decay.start_chunk(table(*r, l), b, h, first, n);

    rows.as_x(ok, rows.v, rows.packed_v);
    rows.as_y(ok, rows.dy);
    rows.as_z(ok, rows.q, rows.q_factor);
    const Target to_k = assign ? dk : Target{out, ldo, false};
    float crossing[kChunk];
    outputs(to_keys, n, state, to_k.rows, to_k.step, rows.packed_k, crossing, ahead);
    double across = 0;
    if (segments > 0) {
      std::memcpy(kept_weights, ok.weights, n * kChunk * sizeof(float));
      if (state && (t > 0 || p.initial.data))
        across = static_cast<double>(to_keys.decay.total) *
                 inner(state_before(l, t % kSegment / kChunk), ok);
    }
    if (t > 0 || bp.dinitial.data) chunk_state(ok, to_keys.decay, n, written);
    if (!assign) add_rows(dk, n, rows.features);

    rows.as_x(ov, rows.k, rows.packed_k);
    rows.as_y(ov, rows.q, rows.q_factor);
    if (segments > 0) {
      undecayed.start_chunk(undecayed_table, 0, 0, 0, n);
      chunk_scores<false>(ov, undecayed, n, Ahead());
      add_decay_gradient(decay_gradient(l, t), n, crossing, ov.weights, across);
    }
    rows.as_z(ov, rows.dy);
    const Target to_v = assign ? dv : Target{out, ldo, false};
    chunk_outputs<false>(ov, to_values.decay, n, state, to_v.rows, to_v.step, spare, written);
    if (t > 0) chunk_state(ov, to_values.decay, n, ahead);
    if (!assign) add_rows(dv, n, p.value_dim);
  }

  // Decay gradients of n tokens. Rows are in reversed order, `gradients` in time order: they hold
  // q_i . dq_i, and `keys` k_j . dk_j, as far as these come from a state; `scores` are k_j . q_i.
  void add_decay_gradient(float* gradients, int64_t n, const float* keys, const float* scores,
                          double across) const {
    double sums[kChunk];
    double sum = across;
    for (int64_t r = 0; r < n; ++r) sums[r] = sum += static_cast<double>(gradients[n - 1 - r]);
    sum = 0;
    for (int64_t r = n - 1; r >= 0; --r) {
      sums[r] += sum;
      sum += static_cast<double>(keys[r]);
    }
    for (int64_t j = 1; j < n; ++j) {
      double weight = 0;  // key j with the queries 0 .. i
      for (int64_t i = 0; i < j; ++i) {
        const int64_t at = j * kChunk + i;
        weight += static_cast<double>(kept_weights[at]) * static_cast<double>(scores[at]);
        sums[i] += weight;
      }
    }
    for (int64_t r = 0; r < n; ++r) gradients[n - 1 - r] = static_cast<float>(sums[r]);
  }

  void use_states(int64_t l) {
    to_queries.o.state = to_keys.o.state = transposed_states + l * to_keys.o.state_size();
    to_values.o.state = value_states + l * to_values.o.state_size();
  }

  static double inner(const float* a, const ChunkOperands& o) {
    double sum = 0;
    for (int64_t c = 0; c < o.width; c += kPanel)
      for (int64_t e = 0; e < o.features; ++e) {
        const int64_t row = c * o.state_rows + e * kPanel;
        vf acc = zero();
        for (int64_t j = 0; j < kPanel; j += kWidth)
          acc = fma(load(a + row + j), load(o.state + row + j), acc);
        sum += static_cast<double>(sum_lanes(acc));
      }
    return sum;
  }

  void add_rows(const Target& to, int64_t n, int64_t length) const {
    for (int64_t r = 0; r < n; ++r)
      for (int64_t d = 0; d < length; d += kWidth) {
        float* sum = to.rows + r * to.step + d;
        store(sum, load(sum) + load(out + r * ldo + d));
      }
  }

  // Applies the derivative of the feature map: gradients of features to gradients of elements.
  template <bool kQuery>
  void store_gradients(const Span& to, const Span& elements, float* gradients) const {
    const float factor = kQuery && !rows.plain ? p.scale : 1;
    const int64_t length = p.head_dim;
    for (int64_t r = 0; r < to.n; ++r) {
      float* g = gradients + r * ldo;
      if (p.map == FeatureMap::taylor2) {
        float x[kMaxTaylorHeadDim + kWidth], dx[kMaxTaylorHeadDim + kWidth];
        for (int64_t d = 0; d < length; d += kWidth)
          store(x + d, load_as_float_n(elements.row(r), p.dtype, d, length - d) * set(factor));
        taylor_row_backward<kQuery>(x, g, length, dx);
        store_row(dx, factor, to.row(r), p.dtype, length);
        continue;
      }
      if (p.map != FeatureMap::identity)
        visit_map(p.map, [&](auto m) TM_LAMBDA {
          for (int64_t d = 0; d < length; d += kWidth) {
            const vf x = load_as_float_n(elements.row(r), p.dtype, d, length - d);
            store(g + d, load(g + d) * feature_slope<decltype(m)::value>(x));
          }
        });
      store_row(g, factor, to.row(r), p.dtype, length);
    }
  }

  void store_decay(const Sequence& s, int64_t b, int64_t h, int64_t l) const {
    const LogDecay& d = bp.ddecay;
    float* to = d.data + b * d.batch + h * d.head;
    const float* gradient = decay_gradient(l, 0);
    double total = 0;
    for (int64_t t = 0; t < s.length; ++t) {
      total += static_cast<double>(gradient[t]);
      if (d.per_token) to[(s.start + t) * d.seq] = gradient[t];
    }
    if (!d.per_token) *to = static_cast<float>(total);
  }

  const LinearAttentionBackwardParams& bp;
  const LinearAttentionParams& p;
  int64_t group, heads, segments;
  GradientRows rows;
  Recurrence to_queries, to_keys, to_values;
  LogDecay no_decay{};
  ChunkDecay undecayed;
  int64_t ldo;
  cpu::Workspace workspace;
  float *transposed_states, *value_states, *out, *spare, *packed_dk, *packed_dv;
  float *by_state, *kept_weights, *undecayed_table;
  float *saved, *before_chunks, *decay_gradients, *tables;
  Target dk, dv;  // rows of the current chunk
};

}  // namespace

void linear_attention_backward(const LinearAttentionBackwardParams& bp) {
  const LinearAttentionParams& p = bp.forward;
  int64_t longest = 0;
  for (int64_t b = 0; b < (p.cu_seqlens ? p.batch : 1); ++b) {
    const int64_t length = Sequence(p, b).length;
    longest = length > longest ? length : longest;
  }
  const int64_t tokens = p.cu_seqlens ? p.seqlen : p.batch * p.seqlen;
  // A parallel region costs about as much as 2 Mflop on one thread.
  const double work = 12.0 *
                      static_cast<double>(tokens * p.heads * feature_dim(p.map, p.head_dim)) *
                      static_cast<double>(p.value_dim);
  const int threads = work < 2e6 ? 1 : cpu::num_threads();
  const bool split = p.batch * p.kv_heads < threads && !bp.ddecay.data;
  const int64_t group = p.kv_heads > 0 ? p.heads / p.kv_heads : 1;
  const int64_t size = heads_per_item(p.batch, p.kv_heads, threads,
                                      2 * group * feature_dim(p.map, p.head_dim) * p.value_dim);
  const int64_t blocks = ceil_div(p.kv_heads, size);
  cpu::parallel_items(p.batch * blocks * (split ? 2 : 1), threads, [&](cpu::ItemCounter& items) {
    FlushDenormals flush;
    Worker worker(bp, longest, size);
    for (int64_t item; (item = items.next()) >= 0;) {
      const int64_t block = split ? item / 2 : item;
      const Part part = !split ? Part::all : item % 2 == 0 ? Part::keys : Part::queries;
      const int64_t first = block % blocks * size, left = p.kv_heads - first;
      worker.run(block / blocks, first, left < size ? left : size, part);
    }
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
