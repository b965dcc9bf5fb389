// Key tile of a CTA in the backward, and the queries that see any of its keys, found through the
// transposed lists.
#pragma once
#include "sparse/block_sparse_attention/kernel_keys.cuh"

namespace tokenmill::cuda::block_sparse_attention {

// Launch parameters of the backward.
struct BlockSparseGradients : BlockSparseLaunch {
  Rows dout, dq, dk, dv;
  const float *minus_lse, *minus_delta;  // layout of lse
  const int32_t *offsets, *listing;      // output of transpose_block_list
  bool compact_queries;                  // `compact` for Q and dO, which stream past a key tile

  TOKENMILL_HOST_DEVICE const Rows& of_dout() const { return dout; }
  __device__ static int query_at(int place) { return place; }
};

// Keys that a CTA owns: consecutive rows of one or more key blocks.
struct BlockKeyTile {
  int b, kv_head;
  int first, rows, seen;  // seen: keys within the length of the request

  __device__ static BlockKeyTile of(const BlockSparseGradients& d) {
    const AttentionParams& p = d.attention;
    const int tile = blockIdx.x % d.tiles, kv_head = blockIdx.x / d.tiles % p.kv_heads;
    const int b = static_cast<int>(blockIdx.x / d.tiles / p.kv_heads);
    const int first = tile * d.tile_rows;
    const int rows = min(d.tile_rows, static_cast<int>(p.seqlen_k) - first);
    return {b, kv_head, first, rows, min(rows, static_cast<int>(d.length(b)) - first)};
  }

  __device__ static constexpr bool exists() { return true; }
  __device__ int key(int r) const { return first + r; }
  __device__ int place(int r) const { return first + max(r, 0); }
};

// Streamed query, or -1 if there is none; its head among the heads that share its list; its block
// within the window.
struct ListingQuery {
  int query;
  short head, block;
};

// Window of query blocks: which key blocks of the tile each one lists, as bits, and the blocks that
// may see any key of the tile.
template <int kBlocks>
struct QueryWindow {
  uint32_t bits[kBlocks][2];
  int cursors[64];  // read position in the transposed list of each key block
  int count;
  short active[kBlocks];
};

// The 16 keys of a warp and their mask.
struct WarpKeys {
  // Streamed query, with the bits of the warp's key blocks that it lists.
  struct Column {
    int query, position;
    unsigned listed;
  };

  // Keys from `offset` of the tile on.
  template <typename KeyTile>
  __device__ WarpKeys(const BlockSparseLaunch& d, const KeyTile& tile, int offset)
      : first(tile.first + offset),
        last(min(first + 16, tile.first + tile.seen) - 1),
        whole(first + 16 <= tile.first + tile.seen),
        causal(d.causal),
        log2_block(d.log2_block_k),
        sinks(static_cast<int>(d.num_sink < Seeing::kUnbounded ? d.num_sink : Seeing::kUnbounded)),
        recent(static_cast<int>(d.num_recent < Seeing::kUnbounded ? d.num_recent
                                                                  : Seeing::kUnbounded)) {
    const int low = (first >> log2_block) - (tile.first >> log2_block);
    const int blocks = log2_block < 4 ? 16 >> log2_block : 1;
    word = low / 32;
    shift = low % 32;
    mask = (1u << blocks) - 1;
  }

  __device__ bool any_seen(const Column& c) const {
    if (c.query < 0 || first > last || (causal && c.position < first)) return false;
    return c.listed || first < sinks || (recent > 0 && c.position < last + recent);
  }
  __device__ bool all_seen(const Column& c) const {
    if (c.query < 0 || !whole || (causal && c.position < last)) return false;
    return c.listed == mask || last < sinks || (recent > 0 && c.position < first + recent);
  }
  // True if query c sees key `first + r`.
  __device__ bool sees(const Column& c, int r) const {
    const int key = first + r;
    if (c.query < 0 || key > last || (causal && c.position < key)) return false;
    const int bit = log2_block < 4 ? r >> log2_block : 0;
    return (c.listed >> bit & 1) || key < sinks || (recent > 0 && c.position < key + recent);
  }

