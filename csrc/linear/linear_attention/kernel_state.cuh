// State of a CTA in global memory: in the caller's tensors, or in a workspace slot in accumulator
// layout. Also the hand-over of a slot from one CTA to another.
#pragma once
#include "linear/linear_attention/kernel_shape.cuh"

namespace tokenmill::cuda::linear_attention {

// Index of this CTA in start order: all CTAs with lower indices are already running, so it is safe
// to wait for them. Called by all threads of the CTA; shared: a free word.
__device__ inline unsigned take_number(unsigned* begun, unsigned* shared) {
  if (threadIdx.x == 0) *shared = atomicAdd(begun, 1u);
  __syncthreads();
  const unsigned number = *shared;
  __syncthreads();
  return number;
}

// Publishes the stores of all threads of the CTA. Called by all threads.
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

// Accumulators of feature step `step`, in a slot.
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

  // Stores s + factor * state of slot `before`, and sets s to that state. Loads are issued ahead of
  // stores, since each takes a round trip to L2.
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

// State of one head in the caller's layout.
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

  // Calls visit(element, accumulator) for this lane's elements from `feature` and `column` on,
  // within bounds.
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
      opt_barrier(f);  // otherwise the compiler computes all addresses at once
      opt_barrier(at);
    }
  }
};

}  // namespace tokenmill::cuda::linear_attention
