// Forward, block by block, with the state in cache. A worker owns a head of a sequence.
#include <initializer_list>

#include "linear/titans_memory/cpu_block.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

class Worker {
 public:
  explicit Worker(const TitansParams& p)
      : p(p),
        dim(p.head_dim),
        ldk(round_up(dim, kWidth)),
        ldv(round_up(p.value_dim, kWidth)),
        apart(p.chunk_size > kBlock),
        workspace((3 * kRows + kBlock) * ldk + 2 * kRows * ldv + 4 * kRows * kBlock +
                  (2 + apart) * (dim + kTileRows) * ldv + 16 * 16),
        q{workspace.take(kRows * ldk), ldk},
        k{workspace.take(kRows * ldk), ldk},
        scaled{workspace.take(kRows * ldk), ldk},
        transposed{workspace.take(ldk * kBlock), kBlock},
        u{workspace.take(kRows * ldv), ldv},
        out{workspace.take(kRows * ldv), ldv},
        pairs{workspace.take(kRows * kBlock), kBlock},
        w(workspace.take(kRows * kBlock)),
        e(workspace.take(kRows * kBlock)),
        memory{workspace.take((dim + kTileRows) * ldv), ldv},
        momentum{workspace.take((dim + kTileRows) * ldv), ldv},
        start{apart ? workspace.take((dim + kTileRows) * ldv) : memory.data, ldv} {}

  void run(int64_t item) {
    const int64_t b = item / p.heads, h = item % p.heads;
    const Sequence s(p, b);
    load_state(memory, p.initial_memory, b, h, dim, p.value_dim);
    load_state(momentum, p.initial_momentum, b, h, dim, p.value_dim);
    const int64_t blocks = titans_blocks(s.length, p.chunk_size, kBlock);
    for (int64_t i = 0; i < blocks; ++i) {
      const TitansBlock at = titans_block(i, s.length, p.chunk_size, kBlock);
      if (at.starts && apart) std::memcpy(start.data, memory.data, dim * ldv * sizeof(float));
      const int64_t next = at.first + at.tokens;
      const int64_t ahead = std::min(kBlock, s.length - next);
      ask_for(p.q, p.dtype, b, s.start + next, h, ahead, dim);
      ask_for(p.k, p.dtype, b, s.start + next, h, ahead, dim);
      ask_for(p.v, p.dtype, b, s.start + next, h, ahead, p.value_dim);
      ask_for<true>(p.out, p.dtype, b, s.start + at.first, h, at.tokens, p.value_dim);
      block(b, s.start + at.first, h, at.tokens, next < s.length || p.memory.data);
    }
    if (!p.memory.data) return;
    store_state(p.memory, memory, b, h, dim, p.value_dim);
    store_state(p.momentum, momentum, b, h, dim, p.value_dim);
  }

 private:
  void block(int64_t b, int64_t first, int64_t h, int64_t n, bool advance) {
    const char* keys = row_of(p.k, p.dtype, b, first, h);
    pack_rows<Float32>(row_of(p.q, p.dtype, b, first, h), p.dtype, p.q.seq, n, n, dim, 1.f, q.data,
                       ldk);
    pack_rows<Float32>(keys, p.dtype, p.k.seq, n, n, dim, 1.f, k.data, ldk);
    pack_rows<Float32>(row_of(p.v, p.dtype, b, first, h), p.dtype, p.v.seq, n, n, p.value_dim, -1.f,
                       u.data, ldv);
    gates.read(p, b, h, first, n);
    weigh<true>(gates, n, factors, w, e);

    product<false, false>(u, n, k, start, dim, ldv);
    transpose_into(transposed, k, n, dim);
    product_pairs(pairs, n, q, transposed, dim);
    for (int64_t t = 0; t < n; ++t)
      for (int64_t j = 0; j < kBlock; j += kWidth) {
        const vf weight = load(w + t * kBlock + j);
        store(pairs.row(t) + j, negative_product(weight, load(pairs.row(t) + j)));
      }
    scale_rows(scaled, q, factors.memory, n, ldk);
    product<false, true>(out, n, scaled, memory, dim, ldv);
    scale_rows(scaled, q, factors.momentum, n, ldk);
    product<false, false>(out, n, scaled, momentum, dim, ldv);
    product_lower(out, n, pairs, u, ldv);
    for (int64_t t = 0; t < n; ++t)
      store_row(out.row(t), 1.f, row_of(p.out, p.dtype, b, first + t, h), p.dtype, p.value_dim);
    if (advance) carry(n);
  }

  void carry(int64_t n) {
    const vf of_memory = set(factors.memory[n - 1]), of_momentum = set(factors.momentum[n - 1]);
    const vf kept = set(factors.kept[n - 1]);
    for (int64_t i = 0; i < dim * ldv; i += kWidth) {
      const vf s = load(momentum.data + i);
      store(memory.data + i, fma(load(memory.data + i), of_memory, s * of_momentum));
      store(momentum.data + i, s * kept);
    }
    float negative[kBlock];
    for (const bool first : {true, false}) {
      const float* row = (first ? w : e) + (n - 1) * kBlock;
      for (int64_t j = 0; j < kBlock; j += kWidth) store(negative + j, zero() - load(row + j));
      scale_rows(scaled, k, negative, n, ldk);
      product<true, false>(first ? memory : momentum, dim, scaled, u, n, ldv);
    }
  }

  const TitansParams& p;
  const int64_t dim, ldk, ldv;
  const bool apart;  // the memory at the start of the chunk is stored separately from the block's
  cpu::Workspace workspace;
  const Matrix q, k, scaled, transposed, u, out, pairs;
  float *const w, *const e;
  const Matrix memory, momentum, start;
  Gates gates;
  Factors factors;
};

}  // namespace

void titans_memory_forward(const TitansParams& p) {
  run_items<Worker>(p, p, p.batch * p.heads, 10);
}

}  // namespace tokenmill::TOKENMILL_ISA
