// sm_90a decode, for calls that takes_decode_sm90() accepts.
//
//   S = Q K^T    P = 2^(factor S - row_max) or sigmoid(scale S + bias)    O = P V
//
// The rows of an output tile are the queries of a request times the query heads of a KV head: each
// tile of 64 keys is read once for all of them. One producer warp loads K and V tile by tile. One
// consumer warpgroup keeps S, P and O in registers; its warps without rows only take part in the
// products. In unmasked tiles Q K^T of tile j+1 and P V of tile j run under the softmax of tile
// j+1. Segments that share an output tile leave partial sums in memory, and the CTA that finishes
// last merges all of them, in order.
#include "attention/epilogue_sm90.cuh"
#include "attention/mainloop_sm90.cuh"
#include "attention/mask.cuh"
#include "cuda/arch/sm90/tma.cuh"
#include "dense/attention_decode/cuda_plan.cuh"
#include "dense/attention_decode/kernel_merge.cuh"
#include "dense/attention_decode/kernel_sm90_shape.cuh"

namespace tokenmill::cuda {

// Band of keys of request b.
__device__ __forceinline__ MaskBand decode_mask_band(const DecodeParams& d, int b) {
  const AttentionParams& p = d.attention;
  return MaskBand::of(decode_band(p, p.seqlen_q, d.cache.length(b)));
}

// Producer warp. It also finds the segments of the CTA.
template <typename Shape>
class DecodeSm90Loader {
 public:
  static constexpr int kKeys = Shape::kTileKeys, kHeadDim = Shape::kHeadDim;

  __device__ DecodeSm90Loader(const DecodeParams& d, const DecodeSm90Plan& plan,
                              DecodeSm90Shared<Shape>& shared)
      : d_(d), plan_(plan), shared_(shared) {}

  __device__ __forceinline__ void run() {
    Segments<Shape> segments(d_, plan_);
    unsigned round = 0;
    for (Segment s; segments.take(s); ++round) {
      leave(round, s);
      load(s);
    }
    leave(round, {-1});
  }

 private:
  static __device__ bool issues() { return threadIdx.x % kWarpSize == 0; }

  __device__ __forceinline__ void leave(unsigned round, const Segment& s) {
    const int i = round % 2;
    wait_as_warp(shared_.segment_empty[i], round / 2 % 2 ^ 1);
    if (!issues()) return;
    shared_.segments[i] = s;
    shared_.segment_full[i].arrive();
  }

  // Each lane looks up the page of one tile: a tile lies in one page.
  __device__ __forceinline__ void load(const Segment& s) {
    const MaskBand band = decode_mask_band(d_, s.b);
    const int begin = band.begin(0), end = band.columns, lane = threadIdx.x % kWarpSize;
#pragma unroll 1
    for (int first = s.begin; first < s.end; first += kWarpSize * kKeys) {
      const int own = first + lane * kKeys;
      const int own_page = own < s.end ? d_.cache.slot(s.b, own).page : 0;
#pragma unroll 1
      for (int i = 0; i < kWarpSize && first + i * kKeys < s.end; ++i, ++number_) {
        const int key0 = first + i * kKeys;
        const int row = d_.cache.block_table
                            ? key0 & static_cast<int>((int64_t{1} << d_.cache.log2_page_size) - 1)
                            : key0;
        const BoxPlace at{row, s.h, __shfl_sync(kFullWarp, own_page, i)};
        const int seen_begin = begin - key0, seen_end = end - key0;
        load_tile(plan_.k, plan_.k_part, at, seen_begin, seen_end, shared_.k, shared_.k_full,
                  shared_.k_empty);
        load_tile(plan_.v, plan_.v_part, at, seen_begin, seen_end, shared_.v, shared_.v_full,
                  shared_.v_empty);
      }
    }
  }

  // Parts of a cut tile that no row sees are loaded from outside of the tensor, which gives zeros.
  __device__ __forceinline__ void load_tile(const CUtensorMap& whole, const CUtensorMap& part,
                                            const BoxPlace& at, int seen_begin, int seen_end,
                                            char (&tiles)[Shape::kStages][Shape::kTileBytes],
                                            Mbarrier* full, Mbarrier* empty) {
    const Stage<Shape> stage(number_);
    wait_as_warp(empty[stage.index], stage.parity ^ 1);
    if (!issues()) return;
    char* const tile = tiles[stage.index];
    full[stage.index].arrive_expecting(Shape::kTileBytes);
    if (seen_begin <= 0 && seen_end >= kKeys)
      return load_boxes<kKeys, kHeadDim>(whole, at, tile, full[stage.index]);
#pragma unroll 1
    for (int i = 0; i < kKeys; i += Shape::kPartKeys) {
      const bool seen = i < seen_end && i + Shape::kPartKeys > seen_begin;
      load_boxes<kKeys, kHeadDim>(part, {at.row + i, at.head, seen ? at.batch : -1},
                                  tile + i * kBoxRowBytes, full[stage.index]);
    }
  }

