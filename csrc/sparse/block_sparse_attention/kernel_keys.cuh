// Query tile of a CTA and the sequence of keys it sees: sink keys, keys of listed blocks, recent
// keys.
#pragma once
#include "attention/epilogue.cuh"
#include "sparse/block_sparse_attention/params.h"
#include "sparse/listed_keys.cuh"

namespace tokenmill::cuda::block_sparse_attention {

// Launch parameters added by the host.
struct BlockSparseLaunch : BlockSparseParams {
  int row_warps;         // warps along the rows of a CTA
  int tile_rows;         // rows of a CTA
  int tiles;             // tiles of a query block
  int64_t query_blocks;  // per head
  bool aligned;          // rows of the inputs are whole 16-byte chunks
  bool aligned_out;      // rows of the output are whole 16-byte chunks
  bool compact;          // all keys and values lie within 2^32 chunks, and are aligned
  float factor;          // scale of products, in log2 units

  TOKENMILL_HOST_DEVICE const Rows& q() const { return attention.q; }
  TOKENMILL_HOST_DEVICE const Rows& k() const { return attention.k; }
  TOKENMILL_HOST_DEVICE const Rows& v() const { return attention.v; }
};

// Rows of a tile: queries of one block times the heads that share their keys. Row r is query
// r / together of head r % together.
struct QueryTile {
  int b, head, together;
  int block, first_query;  // first query of the block
  int first, rows;         // within the rows of the block
  int diagonal;            // position minus query index

  __device__ static QueryTile of(const BlockSparseLaunch& d) {
    const AttentionParams& p = d.attention;
    QueryTile q;
    q.together = static_cast<int>(d.heads_together());
    const int heads = static_cast<int>(p.heads) / q.together;
    const unsigned index = block_index(), head_blocks = index / d.tiles;
    const unsigned blocks = static_cast<unsigned>(d.query_blocks);
    // Under a causal mask the last queries see the most keys: start with them.
    q.block = static_cast<int>(blocks - 1 - head_blocks % blocks);
    q.b = static_cast<int>(head_blocks / blocks) / heads;
    q.head = static_cast<int>(head_blocks / blocks) % heads * q.together;
    q.first_query = q.block << d.log2_block_q;
    const int queries = min(1 << d.log2_block_q, static_cast<int>(p.seqlen_q) - q.first_query);
    q.first = static_cast<int>(index % d.tiles) * d.tile_rows;
    q.rows = min(d.tile_rows, queries * q.together - q.first);
    q.diagonal = static_cast<int>(d.length(q.b) - p.seqlen_q);
    return q;
  }

  template <typename T>
  __device__ T* first_key(const Rows& rows, int64_t kv_head) const {
    return row_at<T>(rows, b, 0, kv_head);
  }
  __device__ SeenKeys seen(const BlockSparseLaunch& d, int r) const { return d.seen(b, query(r)); }
  __device__ int query(int r) const { return first_query + (first + r) / together; }
  __device__ int place(int r) const { return query(r); }
  __device__ int head_of(int r) const { return head + (first + r) % together; }
  __device__ int position(int r) const { return query(r) + diagonal; }
};

// Kept in shared memory to save registers. Key t of the sequence is a sink key before `sinks`, a
// listed key before `list_end`, else a recent key.
struct TileKeys {
  static constexpr int kNowhere = -1;

  const int32_t* list;
  int blocks;
  int first;                     // first entry of the list
  int sinks, list_end, total;    // indices into the sequence of keys
  int listed_begin, listed_end;  // range of positions covered by the list
  int recent_begin, recent;
  bool ascends;

