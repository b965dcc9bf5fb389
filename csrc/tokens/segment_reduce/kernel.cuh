// Reduces rows by segments. A warp or a CTA processes a segment in a tile of channels, adjacent
// channels per lane; if segments are few and long, several CTAs process parts of one, which are
// merged in order.
#pragma once
#include "cuda/arch/shared_memory.cuh"
#include "cuda/vector.cuh"
#include "cuda/warp.cuh"
#include "tokens/segment_reduce/params.h"

namespace tokenmill::cuda::segment_reduce {

constexpr int kSegmentThreads = 256;
constexpr int kSegmentWarps = kSegmentThreads / kWarpSize;
constexpr int kSumPlaces = 256;   // places per accumulator
constexpr int kWarpPlaces = 128;  // maximum places of a segment processed by one warp of a group

// The plan depends only on shapes.
struct SegmentPlan {
  int group;  // segments per CTA, 1 or one per warp
  int parts;  // CTAs per segment and tile; 1 with several segments per CTA
  int tiles;
  float* values;   // [parts, B, S, C], if there are several parts
  int32_t* rows;   // the same, for extremes
  float* weights;  // [parts, B, S]
};

// A lane's accumulators for its channels. For extremes also the rows, -1: none yet.
template <int kVector, bool kExtreme>
struct SegmentLane {
  float value[kVector];
  int32_t row[kExtreme ? kVector : 1];

  __device__ __forceinline__ SegmentLane() {
#pragma unroll
    for (int v = 0; v < kVector; ++v) value[v] = 0;
#pragma unroll
    for (int v = 0; v < (kExtreme ? kVector : 1); ++v) row[v] = -1;
  }
  // Extremes: keeps the greater value; values that are not greater, and NaN after NaN, are ignored.
  __device__ __forceinline__ void take(int v, float x, int32_t r) {
    if (r < 0 || (row[v] >= 0 && (x <= value[v] || value[v] != value[v]))) return;
    value[v] = x;
    row[v] = r;
  }
  __device__ __forceinline__ void merge(int v, float x, int32_t r) {
    if constexpr (kExtreme)
      take(v, x, r);
    else
      value[v] += x;
  }
};

__device__ __forceinline__ float sign_of(Reduce reduce) {
  return reduce == Reduce::amin ? -1.f : 1.f;
}

// Rows and weights of 32 places, one per lane; -1 past the end.
struct PlaceOfLane {
  int32_t row;
  float weight;

  __device__ __forceinline__ PlaceOfLane(const SegmentReduceParams& p, int64_t b, int64_t place,
                                         int64_t end)
      : row(place < end ? row_of_place(p, b, place) : -1),
        weight(row >= 0 ? (p.weight ? p.weight[b * p.weight_batch + row] : 1.f) : 0.f) {}
};

// Reduces places begin .. end - 1 of batch row b for the channels from c on. Returns the sum of the
// weights.
template <typename T, int kVector, bool kExtreme>
__device__ __forceinline__ float reduce_places(const SegmentReduceParams& p, int64_t b,
                                               int64_t begin, int64_t end, int64_t c,
                                               SegmentLane<kVector, kExtreme>& lane) {
  const T* const x = static_cast<const T*>(p.x) + b * p.x_batch + c;
  const int id = threadIdx.x % kWarpSize;
  const bool there = c < p.channels;
  const float sign = sign_of(p.reduce);
  float weight = 0;
  int count = 0;  // exact where a float32 sum of ones would stop growing
  for (int64_t chunk = begin; chunk < end; chunk += kSumPlaces) {
    SegmentLane<kVector, false> sum;
    const int64_t chunk_end = end - chunk < kSumPlaces ? end : chunk + kSumPlaces;
    for (int64_t first = chunk; first < chunk_end; first += kWarpSize) {
      const PlaceOfLane mine(p, b, first + id, chunk_end);
      weight += mine.weight;
      count += mine.row >= 0;
      const int places =
          static_cast<int>(chunk_end - first < kWarpSize ? chunk_end - first : kWarpSize);
#pragma unroll 4
      for (int j = 0; j < places; ++j) {
        const int32_t row = __shfl_sync(kFullWarp, mine.row, j);
        const float w = __shfl_sync(kFullWarp, mine.weight, j);
        float at[kVector] = {};
        if (there && row >= 0) load_floats(at, x + row * p.x_row);
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          if constexpr (kExtreme)
            lane.take(v, at[v] * sign, row);
          else
            sum.value[v] = fmaf(w, at[v], sum.value[v]);
        }
      }
    }
    if constexpr (!kExtreme) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) lane.value[v] += sum.value[v];
    }
  }
  return p.weight ? warp_sum(weight) : static_cast<float>(warp_sum(count));
}