  const DecodeParams& d_;
  const DecodeSm90Plan& plan_;
  DecodeSm90Shared<Shape>& shared_;
  unsigned number_ = 0;  // key tiles loaded so far
};

// Key tiles of a segment. Rows beyond the last one see the same keys as the last one.
template <typename Shape>
class SegmentTiles : public Sm90Tiles {
 public:
  static constexpr int kKeys = Shape::kTileKeys;

  // query: queries of the thread's rows; active: some row of the warp exists
  __device__ SegmentTiles(const Segment& s, const MaskBand& band, int queries,
                          const int (&query)[2], bool active)
      : band_(band),
        query_{query[0], query[1]},
        several_(queries > 1),
        active_(active),
        key0_(s.begin),
        end_(s.end),
        seen_{band.begin(queries - 1), min(band.end(0), s.end)} {}

  __device__ bool is_left() const { return key0_ < end_; }
  __device__ void next(unsigned) { key0_ += kKeys; }
  __device__ static bool sees_any() { return true; }
  __device__ bool sees_all() const { return key0_ >= seen_.begin && key0_ + kKeys <= seen_.end; }
  __device__ KeySpan seen() const { return {seen_.begin - key0_, seen_.end - key0_}; }
  __device__ __forceinline__ RowBounds bounds(int own) const {
    const int from = key0_ + own;
    return {{band_.begin(query_[0]) - from, band_.begin(query_[1]) - from},
            {band_.end(query_[0]) - from, band_.end(query_[1]) - from}};
  }
  __device__ bool has_rows() const { return active_; }
  // A single query hides only keys that were cleared.
  __device__ bool hides_values() const { return several_; }

  // The tile is loaded in parts: only a part that an edge of the seen keys cuts holds such values.
  // 0 times NaN would be NaN.
  __device__ __forceinline__ void clear_values(uint32_t values) const {
    const int begin = band_.begin(0) - key0_, end = band_.columns - key0_;
    constexpr uint32_t kZeros[4] = {0, 0, 0, 0};
    constexpr int kPart = Shape::kPartKeys;
    static_assert(kPart * kBoxRowBytes == kWarpgroupThreads * 16);
    const auto clear = [&](int edge) {
      if (edge <= 0 || edge >= kKeys || edge % kPart == 0) return;
      const int key = edge / kPart * kPart + warpgroup_thread() / 8;
      if (key >= begin && key < end) return;
      unroll<Shape::kColumns / kBoxColumns>([&](auto block) {
        store_shared<block * kKeys * kBoxRowBytes>(
            values + key * kBoxRowBytes + warpgroup_thread() % 8 * 16, kZeros);
      });
    };
    clear(begin);
    clear(end);
    fence_stores();
  }

 private:
  MaskBand band_;
  int query_[2];
  bool several_, active_;
  int key0_, end_;
  KeySpan seen_;  // keys that all rows see
};

// Consumer warpgroup. Rows beyond the last one are zeros.
template <typename T, typename Shape, Weights kWeights>
class DecodeConsumer {
 public:
  static constexpr int kKeys = Shape::kTileKeys, kHeadDim = Shape::kHeadDim;
  static constexpr bool kSoftmax = kWeights == Weights::softmax;
  using Scores = Sm90ScoreMap<T, kWeights, 2>;

  __device__ DecodeConsumer(const DecodeParams& d, const DecodeSm90Plan& plan,
                            DecodeSm90Shared<Shape>& shared)
      : d_(d),
        p_(d.attention),
        plan_(plan),
        shared_(shared),
        queries_(shared_address(shared.q)),
        mainloop_(shared, plan.scores, 0) {
    // Broadcast from lane 0 so that the compiler knows the value to be warp-uniform.
    active_ = __shfl_sync(kFullWarp, warpgroup_row(0), 0) < plan.rows;
#pragma unroll
    for (int h = 0; h < 2; ++h) query_[h] = min(warpgroup_row(h), plan.rows - 1) / plan.group;
  }

