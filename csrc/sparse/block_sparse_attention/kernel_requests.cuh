// Packed requests and paged keys: addressing of queries, lists and keys, and the forward over them.
#pragma once
#include "cuda/sequences.cuh"
#include "sparse/block_sparse_attention/kernel_keys.cuh"
#include "sparse/listed_forward.cuh"

namespace tokenmill::cuda::block_sparse_attention {

// Keys of a request in pages of 2^log2_page rows: row i of page p is row p 2^log2_page + i. Strides
// are divided into chunks on the host to save registers.
struct KeyRows {
  Rows rows;
  int log2_page;  // 31: not paged
  int mask;       // row mask within a page
  uint32_t page_chunks, row_chunks;

  template <typename T>
  static KeyRows of(const Rows& rows, const KeyPages& pages) {
    constexpr uint64_t kCount = kChunkBytes / sizeof(T);
    const int log2_page = pages.table ? pages.log2_size : 31;
    return {rows, log2_page, static_cast<int>((1u << log2_page) - 1),
            static_cast<uint32_t>(static_cast<uint64_t>(rows.batch) / kCount),
            static_cast<uint32_t>(static_cast<uint64_t>(rows.seq) / kCount)};
  }
};

using cuda::chunks_to, cuda::step_to;

__device__ __forceinline__ int64_t step_to(const KeyRows& keys, int row) {
  return (row >> keys.log2_page) * keys.rows.batch + (row & keys.mask) * keys.rows.seq;
}

template <int kCount>
__device__ __forceinline__ uint32_t chunks_to(const KeyRows& keys, int row) {
  return static_cast<uint32_t>(row >> keys.log2_page) * keys.page_chunks +
         static_cast<uint32_t>(row & keys.mask) * keys.row_chunks;
}

// Row of the key at a position; `table` is the request's block_table row. An invalid page reads as
// page 0.
__device__ __forceinline__ int row_of_key(const KeyPages& pages, const int32_t* table,
                                          int position) {
  const int page = table[position >> pages.log2_size];
  const bool exists = page >= 0 && page < pages.count;
  return ((exists ? page : 0) << pages.log2_size) + static_cast<int>(pages.row(position));
}

struct RequestLaunch : BlockSparseLaunch {
  KeyRows keys, values;

  __device__ const KeyRows& k() const { return keys; }
  __device__ const KeyRows& v() const { return values; }
};

// Block of queries of one request. Queries are rows of q.
struct RequestBlock {
  int b;        // batch of queries and lists: 0 if packed
  int request;  // -1: none
  int block;    // row of the lists
  int first_query, queries;
  int diagonal;           // position minus row index
  int key_start, length;  // first row of packed keys, and the number of keys

  // Block `index` of batch b, or of all packed requests. Called by all lanes of a warp.
  __device__ static RequestBlock of(const BlockSparseParams& d, int b, int64_t index) {
    const AttentionParams& p = d.attention;
    const int size = 1 << d.log2_block_q;
    RequestBlock r{b, b, static_cast<int>(index)};
    PackedRows rows{0, static_cast<int>(p.seqlen_q)};
    int tile = r.block;
    if (p.cu_seqlens_q) {
      const TilePlace place = find_tile(p.cu_seqlens_q, p.batch, p.seqlen_q, size, index);
      r.request = place.b;
      if (place.b < 0) return r;
      tile = place.tile;
      rows = place.rows;
      r.block = first_slot(rows, place.b, size) + tile;
    }
    r.first_query = rows.start + tile * size;
    r.queries = min(size, rows.length - tile * size);
    r.length = static_cast<int>(d.length(r.request));
    if (p.cu_seqlens_k) {
      r.key_start = clamped_end(p.cu_seqlens_k, r.request, p.seqlen_k);
      r.length = max(clamped_end(p.cu_seqlens_k, r.request + 1, p.seqlen_k) - r.key_start, 0);
    }
    r.diagonal = r.length - rows.length - rows.start;
    return r;
  }

  __device__ bool exists() const { return request >= 0; }
  // First key row of the request, for packed, padded or paged keys.
  template <typename T>
  __device__ T* first_key(const BlockSparseParams& d, const Rows& rows, int64_t kv_head) const {
    return rows_at<T>(rows, d.pages.table ? 0 : request, key_start, kv_head);
  }
  __device__ const int32_t* page_table(const BlockSparseParams& d) const {
    return d.pages.table ? d.pages.table + request * d.pages.stride : nullptr;
  }
};

// Tile of a CTA: part `tile` of the rows of a query block. Under a causal mask the last queries see
// the most keys: start with them.
struct TileNumber {
  int b, head;  // head: first of the heads that share keys
  int tile;
  int64_t block;

