// Forward on compute capability 9.0a, of the calls that takes_sm90 lets in.
//
//   S = Q K^T    P = 2^(factor S - row_max) or sigmoid(scale S + bias)    O = P V
//
// A block takes tiles of queries in turn: kBlockRows rows of one head. One warp loads Q once and K
// and V tile by tile, each with a barrier of its own, into kStages stages. Each of the other
// warpgroups owns 64 rows. It runs over the tiles of keys that its rows see and keeps S, P and O in
// registers. Where no mask cuts, Q K^T of a tile and P V of the one before run while P is made.
#pragma once
#include <numeric>

#include "cuda/arch/sm90/tma.cuh"
#include "cuda/arch/sm90/wgmma.cuh"
#include "cuda/attention/hidden_values.cuh"
#include "cuda/launch.cuh"
#include "dense/attention/kernel_sm90_shape.cuh"
#include "dense/attention/launch_sm90.h"

namespace tokenmill::cuda {

// Of the tile of queries that a block takes in its round.
__device__ inline int index_of(unsigned round) { return blockIdx.x + round * gridDim.x; }

// Keys of a cached tile from `key` on, which share a page. Behind the last key there may be none: a
// box outside of the tensor has zeros.
__device__ inline BoxPlace find_cached_box(const KvCache& cache, const Sm90Tile& tile, int key,
                                           int head) {
  if (key >= tile.s.k_length) return {0, head, -1};
  const KvCache::Slot at = cache.slot(tile.b, key);
  return {at.row, head, at.page};
}

// The warp that loads.
template <typename Shape>
__device__ void load_sm90(const AttentionParams& p, const Sm90Plan& plan,
                          Sm90Shared<Shape>& shared) {
  constexpr int kRows = Shape::kRows, kKeys = Shape::kTileKeys, kColumns = Shape::kColumns;
  const int group = static_cast<int>(p.heads / p.kv_heads);
  const bool issues = threadIdx.x == 0;
  // The phase that follows cannot end before all lanes have seen that this one has.
  const auto wait = [](Mbarrier& empty, unsigned parity) {
    empty.wait(parity);
    __syncwarp();
  };
  unsigned number = 0;  // of tiles of keys
#pragma unroll 1
  for (unsigned round = 0; index_of(round) < plan.tiles; ++round) {
    const Sm90Tile tile = find_sm90_tile<Shape>(p, plan, index_of(round));
    if (tile.b < 0) {
      wait(shared.q_empty, round % 2 ^ 1);
      if (!issues) continue;
      shared.tiles[round % 2] = tile;
      shared.q_full.arrive();
      continue;
    }
    const int batch = p.cu_seqlens_q ? 0 : tile.b, kv_head = tile.h / group;
    const auto load = [&](const CUtensorMap& map, int key0, auto& stages, Mbarrier* full,
                          Mbarrier* empty) {
      const Stage<Shape> stage(number);
      wait(empty[stage.index], stage.parity ^ 1);
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
    if (tile.begin < tile.end) load_keys(tile.begin);  // while the tile before is still at work
    wait(shared.q_empty, round % 2 ^ 1);
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

// A warpgroup that multiplies: 64 rows of each tile of queries.
template <typename T, typename Shape, Weights kWeights>
class Sm90Rows {
 public:
  static constexpr int kRows = Shape::kRows, kKeys = Shape::kTileKeys, kHeadDim = Shape::kHeadDim;
  static constexpr int kColumns = Shape::kColumns;

  __device__ Sm90Rows(const AttentionParams& p, const Sm90Plan& plan, Sm90Shared<Shape>& shared,
                      int warpgroup)
      : p_(p), plan_(plan), shared_(shared), warpgroup_(warpgroup) {}

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (unsigned round = 0; index_of(round) < plan_.tiles; ++round) {
      shared_.q_full.wait(round % 2);
      const Sm90Tile tile = shared_.tiles[round % 2];
      queries_ = shared_address(shared_.q[warpgroup_]);
      // Or the loop over tiles of keys computes the operand from warpgroup_. With 256 columns of O
      // no register is left for it.
      if constexpr (kColumns < 256) keep(queries_);
      if (tile.b < 0) {
        clear(tile);
        release(shared_.q_empty);
        continue;
      }
      // Without rows of its own it sees nothing: they are in front of all that see a key.
      first_ = tile.first + warpgroup_ * kRows;
      if (first_ >= tile.s.q_length) first_ = -2 * static_cast<int>(kMaxLength);
      band_ = tile.band;
#pragma unroll
      for (int j = 0; j < kColumns / 2; ++j) o_[j] = 0;
      RowWeights<T, kWeights> weights(plan_, constant_of(p_, tile.b, tile.h, tile.s.k_length));
#pragma unroll 1
      for (int key0 = tile.begin; key0 < tile.end;) {
        if (!sees(key0))
          skip_tile(key0);
        else if (is_whole(key0))
          add_whole_tiles(key0, weights);
        else if (kKeys == kRows || band_.end(last()) > key0 + kRows)
          add_cut_tile<kKeys>(key0, weights);
        else
          add_cut_tile<kRows>(key0, weights);
      }
      release(shared_.q_empty);
      keep(round);  // read again: what the loop does not need takes none of its registers
      store(shared_.tiles[round % 2], weights);
    }
    if (is_first_thread()) wait_for_stores();
  }

 private:
  // Some of the rows see some of a tile of keys; all of them see all of it. Rows behind the last
  // one of the sequence count too: a register less.
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

  // Tiles from key0 on as long as they are whole.
  __device__ __forceinline__ void add_whole_tiles(int& key0, RowWeights<T, kWeights>& weights) {
    float s[kKeys / 2];
    uint32_t p[kKeys / 4];
    multiply_keys(s, number_);
    finish_keys<0>(s, number_);
    weights.weigh(s);
    weights.rescale(o_);
    pack_weights(p, s, weights);
#pragma unroll 1
    for (key0 += kKeys; is_whole(key0); key0 += kKeys, ++number_) {
      multiply_keys(s, number_ + 1);
      multiply_values(p, number_);
      finish_keys<1>(s, number_ + 1);
      weights.weigh(s);
      finish_values(number_);
      weights.rescale(o_);
      pack_weights(p, s, weights);
    }
    multiply_values(p, number_);
    finish_values(number_);
    ++number_;
  }

  // A tile that a mask or the end of the keys cuts, of which rows see some of the first kSeen keys.
  template <int kSeen>
  __device__ __forceinline__ void add_cut_tile(int& key0, RowWeights<T, kWeights>& weights) {
    float s[kSeen / 2];
    uint32_t p[kSeen / 4];
    multiply_keys(s, number_);
    finish_keys<0>(s, number_);
    const int seen_begin = band_.begin(last()) - key0, seen_end = band_.end(first_) - key0;
    bounds(key0).hide(s, seen_begin > 0, seen_end < kSeen);
    weights.weigh(s);
    weights.rescale(o_);
    pack_weights(p, s, weights);
    const Stage<Shape> stage(number_);
    shared_.v_full[stage.index].wait(stage.parity);
    const bool infinite = has_infinite_values<kSeen>(stage.index, seen_begin, seen_end);
    if (any_in_warpgroup(warpgroup_, infinite))
      multiply_seen_values(p, key0, stage.index);
    else
      start_pv<T, kKeys>(o_, p, shared_address(shared_.v[stage.index]));
    fence_stores();  // values were read as ordinary memory is, and the next copy overwrites them
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
    if (plan_.cap_scale == 0) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) s[i] = tanh_accurate(s[i] * plan_.cap_scale);
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

  template <int kCount>
  __device__ __forceinline__ static void pack_weights(uint32_t (&p)[kCount / 2], float (&s)[kCount],
                                                      const RowWeights<T, kWeights>& weights) {
    fence_accumulators(s);
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) p[i] = weights.pack(s[2 * i], s[2 * i + 1]);
  }

  // The warp is done with a tile.
  __device__ __forceinline__ void release(Mbarrier& empty) {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) empty.arrive();
  }

  static __device__ int thread() { return threadIdx.x % kWarpgroupThreads; }
  // Of the warpgroup, 0 .. 63.
  static __device__ int row(int h) {
    return thread() / kWarpSize * 16 + thread() % kWarpSize / 4 + 8 * h;
  }
  static __device__ bool is_first_thread() { return thread() == 0; }

  __device__ __forceinline__ RowBounds bounds(int key0) const {
    const int own = key0 + 2 * static_cast<int>(threadIdx.x % 4);
    const int rows[2] = {first_ + row(0), first_ + row(1)};
    return {{band_.begin(rows[0]) - own, band_.begin(rows[1]) - own},
            {band_.end(rows[0]) - own, band_.end(rows[1]) - own}};
  }

  // Of the first kSeen keys of a stage, those that this thread looks at; not keys that all rows
  // see, whole 16 of them.
  template <int kSeen>
  __device__ __forceinline__ bool has_infinite_values(int stage, int seen_begin,
                                                      int seen_end) const {
    constexpr int kBytes = kWarpgroupThreads * 16, kSteps = kSeen / 16;
    uint32_t found = 0, at = shared_address(shared_.v[stage]) + thread() * 16;
#pragma unroll 1
    for (int i = 0; i < kSteps; ++i, at += kBytes) {
      if (16 * i >= seen_begin && 16 * i + 16 <= seen_end) continue;
      unroll<kColumns / kBoxColumns>([&](auto block) {
        uint32_t w[4];
        load_shared<block * kKeys * kBoxRowBytes>(w, at);
#pragma unroll
        for (int j = 0; j < 4; ++j) note_infinite<T>(found, w[j]);
      });
    }
    return found != 0;
  }

  // O += P V where V has values that are not finite, see hidden_values.cuh: products with finite
  // ones in their place, as many keys at a time as the memory of `out` holds, then what rows see of
  // them.
  template <int kCount>
  __device__ __forceinline__ void multiply_seen_values(const uint32_t (&p)[kCount], int key0,
                                                       int stage) {
    constexpr int kStep = Shape::kOutBytes / (2 * kColumns) / kWgmmaDepth * kWgmmaDepth;
    constexpr int kWords = kStep / 4;
    static_assert(kCount % kWords == 0);
    // Of 64 columns: of a step, and of the tile.
    constexpr int kBlock = kStep * kBoxRowBytes, kTileBlock = kKeys * kBoxRowBytes;
    const uint32_t values = shared_address(shared_.v[stage]);
    const uint32_t clean = shared_address(shared_.out[warpgroup_]);
    if (is_first_thread()) wait_for_stores();
    unroll<kCount / kWords>([&](auto step) {
      sync_warpgroup(warpgroup_);  // all are done with the memory
#pragma unroll 1
      for (int at = thread() * 16; at < kStep * kColumns * 2; at += kWarpgroupThreads * 16) {
        uint32_t w[4];
        load_shared(w, values + at / kBlock * kTileBlock + step * kBlock + at % kBlock);
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = make_finite<T>(w[i]);
        store_shared(clean + at, w);
      }
      fence_stores();
      sync_warpgroup(warpgroup_);
      start_pv<T, kStep>(o_, reinterpret_cast<const uint32_t (&)[kWords]>(p[step * kWords]), clean);
      wait_for_product<0>(o_);
    });
    const int c = threadIdx.x % 4;
    const RowBounds seen = bounds(key0 - 2 * c);
#pragma unroll 1
    for (int key = 0; key < 4 * kCount; ++key) {
      const bool sees[2] = {key >= seen.begin[0] && key < seen.end[0],
                            key >= seen.begin[1] && key < seen.end[1]};
      unroll<kHeadDim / 8>([&](auto n) {
        const uint32_t chunk = n / 8 * kTileBlock + key * kBoxRowBytes + (n % 8 ^ key % 8) * 16;
        const float2 x = unpack<T>(load_word<0>(values + chunk + 4 * c));
        unroll<4>([&](auto i) {
          const float value = i % 2 ? x.y : x.x;
          // 4 x as in add_infinite: a weight of 0 would make NaN of an infinity.
          if (!is_finite<T>(value) && sees[i / 2]) o_[4 * n + i] += 4 * value;
        });
      });
    }
  }

  // Rows of O through shared memory to the tensor, and their lse.
  __device__ __forceinline__ void store(const Sm90Tile& tile,
                                        const RowWeights<T, kWeights>& weights) {
    const int first = tile.first + warpgroup_ * kRows, rows = min(tile.s.q_length - first, kRows);
    const float shift = constant_of(p_, tile.b, tile.h, tile.s.k_length);
    float factor[2];
    unroll<2>([&](auto h) {
      const RowScale scale = weights.finish(h, p_.sink ? p_.sink + tile.h : nullptr, shift);
      factor[h] = scale.factor;
      if (kWeights == Weights::softmax && thread() % 4 == 0 && row(h) < rows)
        lse_at(p_, p_.lse, tile.b, tile.s.q_start, tile.h)[first + row(h)] = scale.lse;
    });
    unroll<(kColumns + Shape::kOutColumns - 1) / Shape::kOutColumns>(
        [&](auto part) { store_columns<part * Shape::kOutColumns>(tile, first, rows, factor); });
  }

  // Those of `out` from kFirst on.
  template <int kFirst>
  __device__ __forceinline__ void store_columns(const Sm90Tile& tile, int first, int rows,
                                                const float (&factor)[2]) {
    constexpr int kLeft = kColumns - kFirst;
    constexpr int kTaken = kLeft < Shape::kOutColumns ? kLeft : Shape::kOutColumns;
    constexpr int kBlock = kRows * kBoxRowBytes;  // of 64 columns
    const int lane = thread() % kWarpSize, g = lane / 4;
    const uint32_t staged = shared_address(shared_.out[warpgroup_]);
    const uint32_t own =
        staged + thread() / kWarpSize * 16 * kBoxRowBytes + g * (kBoxRowBytes + 16) + lane % 4 * 4;
    if (is_first_thread()) wait_for_stores();  // of what lay there before
    sync_warpgroup(warpgroup_);
    unroll<2>([&](auto h) {
      // A bias of NaN makes NaN of the weights of hidden keys too.
      const bool empty = kWeights == Weights::sigmoid &&
                         tile.band.begin(first + row(h)) >= tile.band.end(first + row(h));
      unroll<kTaken / 8>([&](auto n) {
        constexpr int at = 4 * (kFirst / 8 + n) + 2 * h;
        const uint32_t both = pack<T>(o_[at] * factor[h], o_[at + 1] * factor[h]);
        store_shared<n / 8 * kBlock + h * 8 * kBoxRowBytes>(own ^ n % 8 * 16, empty ? 0 : both);
      });
    });
    fence_stores();
    sync_warpgroup(warpgroup_);
    if (!p_.cu_seqlens_q || rows == kRows) {  // rows that the tensor does not have are left out
      if (is_first_thread() && rows > 0)
        store_boxes<kRows, kTaken>(
            plan_.out, {tile.s.q_start + first, tile.h, p_.cu_seqlens_q ? 0 : tile.b, kFirst},
            shared_.out[warpgroup_]);
      return;
    }
    // Of 16 bytes, of a row. Columns that it does not have are in the last part.
    constexpr int kChunks = (kTaken < kLeft ? kTaken : kHeadDim - kFirst) / 8;
    T* const to = rows_at<T>(p_.out, tile.b, tile.s.q_start, tile.h) + kFirst;
#pragma unroll 1
    for (int i = thread(); i < rows * kChunks; i += kWarpgroupThreads) {
      const int r = i / kChunks, chunk = i % kChunks;
      uint32_t w[4];
      load_shared(w, staged + chunk / 8 * kBlock + r * kBoxRowBytes + (chunk % 8 ^ r % 8) * 16);
      store_global(to + (first + r) * p_.out.seq + chunk * 8, w);
    }
  }

  // What rows without a sequence get.
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
  uint32_t queries_;  // address of its own
  int first_;         // row of the sequence
  MaskBand band_;
  unsigned number_ = 0;  // of the next tile of keys
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
  // From the first lane: the compiler then knows that it is the same for a warp.
  const int warpgroup =
      __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0) - 1;
  if (warpgroup < 0) {
    shrink_registers<Shape::kLoadRegisters>();
    if (threadIdx.x < kWarpSize) load_sm90<Shape>(p, plan, shared);
  } else {
    grow_registers<Shape::kMultiplyRegisters>();
    Sm90Rows<T, Shape, kWeights>(p, plan, shared, warpgroup).run();
  }
}

