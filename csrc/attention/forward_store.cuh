// Epilogue of the sm_80 forward: from accumulators to rows of the output and their lse.
#pragma once
#include "attention/epilogue.cuh"
#include "attention/forward_warp.cuh"

namespace tokenmill::cuda {

template <typename T>
struct OutputRows {
  T* data;
  int64_t stride;
  int columns;
  bool aligned;
};

// Output of one warp. For float the output itself holds a second level of sums, into which `flush`
// moves the accumulators; 16-bit outputs are stored once.
template <typename T, int kBucket, Weights kWeights, bool kGeneral,
          typename Shape_ = ForwardShape<T, kBucket>>
class WarpOutput {
 public:
  using Warp = ForwardWarp<T, kBucket, kWeights, kGeneral, Shape_>;
  using Shape = typename Warp::Shape;
  static constexpr int kRowTiles = Shape::kRowTiles;
  static constexpr int kFlushKeys = 256;

  __device__ explicit WarpOutput(Warp& warp) : warp_(warp) {}

  __device__ __forceinline__ void flush(const OutputRows<T>& out, const WarpPlace& place) {
    static_assert(Shape::kFloat);
    out_ = out;
    first_ = place.first, last_ = place.last;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float factor = take_level(m, h);
        store_floats(m, h, factor, 1);
        warp_.sum_[m][h] = 0;
#pragma unroll
        for (int n = 0; n < Warp::kTiles; ++n)
          warp_.out_[m][n][2 * h] = warp_.out_[m][n][2 * h + 1] = 0;
      }
    flushed_ = true;
  }

  // lse, sink: at the row's head; lse is null without normalisation. area: free shared memory for
  // kWarpRows rows.
  __device__ __forceinline__ void store(const OutputRows<T>& out, const WarpPlace& place,
                                        float* lse, const float* sink, uint32_t area) {
    out_ = out;
    first_ = place.first, last_ = place.last;
    const int lane = threadIdx.x % kWarpSize;
    const StageAddress staged(area);
    unroll<2 * kRowTiles>([&](auto half) {
      constexpr int m = half / 2, h = half % 2;
      float factor = 1 / warp_.scale();
      [[maybe_unused]] const float level = Shape::kFloat ? take_level(m, h) : 1;
      if (warp_.weights() == Weights::softmax) {
        const float sum = quad_sum(Shape::kFloat ? total_[m][h] : warp_.sum_[m][h]);
        const RowScale scale = softmax_epilogue(sum, -warp_.neg_row_max_[m][h], sink, place.shift);
        const int row = row_of(m, h);
        if (lane % 4 == 0 && row <= last_) lse[row] = scale.lse;
        factor = scale.factor;
      } else if (warp_.weights() == Weights::elementwise && lse) {
        const int row = row_of(m, h);
        float statistic;
        if (!kGeneral && warp_.normalize() == Normalize::count)
          statistic = max(place.band.end(row) - place.band.begin(row), 0);
        else
          statistic = quad_sum(Shape::kFloat ? total_[m][h] : warp_.sum_[m][h]);
        if (warp_.normalize() == Normalize::sum) statistic *= factor;
        if (lane % 4 == 0 && row <= last_) lse[row] = statistic;
        factor *= inverse_of_row(warp_.map(), warp_.normalize(), statistic);
      }
      if constexpr (Shape::kFloat) {
        store_floats(m, h, level, factor);
      } else if (out_.aligned) {
        stage<8 * half>(m, h, factor, staged);
      } else {
        store_elements(m, h, factor);
      }
    });
    if constexpr (!Shape::kFloat)
      if (out_.aligned) store_staged(area);
  }

 private:
  __device__ int row_of(int m, int h) const {
    return first_ + 16 * m + 8 * h + static_cast<int>(threadIdx.x % kWarpSize) / 4;
  }
  __device__ T* row_at(int row) const { return out_.data + row * out_.stride; }

  // Adds the row's sum to the second level; returns the rescale factor of what the output already
  // holds.
  __device__ __forceinline__ float take_level(int m, int h) {
    const float neg_row_max = warp_.neg_row_max_[m][h];
    const float factor = flushed_ ? exp2_approx(neg_row_max - level_neg_row_max_[m][h]) : 0;
    total_[m][h] = (flushed_ ? total_[m][h] * factor : 0) + warp_.sum_[m][h];
    level_neg_row_max_[m][h] = neg_row_max;
    return factor;
  }

