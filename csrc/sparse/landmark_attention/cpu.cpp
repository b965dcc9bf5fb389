// Forward. A worker owns a query tile of one head and streams the keys past it in tiles of whole
// blocks. With exponents t = scale log2(e) q.k, and l the exponent of the landmark:
//
//   an earlier block:  w_j = 2^(l - M) / s 2^(t_j - m),  m = max_j t_j, s = sum_j 2^(t_j - m)
//   the own block:     w_j = 2^(t_j - M)
//
// over ordinary keys j. out = sum w_j v_j / Z; Z sums 2^(l - M), and the w_j of the own block. M is
// a running maximum of l and of the t of the own block. The m and s of a block longer than a tile
// come from a separate pass over its keys.
#include <cstring>

#include "attention/cpu_weights.h"
#include "cpu/parallel.h"
#include "sparse/landmark_attention/cpu_tiles.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kTileQueries = 128;  // multiple of kPanel
constexpr int kValueRows = 4;          // rows of the register tile of P V

// Exponents of kTileRows keys and a panel of queries.
template <class Op>
__attribute__((noinline)) void score_tile(const float* k, int64_t ldk, const float* q,
                                          int64_t words, float factor, float* t) {
  vf z[kTileRows][kTileVectors];
  clear(z);
  multiply<Op, false>(z, k, ldk, q, kPanel, words);
  const vf scale = set(factor);
  TM_UNROLL(8)
  for (int m = 0; m < kTileRows; ++m) {
    TM_UNROLL(4)
    for (int n = 0; n < kTileVectors; ++n)
      store(t + m * kPanel + n * kWidth, Op::kPair == 1 ? z[m][n] : z[m][n] * scale);
  }
}

// C[M, width] += P^T V; P has a row per word of keys. A weight of 0 masks its value.
template <class Op, int M, int N = kTileVectors>
__attribute__((noinline)) void add_values(float* c, int64_t ldc, const float* p, const float* v,
                                          int64_t ldv, int64_t words, int64_t column,
                                          int64_t width) {
  int64_t n = column;
  for (; n + N * kWidth <= width; n += N * kWidth) {
    vf acc[M][N];
    clear(acc);
    multiply<Op, true>(acc, p, kPanel, v + n, ldv, words);
    if (!finite(acc)) [[unlikely]] {
      vf shown[M][N];  // a separate accumulator, so that acc stays in registers
      clear(shown);
      for (int64_t k = 0; k < words; ++k)
        for (int i = 0; i < M; ++i)
          for (int j = 0; j < N; ++j) {
            const float weight = p[k * kPanel + i];
            shown[i][j] = Op::madd(shown[i][j], set(weight),
                                   Op::shown(weight, load(v + k * ldv + n + j * kWidth)));
          }
      std::memcpy(acc, shown, sizeof acc);
    }
    TM_UNROLL(16)
    for (int i = 0; i < M; ++i) {
      TM_UNROLL(8)
      for (int j = 0; j < N; ++j) {
        float* out = c + i * ldc + n + j * kWidth;
        store(out, load(out) + acc[i][j]);
      }
    }
  }
  if constexpr (N > 1)
    if (n < width) add_values<Op, M, N - 1>(c, ldc, p, v, ldv, words, n, width);
}

template <class Op, bool kCoarse>
class ForwardWorker {
 public:
  ForwardWorker(const LandmarkParams& d, int64_t shares)
      : p(d.attention),
        tiles(p.seqlen_k, d.block),
        shares(shares),
        query_tiles(ceil_div(p.seqlen_q, kTileQueries)),
        words(words_of<Op>(p.head_dim)),
        ldk(round_up(words, kWidth)),
        width(round_up(p.value_dim, kWidth)),
        ldo(width + kRowPad),
        k_floats(round_up(tiles.keys, kTileRows) * ldk),
        v_floats(words_of<Op>(tiles.keys) * width),
        factor(p.scale * kLog2e),
        workspace(floats_needed()) {
    k = workspace.take(tiles.count * k_floats);
    v = workspace.take(tiles.count * v_floats);
    done = reinterpret_cast<uint8_t*>(workspace.take(ceil_div(tiles.count, 4)));
    q = workspace.take(kTileQueries * words);
    out = workspace.take(kTileQueries * ldo);
    t = workspace.take(kKeyTile * kPanel);
    pairs = workspace.take(kKeyTile * kPanel);
    maxima = workspace.take(kMaxBlocks * kPanel);
    row_max = workspace.take(kTileQueries);
    raise_above = workspace.take(kTileQueries);
    sums = workspace.take(kTileQueries);
    stats.place(workspace, kTileQueries);
  }

