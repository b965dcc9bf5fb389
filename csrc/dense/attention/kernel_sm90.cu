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
#include "attention/masked_values_sm90.cuh"
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

// Consumer warpgroup: 64 rows of each query tile.
template <typename T, typename Shape, Weights kWeights>
class Consumer {
 public:
  static constexpr int kRows = Shape::kRows, kKeys = Shape::kTileKeys, kHeadDim = Shape::kHeadDim;
  static constexpr int kColumns = Shape::kColumns;

  __device__ Consumer(const AttentionParams& p, const Sm90Plan& plan, Sm90Shared<Shape>& shared,
                      int warpgroup)
      : p_(p), plan_(plan), shared_(shared), warpgroup_(warpgroup) {}

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (unsigned round = 0; index_of(round) < plan_.tiles; ++round) {
      shared_.q_full.wait(round % 2);
      const Sm90Tile tile = shared_.tiles[round % 2];
      queries_ = shared_address(shared_.q[warpgroup_]);
      // Otherwise the key loop recomputes the operand from warpgroup_. With 256 columns of O no
      // register is left to hold it.
      if constexpr (kColumns < 256) opt_barrier(queries_);
      if (tile.b < 0) {
        clear(tile);
        release(shared_.q_empty);
        continue;
      }
      // A warpgroup without rows in the sequence is placed before all rows that see a key.
      first_ = tile.first + warpgroup_ * kRows;
      if (first_ >= tile.s.q_length) first_ = -2 * static_cast<int>(kMaxLength);
      band_ = tile.band;
#pragma unroll
      for (int j = 0; j < kColumns / 2; ++j) o_[j] = 0;
      Sm90ScoreMap<T, kWeights> weights(plan_, constant_of(p_, tile.b, tile.h, tile.s.k_length));
#pragma unroll 1
      for (int key0 = tile.begin; key0 < tile.end;) {
        if (!sees(key0))
          skip_tile(key0);
        else if (is_whole(key0))
          mainloop_unmasked(key0, weights);
        else if (kKeys == kRows || band_.end(last()) > key0 + kRows)
          masked_tile<kKeys>(key0, weights);
        else
          masked_tile<kRows>(key0, weights);
      }
      release(shared_.q_empty);
      opt_barrier(round);  // reload `round` here so that it holds no register through the key loop
      store(shared_.tiles[round % 2], weights);
    }
    if (warpgroup_thread() == 0) wait_for_stores();
  }

 private:
  // sees: some row sees some key of a tile; is_whole: all rows see all keys. Rows beyond the
  // sequence count too, which saves a register.
  __device__ int last() const { return first_ + kRows - 1; }
  __device__ bool sees(int key0) const {
    return key0 < band_.end(last()) && key0 + kKeys > band_.begin(first_);
  }
  __device__ bool is_whole(int key0) const {
    return key0 >= band_.begin(last()) && key0 + kKeys <= band_.end(first_);
  }

  __device__ __forceinline__ void skip_tile(int& key0) {
    const Stage<Shape> stage(number_);
    shared_.k_full[stage.index].wait(stage.parity);
    release(shared_.k_empty[stage.index]);
    shared_.v_full[stage.index].wait(stage.parity);
    release(shared_.v_empty[stage.index]);
    ++number_;
    key0 += kKeys;
  }

  // Unmasked tiles from key0 on, as many as follow each other.
  __device__ __forceinline__ void mainloop_unmasked(int& key0, Sm90ScoreMap<T, kWeights>& weights) {
    float s[kKeys / 2];
    uint32_t p[kKeys / 4];
    // S = Q K^T and P = f(S) of the first tile
    multiply_keys(s, number_);
    finish_keys<0>(s, number_);
    weights.apply_map(s);
    weights.rescale(o_);
    pack_weights(p, s, weights);
#pragma unroll 1
    for (key0 += kKeys; is_whole(key0); key0 += kKeys, ++number_) {
      // Issue S_next = Q K_next^T and O += P V, then compute P_next under them
      multiply_keys(s, number_ + 1);
      multiply_values(p, number_);
      finish_keys<1>(s, number_ + 1);
      weights.apply_map(s);
      finish_values(number_);
      weights.rescale(o_);
      pack_weights(p, s, weights);
    }
    // O += P V of the last tile
    multiply_values(p, number_);
    finish_values(number_);
    ++number_;
  }

  // A tile cut by a mask or by the end of the keys; its rows see keys only in the first kSeen.
  template <int kSeen>
  __device__ __forceinline__ void masked_tile(int& key0, Sm90ScoreMap<T, kWeights>& weights) {
    float s[kSeen / 2];
    uint32_t p[kSeen / 4];
    multiply_keys(s, number_);
    finish_keys<0>(s, number_);
    const int seen_begin = band_.begin(last()) - key0, seen_end = band_.end(first_) - key0;
    bounds(key0, 2 * static_cast<int>(threadIdx.x % 4)).hide(s, seen_begin > 0, seen_end < kSeen);
    weights.apply_map(s);
    weights.rescale(o_);
    pack_weights(p, s, weights);
    const Stage<Shape> stage(number_);
    shared_.v_full[stage.index].wait(stage.parity);
    const uint32_t values = shared_address(shared_.v[stage.index]);
    const bool infinite = has_nonfinite<T, kColumns, kKeys, kSeen>(values, seen_begin, seen_end);
    if (any_in_warpgroup(warpgroup_, infinite)) {
      // step of keys whose finite copy fits into the `out` buffer
      constexpr int kStep = Shape::kOutBytes / (2 * kColumns) / kWgmmaDepth * kWgmmaDepth;
      if (warpgroup_thread() == 0) wait_for_stores();
      multiply_seen_values<T, kKeys, kStep>(o_, p, values, shared_address(shared_.out[warpgroup_]),
                                            warpgroup_, bounds(key0, 0));
    } else {
      start_pv<T, kKeys>(o_, p, values);
    }
    // values were read through the generic proxy, and the next TMA copy overwrites them
    fence_stores();
    finish_values(number_);
    ++number_;
    key0 += kKeys;
  }

  template <int kCount>
  __device__ __forceinline__ void multiply_keys(float (&s)[kCount], unsigned number) {
    const Stage<Shape> stage(number);
    shared_.k_full[stage.index].wait(stage.parity);
    start_qk<T, kHeadDim, kKeys>(s, queries_, shared_address(shared_.k[stage.index]));
  }
  template <int kPending, int kCount>
  __device__ __forceinline__ void finish_keys(float (&s)[kCount], unsigned number) {
    wait_for_product<kPending>(s);
    release(shared_.k_empty[Stage<Shape>(number).index]);
    plan_.cap(s);
  }
  __device__ __forceinline__ void multiply_values(const uint32_t (&p)[kKeys / 4], unsigned number) {
    const Stage<Shape> stage(number);
    shared_.v_full[stage.index].wait(stage.parity);
    start_pv<T, kKeys>(o_, p, shared_address(shared_.v[stage.index]));
  }
  __device__ __forceinline__ void finish_values(unsigned number) {
    wait_for_product<0>(o_);
    release(shared_.v_empty[Stage<Shape>(number).index]);
  }

  // Visible columns of both rows of this thread, relative to column `own` of the tile at key0.
  __device__ __forceinline__ RowBounds bounds(int key0, int own) const {
    const int rows[2] = {first_ + warpgroup_row(0), first_ + warpgroup_row(1)};
    const int from = key0 + own;
    return {{band_.begin(rows[0]) - from, band_.begin(rows[1]) - from},
            {band_.end(rows[0]) - from, band_.end(rows[1]) - from}};
  }

  // Epilogue: normalise O, write it through shared memory, and write lse.
  __device__ __forceinline__ void store(const Sm90Tile& tile,
                                        const Sm90ScoreMap<T, kWeights>& weights) {
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
      stage_row<T, h, kTaken, kFirst>(staged, o_, factor[h], empty);
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
  Sm90Shared<Shape>& shared_;
  int warpgroup_;
  uint32_t queries_;  // shared-memory address of the warpgroup's Q rows
  int first_;         // first row within the sequence
  MaskBand band_;
  unsigned number_ = 0;  // index of the next key tile
  float o_[kColumns / 2];
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
