// A tile of keys and the queries that see any of them, found through the transposed lists.
#pragma once
#include "sparse/block_sparse_attention/kernel_gradient.cuh"

namespace tokenmill::cuda {

// What the host adds to the arguments of a gradient.
struct BlockSparseGradients : BlockSparseLaunch {
  Rows dout, dq, dk, dv;
  const float *minus_lse, *minus_delta;  // like lse
  const int32_t *offsets, *listing;      // of transpose_block_list
};

// A streamed query: -1 if there is none; its head among those that share its list; its block among
// those of the window.
struct ListingQuery {
  int query;
  short head, block;
};

// Blocks of queries at a time: which blocks of the tile's keys each one lists, as bits, and the
// numbers of those that any key of the tile may be seen by.
template <int kBlocks>
struct QueryWindow {
  uint32_t bits[kBlocks][2];
  int cursors[64];  // of the list of each block of keys
  int count;
  short active[kBlocks];
};

template <typename T, int kBucket>
struct KeySideShape : GradientShape<T, kBucket, Side::keys> {
  using Base = GradientShape<T, kBucket, Side::keys>;
  static constexpr int kWindow = Base::kRowBytes > 512 ? 64 : 512;
  using Window = QueryWindow<kWindow>;
  static constexpr int kRingAt = (sizeof(Window) + 15) / 16 * 16;
  static constexpr int kInfoBytes =
      (kRingAt + Base::kRing * static_cast<int>(sizeof(ListingQuery)) + 127) / 128 * 128;

  static constexpr int shared_bytes(int row_warps) {
    return kInfoBytes + 2 * Base::kStageBytes + 2 * row_warps * 16 * Base::kRowBytes;
  }
};

// The 16 keys of a warp, and what sees them.
struct WarpKeys {
  // A query: the bits of the blocks of these keys that it lists.
  struct Column {
    int query, position;
    unsigned listed;
  };

  __device__ WarpKeys(const BlockSparseLaunch& d, int tile, int first, int end)
      : first(first),
        last(min(first + 16, end) - 1),
        whole(first + 16 <= end),
        causal(d.causal),
        log2_block(d.log2_block_k),
        sinks(static_cast<int>(d.num_sink < TileKeys::kFar ? d.num_sink : TileKeys::kFar)),
        recent(static_cast<int>(d.num_recent < TileKeys::kFar ? d.num_recent : TileKeys::kFar)) {
    const int low = (first >> log2_block) - (tile >> log2_block);
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
  // Key number r.
  __device__ bool sees(const Column& c, int r) const {
    const int key = first + r;
    if (c.query < 0 || key > last || (causal && c.position < key)) return false;
    const int bit = log2_block < 4 ? r >> log2_block : 0;
    return (c.listed >> bit & 1) || key < sinks || (recent > 0 && c.position < key + recent);
  }

  int first, last;
  bool whole, causal;
  int log2_block, sinks, recent;
  int word, shift;  // of their bits
  unsigned mask;
};

// Rows of queries and of dO of a tile of keys, as stream_rows wants them, window by window.
template <typename T, typename Shape>
class TileQueries {
 public:
  using Copy = RowCopy<T, typename Shape::Tile>;

  __device__ TileQueries(const BlockSparseGradients& d, typename Shape::Window& window,
                         uint32_t stages, int b, int kv_head, int first_key, int keys)
      : d_(d),
        window_(window),
        places_(reinterpret_cast<ListingQuery*>(reinterpret_cast<unsigned char*>(&window) +
                                                Shape::kRingAt)),
        stages_(stages),
        b_(b),
        kv_head_(kv_head),
        first_key_(first_key),
        last_key_(first_key + keys - 1),
        together_(static_cast<int>(d.heads_together())),
        diagonal_(static_cast<int>(d.length(b) - d.attention.seqlen_q)) {}

  // Lists of the heads of the group follow each other, and so do windows of their blocks of
  // queries. All threads of the block together.
  template <typename Visit>
  __device__ __forceinline__ void each_window(const Visit& visit) {
    const int group = static_cast<int>(d_.attention.heads / d_.attention.kv_heads);
    const int blocks = static_cast<int>(d_.query_blocks);
    // The first query that may see the first key.
    const int begin = d_.causal ? max(first_key_ - diagonal_, 0) >> d_.log2_block_q : 0;
#pragma unroll 1
    for (int head = 0; head < group; head += together_) {
      head_ = kv_head_ * group + head;
#pragma unroll 1
      for (first_ = begin; first_ < blocks; first_ += Shape::kWindow) {
        find_blocks(min(first_ + Shape::kWindow, blocks), first_ == begin);
        visit();
      }
    }
  }

