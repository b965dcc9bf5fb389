// Decode: keys and values stream once through two stages of shared memory, past all rows of queries
// of a KV head. The last block that is done with a segment of an output tile merges all of them, in
// order: nobody waits, and no order of arrival changes a bit.
#pragma once
#include "dense/attention_decode/kernel_merge.cuh"
#include "dense/attention_decode/kernel_warp.cuh"

namespace tokenmill::cuda {

// Loads rows from wherever they lie.
template <typename T, typename Tile>
struct RowChunks {
  static constexpr int kCount = kChunkBytes / sizeof(T);
  static constexpr int kLanes = Tile::kChunks % 16 == 0 ? 16 : 8;  // threads side by side in a row
  static constexpr int kRowStep = kDecodeThreads / kLanes;
  static_assert(Tile::kChunks % 8 == 0 && kRowStep % 8 == 0);

  // This thread's chunks of a row of `columns` elements to `to`, where the first one goes.
  static __device__ __forceinline__ void copy(uint32_t to, const T* row, int columns,
                                              bool aligned) {
    const int own = threadIdx.x % kLanes * kCount;
#pragma unroll
    for (int c = 0; c < Tile::kChunks; c += kLanes) {
      const int left = columns - own - c * kCount;
      const T* from = row + (left > 0 ? own + c * kCount : 0);
      if (aligned)
        copy_async_or_zero(to + c * kChunkBytes, from, left > 0);
      else
        copy_elements(to + c * kChunkBytes, from, left);
    }
  }
};

template <typename T, int kBucket>
class DecodeBlock {
 public:
  using Shape = DecodeShape<T, kBucket>;
  using Warp = DecodeWarp<T, kBucket>;
  using Keys = RowChunks<T, typename Shape::KeyTile>;
  using Values = RowChunks<T, typename Shape::ValueTile>;

  __device__ DecodeBlock(const DecodeParams& d, const DecodePlan& plan, unsigned char* shared)
      : d_(d),
        plan_(plan),
        stages_(shared_address(shared)),
        sums_(reinterpret_cast<float*>(shared)),
        slots_(reinterpret_cast<KvCache::Slot*>(shared + Shape::kWorkBytes)),
        queries_(stages_ + Shape::kWorkBytes + Shape::kSlotBytes),
        warp_(d, plan, queries_) {}

  __device__ __forceinline__ void run(const Segment& s) {
    s_ = s;
    warp_.start(plan_, s, static_cast<int>(d_.cache.length(s.b)));
    if (s.begin < s.end) load_queries();
    bool first = true;
    for (int begin = s.begin; first || begin < s.end; begin += Shape::kChunkKeys, first = false) {
      const int end = s.end - begin < Shape::kChunkKeys ? s.end : begin + Shape::kChunkKeys;
      warp_.clear();
      stream(begin, end, first);
      merge_warps(first, end == s.end);
    }
    if (s.parts > 1) merge_segments();
  }

 private:
  __device__ int rows() const {
    return min(plan_.rows - s_.row_tile * plan_.tile_rows, plan_.tile_rows);
  }

  __device__ __forceinline__ void load_queries() const {
    const AttentionParams& p = d_.attention;
    const int first = threadIdx.x / Keys::kLanes;
    const int last = s_.row_tile * plan_.tile_rows + rows() - 1;
    for (int r = first; r < plan_.tile_rows; r += Keys::kRowStep) {
      const int row = s_.row_tile * plan_.tile_rows + r, read = min(row, last);
      const T* from =
          rows_at<T>(p.q, s_.b, read / plan_.group, s_.h * plan_.group + read % plan_.group);
      Keys::copy(queries_ + Shape::KeyTile::offset(r, threadIdx.x % Keys::kLanes), from,
                 row <= last ? static_cast<int>(p.head_dim) : 0, plan_.aligned);
    }
  }

  // Key number `t` of the request: where dense and paged caches differ.
  __device__ __forceinline__ KvCache::Slot slot(int t, int end) const {
    return d_.cache.slot(s_.b, min(t, end - 1));
  }

  template <typename Chunks, typename Tile>
  __device__ __forceinline__ void load_rows(const Rows& rows, int64_t columns, uint32_t tile,
                                            const KvCache::Slot* slots, int count) const {
    const int first = threadIdx.x / Chunks::kLanes;
    uint32_t to = tile + Tile::offset(first, threadIdx.x % Chunks::kLanes);
    const T* data = static_cast<const T*>(rows.data);
#pragma unroll 4
    for (int r = first; r < Shape::kTileKeys; r += Chunks::kRowStep) {
      Chunks::copy(to, data + KvCache::offset(rows, slots[r], s_.h),
                   r < count ? static_cast<int>(columns) : 0, plan_.aligned);
      to += Chunks::kRowStep * Shape::kRowBytes;
    }
  }

  // What lies behind `count` keys becomes zero.
  __device__ __forceinline__ void load_stage(uint32_t stage, const KvCache::Slot* slots,
                                             int count) const {
    const AttentionParams& p = d_.attention;
    load_rows<Keys, typename Shape::KeyTile>(d_.cache.k, p.head_dim, stage, slots, count);
    load_rows<Values, typename Shape::ValueTile>(d_.cache.v, p.value_dim, stage + Shape::kTileBytes,
                                                 slots, count);
    commit_copies();
  }