  // Runs one share of the query tiles of one KV head, query head by query head.
  void run(int64_t item) {
    const int64_t kv = item / shares, all = query_tiles * (p.heads / p.kv_heads);
    const int64_t end = (item % shares + 1) * all / shares;
    b = kv / p.kv_heads;
    kv_head = kv % p.kv_heads;
    if (kv != packed) std::memset(done, 0, tiles.count);
    packed = kv;
    for (int64_t n = item % shares * all / shares; n < end; ++n) {
      h = kv_head * (p.heads / p.kv_heads) + n / query_tiles;
      first = n % query_tiles * kTileQueries;
      rows = p.seqlen_q - first < kTileQueries ? p.seqlen_q - first : kTileQueries;
      load_queries();
      stream_keys();
      store_rows();
    }
  }

 private:
  int64_t floats_needed() const {
    return tiles.count * (k_floats + v_floats + 1) + kTileQueries * (words + ldo + 3) +
           (2 * kKeyTile + kMaxBlocks) * kPanel + stats.size(kTileQueries) + 11 * 16;
  }

  char* row_at(const Rows& r, int64_t row) const {
    return row_of(r, p.dtype, b, 0, first + row, h);
  }

  void load_queries() {
    for (int64_t c = 0; c < rows; c += kPanel) {
      const int64_t n = rows - c < kPanel ? rows - c : kPanel;
      pack_transposed<Op>(row_at(p.q, c), p.dtype, p.q.seq, n, p.head_dim,
                          Op::kPair == 1 ? factor : 1.f, q + c * words);
    }
    std::memset(out, 0, kTileQueries * ldo * sizeof(float));
    for (int64_t r = 0; r < kTileQueries; ++r) row_max[r] = sums[r] = 0, raise_above[r] = -kInf;
  }

  void ensure(int64_t tile) {
    if (done[tile]) return;
    done[tile] = 1;
    const int64_t count = tiles.count_of(tile);
    const TileRows at(p, tiles, b, kv_head, tiles.first(tile), count);
    pack_rows<Op>(ScatteredRows{at.k}, p.dtype, count, round_up(count, kTileRows), p.head_dim, 1.f,
                  k + tile * k_floats, ldk);
    pack_reduced_rows<Op>(ScatteredRows{at.v}, p.dtype, count, p.value_dim, v + tile * v_floats,
                          width);
  }

  void stream_keys() {
    const int64_t last = first + rows - 1;
    for (int64_t tile = 0; tile < tiles.count && tiles.first(tile) <= last; ++tile) {
      ensure(tile);
      if (!tiles.whole() && tile % tiles.parts == 0) find_statistics(tile);
      for (int64_t c = 0; c < rows; c += kPanel) {
        const int64_t seen = score(tile, c);
        if (seen <= 0) continue;
        find_weights(tile, c, seen);
        add_panel(tile, c, seen);
      }
    }
  }

  // Exponents of a panel. Returns how many keys of the tile its queries may see.
  int64_t score(int64_t tile, int64_t c) {
    const int64_t n = rows - c < kPanel ? rows - c : kPanel, count = tiles.count_of(tile);
    const int64_t before = first + c + n - tiles.first(tile);
    const int64_t seen = before < count ? before : count;
    for (int64_t r = 0; r < seen; r += kTileRows)
      score_tile<Op>(k + tile * k_floats + r * ldk, ldk, q + c * words, words, factor,
                     t + r * kPanel);
    return seen;
  }

  // m, s and l of the long block that begins with `tile`, for queries after it.
  void find_statistics(int64_t tile) {
    const int64_t begin = tiles.first(tile), end = begin + tiles.block;
    if (first + rows <= end) return;
    stats.clear(0, kTileQueries);
    for (int64_t part = tile; part < tile + tiles.parts; ++part) {
      ensure(part);
      const BlockRows x = block_rows(tiles, tiles.first(part), tiles.count_of(part), 0);
      for (int64_t c = 0; c < rows; c += kPanel) {
        if (first + c + kPanel <= end) continue;
        score(part, c);
        for (int64_t n = 0; n < kPanel; n += kWidth) {
          const float* z = t + n;
          vf top = load(stats.max + c + n);
          const vf old = top;
          for (int64_t j = x.from; j < x.to; ++j) top = max_of(top, load(z + j * kPanel));
          const vf m = finite_max(top);
          vf sum = load(stats.sum + c + n) * power<kCoarse>(old - m);
          for (int64_t j = x.from; j < x.to; ++j)
            sum = sum + power<kCoarse>(load(z + j * kPanel) - m);
          store(stats.max + c + n, top);
          store(stats.sum + c + n, sum);
          if (x.landmark >= 0) store(stats.landmark + c + n, load(z + x.landmark * kPanel));
        }
      }
    }
  }

