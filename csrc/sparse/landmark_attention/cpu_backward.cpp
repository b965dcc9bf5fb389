// Backward: the five products of csrc/dense/attention/cpu_backward.cpp on transposed scores, with
// key tiles of whole blocks. With delta = rowsum(dO O) - dlse and dp = dO V^T, for an earlier block
// whose landmark has exponent l,
//
//   g = 2^(l - lse),  e_j = 2^(t_j - m),  s = sum_j e_j,  w_j = g e_j / s,  D = sum_j e_j dp_j / s
//   dS_j = w_j (dp_j - D),  dS_landmark = g (D - delta)
//
// and for the own block w_j = 2^(t_j - lse), dS_j = w_j (dp_j - delta). Each (block, query) pair
// thus has a base m, a factor and a D, and both cases share one formula. The m, s and D of a block
// longer than a tile come from a separate pass.
#include <cstring>

#include "cpu/parallel.h"
#include "sparse/landmark_attention/cpu_tiles.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

// Splits the keys into at most kSplits parts of whole blocks and whole tiles.
struct KeyParts {
  int64_t tiles, count;  // tiles per part; number of parts

  explicit KeyParts(const BlockTiles& all) {
    const int64_t unit = all.parts;  // tiles that stay together
    const int64_t minimum = ceil_div(kSplitKeys, all.keys);
    tiles = round_up(ceil_div(all.count, kSplits), unit);
    if (tiles < minimum) tiles = round_up(minimum, unit);
    count = all.count > 0 ? ceil_div(all.count, tiles) : 1;
  }
};

template <class Op, bool kCoarse>
class BackwardWorker {
 public:
  BackwardWorker(const LandmarkBackwardParams& g, bool whole_head)
      : bp(g.attention),
        p(bp.forward),
        tiles(p.seqlen_k, g.block),
        parts(tiles),
        queries(bp),
        tile(p),
        group(p.heads / p.kv_heads),
        width_d(queries.width_d),
        width_v(queries.width_v),
        padded_q(padded(p)),
        max_keys(kTileRows + (whole_head || parts.count == 1 ? p.seqlen_k : key_of(parts.tiles))),
        workspace(floats_needed()) {
    queries.place(workspace, padded_q);
    tile.place(workspace, kKeyTile);
    scores.place(workspace, kKeyTile);
    stats.place(workspace, padded_q);
    deltas = workspace.take(padded_q);
    dq = workspace.take(padded_q * width_d);
    dq_total = workspace.take(padded_q * width_d);
    dk = workspace.take(max_keys * width_d);
    dv = workspace.take(max_keys * width_v);
    t = workspace.take(kKeyTile * kPanel);
    dp = workspace.take(kKeyTile * kPanel);
    factors = workspace.take(kMaxBlocks * kPanel);
    means = workspace.take(kMaxBlocks * kPanel);
    gates = workspace.take(kMaxBlocks * kPanel);
  }

  static int64_t padded(const AttentionParams& p) { return round_up(p.seqlen_q, kQueryBlock); }

  // Runs all parts of one KV head in order.
  void run_head(int64_t kv) {
    enter(kv);
    clear_keys(0, p.seqlen_k);
    for (int64_t g = 0; g < group; ++g) {
      enter_query_head(g);
      for (int64_t part = 0; part < parts.count; ++part) {
        run_part(part, part == 0 ? dq_total : dq);
        if (part > 0) add(dq, dq_total);
      }
      store_queries();
    }
    store_keys();
  }

  // Runs one part of one KV head; dQ goes to `partial` [group][padded_q][width_d].
  void run_split(int64_t kv, int64_t part, float* partial) {
    enter(kv);
    clear_keys(key_of(part * parts.tiles), key_of((part + 1) * parts.tiles));
    for (int64_t g = 0; g < group; ++g) {
      enter_query_head(g);
      run_part(part, partial + g * padded_q * width_d);
    }
    store_keys();
  }

  // Sums dQ of a KV head over its finished parts, [parts][group][padded_q][width_d].
  void reduce(int64_t kv, const float* partials) {
    enter(kv);
    const int64_t size = padded_q * width_d;
    for (int64_t g = 0; g < group; ++g) {
      h = kv_head * group + g;
      std::memcpy(dq_total, partials + g * size, size * sizeof(float));
      for (int64_t part = 1; part < parts.count; ++part)
        add(partials + (part * group + g) * size, dq_total);
      store_queries();
    }
  }

 private:
  using Scores = ScoreOperands<Op, kQueryBlock>;

  int64_t floats_needed() const {
    return queries.size(padded_q) + tile.size(kKeyTile) + scores.size(kKeyTile) +
           stats.size(padded_q) + padded_q * (1 + 2 * width_d) + max_keys * (width_d + width_v) +
           (2 * kKeyTile + 3 * kMaxBlocks) * kPanel + 10 * 16;
  }

