// sm_80 decode: K and V stream once through a two-stage pipeline in shared memory, for all query
// rows of a KV head. The CTA that finishes the last segment of an output tile merges all of them,
// in order: no CTA waits, and the order of arrival does not change a bit.
#pragma once
#include "attention/gmem_to_smem.cuh"
#include "dense/attention_decode/kernel_merge.cuh"
#include "dense/attention_decode/kernel_warp.cuh"

namespace tokenmill::cuda {

// Keys (CacheKeys) locates the keys of a row; its Warp applies masks and score_mod.
template <typename Keys>
class DecodeBlock {
 public:
  using T = typename Keys::Element;
  using Params = typename Keys::Params;
  using Shape = typename Keys::Shape;
  using Warp = typename Keys::Warp;
  using Cache = typename Shape::Cache;
  static constexpr bool kFloat8 = Shape::kFloat8;
  using Codes = CodeTile<Shape::kBucket>;
  using QueryCopy = RowCopy<T, typename Shape::KeyTile>;
  using KeyCopy = RowCopy<Cache, std::conditional_t<kFloat8, Codes, typename Shape::KeyTile>>;
  using ValueCopy = RowCopy<Cache, std::conditional_t<kFloat8, Codes, typename Shape::ValueTile>>;

  __device__ DecodeBlock(const Params& d, const DecodePlan& plan, unsigned char* shared)
      : d_(d),
        plan_(plan),
        stages_(shared_address(shared)),
        sums_(reinterpret_cast<float*>(shared)),
        queries_(stages_ + Shape::kWorkBytes + Keys::kBytes),
        keys_(d, shared + Shape::kWorkBytes),
        warp_(d, plan, queries_) {}

  __device__ Keys& keys() { return keys_; }

  __device__ __forceinline__ void run(const Segment& s) {
    s_ = s;
    warp_.start(plan_, s, d_, keys_);
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
    const int first = QueryCopy::first_row();
    const int last = s_.row_tile * plan_.tile_rows + rows() - 1;
    for (int r = first; r < plan_.tile_rows; r += kDecodeThreads / QueryCopy::kLanes) {
      const int row = s_.row_tile * plan_.tile_rows + r, read = min(row, last);
      const QueryPlace at = d_.place(s_.b, read / plan_.group);
      const T* from = rows_at<T>(p.q, at.b, at.i, s_.h * plan_.group + read % plan_.group);
      QueryCopy::copy_to(queries_, r, from, row <= last ? static_cast<int>(p.head_dim) : 0,
                         plan_.aligned);
    }
  }

  template <bool kValues, typename Copy>
  __device__ __forceinline__ void load_rows(int64_t columns, uint32_t tile, int place,
                                            int count) const {
    constexpr int kRowStep = kDecodeThreads / Copy::kLanes;
    static_assert(kRowStep % 8 == 0);
    const int first = Copy::first_row();
    uint32_t to = tile + Copy::Tile::offset(first, Copy::own_lane());
#pragma unroll 4
    for (int r = first; r < Shape::kTileKeys; r += kRowStep) {
      Copy::copy(to, Copy::own_lane(), keys_.template row<kValues>(s_, place + r),
                 r < count && keys_.exists(place + r) ? static_cast<int>(columns) : 0,
                 plan_.aligned);
      to += kRowStep * Copy::Tile::kRowBytes;
    }
  }

  // Zeros from key `count` on.
  __device__ __forceinline__ void load_stage(uint32_t stage, int place, int count) const {
    const AttentionParams& p = d_.attention;
    constexpr int kTileBytes = kFloat8 ? Shape::kCodeTileBytes : Shape::kTileBytes;
    load_rows<false, KeyCopy>(p.head_dim, stage, place, count);
    load_rows<true, ValueCopy>(p.value_dim, stage + kTileBytes, place, count);
    cp_async_commit();
  }

  // Load buffer of a stage. Float8 codes lie after the tiles that they are converted to.
  __device__ __forceinline__ uint32_t stage_at(int stage) const {
    if constexpr (kFloat8) return stages_ + Shape::kStageBytes + stage * 2 * Shape::kCodeTileBytes;
    return stages_ + (Shape::kStages > 1 ? stage * Shape::kStageBytes : 0);
  }

  // Tiles of a stage as the products read them.
  __device__ __forceinline__ uint32_t tile_at(int stage) const {
    return kFloat8 ? stages_ : stage_at(stage);
  }

  // Converts the codes of a stage to the tiles that the products read.
  __device__ __forceinline__ void convert_stage(uint32_t codes, int place) const {
    convert_tile<false, T, typename Shape::KeyTile>(codes, stages_, place);
    convert_tile<true, typename Shape::Value, typename Shape::ValueTile>(
        codes + Shape::kCodeTileBytes, stages_ + Shape::kTileBytes, place);
    __syncthreads();
  }
  template <bool kValues, typename To, typename Tile>
  __device__ __forceinline__ void convert_tile(uint32_t codes, uint32_t tile, int place) const {
    const AttentionParams& p = d_.attention;
    convert_codes<To, Codes, Tile, Shape::kTileKeys>(
        codes, tile, [&](int r, int column, uint32_t (&words)[4]) {
          if constexpr (Keys::kExtras) {
            const int columns = static_cast<int>(kValues ? p.value_dim : p.head_dim);
            if (const T* row = keys_.template extra_row<kValues>(s_, place + r)) {
              if constexpr (std::is_same_v<To, T>)
                load_elements(words, row, column, columns);
              else
                load_part(words, row, column, columns, keys_.is_lost_part(place + r));
            }
          }
        });
  }