  __device__ __forceinline__ void run() {
    const int first = warpgroup_thread() / kWarpSize * 16;  // first row of the warp
    clear_rows<Shape::kRows, kHeadDim>(shared_.q, max(first, plan_.rows), first + 16);
#pragma unroll 1
    for (unsigned round = 0;; ++round) {
      const int i = round % 2;
      shared_.segment_full[i].wait(round / 2 % 2);
      const Segment& s = shared_.segments[i];
      if (s.b < 0) return;
      add(s);
      release(shared_.segment_empty[i]);
    }
  }

 private:
  __device__ __forceinline__ void add(const Segment& s) {
    load_queries(s);
    band_ = decode_mask_band(d_, s.b);
    SegmentTiles<Shape> tiles(s, band_, static_cast<int>(p_.seqlen_q), query_, active_);
    Scores weights(plan_.scores, constant(s, 0), constant(s, 1));
    mainloop_.run(tiles, queries_, weights);
    sync_warpgroup(0);  // all warps are done with Q
    if (s.parts == 1) return store(s, weights);
    store_sums(s, weights);
    merge_segments(s);
  }

  // Row h of this thread, its head and its constant.
  __device__ int row(int h) const { return min(warpgroup_row(h), plan_.rows - 1); }
  __device__ int head(const Segment& s, int h) const {
    return s.h * plan_.group + row(h) - query_[h] * plan_.group;
  }
  __device__ float constant(const Segment& s, int h) const {
    return kSoftmax ? 0 : constant_of(p_, s.b, head(s, h), band_.columns);
  }

  // Copies Q of the segment's rows to shared memory.
  __device__ __forceinline__ void load_queries(const Segment& s) const {
    constexpr int kChunks = kHeadDim / 8;  // 16-byte chunks per row
#pragma unroll 1
    for (int at = warpgroup_thread(); at < plan_.rows * kChunks; at += kWarpgroupThreads) {
      const int r = at / kChunks, chunk = at % kChunks, i = r / plan_.group;
      const T* from = rows_at<T>(p_.q, s.b, i, s.h * plan_.group + r - i * plan_.group);
      const uint4 x = *reinterpret_cast<const uint4*>(from + chunk * 8);
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
      store_shared(chunk_address(queries_, r, chunk), words);
    }
    fence_stores();
    sync_warpgroup(0);
  }

  // A NaN bias makes NaN of the weights of masked keys too.
  __device__ bool is_empty(int h) const {
    return !kSoftmax && band_.begin(query_[h]) >= band_.end(query_[h]);
  }

  // Epilogue of an unsplit segment: O through the memory of Q to the tensor, and lse.
  __device__ __forceinline__ void store(const Segment& s, const Scores& weights) const {
    if (active_) {
      unroll<2>([&](auto h) {
        const int of = head(s, h);
        const float shift = constant_of(p_, s.b, of, band_.columns);
        const RowScale scale = weights.finish(h, p_.sink ? p_.sink + of : nullptr, shift);
        if (warpgroup_row(h) >= plan_.rows) return;
        if (kSoftmax && threadIdx.x % 4 == 0) p_.lse[d_.lse_at(s.b, query_[h], of)] = scale.lse;
        stage_row<T, h, kHeadDim>(queries_, mainloop_.o(), scale.factor, is_empty(h));
      });
    }
    sync_warpgroup(0);
    constexpr int kChunks = kHeadDim / 8;
#pragma unroll 1
    for (int at = warpgroup_thread(); at < plan_.rows * kChunks; at += kWarpgroupThreads) {
      const int r = at / kChunks, chunk = at % kChunks, i = r / plan_.group;
      uint32_t words[4];
      load_shared(words, chunk_address(queries_, r, chunk));
      T* to = rows_at<T>(p_.out, s.b, i, s.h * plan_.group + r - i * plan_.group);
      store_global(to + chunk * 8, words);
    }
    sync_warpgroup(0);  // all reads are done before the next Q is written
  }

  __device__ float* sums_of(const Segment& s, int part, int r) const {
    return plan_.partials +
           (slot_of(plan_, s, part) * plan_.tile_rows + r) * int64_t{Shape::kPartialRow};
  }