  int64_t key_of(int64_t n) const {
    const int64_t key = n < tiles.count ? tiles.first(n) : p.seqlen_k;
    return key;
  }

  void enter(int64_t kv) {
    b = kv / p.kv_heads;
    kv_head = kv % p.kv_heads;
  }

  void enter_query_head(int64_t g) {
    h = kv_head * group + g;
    const Sequence s(p, b);
    queries.pack(s, b, h, padded_q, Op::kPair == 1 ? p.scale * kLog2e : 1);
    queries.pack_statistics(s, b, h, padded_q, 0);
  }

  // Selects the keys whose dk and dv are summed next, and zeroes the sums.
  void clear_keys(int64_t begin, int64_t end) {
    origin = begin;
    keys_end = end;
    std::memset(dk, 0, (end - begin + kTileRows) * width_d * sizeof(float));
    std::memset(dv, 0, (end - begin + kTileRows) * width_v * sizeof(float));
  }

  void pack(int64_t n) {
    first_key = tiles.first(n);
    keys = tiles.count_of(n);
    const TileRows at(p, tiles, b, kv_head, first_key, keys);
    tile.pack(keys, ScatteredRows{at.k}, ScatteredRows{at.v});
  }

  // dQ of the current head from the keys of one part.
  void run_part(int64_t part, float* dq_out) {
    std::memset(dq_out, 0, padded_q * width_d * sizeof(float));
    const int64_t begin = part * parts.tiles, end = begin + parts.tiles;
    for (int64_t n = begin; n < end && n < tiles.count; ++n) {
      if (!tiles.whole() && n % tiles.parts == 0) find_statistics(n);
      pack(n);
      for (int64_t i = first_key / kQueryBlock * kQueryBlock; i < p.seqlen_q; i += kQueryBlock)
        run_block(i, dq_out + i * width_d);
    }
  }

  // t and dp of the tile's keys that a panel of queries may see. Returns their number.
  int64_t score(int64_t i) {
    const int64_t behind = i + kPanel < p.seqlen_q ? i + kPanel : p.seqlen_q;
    const int64_t seen = behind - first_key < keys ? behind - first_key : keys;
    for (int64_t r = 0; r < seen; r += kTileRows) score_tile(r, i);
    return seen;
  }

  __attribute__((noinline)) void score_tile(int64_t r, int64_t i) {
    vf z[kTileRows][kTileVectors];
    alignas(64) float dp_memory[kTileRows][kPanel];
    multiply_scores<Op>(z, dp_memory, tile, r, queries, i);
    const vf factor = set(p.scale * kLog2e);
    TM_UNROLL(8)
    for (int m = 0; m < kTileRows; ++m) {
      TM_UNROLL(4)
      for (int n = 0; n < kTileVectors; ++n)
        store(t + (r + m) * kPanel + n * kWidth, Op::kPair == 1 ? z[m][n] : z[m][n] * factor);
    }
    std::memcpy(dp + r * kPanel, dp_memory, sizeof dp_memory);
  }

  // m, s, D and l of the long block that begins with tile n, for the queries after it.
  void find_statistics(int64_t n) {
    const int64_t end = tiles.first(n) + tiles.block;
    if (end >= p.seqlen_q) return;
    const int64_t from = end / kPanel * kPanel;
    stats.clear(from, padded_q);
    std::memset(deltas + from, 0, (padded_q - from) * sizeof(float));
    for (int64_t part = n; part < n + tiles.parts; ++part) {
      pack(part);
      const BlockRows x = block_rows(tiles, first_key, keys, 0);
      for (int64_t i = from; i < p.seqlen_q; i += kPanel) {
        score(i);
        for (int64_t l = 0; l < kPanel; l += kWidth) add_statistics(x, i + l, t + l, dp + l);
      }
    }
  }

  void add_statistics(const BlockRows& x, int64_t i, const float* z, const float* change) {
    const vf old = load(stats.max + i);
    vf top = old;
    for (int64_t j = x.from; j < x.to; ++j) top = max_of(top, load(z + j * kPanel));
    const vf m = finite_max(top), scale = power<kCoarse>(old - m);
    vf sum = load(stats.sum + i) * scale, mean = load(deltas + i) * scale;
    for (int64_t j = x.from; j < x.to; ++j) {
      const vf e = power<kCoarse>(load(z + j * kPanel) - m);
      sum = sum + e;
      mean = fma(e, load(change + j * kPanel), mean);
    }
    store(stats.max + i, top);
    store(stats.sum + i, sum);
    store(deltas + i, mean);
    if (x.landmark >= 0) store(stats.landmark + i, load(z + x.landmark * kPanel));
  }

