// Forward, chunk by chunk, with the states in cache. A worker owns some heads of a sequence, or
// some columns of V of one head if there are fewer heads than threads.
#include "cpu/parallel.h"
#include "linear/linear_attention/cpu_chunk_bfloat16.h"
#include "linear/linear_attention/cpu_rows.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

struct Division {
  int64_t heads, blocks;        // heads per item; items per sequence
  int64_t slices, slice_width;  // slices of the columns of V

  int64_t items(const LinearAttentionParams& p) const { return p.batch * blocks * slices; }
};

class Worker {
 public:
  Worker(const LinearAttentionParams& p, const Division& division)
      : p(p),
        division(division),
        taylor(p.map == FeatureMap::taylor2),
        narrow(p.dtype == DType::bfloat16 && p.map == FeatureMap::identity && !p.normalize),
        o(feature_dim(p.map, p.head_dim), division.slice_width + p.normalize, taylor),
        scale_at_end(p.map == FeatureMap::identity),
        decay(p.decay, false, scale_at_end ? p.scale : 1),
#if defined(TM_DOTS)
        pairs(o),
#endif
        ldo(round_up(o.width, kWidth)),
        workspace(narrow_size() + o.size() +
                  division.heads * (o.state_size() + ChunkDecay::kTable + 16) +
                  (kMaxChunk + 2 * kTileRows) * ldo + 4 * 16) {
    if (taylor) {
      o.taylor = true;
      o.first_score = 1;
      o.score_features = p.head_dim;
    }
    o.place(workspace);
#if defined(TM_DOTS)
    if (narrow) {
      pairs.place(workspace);
      tokens = kPairChunk;
    }
#endif
    x = o.x;
    ldx = o.ldx;
    states = workspace.take(division.heads * o.state_size());
    tables = workspace.take(division.heads * ChunkDecay::kTable);
    out = workspace.take((kMaxChunk + kTileRows) * ldo);
    spare = workspace.take(kTileRows * ldo);
    state_size = o.state_size();
  }

  void run(int64_t item) {
    const int64_t slice = item % division.slices, block = item / division.slices;
    const int64_t b = block / division.blocks;
    const int64_t first_head = block % division.blocks * division.heads;
    const int64_t left = p.heads - first_head;
    const int64_t heads = left < division.heads ? left : division.heads;
    first = slice * division.slice_width;
    columns =
        p.value_dim - first < division.slice_width ? p.value_dim - first : division.slice_width;
    o.width = columns + p.normalize;
    const Sequence s(p, b);
    for (int64_t i = 0; i < heads; ++i) {
      decay.fill_table(tables + i * ChunkDecay::kTable, b, first_head + i);
      load_state(b, first_head + i, i);
    }
    for (int64_t t = 0; t < s.length; t += tokens)
      for (int64_t i = 0; i < heads; ++i)
        chunk(s, b, first_head + i, i, t,
              i + 1 < heads ? ahead_of(s, b, first_head + i + 1, t)
                            : ahead_of(s, b, first_head, t + tokens));
    if (p.final.data)
      for (int64_t i = 0; i < heads; ++i) store_state(b, first_head + i, i, slice);
  }

 private:
  int64_t narrow_size() const {
#if defined(TM_DOTS)
    if (narrow) return pairs.size();
#endif
    return 0;
  }

  Ahead ahead_of(const Sequence& s, int64_t b, int64_t h, int64_t t) const {
    const int64_t n = s.length - t < tokens ? s.length - t : tokens, at = s.start + t;
    const int64_t kv_head = h / (p.heads / p.kv_heads);
    Ahead a;
    if (n <= 0) return a;
    a.scores = span_of(p.q, p.dtype, b, h, at, n).ahead(p.head_dim);
    a.outputs = span_of(p.k, p.dtype, b, kv_head, at, n).ahead(p.head_dim);
    a.state = span_of(p.v, p.dtype, b, kv_head, at, n).columns(first).ahead(columns);
    a.written = span_of(p.out, p.dtype, b, h, at, n).columns(first).ahead(columns);
    return a;
  }

