// Where the state of a block lies in global memory: in the tensors of the caller, or in a slot of
// the workspace, as the accumulators of its threads. How a block hands its slot to another one.
#pragma once
#include "linear/linear_attention/kernel_shape.cuh"

namespace tokenmill::cuda::linear_attention {

// The number of a block in the order in which blocks begin: those with lower numbers run already,
// so that it may wait for them. All threads of the block; shared: a word that is free.
__device__ inline unsigned take_number(unsigned* begun, unsigned* shared) {
  if (threadIdx.x == 0) *shared = atomicAdd(begun, 1u);
  __syncthreads();
  const unsigned number = *shared;
  __syncthreads();
  return number;
}

// All threads of a block, about what any of them has stored.
__device__ __forceinline__ void announce(unsigned* flag) {
  __syncthreads();
  if (threadIdx.x == 0)
    asm volatile("st.release.gpu.global.u32 [%0], %1;\n" ::"l"(flag), "r"(1) : "memory");
}
__device__ __forceinline__ void await(const unsigned* flag) {
  if (threadIdx.x == 0) {
    unsigned x;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(x) : "l"(flag) : "memory");
    } while (!x);
  }
  __syncthreads();
}

// Accumulators of a step of features, which is step number `step`.
template <typename Shape>
class SlotState {
 public:
  __device__ explicit SlotState(float* slot) : slot_(slot) {}
  __device__ void move(int64_t floats) { slot_ += floats; }
  __device__ float* data() const { return slot_; }

  __device__ __forceinline__ void load(float (&s)[Shape::kFeatureTiles][4], int step) const {
    const float4* from = own(step);
#pragma unroll
    for (int n = 0; n < Shape::kFeatureTiles; ++n) {
      const float4 x = from[n * blockDim.x];
      s[n][0] = x.x, s[n][1] = x.y, s[n][2] = x.z, s[n][3] = x.w;
    }
  }
  __device__ __forceinline__ void store(const float (&s)[Shape::kFeatureTiles][4], int step) const {
    float4* to = own(step);
#pragma unroll
    for (int n = 0; n < Shape::kFeatureTiles; ++n)
      to[n * blockDim.x] = {s[n][0], s[n][1], s[n][2], s[n][3]};
  }

  // Stores s + factor * the state in the slot `before`, which s becomes. Loads go ahead of stores,
  // as either takes the time of a trip to L2.
  __device__ __forceinline__ void pass_on(float (&s)[Shape::kFeatureTiles][4], float factor,
                                          const SlotState& before) const {
    constexpr int kAhead = 8;
    static_assert(Shape::kFeatureTiles % kAhead == 0);
    const float4* from = before.own(0);
    float4* to = own(0);
#pragma unroll
    for (int first = 0; first < Shape::kFeatureTiles; first += kAhead) {
      float4 x[kAhead];
#pragma unroll
      for (int n = 0; n < kAhead; ++n) x[n] = from[(first + n) * blockDim.x];
#pragma unroll
      for (int n = 0; n < kAhead; ++n) {
        float (&own)[4] = s[first + n];
        to[(first + n) * blockDim.x] = {fmaf(factor, x[n].x, own[0]), fmaf(factor, x[n].y, own[1]),
                                        fmaf(factor, x[n].z, own[2]), fmaf(factor, x[n].w, own[3])};
        own[0] = x[n].x, own[1] = x[n].y, own[2] = x[n].z, own[3] = x[n].w;
      }
    }
  }

 private:
  __device__ float4* own(int step) const {
    return reinterpret_cast<float4*>(slot_) +
           static_cast<int64_t>(step) * Shape::kFeatureTiles * blockDim.x + threadIdx.x;
  }
  float* slot_;
};

// The state of one head as the caller has it.
struct CallerState {
  float* data;
  int64_t feature_step, column_step;
  int features, columns;

  __device__ CallerState(const StateRows& rows, int64_t b, int64_t h, int features, int columns)
      : data(rows.data ? rows.data + b * rows.sequence + h * rows.head : nullptr),
        feature_step(rows.feature_step),
        column_step(rows.column_step),
        features(features),
        columns(columns) {}

  // visit(element, accumulator) for this lane's elements, from `feature` and `column` on, that
  // exist.
  template <int kTiles, typename Visit>
  __device__ __forceinline__ void each(float (&s)[kTiles][4], int feature, int column,
                                       const Visit& visit) const {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, c = lane % 4;
    const int v = column + g;
    int f = feature + 2 * c;
    float* at = data + f * feature_step + v * column_step;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (f + i % 2 < features && v + i / 2 * 8 < columns)
          visit(at[i % 2 * feature_step + i / 2 * 8 * column_step], s[n][i]);
      f += 8;
      at += 8 * feature_step;
      keep(f);  // or the compiler would compute all addresses at once
      keep(at);
    }
  }
};

}  // namespace tokenmill::cuda::linear_attention
