// sm_80 forward. A CTA owns rows of queries of one KV head, each warp 16 or 32 rows of one query
// head. K and V tiles that any row sees stream through a two-stage cp.async pipeline in shared
// memory; the warps of a CTA are split among the query heads of a GQA group, which share the tiles.
// The host side, which plans the grid and launches an instance, follows the kernel.
#pragma once
#include "attention/forward_float8.cuh"
#include "attention/forward_store.cuh"
#include "attention/gmem_to_smem.cuh"
#include "attention/head_dim.cuh"
#include "core/kv_cache.h"
#include "cuda/launch.cuh"

namespace tokenmill::cuda {

// Launch plan, made on the host. blockIdx.x enumerates query tiles (fastest), then blocks of heads
// of all sequences.
struct ForwardPlan {
  int warps;
  // log2 of the warps per query head; the others take further heads of the group
  int log2_warps_per_head;
  unsigned tiles;             // query tiles per head; packed: over all sequences
  unsigned head_blocks;       // blocks of heads per sequence
  unsigned blocks_per_group;  // blocks of heads per KV head
  unsigned first_head_block;
  int64_t key_step, value_step;  // TileLoader::step
  float factor;                  // ForwardWarp::factor()
  bool inputs_aligned, output_aligned;
  bool inputs_whole;  // aligned, and head_dim and value_dim fill the tile's rows
  // cached: skip requests with more queries, which another kernel takes; 0: no limit
  uint8_t max_queries;
  MaskBounds bounds;  // bounds of the mask's rows, where the call has a mask
  KvCache cache;      // the KV cache, where keys and values are cached
};

// Writes the result of query rows that belong to no sequence: out = 0, lse = -inf (0 for other
// maps).
template <typename T>
__device__ void clear_queries(const AttentionParams& p, const ForwardPlan& plan,
                              const LooseRows& rows, unsigned head_block) {
  const int group = static_cast<int>(p.heads) / static_cast<int>(p.kv_heads);
  const int heads = plan.warps >> plan.log2_warps_per_head;  // per CTA
  const int first = head_block % plan.blocks_per_group * heads;
#pragma unroll 1
  for (int i = first; i < min(first + heads, group); ++i) {
    const int h = head_block / plan.blocks_per_group * group + i;
    rows.fill(rows_at<T>(p.out, 0, 0, h), p.out.seq, p.value_dim, 0);
    if (p.lse)
      rows.fill(lse_at(p, p.lse, 0, 0, h), 1, 1, p.map == ScoreMap::softmax ? -infinity() : 0);
  }
}

// Copies keys key0 .. key0 + kRows - 1 of head `head` from their pages to a tile; zeros from
// `length` on. Where the cache has scales, they go to the address `scales`.
template <typename T, typename Tile, int kRows>
__device__ __forceinline__ void copy_cached_rows(uint32_t tile, const KvCache& cache,
                                                 const Rows& rows, int columns, int b, int head,
                                                 int key0, int length, bool aligned,
                                                 const CacheScale& scale = {},
                                                 uint32_t scales = 0) {
  using Copy = RowCopy<T, Tile>;
#pragma unroll 1
  for (int r = Copy::first_row(); r < kRows; r += Copy::row_step()) {
    const int key = key0 + r;
    const KvCache::Slot at = cache.slot(b, key < length ? key : length - 1);
    const T* row = static_cast<const T*>(rows.data) + KvCache::offset(rows, at, head);
    Copy::copy_to(tile, r, row, key < length ? columns : 0, aligned);
    if constexpr (std::is_same_v<T, Float8>)
      if (Copy::own_lane() == 0 && scale.data)
        cp_async_word(scales + 4 * r,
                      scale.data + at.page * scale.page + at.row * scale.row + head * scale.head);
  }
}

// Types of one instance. Cache: element type of the KV cache; void: no cache.
template <typename T, int kBucket_, Weights kWeights, bool kGeneral_, typename Cache>
struct ForwardTraits {
  static constexpr int kBucket = kBucket_;
  static constexpr bool kGeneral = kGeneral_;
  static constexpr bool kCached = !std::is_void_v<Cache>, kFloat8 = std::is_same_v<Cache, Float8>;
  static_assert(kGeneral || !kCached);