  // float accumulators: lane c of a quad holds columns 32 group + 8 c ... + 7.
  __device__ __forceinline__ void store_floats(int m, int h, float level, float scale) {
    const int row = row_of(m, h), c = threadIdx.x % 4;
    if (row > last_) return;
#pragma unroll
    for (int group = 0; group < kBucket / 32; ++group)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = 32 * group + 8 * c + 4 * i;
        float* to = reinterpret_cast<float*>(row_at(row)) + column;
        float x[4];
#pragma unroll
        for (int t = 0; t < 4; ++t) x[t] = warp_.out_[m][4 * group + t][2 * h + i];
        if (out_.aligned) {
          if (column >= out_.columns) continue;
          float4 y{0, 0, 0, 0};
          if (flushed_) y = *reinterpret_cast<const float4*>(to);
          *reinterpret_cast<float4*>(to) = {
              fmaf(y.x, level, x[0]) * scale, fmaf(y.y, level, x[1]) * scale,
              fmaf(y.z, level, x[2]) * scale, fmaf(y.w, level, x[3]) * scale};
        } else {
#pragma unroll
          for (int t = 0; t < 4; ++t)
            if (column + t < out_.columns)
              to[t] = (flushed_ ? fmaf(to[t], level, x[t]) : x[t]) * scale;
        }
      }
  }

  __device__ __forceinline__ void store_elements(int m, int h, float scale) {
    const int row = row_of(m, h);
    if (row > last_) return;
    T* to = row_at(row);
#pragma unroll
    for (int n = 0; n < Warp::kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = 8 * n + 2 * static_cast<int>(threadIdx.x % 4) + i;
        if (column < out_.columns) to[column] = static_cast<T>(warp_.out_[m][n][2 * h + i] * scale);
      }
  }

  // A lane holds 4 bytes of a chunk: staging through shared memory makes whole-sector stores.
  struct StageAddress {
    static constexpr int kPatterns = Shape::KeyTile::kSwizzledChunks;
    uint32_t at[kPatterns];

    __device__ explicit StageAddress(uint32_t area) {
      const int lane = threadIdx.x % kWarpSize;
#pragma unroll
      for (int n = 0; n < kPatterns; ++n) {
        at[n] = area + lane % 4 * 4 + Shape::KeyTile::offset(lane / 4, n);
        opt_barrier(at[n]);
      }
    }
  };

  template <int kRow>
  __device__ __forceinline__ void stage(int m, int h, float scale, const StageAddress& to) {
    unroll<Warp::kTiles>([&](auto n) {
      constexpr int kPatterns = StageAddress::kPatterns;
      const float (&x)[4] = warp_.out_[m][n];
      store_shared<kRow * Shape::kRowBytes + n / kPatterns * kPatterns * kChunkBytes>(
          to.at[n % kPatterns], pack<T>(x[2 * h] * scale, x[2 * h + 1] * scale));
    });
  }

  __device__ __forceinline__ void store_staged(uint32_t area) {
    using Tile = typename Shape::KeyTile;
    constexpr int kLanes = Tile::kCopyLanes;
    constexpr int kRows = kWarpSize / kLanes;  // per instruction
    constexpr int kPatterns = 8 / kRows;
    const int lane = threadIdx.x % kWarpSize, row = lane / kLanes, chunk = lane % kLanes;
    uint32_t at[kPatterns];
#pragma unroll
    for (int i = 0; i < kPatterns; ++i) at[i] = area + Tile::offset(row + i * kRows, chunk);
    const int rows = last_ + 1 - first_ - row;
    constexpr int kCount = kChunkBytes / static_cast<int>(sizeof(T));
    const int columns = out_.columns - chunk * kCount;
    T* to = row_at(first_ + row) + chunk * kCount;
    __syncwarp();
    unroll<Shape::kWarpRows / kRows>([&](auto i) {
      unroll<Tile::kChunks / kLanes>([&](auto c) {
        if (i * kRows < rows && c * kLanes * kCount < columns) {
          uint32_t w[4];
          load_shared<i / kPatterns * 8 * Shape::kRowBytes + c * kLanes * kChunkBytes>(
              w, at[i % kPatterns]);
          store_global(to + c * kLanes * kCount, w);
        }
      });
      to += kRows * out_.stride;
    });
  }

  Warp& warp_;
  OutputRows<T> out_;
  int first_, last_;
  bool flushed_ = false;
  float total_[kRowTiles][2] = {}, level_neg_row_max_[kRowTiles][2] = {};
};

}  // namespace tokenmill::cuda
