// Attention mass of each list entry. A CTA owns keys of one list, gathered from its entries, whose
// fragments stay in registers; the rows that read the list stream through two stages of shared
// memory, and their scores are recomputed.
//
//   mass_e = sum over rows r and keys j of e: 2^(t_rj - lse_r)
#pragma once
#include "attention/gmem_to_smem.cuh"
#include "attention/qk.cuh"
#include "attention/score_mod.cuh"
#include "attention/stage_addresses.cuh"
#include "attention/tile_shape.cuh"
#include "cuda/arch/mma_sm80.cuh"
#include "cuda/math.cuh"
#include "sparse/block_sparse_attention/kernel_requests.cuh"
#include "sparse/block_sparse_attention/mass.h"

namespace tokenmill::cuda::block_sparse_attention {

constexpr int kMassWarps = 4, kMassThreads = kMassWarps * kWarpSize;

template <typename T, int kBucket>
struct MassShape : TileShape<T, kBucket> {
  using Base = TileShape<T, kBucket>;
  using Tile = typename Base::KeyTile;
  static constexpr int kTileRows = Base::kTileKeys;  // streamed rows of a stage
  static constexpr int kOwnTiles = kBucket <= (Base::kFloat ? 64 : 128) ? 2 : 1;
  static constexpr int kOwnKeys = 16 * kOwnTiles;  // per warp
  static constexpr int kBlockKeys = kMassWarps * kOwnKeys;
  static constexpr bool kOwnInRegisters = kBucket <= (Base::kFloat ? 128 : 256);
  static constexpr int kStep = 16;  // streamed rows per step

  // Streamed row: its shift in the exponent (minus lse in log2 units), and its query.
  struct alignas(8) Row {
    float shift;
    int query;
  };
  static constexpr int kSharedBytes =
      2 * Base::kTileBytes + 2 * kTileRows * static_cast<int>(sizeof(Row)) + kBlockKeys * 4;
};

struct MassLaunch : BlockSparseMass {
  KeyRows keys;
  int parts;        // CTAs per list
  int64_t blocks;   // query blocks per head
  bool aligned;     // rows of q and k are whole 16-byte chunks
  bool leaves_out;  // skip keys on invalid pages, as the forward of latent heads does
  float factor;     // scale of products, in log2 units
};

// Counterpart of RequestBlock for a batch whose keys are indexed by position.
struct QueryBlock {
  int b, block;
  int first_query, queries;
  int diagonal, length;

  __device__ static QueryBlock of(const BlockSparseParams& d, int b, int64_t index) {
    const int64_t tokens = d.attention.seqlen_q, first = index << d.log2_block_q;
    const int queries = static_cast<int>(min(int64_t{1} << d.log2_block_q, tokens - first));
    const int length = static_cast<int>(d.length(b));
    return {b,       static_cast<int>(index),           static_cast<int>(first),
            queries, length - static_cast<int>(tokens), length};
  }
  __device__ static constexpr bool exists() { return true; }
  template <typename T>
  __device__ T* first_key(const BlockSparseParams&, const Rows& rows, int64_t kv_head) const {
    return rows_at<T>(rows, b, 0, kv_head);
  }
};

struct MassBlocks {
  using Block = QueryBlock;
  static constexpr bool kPaged = false;
  static __device__ const Rows& keys(const MassLaunch& d) { return d.attention.k; }
};

// Packed requests, and paged keys.
struct MassRequests {
  using Block = RequestBlock;
  static constexpr bool kPaged = true;
  static __device__ const KeyRows& keys(const MassLaunch& d) { return d.keys; }
};

// List of a CTA and its range of keys there: key x of a list belongs to entry x >> log2_block_k.
template <int kBlockKeys>
struct MassPlace {
  int64_t b, list_head, block;
  int64_t first;   // first key of the list
  int64_t passes;  // passes over kBlockKeys keys; with several passes, all keys belong to one entry

