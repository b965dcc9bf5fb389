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
#include "attention/mask.cuh"
#include "attention/masked_values_sm90.cuh"
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

// Consumer warpgroup. Rows beyond the last one are zeros, and see the same keys as the last one.
template <typename T, typename Shape, Weights kWeights>
class DecodeConsumer {
 public:
  static constexpr int kKeys = Shape::kTileKeys, kHeadDim = Shape::kHeadDim;
  static constexpr bool kSoftmax = kWeights == Weights::softmax;
  using Scores = Sm90ScoreMap<T, kWeights, 2>;

  __device__ DecodeConsumer(const DecodeParams& d, const DecodeSm90Plan& plan,
                            DecodeSm90Shared<Shape>& shared)
      : d_(d), p_(d.attention), plan_(plan), shared_(shared), queries_(shared_address(shared.q)) {
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
    whole_begin_ = band_.begin(static_cast<int>(p_.seqlen_q) - 1);
    whole_end_ = min(band_.end(0), s.end);
#pragma unroll
    for (int j = 0; j < kHeadDim / 2; ++j) o_[j] = 0;
    Scores weights(plan_.scores, constant(s, 0), constant(s, 1));
#pragma unroll 1
    for (int key0 = s.begin; key0 < s.end;) {
      if (is_whole(key0))
        mainloop_unmasked(key0, weights);
      else
        masked_tile(key0, weights);
    }
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

  // All rows see all keys of the tile.
  __device__ bool is_whole(int key0) const {
    return key0 >= whole_begin_ && key0 + kKeys <= whole_end_;
  }

  // Unmasked tiles from key0 on, as many as follow each other.
  __device__ __forceinline__ void mainloop_unmasked(int& key0, Scores& weights) {
    float s[kKeys / 2];
    uint32_t p[kKeys / 4] = {};
    // S = Q K^T and P = f(S) of the first tile
    multiply_keys(s, number_);
    finish_keys<0>(s, number_);
    if (active_) {
      plan_.scores.cap(s);
      weights.apply_map(s);
      weights.rescale(o_);
      pack_weights(p, s, weights);
    }
#pragma unroll 1
    for (key0 += kKeys; is_whole(key0); key0 += kKeys, ++number_) {
      // Issue S_next = Q K_next^T and O += P V, then compute P_next under them
      multiply_keys(s, number_ + 1);
      multiply_values(p, number_);
      finish_keys<1>(s, number_ + 1);
      if (active_) {
        plan_.scores.cap(s);
        weights.apply_map(s);
      }
      finish_values(number_);
      if (active_) {
        weights.rescale(o_);
        pack_weights(p, s, weights);
      }
    }
    // O += P V of the last tile
    multiply_values(p, number_);
    finish_values(number_);
    ++number_;
  }

  // A tile cut by a mask or by the end of the keys.
  __device__ __forceinline__ void masked_tile(int& key0, Scores& weights) {
    float s[kKeys / 2];
    uint32_t p[kKeys / 4] = {};
    multiply_keys(s, number_);
    wait_for_product<0>(s);
    const int seen_begin = whole_begin_ - key0, seen_end = whole_end_ - key0;
    if (active_) {
      plan_.scores.cap(s);
      bounds(key0, 2 * static_cast<int>(threadIdx.x % 4)).hide(s, seen_begin > 0, seen_end < kKeys);
      weights.apply_map(s);
      weights.rescale(o_);
      pack_weights(p, s, weights);
    }
    const Stage<Shape> stage(number_);
    shared_.v_full[stage.index].wait(stage.parity);
    const uint32_t values = shared_address(shared_.v[stage.index]);
    clear_unseen_values(values, band_.begin(0) - key0, band_.columns - key0);
    // A single query hides only keys that were cleared.
    const bool infinite =
        p_.seqlen_q > 1 && has_nonfinite<T, kHeadDim, kKeys, kKeys>(values, seen_begin, seen_end);
    fence_stores();
    if (any_in_warpgroup(0, infinite))  // finite values overwrite the K stage
      multiply_seen_values<T, kKeys, kKeys>(o_, p, values, shared_address(shared_.k[stage.index]),
                                            0, bounds(key0, 0));
    else
      start_pv<T, kKeys>(o_, p, values);
    fence_stores();  // generic accesses precede the next TMA copies
    release(shared_.k_empty[stage.index]);
    finish_values(number_);
    ++number_;
    key0 += kKeys;
  }

  // Clears values of keys that were loaded but that no row sees: 0 times NaN would be NaN. Visible
  // are the keys begin .. end - 1 of the tile, which is loaded in parts.
  __device__ __forceinline__ void clear_unseen_values(uint32_t values, int begin, int end) const {
    constexpr uint32_t kZeros[4] = {0, 0, 0, 0};
    constexpr int kPart = Shape::kPartKeys;
    static_assert(kPart * kBoxRowBytes == kWarpgroupThreads * 16);
    const auto clear = [&](int edge) {
      if (edge <= 0 || edge >= kKeys || edge % kPart == 0) return;
      const int key = edge / kPart * kPart + warpgroup_thread() / 8;
      if (key >= begin && key < end) return;
      unroll<kHeadDim / kBoxColumns>([&](auto block) {
        store_shared<block * kKeys * kBoxRowBytes>(
            values + key * kBoxRowBytes + warpgroup_thread() % 8 * 16, kZeros);
      });
    };
    clear(begin);
    clear(end);
  }

  __device__ __forceinline__ void multiply_keys(float (&s)[kKeys / 2], unsigned number) {
    const Stage<Shape> stage(number);
    shared_.k_full[stage.index].wait(stage.parity);
    start_qk<T, kHeadDim, kKeys>(s, queries_, shared_address(shared_.k[stage.index]));
  }
  template <int kPending>
  __device__ __forceinline__ void finish_keys(float (&s)[kKeys / 2], unsigned number) {
    wait_for_product<kPending>(s);
    release(shared_.k_empty[Stage<Shape>(number).index]);
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

  // Visible columns of both rows of this thread, relative to column `own` of the tile at key0.
  __device__ __forceinline__ RowBounds bounds(int key0, int own) const {
    const int from = key0 + own;
    return {{band_.begin(query_[0]) - from, band_.begin(query_[1]) - from},
            {band_.end(query_[0]) - from, band_.end(query_[1]) - from}};
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
        stage_row<T, h, kHeadDim>(queries_, o_, scale.factor, is_empty(h));
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
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float factor = weights.to_row_max(h), sum = weights.sum(h) * factor;
      if (warpgroup_row(h) >= plan_.rows) continue;
      float* const row = sums_of(s, s.part, warpgroup_row(h));
      const bool empty = is_empty(h);
      const int c = threadIdx.x % 4;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        const float2 x{o_[4 * n + 2 * h] * factor, o_[4 * n + 2 * h + 1] * factor};
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
  int whole_begin_, whole_end_;  // keys that all rows see
  unsigned number_ = 0;          // index of the next key tile
  float o_[kHeadDim / 2];
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