  // Keys begin .. end - 1 past the queries, which `fresh` ones must be waited for.
  __device__ __forceinline__ void stream(int begin, int end, bool fresh) {
    if (begin >= end) return;
    const int thread = threadIdx.x, own = thread % Shape::kTileKeys;
    if (thread < 2 * Shape::kTileKeys) slots_[thread] = slot(begin + thread, end);
    __syncthreads();
    load_stage(stages_, slots_, end - begin);
    const int share = Shape::kTileKeys / (Shape::kRowOrKeyWarps >> plan_.log2_row_warps);
    const int offset = (Warp::row_or_key_warp() >> plan_.log2_row_warps) * share;
    auto at = Warp::addresses(stages_, offset);
    int stage = 0;
#pragma unroll 1
    for (int key0 = begin; key0 < end; key0 += Shape::kTileKeys, stage ^= 1) {
      wait_for_copies<0>();
      __syncthreads();
      if (fresh) warp_.load_queries(), fresh = false;
      const int next = key0 + Shape::kTileKeys;
      if (next < end)
        load_stage(stages_ + (stage ^ 1) * Shape::kStageBytes,
                   slots_ + (stage ^ 1) * Shape::kTileKeys, end - next);
      // Page numbers are on their way while the tile is worked on.
      KvCache::Slot ahead{};
      const bool fetches = thread < Shape::kTileKeys && next + Shape::kTileKeys < end;
      if (fetches) ahead = slot(next + Shape::kTileKeys + own, end);
      if (warp_.active()) {
        int k = 0;
#pragma unroll 1
        for (; k < share; k += Shape::kStepKeys) {
          if (key0 + offset + k < end) warp_.add_step(at, key0 + offset + k, end);
          at.move(Shape::kStepKeys * Shape::kRowBytes);
        }
        at.move(-k * Shape::kRowBytes);
      }
      at.move(stage ? -Shape::kStageBytes : Shape::kStageBytes);
      if (fetches) slots_[stage * Shape::kTileKeys + own] = ahead;
    }
  }

  // The sums of all warps, on those of earlier chunks.
  __device__ __forceinline__ void merge_warps(bool first_chunk, bool last_chunk) {
    const int warp = threadIdx.x / kWarpSize;
    const int key_warps = Shape::kRowOrKeyWarps >> plan_.log2_row_warps;
    const int key_warp = Warp::row_or_key_warp() >> plan_.log2_row_warps;
    __syncthreads();
    warp_.store(sums_ + (key_warp * plan_.tile_rows + 16 * warp_.row_warp()) * Shape::kPartialRow);
    __syncthreads();
    float* slot = slot_rows(s_.part);
    const bool softmax = d_.attention.map == ScoreMap::softmax;
    for (int row = warp; row < rows(); row += kDecodeWarps) {
      const int earlier = first_chunk ? 0 : 1;
      const RowSums<Shape> sums(key_warps + earlier, softmax, [&](int n) -> const float* {
        if (n < earlier) return slot + row * Shape::kPartialRow;
        return sums_ + ((n - earlier) * plan_.tile_rows + row) * Shape::kPartialRow;
      });
      if (last_chunk && s_.parts == 1)
        store_result<T, Shape>(d_, plan_, s_, row, sums);
      else
        sums.store(slot + row * Shape::kPartialRow);
      __syncwarp();
    }
    __syncthreads();
  }

  __device__ float* slot_rows(int part) const {
    return plan_.partials + slot_of(plan_, s_, part) * plan_.tile_rows * Shape::kPartialRow;
  }

  // The last of the blocks that share an output tile stores it.
  __device__ __forceinline__ void merge_segments() {
    int* last = reinterpret_cast<int*>(sums_);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *last = atomicAdd(plan_.arrived + s_.output, 1) == s_.parts - 1;
    __syncthreads();
    const bool merges = *last;
    __syncthreads();
    if (!merges) return;
    __threadfence();
    const bool softmax = d_.attention.map == ScoreMap::softmax;
    for (int row = threadIdx.x / kWarpSize; row < rows(); row += kDecodeWarps) {
      const RowSums<Shape> sums(s_.parts, softmax, [&](int n) -> const float* {
        return slot_rows(n) + row * Shape::kPartialRow;
      });
      store_result<T, Shape>(d_, plan_, s_, row, sums);
    }
  }

  const DecodeParams& d_;
  const DecodePlan& plan_;
  uint32_t stages_;
  float* sums_;
  KvCache::Slot* slots_;
  uint32_t queries_;
  Segment s_;
  Warp warp_;
};

template <typename T, int kBucket>
__global__ void __launch_bounds__(kDecodeThreads)
    attention_decode_kernel(const __grid_constant__ DecodeParams d,
                            const __grid_constant__ DecodePlan plan) {
  extern __shared__ __align__(128) unsigned char shared[];
  Segments<DecodeShape<T, kBucket>> segments(d, plan);
  DecodeBlock<T, kBucket> block(d, plan, shared);
  for (Segment s; segments.take(s);) block.run(s);
}

}  // namespace tokenmill::cuda