  // Mainloop over keys begin .. end - 1. fresh: Q has just been issued and must be waited for.
  __device__ __forceinline__ void stream(int begin, int end, bool fresh) {
    if (begin >= end) return;
    const int thread = threadIdx.x, own = thread % Shape::kTileKeys;
    const int tile = thread / Shape::kTileKeys;
    if (tile < 2)
      keys_.store(Keys::place(tile, begin + tile * Shape::kTileKeys) + own,
                  keys_.find(s_, begin + thread, end));
    __syncthreads();
    load_stage(stage_at(0), Keys::place(0, begin), end - begin);
    const int share = Shape::kTileKeys / (Shape::kRowOrKeyWarps >> plan_.log2_row_warps);
    const int offset = (Warp::row_or_key_warp() >> plan_.log2_row_warps) * share;
    auto at = Warp::addresses(stages_, offset);
    int stage = 0;
#pragma unroll 1
    for (int key0 = begin; key0 < end; key0 += Shape::kTileKeys, stage ^= 1) {
      cp_async_wait<0>();
      __syncthreads();
      const int next = key0 + Shape::kTileKeys;
      if constexpr (!Keys::kTurns)
        if (fresh) warp_.load_queries();
      if (Shape::kStages > 1 && next < end)
        load_stage(stage_at(stage ^ 1), Keys::place(stage ^ 1, next), end - next);
      if constexpr (kFloat8) convert_stage(stage_at(stage), Keys::place(stage, key0));
      if constexpr (Keys::kTurns) {
        unsigned char* const shared = reinterpret_cast<unsigned char*>(sums_);
        const int tile = static_cast<int>(tile_at(stage) - stages_);
        keys_.turn(plan_, s_, shared + tile, Keys::place(stage, key0),
                   fresh ? shared + Shape::kWorkBytes + Keys::kBytes : nullptr);
        if (fresh) warp_.load_queries();
      }
      fresh = false;
      // Prefetch the slots of the tile after the next while this one is processed.
      typename Keys::Key ahead{};
      const int second = next + Shape::kTileKeys;
      const bool fetches = thread < Shape::kTileKeys && second < end;
      if (fetches) ahead = keys_.find(s_, second + own, end);
      if (warp_.active()) {
        int k = 0;
#pragma unroll 1
        for (; k < share; k += Shape::kStepKeys) {
          if (key0 + offset + k < end)
            warp_.add_step(keys_, at, Keys::place(stage, key0) + offset + k, key0 + offset + k,
                           end);
          at.move(Shape::kStepKeys * Shape::kRowBytes);
        }
        at.move(-k * Shape::kRowBytes);
      }
      if constexpr (!kFloat8 && Shape::kStages > 1)
        at.move(stage ? -Shape::kStageBytes : Shape::kStageBytes);
      if constexpr (Shape::kStages == 1) {
        __syncthreads();
        if (next < end) load_stage(stages_, Keys::place(stage ^ 1, next), end - next);
      }
      if (fetches) keys_.store(Keys::place(stage, second) + own, ahead);
    }
  }

  // Merges the sums of all warps, and the sums of earlier chunks of keys.
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
        store_result<T, Keys::kMasked>(d_, plan_, s_, row, sums);
      else
        sums.store(slot + row * Shape::kPartialRow);
      __syncwarp();
    }
    __syncthreads();
  }

  __device__ float* slot_rows(int part) const {
    return plan_.partials + slot_of(plan_, s_, part) * plan_.tile_rows * Shape::kPartialRow;
  }

  // The last CTA that finishes a segment of an output tile merges and stores it.
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
      store_result<T, Keys::kMasked>(d_, plan_, s_, row, sums);
    }
  }

  const Params& d_;
  const DecodePlan& plan_;
  uint32_t stages_;
  float* sums_;
  uint32_t queries_;
  Segment s_;
  Keys keys_;
  Warp warp_;
};

template <typename Keys>
__device__ __forceinline__ void run_segments(const DecodeParams& d, const DecodePlan& plan) {
  extern __shared__ __align__(128) unsigned char shared[];
  Segments<typename Keys::Shape> segments(d, plan);
  DecodeBlock<Keys> block(d, plan, shared);
  for (Segment s; segments.take(s);) block.run(s);
}

// With a mask two CTAs per SM are enough: with more ptxas spills. 0: ptxas chooses.
template <typename T, int kBucket, bool kMasked>
__global__ void __launch_bounds__(kDecodeThreads, kMasked ? 2 : 0)
    attention_decode_kernel(const __grid_constant__ DecodeParams d,
                            const __grid_constant__ DecodePlan plan) {
  run_segments<CacheKeys<T, kBucket, kMasked>>(d, plan);
}

template <typename T, int kBucket>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    attention_decode_float8_kernel(const __grid_constant__ DecodeParams d,
                                   const __grid_constant__ DecodePlan plan) {
  run_segments<CacheKeys<T, kBucket, true, Float8>>(d, plan);
}

}  // namespace tokenmill::cuda