  // Processes the current key tile against queries i .. i + kQueryBlock - 1.
  void run_block(int64_t i, float* dq_rows) {
    const int64_t left = p.seqlen_q - i, count = left < kQueryBlock ? left : kQueryBlock;
    for (int64_t c = 0; c < count; c += kPanel) {
      const int64_t seen = score(i + c);
      if (seen <= 0) continue;
      const int64_t blocks = blocks_of(tiles, seen);
      for (int64_t x = 0; x < blocks; ++x) {
        const BlockRows rows = block_rows(tiles, first_key, seen, x);
        for (int64_t n = 0; n < kPanel; n += kWidth)
          rows.earlier(i + c + n) ? find_weights<false>(rows, x, i + c, n)
                                  : find_weights<true>(rows, x, i + c, n);
      }
      for (int64_t r = 0; r < seen; r += kTileRows) store_scores(r, c, seen);
    }
    float *dk_rows = dk + (first_key - origin) * width_d,
          *dv_rows = dv + (first_key - origin) * width_v;
    for (int64_t r = 0; r < keys && first_key + r < i + count; r += kTileRows) {
      const int64_t from = first_key + r - i;
      const int64_t word = from > 0 ? from / Op::kPair : 0;
      const int64_t words = ceil_div(count, Op::kPair) - word, at = i / Op::kPair + word;
      multiply_rows<Op, false, kTileRows, false>(
          dv_rows + r * width_v, width_v, scores.pt + r * Scores::kLdp + word, Scores::kLdp,
          queries.gr + at * width_v, width_v, words, width_v);
      multiply_rows<Op, false, kTileRows, false>(
          dk_rows + r * width_d, width_d, scores.st + r * Scores::kLdp + word, Scores::kLdp,
          queries.qr + at * width_d, width_d, words, width_d);
    }
    for (int64_t q = 0; q < count; q += kQueryRows) {
      const int64_t before = i + q + kQueryRows - first_key;
      const int64_t seen = before < keys ? before : keys;
      if (seen <= 0) continue;
      multiply_rows<Op, true, kQueryRows, false>(dq_rows + q * width_d, width_d,
                                                 scores.gradient(0, q), Scores::gradient_ld(),
                                                 tile.kb, width_d, words_of<Op>(seen), width_d);
    }
  }

  // Replaces t_j by e_j for block `slot` and kWidth queries from i + n on; computes their factor,
  // D, and dS of the landmark. kOwn: some queries lie in the block, or before it.
  template <bool kOwn>
  void find_weights(const BlockRows& x, int64_t slot, int64_t i, int64_t n) {
    float *z = t + n, *change = dp + n;
    const int64_t query = i + n;
    const vf lse = load(queries.lse + query), delta = load(queries.delta + query);
    const vm earlier = x.earlier_lanes(query);
    vf base = set(-kInf), l = set(-kInf);
    if (!tiles.whole()) {
      base = load(stats.max + query);
      l = load(stats.landmark + query);
    } else {
      for (int64_t j = x.from; j < x.to; ++j) base = max_of(base, load(z + j * kPanel));
      if (x.landmark >= 0) l = load(z + x.landmark * kPanel);
    }
    base = finite_max(base);
    if constexpr (kOwn) base = select(earlier, base, lse);
    vf sum = zero(), mean = zero();
    for (int64_t j = x.from; j < x.to; ++j) {
      vf e = power<kCoarse>(load(z + j * kPanel) - base);
      vf d = load(change + j * kPanel);
      if constexpr (kOwn) {
        const vm own = own_lanes(first_key, j, query);
        e = select(earlier, e, select(own, e, zero()));
        d = select(earlier, d, select(own, d, zero()));
        store(change + j * kPanel, d);
      }
      store(z + j * kPanel, e);
      sum = sum + e;
      mean = fma(e, d, mean);
    }
    if (!tiles.whole()) {
      sum = load(stats.sum + query);
      mean = load(deltas + query);
    }
    const vf gate = power<kCoarse>(l - lse);
    vf factor = share_of(gate, sum);
    mean = share_of(mean, sum);
    vf pull = gate * (mean - delta);
    if constexpr (kOwn) {
      factor = select(earlier, factor, set(1.f));
      mean = select(earlier, mean, delta);
      pull = select(earlier, pull, zero());
    }
    store(factors + slot * kPanel + n, factor);
    store(means + slot * kPanel + n, mean);
    if (x.landmark < 0) return;
    // P of the landmark is 0; store_scores takes its dS from `gates`.
    store(z + x.landmark * kPanel, zero());
    store(gates + slot * kPanel + n, pull);
  }