  // Converts exponents to weights, for the first `seen` keys.
  void find_weights(int64_t tile, int64_t c, int64_t seen) {
    const int64_t at = tiles.first(tile), blocks = blocks_of(tiles, seen);
    const int64_t count = rows - c < kPanel ? rows - c : kPanel;
    for (int64_t n = 0; n < count; n += kWidth) {
      const int64_t i = first + c + n;
      for (int64_t x = 0; x < blocks; ++x) {
        const BlockRows rows_of_block = block_rows(tiles, at, seen, x);
        rows_of_block.earlier(i) ? find_top<false>(rows_of_block, at, x, c, n)
                                 : find_top<true>(rows_of_block, at, x, c, n);
      }
      for (int64_t x = 0; x < blocks; ++x) {
        const BlockRows rows_of_block = block_rows(tiles, at, seen, x);
        rows_of_block.earlier(i) ? find_weights_of<false>(rows_of_block, at, x, c, n)
                                 : find_weights_of<true>(rows_of_block, at, x, c, n);
      }
    }
    if constexpr (Op::kPair == 2) {
      if (seen % 2) std::memset(t + seen * kPanel, 0, kPanel * sizeof(float));
#if defined(__AVX512BF16__)
      for (int64_t j = 0; j < seen; j += 2)
        for (int64_t n = 0; n < kPanel; n += kWidth)
          store(pairs + j / 2 * kPanel + n,
                pair_bfloat(load(t + j * kPanel + n), load(t + (j + 1) * kPanel + n)));
#endif
    }
  }

  // Landmark exponent for kWidth queries, -inf if the tile has no landmark that they see.
  vf landmark(const BlockRows& x, int64_t c, int64_t n) const {
    if (!tiles.whole()) return load(stats.landmark + c + n);
    return x.landmark >= 0 ? load(t + x.landmark * kPanel + n) : set(-kInf);
  }

  // Maximum exponent of block `slot` for kWidth queries, and update of M. kOwn: some queries lie in
  // the block, or before it.
  template <bool kOwn>
  void find_top(const BlockRows& x, int64_t at, int64_t slot, int64_t c, int64_t n) {
    const int64_t i = first + c + n;
    vf m = set(-kInf), own = set(-kInf), top = landmark(x, c, n);
    if (kOwn || tiles.whole())
      for (int64_t j = x.from; j < x.to; ++j) {
        const vf z = load(t + j * kPanel + n);
        m = max_of(m, z);
        if constexpr (kOwn) own = max_of(own, select(own_lanes(at, j, i), z, set(-kInf)));
      }
    if (!tiles.whole()) m = load(stats.max + c + n);
    store(maxima + slot * kPanel + n, finite_max(m));
    if constexpr (kOwn) top = select(x.earlier_lanes(i), top, own);
    if (any(less(load(raise_above + c + n), top))) [[unlikely]]
      raise(top, c + n);
  }

  // Raises M of rows `row` and on to `top`.
  __attribute__((noinline)) void raise(vf top, int64_t row) {
    float lane[kWidth];
    store(lane, top);
    for (int64_t r = row; r < row + kWidth; ++r) {
      const float to = lane[r - row];
      if (!(to > raise_above[r])) continue;
      const float change = raise_above[r] == -kInf ? 0 : std::exp2(row_max[r] - to);
      row_max[r] = to;
      raise_above[r] = to + kHeadroom;
      sums[r] *= change;
      for (int64_t d = 0; d < width; d += kWidth)
        store(out + r * ldo + d, load(out + r * ldo + d) * set(change));
    }
  }