  int first, last;
  bool whole, causal;
  int log2_block, sinks, recent;
  int word, shift;  // word and bit position of the warp's blocks in QueryWindow::bits
  unsigned mask;
};

// Queries of a request: rows start() ... end() - 1 of batch b, with `blocks()` lists from row
// list_row() on; a row's position is row + diagonal.
struct BatchQueries {
  const BlockSparseGradients& d;
  int b, diagonal;

  __device__ BatchQueries(const BlockSparseGradients& d, const BlockKeyTile& tile)
      : d(d), b(tile.b), diagonal(static_cast<int>(d.length(tile.b) - d.attention.seqlen_q)) {}

  __device__ static constexpr int start() { return 0; }
  __device__ static constexpr int list_row() { return 0; }
  __device__ int end() const { return static_cast<int>(d.attention.seqlen_q); }
  __device__ int blocks() const { return static_cast<int>(d.query_blocks); }
};

// Iterates over the queries that may see a key tile, window by window.
template <typename T, int kBucket, typename Queries>
class BlockListing {
 public:
  using Place = ListingQuery;
  static constexpr int kWindow = kBucket * sizeof(T) > 512 ? 64 : 512;
  using Window = QueryWindow<kWindow>;

  template <typename KeyTile>
  __device__ BlockListing(const BlockSparseGradients& d, Window& window, const KeyTile& tile)
      : BlockListing(d, window, tile, Queries(d, tile)) {}

  // Visits the lists of the heads in the group one after the other, and each list in windows of
  // query blocks. Called by all threads of the CTA.
  template <typename Visit>
  __device__ __forceinline__ void each_window(const Visit& visit) {
    const int group = static_cast<int>(d_.attention.heads / d_.attention.kv_heads);
    const int blocks = queries_.blocks();
    // First query block that may see the first key.
    const int first_query = first_key_ - queries_.diagonal - queries_.start();
    const int begin = d_.causal ? max(first_query, 0) >> d_.log2_block_q : 0;
#pragma unroll 1
    for (int head = 0; head < group; head += together_) {
      head_ = kv_head_ * group + head;
#pragma unroll 1
      for (first_ = begin; first_ < blocks; first_ += kWindow) {
        find_blocks(min(first_ + kWindow, blocks), first_ == begin);
        visit();
      }
    }
  }

  __device__ int total() const { return window_.count * block_rows(); }

  // No ids to prefetch: they are in shared memory.
  __device__ static constexpr const int32_t* id_at(int) { return nullptr; }

  __device__ __forceinline__ ListingQuery look_up(int t, int) const {
    const int n = t / block_rows(), row = t - n * block_rows();
    if (n >= window_.count) return {-1, 0, 0};
    const int block = window_.active[n], i = row / together_;
    const int query = queries_.start() + ((first_ + block) << d_.log2_block_q) + i;
    if (query >= queries_.end()) return {-1, 0, 0};
    return {query, static_cast<short>(row - i * together_), static_cast<short>(block)};
  }

  __device__ __forceinline__ WarpKeys::Column column(const ListingQuery& place,
                                                     const WarpKeys& keys) const {
    const unsigned bits = window_.bits[place.block][keys.word] >> keys.shift;
    return {place.query, place.query + queries_.diagonal, bits & keys.mask};
  }

 protected:
  const BlockSparseGradients& d_;
  int b_;
  int head_ = 0;  // first head of the current list

 private:
  template <typename KeyTile>
  __device__ BlockListing(const BlockSparseGradients& d, Window& window, const KeyTile& tile,
                          const Queries& queries)
      : d_(d),
        b_(queries.b),
        window_(window),
        queries_(queries),
        kv_head_(tile.kv_head),
        first_key_(tile.first),
        last_key_(tile.first + tile.seen - 1),
        together_(static_cast<int>(d.heads_together())) {}