// Stores the rows of the extremes of channels c .. c + kVector - 1 to arg, at `to`.
template <int kVector>
__device__ __forceinline__ void store_rows(int32_t* to, int64_t c, int64_t channels,
                                           const int32_t (&row)[kVector]) {
  static_assert(kVector == 1 || kVector == 4 || kVector == 8);
  if constexpr (kVector == 1) {
    if (c < channels) to[c] = row[0];
  } else {
    uint32_t words[kVector / 4][4];
#pragma unroll
    for (int v = 0; v < kVector; ++v) words[v / 4][v % 4] = static_cast<uint32_t>(row[v]);
    if constexpr (kVector == 8) {
      // 32 bytes per lane: pairs of lanes exchange halves, so that each store fills sectors.
      const bool odd = threadIdx.x % 2;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t other = __shfl_xor_sync(kFullWarp, odd ? words[0][i] : words[1][i], 1);
        words[0][i] = odd ? other : words[0][i];
        words[1][i] = odd ? words[1][i] : other;
      }
      c -= odd ? 8 : 0;
      if (c < channels) store_global(to + c + (odd ? 4 : 0), words[0]);
      c += 8;
      if (c < channels) store_global(to + c + (odd ? 4 : 0), words[1]);
    } else if (c < channels) {
      store_global(to + c, words[0]);
    }
  }
}

// Writes channels c .. c + kVector - 1 of segment number `segment` of all. Called by whole warps.
template <typename T, int kVector, bool kExtreme>
__device__ __forceinline__ void finish_segment(const SegmentReduceParams& p, int64_t segment,
                                               int64_t c, float weight,
                                               const SegmentLane<kVector, kExtreme>& lane) {
  if (c == 0) p.weight_sum[segment] = weight;
  const int64_t first = segment * p.channels;
  if constexpr (kExtreme) store_rows(p.arg + first, c, p.channels, lane.row);
  if (c >= p.channels) return;
  const bool mean = p.reduce == Reduce::mean;
  float y[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    y[v] = lane.value[v] * sign_of(p.reduce);
    if (mean) y[v] = weight == 0 ? 0 : y[v] / weight;
  }
  store_floats(static_cast<T*>(p.y) + first + c, y);
}

