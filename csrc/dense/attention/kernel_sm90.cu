// sm_90a forward, for calls that takes_sm90() accepts.
//
//   S = Q K^T    P = 2^(factor S - row_max) or sigmoid(scale S + bias)    O = P V
//
// Warp-specialised and persistent: each CTA iterates over query tiles of kBlockRows rows of one
// head. One producer warp loads Q once per tile and K and V tile by tile with TMA into kStages
// stages, each with mbarriers of its own. Each consumer warpgroup owns 64 query rows, runs over the
// key tiles that its rows see and keeps S, P and O in registers. In unmasked tiles Q K^T of tile
// j + 1 and P V of tile j run under the softmax of tile j + 1.
#include <numeric>

#include "attention/epilogue_sm90.cuh"
#include "attention/mainloop_sm90.cuh"
#include "core/knobs.h"
#include "cuda/launch.cuh"
#include "dense/attention/kernel_sm90_shape.cuh"
#include "dense/attention/launch.cuh"

namespace tokenmill::cuda {

// Tile index of this CTA's n-th iteration (static round-robin tile scheduler).
__device__ inline int index_of(unsigned round) { return blockIdx.x + round * gridDim.x; }

// TMA coordinates of the keys of a cached tile from `key` on, all in one page. From seqlen_k on
// there may be no page: a box outside of the tensor reads zeros.
__device__ inline BoxPlace find_cached_box(const KvCache& cache, const Sm90Tile& tile, int key,
                                           int head) {
  if (key >= tile.s.k_length) return {0, head, -1};
  const KvCache::Slot at = cache.slot(tile.b, key);
  return {at.row, head, at.page};
}

// Producer warp.
template <typename Shape>
__device__ void producer(const AttentionParams& p, const Sm90Plan& plan,
                         Sm90Shared<Shape>& shared) {
  constexpr int kRows = Shape::kRows, kKeys = Shape::kTileKeys, kColumns = Shape::kColumns;
  const int group = static_cast<int>(p.heads / p.kv_heads);
  const bool issues = threadIdx.x == 0;
  unsigned number = 0;  // key tiles loaded so far
#pragma unroll 1
  for (unsigned round = 0; index_of(round) < plan.tiles; ++round) {
    const Sm90Tile tile = find_sm90_tile<Shape>(p, plan, index_of(round));
    if (tile.b < 0) {
      wait_as_warp(shared.q_empty, round % 2 ^ 1);
      if (!issues) continue;
      shared.tiles[round % 2] = tile;
      shared.q_full.arrive();
      continue;
    }
    const int batch = p.cu_seqlens_q ? 0 : tile.b, kv_head = tile.h / group;
    const auto load = [&](const CUtensorMap& map, int key0, auto& stages, Mbarrier* full,
                          Mbarrier* empty) {
      const Stage<Shape> stage(number);
      wait_as_warp(empty[stage.index], stage.parity ^ 1);
      if (!issues) return;
      full[stage.index].arrive_expecting(Shape::kKeyBytes);
      if (!plan.cache.seqlens) {
        load_boxes<kKeys, kColumns>(map, {tile.s.k_start + key0, kv_head, batch},
                                    stages[stage.index], full[stage.index]);
        return;
      }
#pragma unroll 1
      for (int i = 0; i < kKeys; i += plan.box_keys)
        load_boxes<kKeys, kColumns>(map, find_cached_box(plan.cache, tile, key0 + i, kv_head),
                                    stages[stage.index] + i * kBoxRowBytes, full[stage.index]);
    };
    const auto load_keys = [&](int key0) {
      load(plan.k, key0, shared.k, shared.k_full, shared.k_empty);
    };
    // prefetch: the consumers are still at work on the previous tile
    if (tile.begin < tile.end) load_keys(tile.begin);
    wait_as_warp(shared.q_empty, round % 2 ^ 1);
    if (issues) {
      shared.tiles[round % 2] = tile;
      shared.q_full.arrive_expecting(Shape::kWarpgroups * Shape::kQueryBytes);
      for (int w = 0; w < Shape::kWarpgroups; ++w)
        load_boxes<kRows, kColumns>(plan.q,
                                    {tile.s.q_start + tile.first + w * kRows, tile.h, batch},
                                    shared.q[w], shared.q_full);
    }
#pragma unroll 1
    for (int key0 = tile.begin; key0 < tile.end; key0 += kKeys, ++number) {
      if (key0 > tile.begin) load_keys(key0);
      load(plan.v, key0, shared.v, shared.v_full, shared.v_empty);
    }
  }
}

// Key tiles that 64 rows from `first` on see under a band mask. Rows beyond the sequence count too,
// which saves a register.
template <typename Shape>
class BandTiles : public Sm90Tiles {
 public:
  static constexpr int kKeys = Shape::kTileKeys;

