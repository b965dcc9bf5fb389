// Forward: chunk by chunk, the state in cache. A worker owns one head of a sequence, or some of its
// value columns where there are fewer heads than threads.
#include "cpu/parallel.h"
#include "linear/linear_attention/cpu_rows.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

class Worker {
 public:
  Worker(const LinearAttentionParams& p, int64_t slices, int64_t slice_width)
      : p(p),
        slices(slices),
        slice_width(slice_width),
        taylor(p.map == FeatureMap::taylor2),
        o(feature_dim(p.map, p.head_dim), slice_width + p.normalize, taylor),
        decay(p.decay, false, true),
        ldo(round_up(o.width, kWidth)),
        workspace(o.size() + (kChunk + kTileRows) * ldo + 2 * 16) {
    if (taylor) {
      o.taylor = true;
      o.first_score = 1;
      o.score_features = p.head_dim;
    }
    o.place(workspace);
    out = workspace.take(kChunk * ldo);
    spare = workspace.take(kTileRows * ldo);
  }

  void run(int64_t item) {
    const int64_t slice = item % slices, h = item / slices % p.heads;
    const int64_t b = item / slices / p.heads;
    first = slice * slice_width;
    columns = p.value_dim - first < slice_width ? p.value_dim - first : slice_width;
    o.width = columns + p.normalize;
    const Sequence s(p, b);
    const int64_t kv_head = h / (p.heads / p.kv_heads);
    const int64_t rows = o.features, ld = p.value_dim + p.normalize;
    bool state = p.initial.data != nullptr;
    if (state) {
      float* from = p.initial.data + b * p.initial.sequence + h * p.initial.head;
      move_state<false>(o, from, ld, rows, first, columns, 0);
      if (p.normalize) move_state<false>(o, from, ld, rows, p.value_dim, 1, columns);
    } else {
      std::memset(o.state, 0, o.state_size() * sizeof(float));
    }
    decay.start_head(b, h);
    for (int64_t t = 0; t < s.length; t += kChunk) {
      const int64_t n = s.length - t < kChunk ? s.length - t : kChunk;
      pack_x(o, span_of(p.q, p.dtype, b, h, s.start + t, n), p.map, p.scale, p.head_dim);
      pack_y(o, span_of(p.k, p.dtype, b, kv_head, s.start + t, n), p.map, 1.f, p.head_dim);
      pack_z(o, span_of(p.v, p.dtype, b, kv_head, s.start + t, n).columns(first), columns);
      if (p.normalize) fill_z(o, columns, n, 1.f);
      decay.start_chunk(s.start + t, n);
      const Span to = span_of(p.out, p.dtype, b, h, s.start + t, n).columns(first);
      const bool direct = p.dtype == DType::float32 && !p.normalize && columns % kWidth == 0;
      float* rows_out = direct ? reinterpret_cast<float*>(to.data) : out;
      const int64_t step = direct ? to.step : ldo;
      if (taylor)
        chunk_outputs<true>(o, decay, n, state, rows_out, step, spare);
      else
        chunk_outputs<false>(o, decay, n, state, rows_out, step, spare);
      if (!direct) store_rows(to, b, h, s, t);
      if (t + n < s.length || p.final.data) chunk_state(o, decay, n);
      state = true;
    }
    if (p.final.data) {
      float* to = p.final.data + b * p.final.sequence + h * p.final.head;
      move_state<true>(o, to, ld, rows, first, columns, 0);
      if (p.normalize && slice == 0) move_state<true>(o, to, ld, rows, p.value_dim, 1, columns);
    }
  }

 private:
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
  int64_t slices, slice_width;
  bool taylor;
  ChunkOperands o;
  ChunkDecay decay;
  int64_t ldo;
  cpu::Workspace workspace;
  float *out, *spare;
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
  int64_t slices = 1;
  const int64_t heads = p.batch * p.heads;
  if (heads > 0 && heads < threads) slices = ceil_div(threads, heads);
  const int64_t slice_width = round_up(ceil_div(p.value_dim, slices), kPanel / 2);
  slices = ceil_div(p.value_dim, slice_width);
  cpu::parallel_items(heads * slices, threads, [&](cpu::ItemCounter& items) {
    FlushDenormals flush;
    Worker worker(p, slices, slice_width);
    for (int64_t item; (item = items.next()) >= 0;) worker.run(item);
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