  __device__ explicit MassPlace(const MassLaunch& d) {
    const int64_t item = blockIdx.x / d.parts;
    block = item % d.blocks;
    list_head = item / d.blocks % d.list.heads;
    b = item / d.blocks / d.list.heads;
    const int64_t keys = int64_t{1} << d.log2_block_k;
    passes = keys > kBlockKeys ? keys / kBlockKeys : 1;
    first = int64_t{blockIdx.x % static_cast<unsigned>(d.parts)} * kBlockKeys * passes;
  }
};

// Position of key x of a list; negative if it adds no key.
__device__ inline int mass_key(const MassLaunch& d, const int32_t* ids, int64_t count, bool ascends,
                               int64_t length, int64_t x) {
  const int64_t e = x >> d.log2_block_k;
  if (e >= count) return -1;
  const int id = ids[e];
  if (id < 0 || id >= d.key_blocks()) return -1;
  const int64_t at = (int64_t{id} << d.log2_block_k) + (x & ((int64_t{1} << d.log2_block_k) - 1));
  if (at < d.num_sink || at >= length) return -1;
  // Invalid lists (not ascending): an id counts if it is greater than all previous ids.
  for (int64_t i = 0; !ascends && i < e; ++i)
    if (ids[i] >= id) return -1;
  return static_cast<int>(at);
}

template <typename T, int kBucket, typename Walk>
class MassWarp {
 public:
  using Shape = MassShape<T, kBucket>;
  using Row = typename Shape::Row;
  static constexpr int kTiles = Shape::kOwnTiles;

  // `keys`: positions of this warp's keys; `rows`: their rows in memory.
  __device__ MassWarp(const MassLaunch& d, const T* head, const int* keys, const int* rows)
      : d_(d), head_(head), rows_(rows) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        key_[m][half] = keys[own(m, half)];
        sum_[m][half] = 0;
      }
      if constexpr (Shape::kOwnInRegisters)
#pragma unroll
        for (int j = 0; j < Shape::kSlices; ++j) load_own(slices_[m][j], m, j);
    }
  }

  // Adds the streamed tile at `tile`, described by `rows`; sees(key, query) is the mask.
  template <typename Sees>
  __device__ __forceinline__ void add_tile(uint32_t tile, const Row* rows, const Sees& sees) {
    KeyAddresses<Shape> at(tile);
#pragma unroll 1
    for (int i = 0; i < Shape::kTileRows; i += Shape::kStep) {
      // S = K Q^T
      float t[kTiles][Shape::kStep / 8][4];
      multiply(t, at);
#pragma unroll
      for (int n = 0; n < Shape::kStep / 8; ++n)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const Row row = rows[i + 8 * n + static_cast<int>(threadIdx.x) % 4 * 2 + odd];
#pragma unroll
          for (int m = 0; m < kTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              // P = 2^(t - lse)
              const float weight = exp2_approx(exponent(t[m][n][2 * half + odd]) + row.shift);
              if (sees(key_[m][half], row.query)) sum_[m][half] += weight;
            }
        }
#pragma unroll
      for (uint32_t& address : at.key) address += Shape::kStep * Shape::kRowBytes;
    }
  }

  // Writes the mass of each of the warp's keys to sums[key].
  __device__ __forceinline__ void store(float* sums) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = quad_sum(sum_[m][half]);
        if (threadIdx.x % 4 == 0) sums[own(m, half)] = sum;
      }
  }

 private:
  static __device__ int own(int m, int half) {
    return 16 * m + 8 * half + static_cast<int>(threadIdx.x) % kWarpSize / 4;
  }

  __device__ __forceinline__ void load_own(QuerySlice& to, int m, int slice) const {
    const int chunk = 4 * slice + static_cast<int>(threadIdx.x) % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = rows_[own(m, half)];
      const T* row = head_ + step_to(Walk::keys(d_), max(at, 0));
      load_chunk(to.words[half], row, chunk, at < 0 ? 0 : static_cast<int>(d_.attention.head_dim),
                 false);
    }
  }

  __device__ __forceinline__ void multiply(float (&t)[kTiles][Shape::kStep / 8][4],
                                           const KeyAddresses<Shape>& at) const {
    if constexpr (Shape::kOwnInRegisters)
      multiply_held<T, Shape::kSlices, 0>(t, at, [&](int m, auto j) { return slices_[m][j]; });
    else
      multiply_loaded<T, Shape::kSlices, 0>(
          t, at,
          [&](int m, auto j, int i) {
            QuerySlice own;
            load_own(own, m, i + j);
            return own;
          },
          [] {});
  }

  __device__ __forceinline__ float exponent(float product) const {
    const AttentionParams& p = d_.attention;
    return p.softcap > 0 ? apply_softcap(product * p.scale, p.softcap, kLog2e)
                         : product * d_.factor;
  }

  const MassLaunch& d_;
  const T* head_;
  const int* rows_;
  int key_[kTiles][2];
  float sum_[kTiles][2];  // partial sums of this lane
  QuerySlice slices_[Shape::kOwnInRegisters ? kTiles : 1]
                    [Shape::kOwnInRegisters ? Shape::kSlices : 1];
};