  template <bool kOwn>
  void find_weights_of(const BlockRows& x, int64_t at, int64_t slot, int64_t c, int64_t n) {
    const int64_t i = first + c + n;
    float* z = t + n;
    const vf top = load(row_max + c + n);
    const vm earlier = x.earlier_lanes(i);
    vf m = load(maxima + slot * kPanel + n);
    if constexpr (kOwn) m = select(earlier, m, top);
    vf sum = zero();
    for (int64_t j = x.from; j < x.to; ++j) {
      vf w = power<kCoarse>(load(z + j * kPanel) - m);
      if constexpr (kOwn) w = select(earlier, w, select(own_lanes(at, j, i), w, zero()));
      sum = sum + w;
      store(z + j * kPanel, w);
    }
    const vf own_sum = sum;
    if (!tiles.whole()) sum = load(stats.sum + c + n);
    const vf gate = power<kCoarse>(landmark(x, c, n) - top);
    vf factor = share_of(gate, sum), more = x.landmark >= 0 ? gate : zero();
    if constexpr (kOwn) {
      factor = select(earlier, factor, set(1.f));
      more = select(earlier, more, own_sum);
    }
    for (int64_t j = x.from; j < x.to; ++j) store(z + j * kPanel, load(z + j * kPanel) * factor);
    if (x.landmark >= 0) store(z + x.landmark * kPanel, zero());
    store(sums + c + n, load(sums + c + n) + more);
  }

  void add_panel(int64_t tile, int64_t c, int64_t seen) {
    const float* weights = Op::kPair == 1 ? t : pairs;
    for (int64_t r = 0; r < kPanel && c + r < rows; r += kValueRows) {
      const int64_t before = first + c + r + kValueRows - tiles.first(tile);
      const int64_t keys = before < seen ? before : seen;
      if (keys <= 0) continue;
      add_values<Op, kValueRows>(out + (c + r) * ldo, ldo, weights + r, v + tile * v_floats, width,
                                 words_of<Op>(keys), 0, width);
    }
  }

  void store_rows() {
    float* lse = lse_of(p, p.lse, b, 0, h);
    for (int64_t r = 0; r < rows; ++r) {
      const RowScale scale =
          softmax_epilogue(sums[r], row_max[r], raise_above[r] > -kInf, nullptr, 0, true);
      lse[first + r] = scale.lse;
      store_row(out + r * ldo, scale.factor, row_at(p.out, r), p.dtype, p.value_dim);
    }
  }

  const AttentionParams& p;
  BlockTiles tiles;
  int64_t shares, query_tiles;
  int64_t words, ldk, width, ldo, k_floats, v_floats;
  float factor;
  LongBlock stats{};
  cpu::Workspace workspace;
  float *k, *v;  // tiles of the KV head, packed on first use
  uint8_t* done;
  float *q, *out;
  float *t, *pairs;  // exponents, then weights, [keys][kPanel]; as pairs of keys
  float* maxima;     // per block of a tile, [blocks][kPanel]
  float *row_max, *raise_above, *sums;

  int64_t b = 0, kv_head = 0, h = 0, first = 0, rows = 0, packed = -1;
};

template <class Op, bool kCoarse>
void forward(const LandmarkParams& d) {
  const AttentionParams& p = d.attention;
  const double pairs = static_cast<double>(p.seqlen_q) * static_cast<double>(p.seqlen_k);
  // A parallel region costs about as much as 2 Mflop on one thread.
  const double work = pairs * static_cast<double>(p.batch * p.heads * (p.head_dim + p.value_dim));
  const int threads = work < 2e6 ? 1 : cpu::num_threads();
  // A work item is a share of the tiles of one KV head; at least four items per thread, for load
  // balance.
  const int64_t heads = p.batch * p.kv_heads;
  const int64_t all = p.heads / p.kv_heads * ceil_div(p.seqlen_q, kTileQueries);
  int64_t shares = threads == 1 ? 1 : ceil_div(4 * threads, heads);
  if (shares > all) shares = all;
  cpu::parallel_items(heads * shares, threads, [&](cpu::ItemCounter& items) {
    FlushDenormals flush;
    ForwardWorker<Op, kCoarse> worker(d, shares);
    for (int64_t item; (item = items.next()) >= 0;) worker.run(item);
  });
}

}  // namespace

void landmark_attention_forward(const LandmarkParams& d) {
#if defined(TM_DOTS)
  if (d.attention.dtype == DType::bfloat16) return forward<BFloat16, true>(d);
#endif
  d.attention.dtype == DType::float32 ? forward<Float32, false>(d) : forward<Float32, true>(d);
}

}  // namespace tokenmill::TOKENMILL_ISA