  __device__ int total() const { return window_.count * block_rows(); }

  __device__ __forceinline__ ListingQuery look_up(int t) const {
    const int n = t / block_rows(), row = t - n * block_rows();
    if (n >= window_.count) return {-1, 0, 0};
    const int block = window_.active[n], i = row / together_;
    const int query = ((first_ + block) << d_.log2_block_q) + i;
    if (query >= d_.attention.seqlen_q) return {-1, 0, 0};
    return {query, static_cast<short>(row - i * together_), static_cast<short>(block)};
  }
  __device__ void store(int t, const ListingQuery& place) { at(t) = place; }

  __device__ __forceinline__ void load(int stage, int first) const {
    const AttentionParams& p = d_.attention;
    const uint32_t tile = stages_ + stage * Shape::kStageBytes;
#pragma unroll 1
    for (int r = Copy::first_row(); r < Shape::kTileRows; r += Copy::row_step()) {
      const ListingQuery place = at(first + r);
      const bool exists = place.query >= 0;
      const int query = max(place.query, 0), head = head_ + place.head;
      Copy::copy(tile, r, rows_at<const T>(p.q, b_, query, head),
                 exists ? static_cast<int>(p.head_dim) : 0, d_.aligned);
      Copy::copy(tile + Shape::kTileBytes, r, rows_at<const T>(d_.dout, b_, query, head),
                 exists ? static_cast<int>(p.value_dim) : 0, d_.aligned);
    }
    const uint32_t statistics = tile + 2 * Shape::kTileBytes;
    for (int r = threadIdx.x; r < Shape::kTileRows; r += blockDim.x) {
      const ListingQuery place = at(first + r);
      const int64_t row = (int64_t{b_} * p.heads + head_ + place.head) * p.seqlen_q;
      const int64_t from = row + max(place.query, 0);
      copy_word_or_zero(statistics + r * 4, d_.minus_lse + from, place.query >= 0);
      copy_word_or_zero(statistics + (Shape::kTileRows + r) * 4, d_.minus_delta + from,
                        place.query >= 0);
    }
    commit_copies();
  }

  __device__ __forceinline__ WarpKeys::Column column(int t, const WarpKeys& keys) const {
    const ListingQuery place = at(t);
    const unsigned bits = window_.bits[place.block][keys.word] >> keys.shift;
    return {place.query, place.query + diagonal_, bits & keys.mask};
  }

 private:
  __device__ int block_rows() const { return together_ << d_.log2_block_q; }
  __device__ ListingQuery& at(int t) const { return places_[t & (Shape::kRing - 1)]; }

  // Blocks first_ ... end - 1 of queries. Lists of blocks of keys ascend: where one window ends
  // the next one begins.
  __device__ __forceinline__ void find_blocks(int end, bool starts) {
    const int thread = threadIdx.x, lane = thread % kWarpSize;
    const int first_block = first_key_ >> d_.log2_block_k;
    const int key_blocks = (last_key_ >> d_.log2_block_k) - first_block + 1;
    const int64_t h = b_ * d_.list.heads + d_.list_head(head_);
    const int32_t* offsets = d_.offsets + h * (d_.key_blocks() + 1) + first_block;
    const int32_t* listing = d_.listing + h * d_.list.rows * d_.list.entries;
    for (int i = thread; i < Shape::kWindow; i += blockDim.x)
      window_.bits[i][0] = window_.bits[i][1] = 0;
    for (int j = thread; starts && j < key_blocks; j += blockDim.x) {
      int low = offsets[j], high = offsets[j + 1];
      while (low < high) {
        const int middle = low + (high - low) / 2;
        listing[middle] < first_ ? low = middle + 1 : high = middle;
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
        const int block = cursor + lane < list_end ? listing[cursor + lane] : end;
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
      for (int i = lane; i - lane < Shape::kWindow; i += kWarpSize) {
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

  // Any query of a block may see any key of the tile as one of its first or last ones.
  __device__ bool sees_without_list(int block) const {
    const int first = (block << d_.log2_block_q) + diagonal_;
    const int last =
        min(first + (1 << d_.log2_block_q), static_cast<int>(d_.attention.seqlen_q) + diagonal_) -
        1;
    if (d_.causal && last < first_key_) return false;
    return first_key_ < d_.num_sink || (d_.num_recent > 0 && first < last_key_ + d_.num_recent);
  }

  const BlockSparseGradients& d_;
  typename Shape::Window& window_;
  ListingQuery* places_;
  uint32_t stages_;
  int b_, kv_head_, first_key_, last_key_;
  int together_, diagonal_;
  int head_ = 0, first_ = 0;  // of the list at hand; of the window
};

}  // namespace tokenmill::cuda