// Grid: (groups of plan.group segments, tiles and parts, batch). In a group of several segments,
// each warp processes one, and all warps together process the long ones.
template <typename T, int kVector, bool kExtreme>
__global__ void __launch_bounds__(kSegmentThreads, 3)
    segment_kernel(const __grid_constant__ SegmentReduceParams p,
                   const __grid_constant__ SegmentPlan plan) {
  __shared__ float values[kSegmentWarps][kVector][kWarpSize];
  __shared__ int32_t rows[kExtreme ? kSegmentWarps : 1][kVector][kWarpSize];
  __shared__ float weights[kSegmentWarps];
  const int warp = threadIdx.x / kWarpSize, id = threadIdx.x % kWarpSize;
  const int tile = static_cast<int>(blockIdx.y) % plan.tiles;
  const int part = static_cast<int>(blockIdx.y) / plan.tiles;
  const int64_t c = (int64_t{tile} * kWarpSize + id) * kVector;
  for (int64_t b = blockIdx.z; b < p.batch; b += gridDim.z)
    for (int64_t first = int64_t{blockIdx.x} * plan.group; first < p.segments;
         first += int64_t{gridDim.x} * plan.group) {
      // First each warp processes its own segment (-1), then all warps process the long ones in
      // turn.
      for (int turn = plan.group > 1 ? -1 : 0; turn < plan.group; ++turn) {
        const bool alone = turn < 0;
        const int64_t s = first + (alone ? warp : turn);
        const bool exists = s < p.segments;
        const PlaceRange all = exists ? segment_places(p, b, s) : PlaceRange{0, 0};
        const bool is_long = all.end - all.begin > kWarpPlaces;
        const int slices = alone ? 1 : kSegmentWarps * plan.parts;
        const bool mine = exists && (plan.group == 1 || alone != is_long);
        SegmentLane<kVector, kExtreme> lane;
        float weight = 0;
        if (mine) {
          const uint32_t length = static_cast<uint32_t>(all.end - all.begin);
          const int64_t slice =
              alone ? length : round_up(ceil_div(length, static_cast<uint32_t>(slices)), kWarpSize);
          const int64_t begin = all.begin + (alone ? 0 : part * kSegmentWarps + warp) * slice;
          const int64_t end = begin + slice < all.end ? begin + slice : all.end;
          weight = reduce_places<T>(p, b, begin, end, c, lane);
        }
        if (alone && !__syncthreads_or(is_long)) turn = plan.group;  // no long segment
        if (!mine) continue;
        if (!alone) {
          __syncthreads();  // the results of the last turn have been read
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            values[warp][v][id] = lane.value[v];
            if constexpr (kExtreme) rows[warp][v][id] = lane.row[v];
          }
          if (id == 0) weights[warp] = weight;
          __syncthreads();
          if (warp > 0) continue;
          for (int w = 1; w < kSegmentWarps; ++w) {
#pragma unroll
            for (int v = 0; v < kVector; ++v)
              lane.merge(v, values[w][v][id], kExtreme ? rows[w][v][id] : 0);
            weight += weights[w];
          }
        }
        const int64_t segment = b * p.segments + s;
        if (plan.parts == 1) {
          finish_segment<T>(p, segment, c, weight, lane);
          continue;
        }
        const int64_t at = part * p.batch * p.segments + segment;
        if (c == 0) plan.weights[at] = weight;
        if (c >= p.channels) continue;
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          plan.values[at * p.channels + c + v] = lane.value[v];
          if constexpr (kExtreme) plan.rows[at * p.channels + c + v] = lane.row[v];
        }
      }
    }
}

// Merges the parts of segments: one CTA per segment.
template <typename T, bool kExtreme>
__global__ void __launch_bounds__(kSegmentThreads)
    segment_merge_kernel(const __grid_constant__ SegmentReduceParams p,
                         const __grid_constant__ SegmentPlan plan) {
  const int64_t segments = p.batch * p.segments;
  for (int64_t segment = blockIdx.x; segment < segments; segment += gridDim.x) {
    float weight = 0;
    for (int part = 0; part < plan.parts; ++part) weight += plan.weights[part * segments + segment];
    for (int64_t c = threadIdx.x; c < p.channels || c == 0; c += kSegmentThreads) {
      SegmentLane<1, kExtreme> lane;
      for (int part = 0; c < p.channels && part < plan.parts; ++part) {
        const int64_t at = (part * segments + segment) * p.channels + c;
        lane.merge(0, plan.values[at], kExtreme ? plan.rows[at] : 0);
      }
      finish_segment<T>(p, segment, c, weight, lane);
    }
  }
}

// First or last row of each segment: one warp each.
template <typename T, int kVector>
__global__ void __launch_bounds__(kSegmentThreads, 4)
    segment_end_kernel(const __grid_constant__ SegmentReduceParams p) {
  const int id = threadIdx.x % kWarpSize;
  for (int64_t b = blockIdx.z; b < p.batch; b += gridDim.z)
    for (int64_t s = int64_t{blockIdx.x} * kSegmentWarps + threadIdx.x / kWarpSize; s < p.segments;
         s += int64_t{gridDim.x} * kSegmentWarps) {
      const int64_t segment = b * p.segments + s;
      const PlaceRange all = segment_places(p, b, s);
      int count = 0;
      for (int64_t place = all.begin + id; p.perm && place < all.end; place += kWarpSize)
        count += row_of_place(p, b, place) >= 0;
      count = p.perm ? warp_sum(count) : static_cast<int>(all.end - all.begin);
      if (id == 0) p.weight_sum[segment] = static_cast<float>(count);
      const int32_t row = end_row(p, b, s);
      const T* const x = static_cast<const T*>(p.x) + b * p.x_batch + row * p.x_row;
      T* const y = static_cast<T*>(p.y) + segment * p.channels;
      for (int64_t c = id * kVector; c < p.channels; c += kWarpSize * kVector) {
        Pack<T, kVector> bits;
#pragma unroll
        for (int v = 0; v < kVector; ++v) bits.x[v] = static_cast<T>(0.f);
        if (row >= 0) bits = *reinterpret_cast<const Pack<T, kVector>*>(x + c);
        *reinterpret_cast<Pack<T, kVector>*>(y + c) = bits;
      }
    }
}