  using Element = T;
  using CacheElement = std::conditional_t<kCached, Cache, T>;
  using Shape = std::conditional_t<kFloat8, Float8Shape<T, kBucket>, ForwardShape<T, kBucket>>;
  using Stages = Float8Stages<T, kBucket>;
  using Warp = std::conditional_t<kFloat8, Float8Warp<T, kBucket>,
                                  ForwardWarp<T, kBucket, kWeights, kGeneral, Shape>>;
  using Output = WarpOutput<T, kBucket, kWeights, kGeneral, Shape>;
};

// Work of a CTA: `rows` query rows of sequence b from first_row on, of which last_row is the last
// one that exists, for `heads` query heads from first_head on in the group of kv_head.
struct ForwardTile {
  int b, first_row, last_row, rows;
  Sequence s;
  int kv_head, group, first_head, heads;
};

// Finds the work of a CTA. Returns false if it has no queries to attend with, after clearing those
// that belong to no sequence.
template <typename Traits>
__device__ __forceinline__ bool find_work(ForwardTile& tile, const AttentionParams& p,
                                          const ForwardPlan& plan) {
  const int rows = Traits::Shape::kWarpRows << plan.log2_warps_per_head;
  const unsigned head_block = plan.first_head_block + blockIdx.x / plan.tiles;
  const unsigned in_sequence = head_block % plan.head_blocks;
  TilePlace place{static_cast<int>(head_block / plan.head_blocks),
                  static_cast<int>(blockIdx.x % plan.tiles),
                  {0, static_cast<int>(p.seqlen_q)}};
  if (p.cu_seqlens_q) {
    place = find_tile(p.cu_seqlens_q, p.batch, p.seqlen_q, rows, place.tile);
    if (place.b < 0) {
      clear_queries<typename Traits::Element>(p, plan, LooseRows(place, p.seqlen_q, rows),
                                              in_sequence);
      return false;
    }
    if constexpr (Traits::kCached && !Traits::kFloat8 && !Traits::Shape::kFloat)
      if (plan.max_queries > 0 && place.rows.length > plan.max_queries) return false;
  }
  Sequence s{place.rows.start, 0, place.rows.length, 0};
  if constexpr (Traits::kCached)
    s.k_length = static_cast<int>(plan.cache.length(place.b));
  else
    s = sequence_of(p, place.b, place.rows);
  // LPT order: under a causal mask the last query tiles see the most keys, so they start first.
  const int first_row = ((s.q_length + rows - 1) / rows - 1 - place.tile) * rows;
  const int last_row = min(first_row + rows, s.q_length) - 1;
  const int heads = plan.warps >> plan.log2_warps_per_head;
  tile = {place.b,
          first_row,
          last_row,
          rows,
          s,
          static_cast<int>(in_sequence / plan.blocks_per_group),
          static_cast<int>(p.heads) / static_cast<int>(p.kv_heads),
          static_cast<int>(in_sequence % plan.blocks_per_group * heads),
          heads};
  return true;
}

// Shrinks begin .. end to the first and last tile of keys that a mask of pairs lets the CTA see.
template <typename Traits>
__device__ __forceinline__ void skip_hidden_tiles(int& begin, int& end, const AttentionParams& p,
                                                  const ForwardPlan& plan, const ForwardTile& tile,
                                                  int* shared) {
  constexpr int kTileKeys = Traits::Shape::kTileKeys;
  const int head = tile.kv_head * tile.group + tile.first_head;
  const int heads = min(tile.heads, tile.group - tile.first_head);
  cut_hidden_ends<kTileKeys>(begin, end, shared, [&](int key0) {
    return any_sees(p.mask, plan.bounds, tile.b, head, heads, tile.s, tile.first_row, tile.rows,
                    key0, kTileKeys);
  });
}

// Loads cached keys and values from key0 on: into `stage`, float8 into the codes of their stage.
template <typename Traits>
__device__ __forceinline__ void load_cached_stage(const AttentionParams& p, const ForwardPlan& plan,
                                                  uint32_t stages, uint32_t stage, int key0, int b,
                                                  int length, int head) {
  using Shape = typename Traits::Shape;
  const KvCache& cache = plan.cache;
  if constexpr (Traits::kFloat8) {
    using Stages = typename Traits::Stages;
    using Tile = CodeTile<Traits::kBucket>;
    const uint32_t codes = Stages::codes(stages, key0), scales = Stages::scales(stages, key0);
    copy_cached_rows<Float8, Tile, Shape::kTileKeys>(
        codes, cache, cache.k, static_cast<int>(p.head_dim), b, head, key0, length,
        plan.inputs_aligned, cache.k_scale, scales);
    copy_cached_rows<Float8, Tile, Shape::kTileKeys>(
        codes + Stages::kCodeTileBytes, cache, cache.v, static_cast<int>(p.value_dim), b, head,
        key0, length, plan.inputs_aligned, cache.v_scale, scales + Shape::kTileKeys * 4);
  } else {
    using Cache = typename Traits::CacheElement;
    copy_cached_rows<Cache, typename Shape::KeyTile, Shape::kTileKeys>(
        stage, cache, cache.k, static_cast<int>(p.head_dim), b, head, key0, length,
        plan.inputs_aligned);
    copy_cached_rows<Cache, typename Shape::ValueTile, Shape::kTileKeys>(
        stage + Shape::kTileBytes, cache, cache.v, static_cast<int>(p.value_dim), b, head, key0,
        length, plan.inputs_aligned);
  }
  cp_async_commit();
}

// Sets the scales that the cache does not have to 1, in both stages.
template <typename Traits>
__device__ __forceinline__ void fill_scales(const KvCache& cache, uint32_t stages) {
  using Stages = typename Traits::Stages;
  for (int i = threadIdx.x; i < 2 * Stages::kScales; i += blockDim.x) {
    const int first = i % Stages::kScales / Traits::Shape::kTileKeys;
    if (!(first == 0 ? cache.k_scale : cache.v_scale).data)
      store_element(stages + Stages::kScalesAt + 4 * i, 1.f);
  }
}

// Converts a stage of float8 codes to the K and V tiles.
template <typename Traits>
__device__ __forceinline__ void convert_stage(uint32_t codes, uint32_t stages) {
  using Shape = typename Traits::Shape;
  using Stages = typename Traits::Stages;
  using T = typename Traits::Element;
  using Codes = CodeTile<Traits::kBucket>;
  const auto nothing = [](int, int, uint32_t (&)[4]) {};
  convert_codes<T, Codes, typename Shape::KeyTile, Shape::kTileKeys>(codes, stages, nothing);
  convert_codes<Float8Value<T>, Codes, typename Shape::ValueTile, Shape::kTileKeys>(
      codes + Stages::kCodeTileBytes, stages + Shape::kTileBytes, nothing);
}

template <typename T>
__device__ __forceinline__ OutputRows<T> output_rows(const AttentionParams& p,
                                                     const ForwardPlan& plan, const WarpPlace& at) {
  return {rows_at<T>(p.out, at.b, at.q_start, at.h), p.out.seq, static_cast<int>(p.value_dim),
          plan.output_aligned};
}

// Epilogue: the stages are free to stage O.
template <typename Traits>
__device__ __forceinline__ void store_output(const AttentionParams& p, const ForwardPlan& plan,
                                             typename Traits::Warp& warp,
                                             typename Traits::Output& output, uint32_t stages) {
  using Shape = typename Traits::Shape;
  __syncthreads();
  const WarpPlace place = warp.place();
  if (place.first <= place.last) {
    float* lse = p.lse ? lse_at(p, p.lse, place.b, place.q_start, place.h) : nullptr;
    const uint32_t area = stages + threadIdx.x / kWarpSize * (Shape::kWarpRows * Shape::kRowBytes);
    output.store(output_rows<typename Traits::Element>(p, plan, place), place, lse,
                 p.sink ? p.sink + place.h : nullptr, area);
  }
}

// Rows of keys or values of sequence b, which start at row `start`.
template <typename T>
__device__ __forceinline__ GlobalRows<T> input_rows(const ForwardPlan& plan, const Rows& rows,
                                                    int64_t columns, int b, int start, int length,
                                                    int head) {
  return {rows_at<T>(rows, b, start, head), rows.seq, length, static_cast<int>(columns),
          plan.inputs_aligned};
}

// Loads successive tiles of K and V, which are not cached, into stages.
template <typename Traits>
struct StageLoader {
  using Shape = typename Traits::Shape;
  using T = typename Traits::Element;
  using Keys = TileLoader<T, typename Shape::KeyTile, Shape::kTileKeys>;
  using Values = TileLoader<T, typename Shape::ValueTile, Shape::kTileKeys>;