  // Called by all threads of the CTA; `shared` has room for one TileKeys. The list is read once: in
  // an ascending list, the number of ids below a bound is the index of the first id not below it.
  template <typename Queries>
  __device__ static void find(const BlockSparseLaunch& d, const Queries& q, TileKeys* shared,
                              int* counters) {
    const int64_t h = d.list_head(q.head);
    const int32_t* list = d.list.at(q.b, h, q.block);
    const int count = static_cast<int>(d.list.count(q.b, h, q.block));
    const SeenKeys of_first = q.seen(d, 0), of_last = q.seen(d, q.rows - 1);
    const int begin = static_cast<int>(of_last.sinks), end = static_cast<int>(of_last.listed);
    if (threadIdx.x < 2) counters[threadIdx.x] = 0;
    __syncthreads();
    bool ascends = true;
    int before = 0, inside = 0;
    for (int e = threadIdx.x; e < count; e += blockDim.x) {
      const int id = list[e];
      ascends &= e == 0 || id > list[e - 1];
      before += id < begin >> d.log2_block_k;
      inside += int64_t{id} * (int64_t{1} << d.log2_block_k) < end;
    }
    before = __reduce_add_sync(kFullWarp, before);
    inside = __reduce_add_sync(kFullWarp, inside);
    if (threadIdx.x % kWarpSize == 0) {
      atomicAdd(counters, before);
      atomicAdd(counters + 1, inside);
    }
    ascends = __syncthreads_and(ascends);
    if (threadIdx.x == 0) {
      TileKeys keys;
      keys.list = list;
      keys.blocks = static_cast<int>(d.key_blocks());
      keys.ascends = ascends;
      keys.first = ascends ? counters[0] : 0;
      const int last = ascends ? max(counters[1], keys.first) : count;
      keys.listed_begin =
          static_cast<int>(d.num_sink < Seeing::kUnbounded ? d.num_sink : Seeing::kUnbounded);
      keys.listed_end = end;
      keys.recent =
          static_cast<int>(d.num_recent < Seeing::kUnbounded ? d.num_recent : Seeing::kUnbounded);
      keys.recent_begin = max(keys.listed_begin, static_cast<int>(of_first.listed));
      const int recents = static_cast<int>(of_last.end) - keys.recent_begin;
      keys.sinks = begin;
      keys.list_end = begin + ((last - keys.first) << d.log2_block_k);
      keys.total = keys.list_end + (keys.recent > 0 ? max(recents, 0) : 0);
      *shared = keys;
    }
    __syncthreads();
  }

  // The query tile, recomputed as find() saw it.
  static __device__ __forceinline__ QueryTile queries_again(const BlockSparseLaunch& d,
                                                            const TileKeys&) {
    return QueryTile::of(d);
  }

  // Address of the list id of key t, or null.
  __device__ __forceinline__ const int32_t* id_at(const BlockSparseLaunch& d, int t) const {
    return is_listed(t) ? list + entry(d, t) : nullptr;
  }

  // Position of key t, or kNowhere if no query of the tile sees it.
  __device__ __forceinline__ int place(const BlockSparseLaunch& d, int t, int id) const {
    if (!is_listed(t)) return t < sinks ? t : t < total ? recent_begin + t - list_end : kNowhere;
    if (static_cast<unsigned>(id) >= static_cast<unsigned>(blocks)) return kNowhere;
    // Invalid lists (not ascending): an id counts if it is greater than all previous ids.
    if (!ascends)
      for (int e = 0; e < entry(d, t); ++e)
        if (list[e] >= id) return kNowhere;
    const int in_block = (t - sinks) & ((1 << d.log2_block_k) - 1);
    const int position = (id << d.log2_block_k) + in_block;
    return position >= listed_begin && position < listed_end ? position : kNowhere;
  }

  static __device__ __forceinline__ int row_of(const BlockSparseLaunch&, int place) {
    return place;
  }

  // Range of query positions that see key t at `position`.
  __device__ __forceinline__ Seeing seen_by(const BlockSparseLaunch& d, int t, int position) const {
    if (position < 0) return {Seeing::kMasked, Seeing::kUnbounded};
    if (!d.causal) return {-Seeing::kUnbounded, Seeing::kUnbounded};
    return {position + (is_listed(t) ? recent : 0),
            t >= list_end ? position + recent : Seeing::kUnbounded};
  }

  // Output scale and lse of a row whose weights sum to `sum` relative to 2^row_max.
  static __device__ RowScale epilogue(const BlockSparseLaunch& d, int head, float sum,
                                      float row_max) {
    const float* sink = d.attention.sink;
    return softmax_epilogue(sum, row_max, sink ? sink + head : nullptr, 0);
  }

 private:
  __device__ __forceinline__ bool is_listed(int t) const { return t >= sinks && t < list_end; }
  __device__ __forceinline__ int entry(const BlockSparseLaunch& d, int t) const {
    return first + ((t - sinks) >> d.log2_block_k);
  }
};

struct BlockWalk {
  using Launch = BlockSparseLaunch;
  using Queries = QueryTile;
  using Keys = TileKeys;
};

}  // namespace tokenmill::cuda::block_sparse_attention
