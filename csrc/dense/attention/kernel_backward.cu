// sm_80 backward: mainloop of a CTA over the columns that its rows see.
#include "cuda/launch.cuh"
#include "dense/attention/kernel_backward_pair.cuh"
#include "dense/attention/launch.cuh"

namespace tokenmill::cuda {

// Rows of a CTA: each pair of warps has its own rows, of one head, or the same rows of several
// heads.
struct BlockPlace {
  // batch -1: no sequence; first_head: KV head on the keys' side, else query head
  int64_t batch, first_head;
  int first_row;
  TilePlace packed;

  __device__ BlockPlace(const BackwardArgs& args, bool keys, int heads_per_block, int rows) {
    const AttentionParams& p = args.p.forward;
    const int64_t head_blocks = (keys ? p.kv_heads : p.heads) / heads_per_block;
    int64_t block = blockIdx.x % args.row_blocks, head_block = blockIdx.x / args.row_blocks;
    if (const int32_t* ends = keys ? p.cu_seqlens_k : p.cu_seqlens_q) {
      packed = find_tile(ends, p.batch, keys ? p.seqlen_k : p.seqlen_q, rows, block);
      batch = packed.b;
      block = packed.tile;
    } else {
      batch = head_block / head_blocks;
      head_block %= head_blocks;
      // LPT order under a causal mask: the last queries and the first keys see the most partners.
      if (!keys) block = args.row_blocks - 1 - block;
    }
    first_head = head_block * heads_per_block;
    first_row = static_cast<int>(block) * rows;
  }
};

template <typename T, int kDim, Side kSide, Mode kMode>
__global__ void __launch_bounds__(256, 1)
    backward_kernel(const __grid_constant__ BackwardArgs args) {
  using Worker = PairWorker<T, kDim, kSide, kMode>;
  using Shape = typename Worker::Shape;
  using Tile = typename Shape::Tile;
  constexpr bool kKeys = Worker::kKeys;
  constexpr int kTiles = Shape::kTiles, kRows = Shape::kRows, kColumns = Shape::kColumns;
  extern __shared__ __align__(128) unsigned char shared[];

  const AttentionBackwardParams& bp = args.p;
  const AttentionParams& p = bp.forward;
  const int heads_per_block = kKeys ? 1 : args.heads_per_block;
  Worker worker{.args = args, .p = p};
  worker.enter(shared_address(shared));
  // True if the mask shows some columns of a tile to some rows of the CTA.
  const auto sees_columns = [&](int64_t b, int head, int heads, const Sequence& s, int row,
                                int rows, int column) {
    return any_sees(p.mask, args.bounds, b, head, heads, s, kKeys ? column : row,
                    kKeys ? kColumns : rows, kKeys ? row : column, kKeys ? rows : kColumns);
  };
  const BlockInfoView& info = worker.info;
  {
    const int thread = threadIdx.x, pair = worker.pair;
    const bool makes_ds = worker.makes_ds;
    const int block_rows = static_cast<int>(blockDim.x) / (2 * kWarpSize) / heads_per_block * kRows;
    const BlockPlace place(args, kKeys, heads_per_block, block_rows);
    if (place.batch < 0) {
      const LooseRows none(place.packed, kKeys ? p.seqlen_k : p.seqlen_q, block_rows);
      const auto clear = [&](const Rows& to, int64_t h, int64_t columns) {
        none.fill(rows_at<T>(to, 0, 0, h), to.seq, columns, 0);
      };
      for (int64_t h = place.first_head; h < place.first_head + heads_per_block; ++h) {
        clear(kKeys ? bp.dk : bp.dq, h, p.head_dim);
        if (kKeys) clear(bp.dv, h, p.value_dim);
      }
      return;
    }
    Sequence s = sequence_of(p, place.batch);
    if (p.cu_seqlens_q) {
      (kKeys ? s.k_start : s.q_start) = place.packed.rows.start;
      (kKeys ? s.k_length : s.q_length) = place.packed.rows.length;
    }
    const int rows = kKeys ? s.k_length : s.q_length;
    if (place.first_row >= rows) return;
    const Band of_queries = Band::of_window(p.window_left, p.window_right, s.q_length, s.k_length);
    const MaskBand band = MaskBand::of(kKeys ? of_queries.transposed(s.q_length) : of_queries);
    const int64_t row_start = kKeys ? s.k_start : s.q_start;
    const int64_t column_start = kKeys ? s.q_start : s.k_start;
    const int64_t group = p.heads / p.kv_heads;
    const int64_t column_head = kKeys ? place.first_head * group : place.first_head / group;
    int begin = band.begin(place.first_row) & -Shape::kStep;
    int end = band.end(min(place.first_row + block_rows, rows) - 1);
    if constexpr (kMode == Mode::general)
      if (p.mask.any())
        cut_hidden_ends<kColumns>(begin, end, reinterpret_cast<int*>(shared), [&](int first) {
          const int head = static_cast<int>(kKeys ? column_head : place.first_head);
          const int heads = kKeys ? static_cast<int>(group) : heads_per_block;
          return sees_columns(place.batch, head, heads, s, place.first_row, block_rows, first);
        });
    const int tiles = end > begin ? (end - begin + kColumns - 1) / kColumns : 0;
    if (thread == 0)
      *reinterpret_cast<BlockInfo*>(shared) = {
          .low = band.low,
          .high = band.high,
          .columns = band.columns,
          .rows = rows,
          .begin = begin,
          .tiles = tiles,
          .total = kKeys ? tiles * static_cast<int>(group) : tiles,
          .batch = place.batch,
          .row_start = row_start,
          .first_head = place.first_head,
          .x = rows_at<T>(kKeys ? p.q : p.k, place.batch, column_start, column_head),
          .y = rows_at<T>(kKeys ? bp.dout : p.v, place.batch, column_start, column_head),
          .minus_lse = lse_at(p, bp.minus_lse, place.batch, s.q_start, column_head),
          .minus_delta = lse_at(p, bp.minus_delta, place.batch, s.q_start, column_head)};

    worker.first_row = place.first_row + pair / heads_per_block * kRows;
    const int last = min(worker.first_row + kRows, rows) - 1;
    const bool idle = worker.first_row >= rows;
    if (worker.lane == 0 && !makes_ds)
      reinterpret_cast<PairInfo*>(shared + kPairInfoOffset)[pair] = {
          band.begin(worker.first_row), idle ? 0 : band.end(last), band.begin(last),
          idle ? 0 : band.end(worker.first_row), worker.first_row};
    worker.counter = -1;
    if constexpr (!Shape::kWide) {
      reinterpret_cast<int*>(shared + kTileNumberOffset)[thread] = worker.counter;
      reinterpret_cast<PairAddresses*>(shared + kTileNumberOffset + thread_count() * 4)[thread] =
          worker.make_addresses();
    }

    const int64_t head = place.first_head + pair % heads_per_block;
    const Rows& own = kKeys ? makes_ds ? p.v : p.k : makes_ds ? bp.dout : p.q;
    copy_rows<kRows, Tile>(
        worker.owned, rows_at<const T>(own, place.batch, row_start + worker.first_row, head),
        own.seq, rows - worker.first_row, static_cast<int>(makes_ds ? p.value_dim : p.head_dim),
        args.vectors, worker.lane, kWarpSize);
    cp_async_commit();
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = worker.first_row + 16 * m + 8 * half + worker.lane / 4;
        worker.statistics[m][half] = kMode == Mode::softmax || makes_ds ? 0 : 1;
        if (!kKeys && has_backward_statistics(p) && row < rows) {
          const float* of_rows = makes_ds ? bp.minus_delta : bp.minus_lse;
          worker.statistics[m][half] = lse_at(p, of_rows, place.batch, s.q_start, head)[row];
        }
      }
    cp_async_wait<0>();
    __syncwarp();
    if constexpr (Shape::kHeld)
      unroll<kTiles>([&](auto m) {
        unroll<Worker::kDepth>([&](auto k) { worker.left[m][k] = worker.load_left(m, k); });
      });
  }
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int i = 0; i < 2 * Worker::kBlocks; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) worker.acc[m][i][j] = 0;
  __syncthreads();  // fragments are loaded: the ring may be overwritten

  // Tile n of the columns. On the keys' side the query heads of the GQA group follow each other.
  const auto head_of = [&](int n) { return kKeys && n >= info.tiles() ? n / info.tiles() : 0; };
  const auto column_of = [&](int n, int head) {
    return info.begin() + (head > 0 ? n - head * info.tiles() : n) * kColumns;
  };
  const auto stage_of = [&](unsigned n) { return worker.ring + n % 2 * Shape::kStageBytes; };
  // Prefetch of tile n, by the pairs in turn: the first warp loads x (Q or K) and the statistics
  // minus_lse, the second y (dO or V) and minus_delta.
  const auto fetch = [&](int n) {
    const unsigned warp = thread_index() / kWarpSize, pairs = thread_count() / (2 * kWarpSize);
    if (((warp ^ n) & (pairs - 1)) != 0) return;
    const bool second = warp >= pairs;
    const Rows &x = kKeys ? p.q : p.k, &y = kKeys ? bp.dout : p.v;
    const int64_t stride = second ? y.seq : x.seq;
    const int head = head_of(n), first = column_of(n, head), left = info.columns() - first;
    if constexpr (kMode == Mode::general)
      if (p.mask.any()) {
        const int64_t b = info.batch(), own = info.first_head();
        const int own_head = static_cast<int>(kKeys ? own * (p.heads / p.kv_heads) + head : own);
        const int heads = kKeys ? 1 : heads_per_block;
        const int rows = static_cast<int>(pairs) / heads_per_block * Shape::kRows;
        if (!sees_columns(b, own_head, heads, sequence_of(p, b), info.first_row(0), rows, first))
          return;
      }
    const uint32_t stage = stage_of(n), tile = stage + (second ? Shape::kTileBytes : 0);
    const T* from = second ? info.pointer<T, offsetof(BlockInfo, y)>()
                           : info.pointer<T, offsetof(BlockInfo, x)>();
    from += first * stride;
    if (kKeys && head > 0) from += head * (second ? y.head : x.head);
    if (args.whole && left >= kColumns)
      copy_whole_rows<kColumns, Tile>(tile, from, stride);
    else
      copy_rows<kColumns, Tile>(tile, from, stride, left,
                                static_cast<int>(second ? p.value_dim : p.head_dim), args.vectors,
                                thread_index() % kWarpSize, kWarpSize);
    if (kKeys && Worker::kStatistics && (kMode != Mode::general || has_backward_statistics(p))) {
      // minus_lse for the S warps, minus_delta for the dS warps. Queries beyond the sequence have
      // dO = 0, so any finite statistics will do.
      const int lane = thread_index() % kWarpSize;
      const float* of_rows = (second ? info.pointer<float, offsetof(BlockInfo, minus_delta)>()
                                     : info.pointer<float, offsetof(BlockInfo, minus_lse)>()) +
                             head * p.seqlen_q + first + lane;
      const uint32_t to = stage + 2 * Shape::kTileBytes + (second ? kColumns * 4 : 0) + lane * 4;
#pragma unroll
      for (int i = 0; i < kColumns; i += kWarpSize)
        if (lane + i < kColumns) cp_async_word_zfill(to + i * 4, of_rows + i, lane + i < left);
    }
    cp_async_commit();
  };
  const auto score_mod_of = [&](int index) {
    const int64_t group = p.heads / p.kv_heads;
    return typename Worker::Mod(p, info.batch(),
                                kKeys ? info.first_head() * group + index
                                      : info.first_head() + worker.pair % heads_per_block);
  };

  if (kKeys && worker.makes_ds) pair_arrive(worker.full + 1);
  constexpr bool kParksConstant = kMode == Mode::sigmoid || kMode == Mode::fast_sigmoid;
  auto score_mod = score_mod_of(0);
  if constexpr (kParksConstant) worker.park_constant(score_mod);
  // Mainloop; prefetch runs one tile ahead.
  for (; worker.tile() < info.total(); worker.next_tile()) {
    const int n = worker.tile();
    if (n >= 0) {
      cp_async_wait<0>();
      __syncthreads();
    }
    if (n + 1 < info.total()) fetch(n + 1);
    if (n < 0) continue;
    const int head = head_of(n), first = column_of(n, head);
    if (kKeys && Worker::kOfHead && head > 0 && first == info.begin()) {
      score_mod = score_mod_of(head);
      if constexpr (kParksConstant) worker.park_constant(score_mod);
    }
    const PairAddresses addresses = worker.addresses(stage_of(n));
    if constexpr (kParksConstant) score_mod.constant = __uint_as_float(addresses.statistics);
    const bool masked = kMode == Mode::general && p.mask.any();
    if (!masked && info.all_see(worker.pair, first, first + kColumns - 1))
      worker.template run_tile<false>(score_mod, addresses, first);
    else if (info.sees(worker.pair, first, first + kColumns - 1))
      worker.template run_tile<true>(score_mod, addresses, first);
  }
  const bool makes_ds = worker.makes_ds;
  const int pair = worker.pair;
  if (kKeys && !makes_ds) pair_sync(worker.full + 1);

  float factor = kKeys && !makes_ds ? 1.f : p.scale;
  if (kKeys && !makes_ds && Worker::kScale && args.weight_scale > 1) factor = 1 / kHalfScale;
  if ((!kKeys || makes_ds) && kMode == Mode::fast_sigmoid) factor *= 0.25f;
  const Rows& to = kKeys ? makes_ds ? bp.dk : bp.dv : bp.dq;
  const int64_t batch = info.batch(), head = info.first_head() + pair % heads_per_block;
  const int first_row = info.first_row(pair), rows = info.rows() - first_row;
  const int dim = static_cast<int>(kKeys && !makes_ds ? p.value_dim : p.head_dim);
  T* out = rows_at<T>(to, batch, info.row_start() + first_row, head);
  if (args.store_vectors) {
    store_accumulators<kKeys ? 1 : 2, T, kTiles, Worker::kBlocks>(
        worker.acc, factor, out, to.seq, rows, kKeys ? 0 : 16 * makes_ds, dim, worker.lane);
  } else {
    __syncthreads();  // all warps are done with the ring
    // The two warps of a pair share a tile of dQ and store half of the rows each.
    const uint32_t tile =
        worker.base + (kKeys ? 2 * pair + makes_ds : pair) * kRows * Tile::kRowBytes;
    put_accumulators<T, Tile, kTiles, Worker::kBlocks>(
        worker.acc, factor, tile, worker.lane, [&](int i) { return kKeys ? i : 2 * i + makes_ds; });
    __syncthreads();
    constexpr int kShare = kKeys ? kRows : kRows / 2;
    const int own = kKeys ? 0 : makes_ds * kShare;
    store_rows<Tile>(out + own * to.seq, to.seq, min(kShare, rows - own), dim,
                     tile + own * Tile::kRowBytes, worker.lane);
  }

  if constexpr (!kKeys && kMode == Mode::general) {
    if (!makes_ds || rows <= 0 || !bp.sums) return;
    const float bias = warp_sum(worker.bias_sum), slope = warp_sum(worker.slope_sum);
    if (worker.lane > 0) return;
    float* sums = bp.sums + 2 * (sums_offset(args, batch, info.row_start(), head) + first_row / 16);
    sums[0] = bias;
    sums[1] = slope;
  }
}