  Keys keys;
  Values values;
  int whole_end;         // end of the keys that need no bounds checks
  uint32_t first_stage;  // address of the first tile's stage
  uint32_t first;        // address of this thread's first chunk of K in it
  int to_values;         // from there to its first chunk in the V tile

  __device__ __forceinline__ StageLoader(const GlobalRows<T>& keys, const GlobalRows<T>& values,
                                         const ForwardPlan& plan, uint32_t stages, int key0)
      : keys(keys, key0, plan.key_step),
        values(values, key0, plan.value_step),
        whole_end(plan.inputs_whole ? keys.rows : 0) {
    if constexpr (Traits::kBucket <= 64) opt_barrier(whole_end);
    first_stage = stages + (!Traits::kFloat8 && key0 & Shape::kTileKeys ? Shape::kStageBytes : 0);
    first = first_stage + (Traits::kCached ? 0 : Keys::own_offset());
    to_values = Shape::kTileBytes + Values::own_offset() - Keys::own_offset();
  }

  // Sets the loader to keys of head `head`, the next tile being the one from key0 on.
  __device__ __forceinline__ void rebuild(const AttentionParams& p, const ForwardPlan& plan, int b,
                                          int start, int length, int head, int key0) {
    keys = Keys(input_rows<T>(plan, p.k, p.head_dim, b, start, length, head), key0, plan.key_step);
    values = Values(input_rows<T>(plan, p.v, p.value_dim, b, start, length, head), key0,
                    plan.value_step);
    whole_end = plan.inputs_whole ? length : 0;
  }