  void chunk(const Sequence& s, int64_t b, int64_t h, int64_t i, int64_t t, const Ahead& ahead) {
    const int64_t n = s.length - t < tokens ? s.length - t : tokens, at = s.start + t;
    const int64_t kv_head = h / (p.heads / p.kv_heads);
    o.state = states + i * state_size;
    const bool state = t > 0 || p.initial.data;
    const bool advance = t + n < s.length || p.final.data;
    const Span q = span_of(p.q, p.dtype, b, h, at, n);
    const Span to = span_of(p.out, p.dtype, b, h, at, n).columns(first);
#if defined(TM_DOTS)
    if (narrow) {
      decay.start_chunk(tables + i * ChunkDecay::kTable, b, h, at, n);
      pairs.pack(q, span_of(p.k, p.dtype, b, kv_head, at, n),
                 span_of(p.v, p.dtype, b, kv_head, at, n).columns(first), decay, p.head_dim,
                 columns, state);
      if (n == tokens && columns % kWidth == 0) {
        chunk_outputs(pairs, decay, n, state, reinterpret_cast<uint16_t*>(to.data), to.step, ahead);
      } else {
        chunk_outputs(pairs, decay, n, state, out, ldo, ahead);
        store_rows(to, b, h, s, t);
      }
      if (advance) chunk_state(pairs, decay, n, ahead);
      return;
    }
#endif
    // Tiles of a full chunk read only its own rows.
    const bool in_place = scale_at_end && p.dtype == DType::float32 && n == kChunk;
    o.x = in_place ? reinterpret_cast<float*>(q.data) : x;
    o.ldx = in_place ? q.step : ldx;
    if (!in_place) pack_x(o, q, p.map, scale_at_end ? 1 : p.scale, p.head_dim);
    pack_y(o, span_of(p.k, p.dtype, b, kv_head, at, n), p.map, 1.f, p.head_dim);
    pack_z(o, span_of(p.v, p.dtype, b, kv_head, at, n).columns(first), 1, columns);
    if (p.normalize) fill_z(o, columns, n, 1.f);
    decay.start_chunk(tables + i * ChunkDecay::kTable, b, h, at, n);
    const bool direct = p.dtype == DType::float32 && !p.normalize && columns % kWidth == 0;
    float* rows_out = direct ? reinterpret_cast<float*>(to.data) : out;
    const int64_t step = direct ? to.step : ldo;
    if (taylor)
      chunk_outputs<true>(o, decay, n, state, rows_out, step, spare, ahead);
    else
      chunk_outputs<false>(o, decay, n, state, rows_out, step, spare, ahead);
    if (!direct) store_rows(to, b, h, s, t);
    if (advance) chunk_state(o, decay, n, ahead);
  }

  void load_state(int64_t b, int64_t h, int64_t i) {
    o.state = states + i * state_size;
    std::memset(o.state, 0, state_size * sizeof(float));
    if (!p.initial.data) return;
    float* from = p.initial.data + b * p.initial.sequence + h * p.initial.head;
    const int64_t ld = p.value_dim + p.normalize;
    move_state<false>(o, from, ld, o.features, first, columns, 0);
    if (p.normalize) move_state<false>(o, from, ld, o.features, p.value_dim, 1, columns);
  }

  void store_state(int64_t b, int64_t h, int64_t i, int64_t slice) {
    o.state = states + i * state_size;
    float* to = p.final.data + b * p.final.sequence + h * p.final.head;
    const int64_t ld = p.value_dim + p.normalize;
    move_state<true>(o, to, ld, o.features, first, columns, 0);
    if (p.normalize && slice == 0) move_state<true>(o, to, ld, o.features, p.value_dim, 1, columns);
  }

  void store_rows(const Span& to, int64_t b, int64_t h, const Sequence& s, int64_t t) {
    float* normalizer = nullptr;
    if (p.normalize)
      normalizer = p.normalizer + (p.cu_seqlens ? h : b * p.heads + h) * p.seqlen + s.start + t;
    for (int64_t r = 0; r < to.n; ++r) {
      const float* row = out + r * ldo;
      float factor = 1;
      if (p.normalize) {
        const float z = row[columns] + kNormalizerEpsilon;
        factor = 1 / z;
        if (first == 0) normalizer[r] = z;
      }
      store_row(row, factor, to.row(r), p.dtype, columns);
    }
  }

  const LinearAttentionParams& p;
  const Division& division;
  bool taylor;
  int64_t tokens = kChunk;  // per chunk
  bool narrow;              // bfloat16 products, where supported: the operands are already bfloat16
  ChunkOperands o;
  bool scale_at_end;  // applies the scale to the products of queries instead of to queries
  ChunkDecay decay;
#if defined(TM_DOTS)
  BFloat16Operands pairs;
#endif
  int64_t ldo;
  cpu::Workspace workspace;
  float *x, *states, *tables, *out, *spare;
  int64_t ldx;
  int64_t state_size;
  int64_t first = 0, columns = 0;
};

}  // namespace

void linear_attention_forward(const LinearAttentionParams& p) {
  const int64_t features = feature_dim(p.map, p.head_dim);
  const int64_t tokens = p.cu_seqlens ? p.seqlen : p.batch * p.seqlen;
  // A parallel region costs about as much as 2 Mflop on one thread.
  const double work = static_cast<double>(tokens * p.heads) *
                      static_cast<double>(features * (4 * p.value_dim + kChunk));
  const int threads = work < 2e6 ? 1 : cpu::num_threads();
  Division d{1, p.heads, 1, round_up(p.value_dim, kWidth)};
  if (p.batch * p.heads > 0 && p.batch * p.heads < threads)
    d.slice_width = round_up(ceil_div(p.value_dim, ceil_div(threads, p.batch * p.heads)), kWidth);
  else
    d.heads = heads_per_item(p.batch, p.heads, threads, features * (p.value_dim + p.normalize));
  d.blocks = ceil_div(p.heads, d.heads);
  d.slices = ceil_div(p.value_dim, d.slice_width);
  cpu::parallel_items(d.items(p), threads, [&](cpu::ItemCounter& items) {
    FlushDenormals flush;
    Worker worker(p, d);
    for (int64_t item; (item = items.next()) >= 0;) worker.run(item);
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