// Segment of each row; segment_of_row must be -1 on entry. One thread per place or, with "first"
// and "last", per segment.
__global__ void __launch_bounds__(kSegmentThreads)
    segment_of_row_kernel(const __grid_constant__ SegmentReduceBackwardParams q) {
  const SegmentReduceParams& p = q.forward;
  const bool ends = p.reduce == Reduce::first || p.reduce == Reduce::last;
  const int64_t count = ends ? p.segments : p.places;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y)
    for (int64_t i = int64_t{blockIdx.x} * kSegmentThreads + threadIdx.x; i < count;
         i += int64_t{gridDim.x} * kSegmentThreads) {
      int64_t s = i;
      int32_t row;
      if (ends) {
        row = end_row(p, b, s);
      } else {
        // The last segment that begins at or before the place.
        const int32_t* const offsets = p.offsets + b * p.offsets_batch;
        int64_t low = 0, high = p.segments;
        while (low < high) {
          const int64_t middle = (low + high) / 2;
          if (offsets[middle] <= i)
            low = middle + 1;
          else
            high = middle;
        }
        s = low - 1;
        row = s >= 0 && i < offsets[s + 1] ? row_of_place(p, b, i) : -1;
      }
      if (row >= 0) q.segment_of_row[b * p.tokens + row] = static_cast<int32_t>(s);
    }
}

// dx and dweight: one warp per row.
template <typename T, int kVector>
__global__ void __launch_bounds__(kSegmentThreads, 4)
    segment_backward_kernel(const __grid_constant__ SegmentReduceBackwardParams q) {
  const SegmentReduceParams& p = q.forward;
  const int id = threadIdx.x % kWarpSize;
  const bool mean = p.reduce == Reduce::mean;
  const bool extreme = p.reduce == Reduce::amax || p.reduce == Reduce::amin;
  for (int64_t b = blockIdx.z; b < p.batch; b += gridDim.z)
    for (int64_t row = int64_t{blockIdx.x} * kSegmentWarps + threadIdx.x / kWarpSize;
         row < p.tokens; row += int64_t{gridDim.x} * kSegmentWarps) {
      const int64_t index = b * p.tokens + row;
      const int32_t s = q.segment_of_row[index];
      const int64_t segment = b * p.segments + s;
      const float total = s >= 0 && mean ? p.weight_sum[segment] : 1.f;
      const float w = p.weight ? p.weight[b * p.weight_batch + row] : 1.f;
      const bool some = s >= 0 && total != 0, dots = some && q.dweight;
      const float factor = some ? w / total : 0;
      float dot = 0;
      for (int64_t c = id * kVector; c < p.channels; c += kWarpSize * kVector) {
        float dy[kVector] = {}, x[kVector], y[kVector] = {};
        if (some) load_floats(dy, static_cast<const T*>(q.dy) + b * q.dy_batch + s * q.dy_row + c);
        if (dots) load_floats(x, static_cast<const T*>(p.x) + b * p.x_batch + row * p.x_row + c);
        if (dots && mean) load_floats(y, static_cast<const T*>(p.y) + segment * p.channels + c);
        if (dots) {
#pragma unroll
          for (int v = 0; v < kVector; ++v) dot = fmaf(x[v] - y[v], dy[v], dot);
        }
        if (extreme && some) {
          const auto rows =
              *reinterpret_cast<const Pack<int32_t, kVector>*>(p.arg + segment * p.channels + c);
#pragma unroll
          for (int v = 0; v < kVector; ++v) dy[v] = rows.x[v] == row ? dy[v] : 0.f;
        } else {
#pragma unroll
          for (int v = 0; v < kVector; ++v) dy[v] *= factor;
        }
        store_floats(static_cast<T*>(q.dx) + index * p.channels + c, dy);
      }
      if (!q.dweight) continue;
      dot = warp_sum(dot);
      if (id != 0) continue;
      float dweight = some ? dot / total : 0.f;
      if (s >= 0 && q.dweight_sum) dweight += q.dweight_sum[segment];
      q.dweight[index] = dweight;
    }
}

}  // namespace tokenmill::cuda::segment_reduce