  // stage: address of this thread's first chunk in the K tile.
  __device__ __forceinline__ void load(uint32_t stage, int key0) {
    if (key0 + Shape::kTileKeys <= whole_end) {
      if (blockDim.x == kMaxThreads) {
        keys.template load_whole<kMaxThreads>(stage);
        values.template load_whole<kMaxThreads>(stage + to_values);
      } else {
        keys.template load_whole<kMaxThreads / 2>(stage);
        values.template load_whole<kMaxThreads / 2>(stage + to_values);
      }
    } else {
      keys.load(stage, key0);
      values.load(stage + to_values, key0);
    }
    cp_async_commit();
  }
};

// Loads the tile from key0 on if the CTA sees any of its keys.
template <typename Traits>
__device__ __forceinline__ void load_next_stage(const AttentionParams& p, const ForwardPlan& plan,
                                                StageLoader<Traits>& loader,
                                                const typename Traits::Warp& warp, uint32_t stages,
                                                uint32_t stage, int key0, int group) {
  if constexpr (Traits::kCached) {
    const WarpPlace at = warp.place();
    if (warp.block_sees(key0))
      load_cached_stage<Traits>(p, plan, stages, stage, key0, at.b, at.band.columns, at.h / group);
  } else {
    bool wanted = true;
    // registers are too short to keep the loaders across tiles: rebuild them
    if constexpr (Traits::kGeneral) {
      const WarpPlace at = warp.place();
      const int b = at.b, start = at.k_start, length = at.band.columns, head = at.h / group;
      wanted = warp.block_sees(key0);
      loader.rebuild(p, plan, b, start, length, head, key0);
    }
    if (wanted) loader.load(stage, key0);
  }
}

// Mainloop: waits for the stage of key0, prefetches the next one, then S = Q K^T, O += P V.
template <typename Traits>
__device__ __forceinline__ void attend(const AttentionParams& p, const ForwardPlan& plan,
                                       StageLoader<Traits>& loader, typename Traits::Warp& warp,
                                       typename Traits::Output& output, uint32_t stages, int begin,
                                       int end, int group) {
  using Shape = typename Traits::Shape;
  // Odd tiles use stage 1: the next stage follows from key0 and needs no register.
  const auto to_other_stage = [](int key0) {
    return key0 & Shape::kTileKeys ? -Shape::kStageBytes : Shape::kStageBytes;
  };
  typename Traits::Warp::Addresses at(loader.first_stage);
  warp.find_sights(begin);
  warp.find_sights(begin + Shape::kTileKeys);
  uint32_t next = loader.first + to_other_stage(begin);
  opt_barrier(next);
  const auto block_end = [&] { return warp.kSpillBoundsToSmem ? warp.place().block_end : end; };
#pragma unroll 1
  for (int key0 = begin; key0 < block_end();) {
    cp_async_wait<0>();
    __syncthreads();
    if (key0 + Shape::kTileKeys < block_end())
      load_next_stage<Traits>(p, plan, loader, warp, stages, next, key0 + Shape::kTileKeys, group);
    if constexpr (Traits::kFloat8) {
      const uint32_t codes = Traits::Stages::codes(stages, key0);
      if (warp.block_sees(key0)) convert_stage<Traits>(codes, stages);
      __syncthreads();
    }
    warp.add_tile(at, key0);
    warp.find_sights(key0 + 2 * Shape::kTileKeys);
    if constexpr (!Traits::kFloat8) {
      const int other = to_other_stage(key0);
      at.move(other);
      next -= other;
    }
    key0 += Shape::kTileKeys;
    if constexpr (Shape::kFloat)
      if ((key0 - begin) % output.kFlushKeys == 0) {
        const WarpPlace place = warp.place();
        output.flush(output_rows<typename Traits::Element>(p, plan, place), place);
      }
  }
}

// Cache: element type of the KV cache; void: no cache.
template <typename T, int kBucket, Weights kWeights, bool kGeneral, typename Cache>
__device__ __forceinline__ void run_forward(const AttentionParams& p, const ForwardPlan& plan) {
  using Traits = ForwardTraits<T, kBucket, kWeights, kGeneral, Cache>;
  constexpr bool kCached = Traits::kCached, kFloat8 = Traits::kFloat8;
  using Shape = typename Traits::Shape;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t stages = shared_address(shared + kParkedBytes<kGeneral>);

  const int warp_index = __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);
  ForwardTile tile;
  if (!find_work<Traits>(tile, p, plan)) return;
  const Sequence& s = tile.s;
  const int in_group = tile.first_head + (warp_index >> plan.log2_warps_per_head);
  const bool idle = in_group >= tile.group;
  const int h = tile.kv_head * tile.group + (idle ? 0 : in_group);