  // Partial sums, relative to the rounded row_max by which they are merged.
  __device__ __forceinline__ void store_sums(const Segment& s, const Scores& weights) const {
    if (!active_) return;
    const auto& o = mainloop_.o();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float factor = weights.to_row_max(h), sum = weights.sum(h) * factor;
      if (warpgroup_row(h) >= plan_.rows) continue;
      float* const row = sums_of(s, s.part, warpgroup_row(h));
      const bool empty = is_empty(h);
      const int c = threadIdx.x % 4;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        const float2 x{o[4 * n + 2 * h] * factor, o[4 * n + 2 * h + 1] * factor};
        *reinterpret_cast<float2*>(row + 8 * n + 2 * c) = empty ? float2{0, 0} : x;
      }
      if (c == 0) row[Shape::kSumAt] = sum, row[Shape::kRowMaxAt] = weights.row_max(h);
    }
  }

  // The last CTA that finishes a segment of an output tile merges and stores it.
  __device__ __forceinline__ void merge_segments(const Segment& s) const {
    __threadfence();
    sync_warpgroup(0);
    if (warpgroup_thread() == 0)
      shared_.is_last = atomicAdd(plan_.arrived + s.output, 1) == s.parts - 1;
    sync_warpgroup(0);
    if (!shared_.is_last) return;
    __threadfence();
#pragma unroll 1
    for (int r = warpgroup_thread() / kWarpSize; r < plan_.rows; r += 4) {
      const RowSums<Shape> sums(s.parts, kSoftmax, [&](int n) { return sums_of(s, n, r); });
      store_result<T, false>(d_, plan_, s, r, sums);
    }
  }

  const DecodeParams& d_;
  const AttentionParams& p_;
  const DecodeSm90Plan& plan_;
  DecodeSm90Shared<Shape>& shared_;
  uint32_t queries_;
  bool active_;   // some rows of the warp exist
  int query_[2];  // query of row h of this thread
  MaskBand band_;
  Sm90Mainloop<T, Shape, DecodeSm90Shared<Shape>, Scores> mainloop_;
};

template <typename T, int kHeadDim, Weights kWeights>
__global__ void __launch_bounds__(DecodeSm90Shape<kHeadDim>::kThreads, 2)
    attention_decode_sm90_kernel(const __grid_constant__ DecodeParams d,
                                 const __grid_constant__ DecodeSm90Plan plan) {
  using Shape = DecodeSm90Shape<kHeadDim>;
  // Two CTAs share the 228 KB of an SM, of which 1 KB is reserved per CTA.
  static_assert(2 * (sizeof(DecodeSm90Shared<Shape>) + 1024) <= 228 * 1024);
  extern __shared__ __align__(1024) char sm90_shared[];
  auto& shared = *reinterpret_cast<DecodeSm90Shared<Shape>*>(sm90_shared);
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();
  if (__shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0) == 0)
    DecodeConsumer<T, Shape, kWeights>(d, plan, shared).run();
  else
    DecodeSm90Loader<Shape>(d, plan, shared).run();
}

template <typename T, int kHeadDim, Weights kWeights>
const char* launch_decode_sm90(const DecodeParams& d, cudaStream_t stream) {
  using Shape = DecodeSm90Shape<kHeadDim>;
  const AttentionParams& p = d.attention;
  const Sm90Tensors t(p, d.cache);
  DecodeSm90Plan plan{};
  for (auto [map, rows, box] : {std::tuple{&plan.k, &t.k, Shape::kTileKeys},
                                {&plan.v, &t.v, Shape::kTileKeys},
                                {&plan.k_part, &t.k, Shape::kPartKeys},
                                {&plan.v_part, &t.v, Shape::kPartKeys}})
    if (const char* error = encode_map(*map, *rows, p.dtype, box)) return error;
  plan.scores = Sm90Scores::of(p.scale, p.softcap);
  const DecodeLaunch planned = plan_segments<DecodeSm90Keys<kHeadDim>>(d);
  static_cast<DecodePlan&>(plan) = planned.plan;
  if (const char* error = place_partials(plan, planned, d.workspace, stream)) return error;
  return launch<attention_decode_sm90_kernel<T, kHeadDim, kWeights>>(
      planned.blocks, Shape::kThreads, sizeof(DecodeSm90Shared<Shape>), stream, d, plan);
}

template <typename T>
const char* launch_decode_sm90(const DecodeParams& d, cudaStream_t stream) {
  return visit_decode_sm90_dim(d.attention.head_dim, [&]<int kHeadDim>() {
    return d.attention.map == ScoreMap::softmax
               ? launch_decode_sm90<T, kHeadDim, Weights::softmax>(d, stream)
               : launch_decode_sm90<T, kHeadDim, Weights::sigmoid>(d, stream);
  });
}

template const char* launch_decode_sm90<TOKENMILL_ELEMENT>(const DecodeParams&, cudaStream_t);

}  // namespace tokenmill::cuda
