// Backward of packed requests, with packed or padded keys.
#pragma once
#include "sparse/block_sparse_attention/kernel_queries.cuh"
#include "sparse/block_sparse_attention/kernel_requests.cuh"
#include "sparse/listed_backward.cuh"

namespace tokenmill::cuda::block_sparse_attention {

// Counterpart of BlockKeyTile: keys of one request.
struct RequestKeyTile {
  int request;  // -1: none
  int b;        // batch of keys: 0 if packed
  int kv_head;
  int key_start, length;  // row of key 0, and the number of keys of the request
  int first, rows, seen;

  // Called by all lanes of a warp.
  __device__ static RequestKeyTile of(const BlockSparseGradients& d) {
    const AttentionParams& p = d.attention;
    const int kv_heads = static_cast<int>(p.kv_heads),
              head = static_cast<int>(blockIdx.x) / d.tiles;
    RequestKeyTile tile{head / kv_heads, head / kv_heads, head % kv_heads};
    int number = static_cast<int>(blockIdx.x) % d.tiles, keys = static_cast<int>(p.seqlen_k);
    if (p.cu_seqlens_k) {
      const TilePlace place = find_tile(p.cu_seqlens_k, p.batch, p.seqlen_k, d.tile_rows, number);
      tile.request = place.b;
      tile.key_start = place.rows.start;
      tile.length = keys = place.rows.length;
      number = place.tile;
    } else {
      tile.length = static_cast<int>(d.length(tile.b));
    }
    tile.first = number * d.tile_rows;
    tile.rows = min(d.tile_rows, keys - tile.first);
    tile.seen = min(tile.rows, tile.length - tile.first);
    return tile;
  }

  __device__ bool exists() const { return request >= 0; }
  __device__ int key(int r) const { return key_start + first + r; }
  __device__ int place(int r) const { return key(max(r, 0)); }
};

// Counterpart of BatchQueries for a packed request.
class PackedQueries {
 public:
  static constexpr int b = 0;
  int diagonal;

  // Called by all lanes of a warp.
  __device__ PackedQueries(const BlockSparseGradients& d, const RequestKeyTile& tile) {
    const AttentionParams& p = d.attention;
    const int size = 1 << d.log2_block_q;
    const PackedRows rows = rows_of_sequence(p.cu_seqlens_q, p.batch, p.seqlen_q, tile.request);
    start_ = rows.start;
    end_ = rows.start + rows.length;
    list_row_ = first_slot(rows, tile.request, size);
    blocks_ = (rows.length + size - 1) >> d.log2_block_q;
    diagonal = tile.length - end_;
  }

  __device__ int start() const { return start_; }
  __device__ int end() const { return end_; }
  __device__ int list_row() const { return list_row_; }
  __device__ int blocks() const { return blocks_; }

 private:
  int start_, end_, list_row_, blocks_;
};

struct RequestGradientWalk {
  using Launch = BlockSparseLaunch;
  using Queries = RequestTile;
  using Keys = TileKeys;
  using Gradients = BlockSparseGradients;
  using KeyTile = RequestKeyTile;
  using WarpKeys = block_sparse_attention::WarpKeys;
  template <typename T, int kBucket>
  using Listing = BlockListing<T, kBucket, PackedQueries>;
};

template <typename T, int kBucket>
__global__ void __launch_bounds__(QuerySideShape<T, kBucket>::kMaxThreads, 1)
    block_sparse_requests_queries_kernel(const __grid_constant__ BlockSparseGradients d) {
  const auto make_zero = [&](const LooseRows& loose, int64_t h) {
    loose.fill(rows_at<T>(d.dq, 0, 0, h), d.dq.seq, d.attention.head_dim, 0);
  };
  if (!fill_loose_rows(d, make_zero)) listed_query_gradients<T, kBucket, RequestGradientWalk>(d);
}

// If the CTA owns packed keys outside of every request, zeroes their gradients and returns true.
template <typename T>
__device__ __forceinline__ bool fill_loose_keys(const BlockSparseGradients& d) {
  const AttentionParams& p = d.attention;
  if (!p.cu_seqlens_k) return false;
  const int number = static_cast<int>(blockIdx.x) % d.tiles;
  const TilePlace place = find_tile(p.cu_seqlens_k, p.batch, p.seqlen_k, d.tile_rows, number);
  if (place.b >= 0) return false;
  const int64_t kv_head = blockIdx.x / d.tiles;
  const LooseRows loose(place, p.seqlen_k, d.tile_rows);
  loose.fill(rows_at<T>(d.dk, 0, 0, kv_head), d.dk.seq, p.head_dim, 0);
  loose.fill(rows_at<T>(d.dv, 0, 0, kv_head), d.dv.seq, p.value_dim, 0);
  return true;
}

template <typename T, int kBucket>
using RequestKeySide = KeySideShape<T, kBucket, BlockListing<T, kBucket, PackedQueries>>;

template <typename T, int kBucket>
__global__ void __launch_bounds__(RequestKeySide<T, kBucket>::kMaxThreads, 1)
    block_sparse_requests_keys_kernel(const __grid_constant__ BlockSparseGradients d) {
  if (!fill_loose_keys<T>(d)) listed_key_gradients<T, kBucket, RequestGradientWalk>(d);
}

}  // namespace tokenmill::cuda::block_sparse_attention