  const MaskBand band = MaskBand::of(p, s);
  const GlobalRows<T> queries{rows_at<T>(p.q, tile.b, s.q_start, h), p.q.seq, s.q_length,
                              static_cast<int>(p.head_dim), plan.inputs_aligned};
  const auto keys =
      input_rows<T>(plan, p.k, p.head_dim, tile.b, s.k_start, s.k_length, tile.kv_head);
  const auto values =
      input_rows<T>(plan, p.v, p.value_dim, tile.b, s.k_start, s.k_length, tile.kv_head);
  // Skip fully masked tiles at both ends of the key range.
  int begin = band.begin(tile.first_row) / Shape::kTileKeys * Shape::kTileKeys;
  int end = band.end(tile.last_row);
  if constexpr (kGeneral)
    if (p.mask.any())
      skip_hidden_tiles<Traits>(begin, end, p, plan, tile, reinterpret_cast<int*>(shared));
  StageLoader<Traits> loader(keys, values, plan, stages, begin);
  if constexpr (kFloat8) fill_scales<Traits>(plan.cache, stages);
  if (begin < end) {
    if constexpr (kCached)
      load_cached_stage<Traits>(p, plan, stages, loader.first, begin, tile.b, s.k_length,
                                tile.kv_head);
    else
      loader.load(loader.first, begin);
  }