// Rows of one KV head that read a list: heads outer, queries of the block inner.
struct MassRows {
  int64_t b, head, first_query;
  int queries, rows;

  __device__ int query(int r) const { return static_cast<int>(first_query) + r % queries; }
  __device__ int64_t head_of(int r) const { return head + r / queries; }
};

// Copies one tile of rows, from row `first` on, to shared memory; the copies are not committed.
template <typename T, int kBucket>
__device__ __forceinline__ void load_rows(uint32_t tile, typename MassShape<T, kBucket>::Row* to,
                                          const MassLaunch& d, const MassRows& rows, int first) {
  using Shape = MassShape<T, kBucket>;
  using Copy = RowCopy<T, typename Shape::Tile>;
  const AttentionParams& p = d.attention;
  for (int r = Copy::first_row(); r < Shape::kTileRows; r += Copy::row_step()) {
    const int row = min(first + r, rows.rows - 1);
    Copy::copy_to(tile, r, rows_at<const T>(p.q, rows.b, rows.query(row), rows.head_of(row)),
                  first + r < rows.rows ? static_cast<int>(p.head_dim) : 0, d.aligned);
  }
  for (int r = threadIdx.x; r < Shape::kTileRows; r += blockDim.x) {
    typename Shape::Row found{0, -1};
    if (first + r < rows.rows) {
      const int query = rows.query(first + r);
      const float lse = p.lse[(rows.b * p.heads + rows.head_of(first + r)) * p.seqlen_q + query];
      // A row that saw no key has no weights.
      found = {-lse * kLog2e, lse == -infinity() ? -1 : query};
    }
    to[r] = found;
  }
}