template <typename T, int kDim, Side kSide, Mode kMode>
const char* launch_side(BackwardArgs args, cudaStream_t stream) {
  using Shape = PairShape<T, kDim, kMode>;
  constexpr bool kKeys = kSide == Side::keys;
  const AttentionParams& p = args.p.forward;
  const int64_t tokens = kKeys ? p.seqlen_k : p.seqlen_q;
  if (tokens == 0) return nullptr;
  const int max_bytes = shared_limit();
  int pairs = 4;
  while (pairs > 1 && Shape::shared_bytes(pairs) > max_bytes) pairs /= 2;
  const int64_t group = p.heads / p.kv_heads;
  args.heads_per_block = 1;
  while (!kKeys && args.heads_per_block < pairs && group % (2 * args.heads_per_block) == 0)
    args.heads_per_block *= 2;
  const int32_t* ends = kKeys ? p.cu_seqlens_k : p.cu_seqlens_q;
  args.row_blocks = max_tiles(ends, p.batch, tokens, pairs / args.heads_per_block * Shape::kRows);
  const int64_t heads = kKeys ? p.kv_heads : p.heads / args.heads_per_block;
  const int64_t blocks = args.row_blocks * heads * (ends ? 1 : p.batch);
  args.whole = args.vectors && p.head_dim == kDim && p.value_dim == kDim;
  return launch<backward_kernel<T, kDim, kSide, kMode>>(blocks, 2 * pairs * kWarpSize,
                                                        Shape::shared_bytes(pairs), stream, args);
}

template <typename T, Mode kMode>
const char* launch_pairs(const BackwardArgs& args, cudaStream_t stream) {
  const auto launch_dim = [&]<int kDim>(Index<kDim>) {
    const char* error = launch_side<T, kDim, Side::queries, kMode>(args, stream);
    return error ? error : launch_side<T, kDim, Side::keys, kMode>(args, stream);
  };
  if constexpr (kMode == Mode::elementwise)
    return args.largest_dim() <= 64 ? launch_dim(Index<64>{}) : launch_dim(Index<128>{});
  else
    return visit_head_dim(args.largest_dim(), launch_dim);
}

template const char* launch_pairs<TOKENMILL_ELEMENT, Mode::TOKENMILL_MODE>(const BackwardArgs&,
                                                                           cudaStream_t);

}  // namespace tokenmill::cuda