  const int position = warp_index & ((1 << plan.log2_warps_per_head) - 1);
  const int first = idle ? s.q_length : tile.first_row + position * Shape::kWarpRows;
  using Warp = typename Traits::Warp;
  Warp warp(p, s, band, tile.b, h, first, end, queries, plan.factor, plan.bounds,
            reinterpret_cast<WarpPlace*>(shared));
  typename Traits::Output output(warp);

  attend<Traits>(p, plan, loader, warp, output, stages, begin, end, tile.group);
  store_output<Traits>(p, plan, warp, output, stages);
}

// Elementwise weights are limited to one CTA per SM: with two, ptxas spills on sm_100 and sm_120.
// 0: ptxas chooses.
template <typename T, int kBucket, Weights kWeights, bool kGeneral, bool kCached = false>
__global__ void __launch_bounds__(kMaxThreads, kWeights == Weights::elementwise ? 1 : 0)
    attention_forward_kernel(const __grid_constant__ AttentionParams p,
                             const __grid_constant__ ForwardPlan plan) {
  run_forward<T, kBucket, kWeights, kGeneral, std::conditional_t<kCached, T, void>>(p, plan);
}

template <typename T, int kBucket>
__global__ void __launch_bounds__(kMaxThreads)
    attention_forward_float8_kernel(const __grid_constant__ AttentionParams p,
                                    const __grid_constant__ ForwardPlan plan) {
  run_forward<T, kBucket, Weights::any, true, Float8>(p, plan);
}

template <typename T, int kBucket, Weights kWeights, bool kGeneral, typename Cache>
constexpr auto kForwardKernel =
    attention_forward_kernel<T, kBucket, kWeights, kGeneral, !std::is_void_v<Cache>>;
template <typename T, int kBucket>
constexpr auto kForwardKernel<T, kBucket, Weights::any, true, Float8> =
    attention_forward_float8_kernel<T, kBucket>;

// Grid size from which larger CTAs, which read K and V less often, still fill a GPU.
constexpr int64_t kManyBlocks = 256;

template <typename Shape>
ForwardPlan plan_forward(const AttentionParams& p) {
  const int64_t group = p.heads / p.kv_heads, sequences = p.cu_seqlens_q ? 1 : p.batch;
  const auto tiles = [&](int64_t rows) {
    return max_tiles(p.cu_seqlens_q, p.batch, p.seqlen_q, rows);
  };
  ForwardPlan plan{};
  int log2_heads = 0;
  while (log2_heads < 3 && 1 << log2_heads < group) ++log2_heads;
  const bool many = tiles(8 * Shape::kWarpRows) * p.heads * sequences >= kManyBlocks;
  const int log2_warps = log2_heads > 0 || many ? 3 : 2;
  plan.warps = 1 << log2_warps;
  plan.log2_warps_per_head = log2_warps - log2_heads;
  plan.tiles = static_cast<unsigned>(tiles(Shape::kWarpRows << plan.log2_warps_per_head));
  plan.blocks_per_group = static_cast<unsigned>(ceil_div(group, 1 << log2_heads));
  plan.head_blocks = static_cast<unsigned>(p.kv_heads) * plan.blocks_per_group;
  return plan;
}