  __device__ static TileNumber of(const BlockSparseLaunch& d) {
    const int together = static_cast<int>(d.heads_together());
    const int heads = static_cast<int>(d.attention.heads) / together;
    const unsigned index = block_index(), head_blocks = index / d.tiles;
    const unsigned blocks = static_cast<unsigned>(d.query_blocks);
    const int head = static_cast<int>(head_blocks / blocks);
    return {head / heads, head % heads * together, static_cast<int>(index % d.tiles),
            int64_t{blocks - 1 - head_blocks % blocks}};
  }
};

// Counterpart of QueryTile.
struct RequestTile : RequestBlock {
  const BlockSparseLaunch& d;
  int head, together;
  int first, rows;  // within the rows of the block

  __device__ static RequestTile of(const BlockSparseLaunch& d) {
    const TileNumber number = TileNumber::of(d);
    return of(d, number, RequestBlock::of(d, number.b, number.block));
  }
  __device__ static RequestTile of(const BlockSparseLaunch& d, const TileNumber& number,
                                   const RequestBlock& block) {
    RequestTile q{block, d, number.head, static_cast<int>(d.heads_together()),
                  number.tile * d.tile_rows};
    q.rows = !q.exists() ? 0 : min(d.tile_rows, q.queries * q.together - q.first);
    return q;
  }

  template <typename T>
  __device__ T* first_key(const KeyRows& keys, int64_t kv_head) const {
    return first_key<T>(keys.rows, kv_head);
  }
  template <typename T>
  __device__ T* first_key(const Rows& keys, int64_t kv_head) const {
    return RequestBlock::first_key<T>(d, keys, kv_head);
  }
  __device__ SeenKeys seen(const BlockSparseLaunch&, int r) const {
    return d.seen_from(position(r), length);
  }
  __device__ int query(int r) const { return first_query + (first + r) / together; }
  __device__ int place(int r) const { return query(r); }
  __device__ int head_of(int r) const { return head + (first + r) % together; }
  __device__ int position(int r) const { return query(r) + diagonal; }
};

struct RequestKeys : TileKeys {
  RequestBlock block;
  const int32_t* table;  // block_table row of the request; null: not paged

  __device__ static void find(const RequestLaunch& d, const RequestTile& q, RequestKeys* shared,
                              int* counters) {
    if (threadIdx.x == 0) {
      shared->block = q;
      shared->table = q.page_table(d);
    }
    TileKeys::find(d, q, shared, counters);
  }
  static __device__ __forceinline__ RequestTile queries_again(const RequestLaunch& d,
                                                              const RequestKeys& keys) {
    return RequestTile::of(d, TileNumber::of(d), keys.block);
  }
  __device__ __forceinline__ int row_of(const RequestLaunch& d, int position) const {
    return table ? row_of_key(d.pages, table, position) : position;
  }
};

struct RequestWalk {
  using Launch = RequestLaunch;
  using Queries = RequestTile;
  using Keys = RequestKeys;
};

// If the CTA owns packed queries outside of every request, calls fill(rows, head) and returns true.
template <typename Fill>
__device__ __forceinline__ bool fill_loose_rows(const BlockSparseLaunch& d, const Fill& fill) {
  const AttentionParams& p = d.attention;
  if (!p.cu_seqlens_q) return false;
  const TileNumber number = TileNumber::of(d);
  const int size = 1 << d.log2_block_q;
  const TilePlace place = find_tile(p.cu_seqlens_q, p.batch, p.seqlen_q, size, number.block);
  if (place.b >= 0) return false;
  if (number.tile > 0) return true;
  const LooseRows loose(place, p.seqlen_q, size);
  for (int64_t h = number.head; h < number.head + d.heads_together(); ++h) fill(loose, h);
  return true;
}

template <typename T, int kBucket>
__global__ void __launch_bounds__(ListedShape<T, kBucket>::kMaxThreads,
                                  ListedShape<T, kBucket>::kMinBlocks)
    block_sparse_requests_kernel(const __grid_constant__ RequestLaunch d) {
  const auto make_empty = [&](const LooseRows& loose, int64_t h) {
    const AttentionParams& p = d.attention;
    loose.fill(rows_at<T>(p.out, 0, 0, h), p.out.seq, p.value_dim, 0);
    loose.fill(p.lse + h * p.seqlen_q, 1, 1, -infinity());
  };
  if (!fill_loose_rows(d, make_empty)) listed_forward<T, kBucket, RequestWalk>(d);
}

}  // namespace tokenmill::cuda::block_sparse_attention