  // Stores P^T and dS^T of kTileRows keys from r on, 0 from `seen` on, for the panel of queries at
  // offset c of the block.
  void store_scores(int64_t r, int64_t c, int64_t seen) {
    vf dz[kTileRows][kTileVectors];
    for (int m = 0; m < kTileRows; ++m) {
      const int64_t j = r + m, slot = tiles.whole() ? j / tiles.block : 0;
      vf w[kTileVectors];
      if (j >= seen) {
        for (int n = 0; n < kTileVectors; ++n) w[n] = dz[m][n] = zero();
        scores.store_key(j, c, w, dz[m]);
        continue;
      }
      const bool landmark = tiles.is_landmark(first_key + j);
      TM_UNROLL(4)
      for (int n = 0; n < kTileVectors; ++n) {
        const int64_t at = slot * kPanel + n * kWidth;
        w[n] = load(t + j * kPanel + n * kWidth) * load(factors + at);
        dz[m][n] = landmark ? load(gates + at)
                            : w[n] * (load(dp + j * kPanel + n * kWidth) - load(means + at));
      }
      scores.store_key(j, c, w, dz[m]);
    }
    scores.store_pairs(r, c, dz);
  }

  void add(const float* from, float* to) const {
    for (int64_t i = 0; i < padded_q * width_d; i += kWidth)
      store(to + i, load(to + i) + load(from + i));
  }

  void store_queries() {
    for (int64_t i = 0; i < p.seqlen_q; ++i)
      store_row(dq_total + i * width_d, p.scale, row_of(bp.dq, p.dtype, b, 0, i, h), p.dtype,
                p.head_dim);
  }

  void store_keys() {
    for (int64_t j = origin; j < keys_end; ++j) {
      store_row(dk + (j - origin) * width_d, p.scale, row_of(bp.dk, p.dtype, b, 0, j, kv_head),
                p.dtype, p.head_dim);
      store_row(dv + (j - origin) * width_v, 1.f, row_of(bp.dv, p.dtype, b, 0, j, kv_head), p.dtype,
                p.value_dim);
    }
  }

  const AttentionBackwardParams& bp;
  const AttentionParams& p;
  BlockTiles tiles;
  KeyParts parts;
  QueryOperands<Op> queries;
  KeyOperands<Op> tile;
  int64_t group, width_d, width_v, padded_q, max_keys;
  Scores scores{};
  LongBlock stats{};
  cpu::Workspace workspace;
  float* deltas;  // long block: sum of e_j dp_j per query
  float *dq, *dq_total, *dk, *dv;
  float *t, *dp;                   // for the tile and a panel, [keys][kPanel]
  float *factors, *means, *gates;  // for the blocks of the tile, [blocks][kPanel]

  int64_t b = 0, kv_head = 0, h = 0;
  int64_t first_key = 0, keys = 0, origin = 0, keys_end = 0;
};

template <class Op, bool kCoarse>
void backward(const LandmarkBackwardParams& g) {
  using W = BackwardWorker<Op, kCoarse>;
  const AttentionParams& p = g.attention.forward;
  const int64_t heads = p.batch * p.kv_heads;
  const int64_t parts = KeyParts(BlockTiles(p.seqlen_k, g.block)).count;
  const double pairs = static_cast<double>(p.seqlen_q) * static_cast<double>(p.seqlen_k);
  const int threads =
      pairs * static_cast<double>(p.heads * p.head_dim) < 1e6 ? 1 : cpu::num_threads();
  const bool whole_head = threads == 1 || parts == 1 || heads >= 2 * threads;
  const int64_t size = p.heads / p.kv_heads * W::padded(p) * round_up(p.head_dim, kWidth);
  cpu::Workspace shared(whole_head ? 0 : heads * (parts * size + 1) + 2 * 16);
  float* partials = shared.take(whole_head ? 0 : heads * parts * size);
  auto* finished = reinterpret_cast<int32_t*>(shared.take(whole_head ? 0 : heads));
  if (!whole_head) std::memset(finished, 0, heads * sizeof(int32_t));

  cpu::parallel_items(whole_head ? heads : heads * parts, threads, [&](cpu::ItemCounter& items) {
    FlushDenormals flush;
    W worker(g, whole_head);
    for (int64_t item; (item = items.next()) >= 0;) {
      if (whole_head) {
        worker.run_head(item);
        continue;
      }
      const int64_t kv = item / parts, part = item % parts;
      float* all = partials + kv * parts * size;
      worker.run_split(kv, part, all + part * size);
      // The last part to finish adds up all parts.
      if (__atomic_add_fetch(finished + kv, 1, __ATOMIC_ACQ_REL) == parts) worker.reduce(kv, all);
    }
  });
}

}  // namespace

void landmark_attention_backward(const LandmarkBackwardParams& g) {
#if defined(TM_DOTS)
  if (g.attention.forward.dtype == DType::bfloat16) return backward<BFloat16, true>(g);
#endif
  g.attention.forward.dtype == DType::float32 ? backward<Float32, false>(g)
                                              : backward<Float32, true>(g);
}

}  // namespace tokenmill::TOKENMILL_ISA