  __device__ BandTiles(const Sm90Tile& tile, int first)
      : band_(tile.band), first_(first), key0_(tile.begin), end_(tile.end) {}

  __device__ bool is_left() const { return key0_ < end_; }
  __device__ void next(unsigned) { key0_ += kKeys; }
  __device__ bool sees_any() const {
    return key0_ < band_.end(last()) && key0_ + kKeys > band_.begin(first_);
  }
  __device__ bool sees_all() const {
    return key0_ >= band_.begin(last()) && key0_ + kKeys <= band_.end(first_);
  }
  __device__ KeySpan seen() const {
    return {band_.begin(last()) - key0_, band_.end(first_) - key0_};
  }
  __device__ int end() const { return band_.end(last()) - key0_; }
  __device__ __forceinline__ RowBounds bounds(int own) const {
    int first = first_;
    opt_barrier(first);  // otherwise four bounds hold registers through the key loop
    const int rows[2] = {first + warpgroup_row(0), first + warpgroup_row(1)};
    const int from = key0_ + own;
    return {{band_.begin(rows[0]) - from, band_.begin(rows[1]) - from},
            {band_.end(rows[0]) - from, band_.end(rows[1]) - from}};
  }

 private:
  __device__ int last() const { return first_ + Shape::kRows - 1; }

  MaskBand band_;
  int first_;       // first row within the sequence
  int key0_, end_;  // first key of the tile, end of the tiles
};

// Consumer warpgroup: 64 rows of each query tile.
template <typename T, typename Shape, Weights kWeights>
class Consumer {
 public:
  static constexpr int kRows = Shape::kRows, kHeadDim = Shape::kHeadDim;
  static constexpr int kColumns = Shape::kColumns;
  using Shared = Sm90Shared<Shape>;
  using ScoreMap = Sm90ScoreMap<T, kWeights>;

  __device__ Consumer(const AttentionParams& p, const Sm90Plan& plan, Shared& shared, int warpgroup)
      : p_(p),
        plan_(plan),
        shared_(shared),
        warpgroup_(warpgroup),
        mainloop_(shared, plan, warpgroup) {}

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (unsigned round = 0; index_of(round) < plan_.tiles; ++round) {
      shared_.q_full.wait(round % 2);
      const Sm90Tile tile = shared_.tiles[round % 2];
      uint32_t queries = shared_address(shared_.q[warpgroup_]);
      // Otherwise the key loop recomputes the operand from warpgroup_. With 256 columns of O no
      // register is left to hold it.
      if constexpr (kColumns < 256) opt_barrier(queries);
      if (tile.b < 0) {
        clear(tile);
        release(shared_.q_empty);
        continue;
      }
      // A warpgroup without rows in the sequence is placed before all rows that see a key.
      int first = tile.first + warpgroup_ * kRows;
      if (first >= tile.s.q_length) first = -2 * static_cast<int>(kMaxLength);
      BandTiles<Shape> tiles(tile, first);
      ScoreMap weights(plan_, constant_of(p_, tile.b, tile.h, tile.s.k_length));
      mainloop_.run(tiles, queries, weights);
      release(shared_.q_empty);
      opt_barrier(round);  // reload `round` here so that it holds no register through the key loop
      store(shared_.tiles[round % 2], weights);
    }
    if (warpgroup_thread() == 0) wait_for_stores();
  }