// Bytes of keys and values that may be in use at once: most of the L2 cache of an H100, 50 MB.
constexpr int64_t kSectionBytes = 32 << 20;

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
  if (cache.seqlens && p.cu_seqlens_q) plan.least_rows = kLeastSm90Queries;
  if (const char* error = encode_map(plan.q, tensors.q, p.dtype, Shape::kRows)) return error;
  if (const char* error = encode_map(plan.k, tensors.k, p.dtype, plan.box_keys)) return error;
  if (const char* error = encode_map(plan.v, tensors.v, p.dtype, plan.box_keys)) return error;
  if (const char* error = encode_map(plan.out, tensors.out, p.dtype, Shape::kRows)) return error;
  plan.tiles_of_head = static_cast<int>(max_sm90_tiles(p, Shape::kBlockRows, plan.least_rows));
  plan.heads = static_cast<int>(tensors.q.batch * p.heads);
  plan.tiles = plan.tiles_of_head * plan.heads;
  const int64_t group = p.heads / p.kv_heads;
  const int64_t at_once = kSectionBytes / (p.seqlen_k * kHeadDim * 4);
  const int64_t section = group * (at_once < 1 ? 1 : at_once);
  plan.section_heads = static_cast<int>(section < plan.heads ? section : plan.heads);
  const float unit = kWeights == Weights::sigmoid && p.fast ? 0.5f : kLog2e;
  static_cast<Sm90Scores&>(plan) = Sm90Scores::of(p.scale, p.softcap, unit, p.fast);
  const int blocks = multiprocessors();
  return launch<attention_forward_sm90_kernel<T, kHeadDim, kWeights>>(
      plan.tiles < blocks ? plan.tiles : blocks, Shape::kThreads, sizeof(Sm90Shared<Shape>), stream,
      p, plan);
}

// Defined in a generated source for each element type and map.
template <typename T, Weights kWeights>
const char* launch_forward_sm90(const AttentionParams& p, const KvCache& cache,
                                cudaStream_t stream) {
  return visit_sm90_dim(p.head_dim, [&](auto dim) -> const char* {
    return launch_sm90<T, dim, kWeights>(p, cache, stream);
  });
}

}  // namespace tokenmill::cuda