// With three CTAs per SM ptxas would spill.
template <typename T, int kBucket, typename Walk>
__global__ void __launch_bounds__(kMassThreads, 2)
    block_sparse_mass_kernel(const __grid_constant__ MassLaunch d) {
  using Shape = MassShape<T, kBucket>;
  using Row = typename Shape::Row;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t stages = shared_address(shared);
  Row* const rows_of_stage = reinterpret_cast<Row*>(shared + 2 * Shape::kTileBytes);
  float* const sums = reinterpret_cast<float*>(rows_of_stage + 2 * Shape::kTileRows);
  __shared__ int keys[Shape::kBlockKeys], rows_of_keys[Walk::kPaged ? Shape::kBlockKeys : 1];
  int* const places = Walk::kPaged ? rows_of_keys : keys;

  const AttentionParams& p = d.attention;
  const MassPlace<Shape::kBlockKeys> place(d);
  const auto block = Walk::Block::of(d, static_cast<int>(place.b), place.block);
  if (!block.exists()) return;
  const int32_t* ids = d.list.at(place.b, place.list_head, block.block);
  const int64_t count = d.list.count(place.b, place.list_head, block.block);
  const int group = static_cast<int>(p.heads / p.kv_heads);
  const int all = static_cast<int>(p.heads / d.list.heads), together = min(all, group);
  MassRows rows{place.b, 0, block.first_query, block.queries, block.queries * together};
  // Query i sees key j through the list if i + diagonal >= j; without a causal mask always.
  const int diagonal = block.diagonal - static_cast<int>(d.num_recent);
  const auto sees = [&](int key, int query) {
    return key >= 0 && query >= 0 && (!d.causal || query + diagonal >= key);
  };
  const int warp = threadIdx.x / kWarpSize;
  const int per_entry = min(1 << d.log2_block_k, Shape::kBlockKeys);
  const int entries = Shape::kBlockKeys / per_entry;
  bool ascends = true;
  for (int64_t e = threadIdx.x; e < count; e += blockDim.x)
    ascends &= e == 0 || ids[e] > ids[e - 1];
  ascends = __syncthreads_and(ascends);
  float total = 0;  // mass of entry threadIdx.x of the CTA
#pragma unroll 1
  for (int64_t pass = 0; pass < place.passes; ++pass) {
    __syncthreads();
    for (int x = threadIdx.x; x < Shape::kBlockKeys; x += blockDim.x) {
      keys[x] = mass_key(d, ids, count, ascends, block.length,
                         place.first + pass * Shape::kBlockKeys + x);
      if constexpr (Walk::kPaged) {
        const int32_t* table = block.page_table(d);
        if (d.leaves_out && table && keys[x] >= 0) {
          const int page = table[keys[x] >> d.pages.log2_size];
          if (page < 0 || page >= d.pages.count) keys[x] = -1;
        }
        places[x] = table && keys[x] >= 0 ? row_of_key(d.pages, table, keys[x]) : keys[x];
      }
    }
    bool any = false;
    for (int x = threadIdx.x; x < Shape::kBlockKeys; x += blockDim.x) any |= keys[x] >= 0;
    if (!__syncthreads_or(any)) continue;
#pragma unroll 1
    for (int head = 0; head < all; head += together) {
      rows.head = place.list_head * all + head;
      MassWarp<T, kBucket, Walk> own(
          d, block.template first_key<const T>(d, p.k, rows.head / group),
          keys + warp * Shape::kOwnKeys, places + warp * Shape::kOwnKeys);
      __syncthreads();
      load_rows<T, kBucket>(stages, rows_of_stage, d, rows, 0);
      cp_async_commit();
#pragma unroll 1
      for (int first = 0; first < rows.rows; first += Shape::kTileRows) {
        const int stage = first / Shape::kTileRows % 2, next = first + Shape::kTileRows;
        cp_async_wait<0>();
        __syncthreads();
        if (next < rows.rows)
          load_rows<T, kBucket>(stages + (stage ^ 1) * Shape::kTileBytes,
                                rows_of_stage + (stage ^ 1) * Shape::kTileRows, d, rows, next);
        cp_async_commit();
        own.add_tile(stages + stage * Shape::kTileBytes, rows_of_stage + stage * Shape::kTileRows,
                     sees);
      }
      own.store(sums + warp * Shape::kOwnKeys);
      __syncthreads();
      if (threadIdx.x < entries)
        for (int x = 0; x < per_entry; ++x) total += sums[threadIdx.x * per_entry + x];
    }
  }
  const int64_t entry = (place.first >> d.log2_block_k) + threadIdx.x;
  if (threadIdx.x < entries && entry < d.list.entries)
    d.mass[((place.b * d.list.heads + place.list_head) * d.list.rows + block.block) *
               d.list.entries +
           entry] = total;
}

}  // namespace tokenmill::cuda::block_sparse_attention