 private:
  // Epilogue: normalise O, write it through shared memory, and write lse.
  __device__ __forceinline__ void store(const Sm90Tile& tile, const ScoreMap& weights) {
    const int first = tile.first + warpgroup_ * kRows, rows = min(tile.s.q_length - first, kRows);
    const float shift = constant_of(p_, tile.b, tile.h, tile.s.k_length);
    float factor[2];
    unroll<2>([&](auto h) {
      const RowScale scale = weights.finish(h, p_.sink ? p_.sink + tile.h : nullptr, shift);
      factor[h] = scale.factor;
      if (kWeights == Weights::softmax && threadIdx.x % 4 == 0 && warpgroup_row(h) < rows)
        lse_at(p_, p_.lse, tile.b, tile.s.q_start, tile.h)[first + warpgroup_row(h)] = scale.lse;
    });
    unroll<(kColumns + Shape::kOutColumns - 1) / Shape::kOutColumns>(
        [&](auto part) { store_columns<part * Shape::kOutColumns>(tile, first, rows, factor); });
  }

  // Stages and stores the columns of O from kFirst on.
  template <int kFirst>
  __device__ __forceinline__ void store_columns(const Sm90Tile& tile, int first, int rows,
                                                const float (&factor)[2]) {
    constexpr int kLeft = kColumns - kFirst;
    constexpr int kTaken = kLeft < Shape::kOutColumns ? kLeft : Shape::kOutColumns;
    const uint32_t staged = shared_address(shared_.out[warpgroup_]);
    if (warpgroup_thread() == 0) wait_for_stores();  // before `out` is overwritten
    sync_warpgroup(warpgroup_);
    unroll<2>([&](auto h) {
      // An empty row is cleared: a NaN bias makes NaN of the weights of masked keys too.
      const int row = first + warpgroup_row(h);
      const bool empty = kWeights == Weights::sigmoid && tile.band.begin(row) >= tile.band.end(row);
      stage_row<T, h, kTaken, kFirst>(staged, mainloop_.o(), factor[h], empty);
    });
    fence_stores();
    sync_warpgroup(warpgroup_);
    if (!p_.cu_seqlens_q || rows == kRows) {  // TMA clips rows beyond the tensor
      if (warpgroup_thread() == 0 && rows > 0)
        store_boxes<kRows, kTaken>(
            plan_.out, {tile.s.q_start + first, tile.h, p_.cu_seqlens_q ? 0 : tile.b, kFirst},
            shared_.out[warpgroup_]);
      return;
    }
    // Padding columns beyond kHeadDim are in the last part.
    constexpr int kOwn = kTaken < kLeft ? kTaken : kHeadDim - kFirst;
    T* const to = rows_at<T>(p_.out, tile.b, tile.s.q_start + first, tile.h) + kFirst;
    store_rows<T, kOwn>(to, p_.out.seq, rows, staged);
  }

  // Writes the result of query rows that belong to no sequence: out = 0, lse = -inf.
  __device__ void clear(const Sm90Tile& tile) const {
    const int64_t end =
        min(tile.first + Shape::kBlockRows, static_cast<int>(p_.seqlen_q) - tile.rows.length);
    const int warp = threadIdx.x / kWarpSize - kWarpgroupThreads / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
    constexpr uint32_t kZeros[4] = {0, 0, 0, 0};
#pragma unroll 1
    for (int64_t i = tile.first + warp; i < end;
         i += Shape::kWarpgroups * kWarpgroupThreads / kWarpSize) {
      const int64_t at = i < tile.rows.start ? i : i + tile.rows.length;
      if (lane < kHeadDim / 8) store_global(rows_at<T>(p_.out, 0, at, tile.h) + lane * 8, kZeros);
      if (kWeights == Weights::softmax && lane == 0)
        *lse_at(p_, p_.lse, 0, at, tile.h) = -infinity();
    }
  }

  const AttentionParams& p_;
  const Sm90Plan& plan_;
  Shared& shared_;
  int warpgroup_;
  Sm90Mainloop<T, Shape, Shared, ScoreMap> mainloop_;
};