  __device__ int block_rows() const { return together_ << d_.log2_block_q; }

  // Fills the window with query blocks first_ ... end - 1. The lists of key blocks ascend, so a
  // window resumes at the cursors of the previous one.
  __device__ __forceinline__ void find_blocks(int end, bool starts) {
    const int thread = threadIdx.x, lane = thread % kWarpSize;
    const int first_block = first_key_ >> d_.log2_block_k;
    const int key_blocks = (last_key_ >> d_.log2_block_k) - first_block + 1;
    const int64_t h = b_ * d_.list.heads + d_.list_head(head_);
    const int32_t* offsets = d_.offsets + h * (d_.key_blocks() + 1) + first_block;
    const int32_t* listing = d_.listing + h * d_.list.rows * d_.list.entries;
    for (int i = thread; i < kWindow; i += blockDim.x) window_.bits[i][0] = window_.bits[i][1] = 0;
    for (int j = thread; starts && j < key_blocks; j += blockDim.x) {
      int low = offsets[j], high = offsets[j + 1];
      while (low < high) {
        const int middle = low + (high - low) / 2;
        listing[middle] - queries_.list_row() < first_ ? low = middle + 1 : high = middle;
      }
      window_.cursors[j] = low;
    }
    __syncthreads();
    const int warps = blockDim.x / kWarpSize;
#pragma unroll 1
    for (int j = thread / kWarpSize; j < key_blocks; j += warps) {
      int cursor = window_.cursors[j];
      const int list_end = offsets[j + 1];
      for (int found = kWarpSize; found == kWarpSize;) {
        const bool exists = cursor + lane < list_end;
        const int block = exists ? listing[cursor + lane] - queries_.list_row() : end;
        if (block < end) atomicOr(&window_.bits[block - first_][j / 32], 1u << j % 32);
        found = __popc(__ballot_sync(kFullWarp, block < end));
        cursor += found;
      }
      __syncwarp();
      if (lane == 0) window_.cursors[j] = cursor;
    }
    __syncthreads();
    if (thread < kWarpSize) {
      int count = 0;
#pragma unroll 1
      for (int i = lane; i - lane < kWindow; i += kWarpSize) {
        const bool active = first_ + i < end && (window_.bits[i][0] || window_.bits[i][1] ||
                                                 sees_without_list(first_ + i));
        const unsigned found = __ballot_sync(kFullWarp, active);
        if (active)
          window_.active[count + __popc(found & ((1u << lane) - 1))] = static_cast<short>(i);
        count += __popc(found);
      }
      if (lane == 0) window_.count = count;
    }
    __syncthreads();
  }

  // True if any query of the block may see any key of the tile as a sink or recent key.
  __device__ bool sees_without_list(int block) const {
    const int diagonal = queries_.diagonal;
    const int first = queries_.start() + (block << d_.log2_block_q) + diagonal;
    const int last = min(first + (1 << d_.log2_block_q), queries_.end() + diagonal) - 1;
    if (d_.causal && last < first_key_) return false;
    return first_key_ < d_.num_sink || (d_.num_recent > 0 && first < last_key_ + d_.num_recent);
  }

  Window& window_;
  Queries queries_;
  int kv_head_, first_key_, last_key_;
  int together_;
  int first_ = 0;  // first block of the window
};

struct BlockGradientWalk : BlockWalk {
  using Gradients = BlockSparseGradients;
  using KeyTile = BlockKeyTile;
  using WarpKeys = block_sparse_attention::WarpKeys;
  template <typename T, int kBucket>
  using Listing = BlockListing<T, kBucket, BatchQueries>;
};

}  // namespace tokenmill::cuda::block_sparse_attention