// cache: the KV cache, where Cache is not void (p then has no keys). max_queries: see ForwardPlan.
template <typename T, int kBucket, Weights kWeights, bool kGeneral, typename Cache = void>
const char* launch_forward(const AttentionParams& p, const MaskBounds& bounds, cudaStream_t stream,
                           const KvCache& cache = {}, int max_queries = 0) {
  constexpr bool kCached = !std::is_void_v<Cache>, kFloat8 = std::is_same_v<Cache, Float8>;
  using Element = std::conditional_t<kCached, Cache, T>;
  const Rows &k = kCached ? cache.k : p.k, &v = kCached ? cache.v : p.v;
  using Shape = std::conditional_t<kFloat8, Float8Shape<T, kBucket>, ForwardShape<T, kBucket>>;
  ForwardPlan plan = plan_forward<Shape>(p);
  plan.bounds = bounds;
  plan.inputs_aligned = is_vectorizable<T>(p.q.data, p.head_dim, p.q.batch, p.q.seq, p.q.head) &&
                        is_vectorizable<Element>(k.data, p.head_dim, k.batch, k.seq, k.head) &&
                        is_vectorizable<Element>(v.data, p.value_dim, v.batch, v.seq, v.head);
  plan.output_aligned =
      is_vectorizable<T>(p.out.data, p.value_dim, p.out.batch, p.out.seq, p.out.head);
  using Keys = TileLoader<T, typename Shape::KeyTile, Shape::kTileKeys>;
  plan.inputs_whole = plan.inputs_aligned && p.head_dim == kBucket && p.value_dim == kBucket;
  plan.key_step = Keys::step(k.seq, plan.warps * kWarpSize);
  plan.value_step = Keys::step(v.seq, plan.warps * kWarpSize);
  plan.cache = cache;
  plan.max_queries = static_cast<uint8_t>(max_queries);
  plan.factor = ForwardWarp<T, kBucket, kWeights, kGeneral>::factor(p);
  const int staged = plan.warps * Shape::kWarpRows * Shape::kRowBytes;
  const int work = kFloat8 ? Float8Stages<T, kBucket>::kBytes : Shape::kSharedBytes;
  const int bytes = kParkedBytes<kGeneral> + (Shape::kFloat || staged < work ? work : staged);
  if (plan.tiles == 0) return nullptr;
  const int64_t at_once = kMaxGrid / plan.tiles;
  const int64_t head_blocks = plan.head_blocks * (p.cu_seqlens_q ? 1 : p.batch);
  for (int64_t first = 0; first < head_blocks; first += at_once) {
    plan.first_head_block = static_cast<unsigned>(first);
    const int64_t count = head_blocks - first < at_once ? head_blocks - first : at_once;
    if (const char* error = launch<kForwardKernel<T, kBucket, kWeights, kGeneral, Cache>>(
            count * plan.tiles, plan.warps * kWarpSize, bytes, stream, p, plan))
      return error;
  }
  return nullptr;
}

// Calls visit(Index<kBucket>{}) with the smallest bucket that holds both head_dim and value_dim.
template <typename Visit>
const char* visit_forward_bucket(const AttentionParams& p, const Visit& visit) {
  return visit_head_dim(p.head_dim > p.value_dim ? p.head_dim : p.value_dim, visit);
}

}  // namespace tokenmill::cuda