template <typename T, int kHeadDim, Weights kWeights>
__global__ void __launch_bounds__(Sm90Shape<kHeadDim>::kThreads, 1)
    attention_forward_sm90_kernel(const __grid_constant__ AttentionParams p,
                                  const __grid_constant__ Sm90Plan plan) {
  using Shape = Sm90Shape<kHeadDim>;
  extern __shared__ __align__(1024) char sm90_shared[];
  auto& shared = *reinterpret_cast<Sm90Shared<Shape>*>(sm90_shared);
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();
  // Broadcast from lane 0 so that the compiler knows the value to be warp-uniform.
  const int warpgroup =
      __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0) - 1;
  if (warpgroup < 0) {
    shrink_registers<Shape::kLoadRegisters>();
    if (threadIdx.x < kWarpSize) producer<Shape>(p, plan, shared);
  } else {
    grow_registers<Shape::kMultiplyRegisters>();
    Consumer<T, Shape, kWeights>(p, plan, shared, warpgroup).run();
  }
}

// Grid size, Knob::attention_sm90_grid.
enum class Sm90Grid { multiprocessors, even_rounds, tiles };

inline int sm90_blocks(int tiles, Sm90Grid grid) {
  const int at_once = multiprocessors();
  if (grid == Sm90Grid::tiles || tiles <= at_once) return tiles;
  if (grid == Sm90Grid::multiprocessors) return at_once;
  return static_cast<int>(ceil_div(tiles, ceil_div(tiles, at_once)));
}

// Number of KV heads whose K and V may be in use at once: attention_sm90_section MB of the L2
// cache, of which an H100 has 50.
inline int64_t sm90_section_heads(int64_t bytes_of_head) {
  const int64_t heads = (knob(Knob::attention_sm90_section) << 20) / bytes_of_head;
  return heads < 1 ? 1 : heads;
}

template <typename T, int kHeadDim, Weights kWeights>
const char* launch_sm90(const AttentionParams& p, const KvCache& cache, cudaStream_t stream) {
  using Shape = Sm90Shape<kHeadDim>;
  Sm90Plan plan{};
  const Sm90Tensors tensors(p, cache);
  plan.cache = cache;
  plan.ragged = p.cu_seqlens_q || cache.seqlens;
  plan.box_keys = Shape::kTileKeys;
  if (cache.block_table)
    plan.box_keys = static_cast<int>(std::gcd(page_size(cache), int64_t{Shape::kTileKeys}));
  if (cache.seqlens && p.cu_seqlens_q) plan.min_rows = kMinSm90Tokens;
  if (const char* error = encode_map(plan.q, tensors.q, p.dtype, Shape::kRows)) return error;
  if (const char* error = encode_map(plan.k, tensors.k, p.dtype, plan.box_keys)) return error;
  if (const char* error = encode_map(plan.v, tensors.v, p.dtype, plan.box_keys)) return error;
  if (const char* error = encode_map(plan.out, tensors.out, p.dtype, Shape::kRows)) return error;
  plan.tiles_of_head = static_cast<int>(
      max_tiles(p.cu_seqlens_q, p.batch, p.seqlen_q, Shape::kBlockRows, plan.min_rows));
  plan.heads = static_cast<int>(tensors.q.batch * p.heads);
  plan.tiles = plan.tiles_of_head * plan.heads;
  const int64_t group = p.heads / p.kv_heads;
  const int64_t section = group * sm90_section_heads(p.seqlen_k * kHeadDim * 4);
  plan.section_heads = static_cast<int>(section < plan.heads ? section : plan.heads);
  const float unit = kWeights == Weights::sigmoid && p.fast ? 0.5f : kLog2e;
  static_cast<Sm90Scores&>(plan) = Sm90Scores::of(p.scale, p.softcap, unit, p.fast);
  const auto grid = static_cast<Sm90Grid>(knob(Knob::attention_sm90_grid));
  return launch<attention_forward_sm90_kernel<T, kHeadDim, kWeights>>(
      sm90_blocks(plan.tiles, grid), Shape::kThreads, sizeof(Sm90Shared<Shape>), stream, p, plan);
}

template <typename T, Weights kWeights>
const char* launch_forward_sm90(const AttentionParams& p, const KvCache& cache,
                                cudaStream_t stream) {
  return visit_sm90_dim(p.head_dim, [&](auto dim) -> const char* {
    return launch_sm90<T, dim, kWeights>(p, cache, stream);
  });
}

template const char* launch_forward_sm90<TOKENMILL_ELEMENT, Weights::TOKENMILL_MODE>(
    const AttentionParams&, const KvCache&, cudaStream_t);

}  // namespace tokenmill::cuda
