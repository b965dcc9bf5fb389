// Decay weights of the tokens of a chunk, relative to its ends.
#pragma once
#include "linear/decay.cuh"
#include "linear/linear_attention/kernel_shape.cuh"

namespace tokenmill::cuda::linear_attention {

// Decays of one head of one sequence, in the order of the recurrence. In reverse, the step from
// token t + 1 to t has the decay of t + 1, and the first step has none.
class Decays {
 public:
  __device__ Decays(const LogDecay& decay, bool reverse, int64_t b, int64_t start, int length,
                    int64_t h)
      : per_token_(decay.data && decay.per_token),
        reverse_(reverse),
        length_(length),
        step_(decay.seq),
        data_(nullptr) {
    if (!decay.data) return;
    const float* of_head = decay.data + h * decay.head;
    if (per_token_) {
      data_ = of_head + b * decay.batch + start * decay.seq;
    } else {
      head_ = log2_decay(*of_head, kMinHeadDecay);
    }
  }

  __device__ bool per_token() const { return per_token_; }

  // Weight of a key `distance` tokens before the query.
  __device__ float at_distance(int distance) const { return exp2_exact(head_ * distance); }

  // Decay applied to the state after the last step; in reverse, the decay of the
  // sequence's first token.
  __device__ float behind_last() const {
    if (!reverse_ || length_ == 0) return 1;
    return exp2_exact(per_token_ ? of_token(0) : head_);
  }

  // Computes the vectors of the n tokens from `first` on, by one warp. `scale` is applied to
  // `start` or, with scale_keys, to `end`. With drop_last the last token adds nothing to the state.
  template <typename Vectors>
  __device__ __forceinline__ void prepare(Vectors& to, int first, int n, float scale,
                                          bool scale_keys, bool drop_last) const {
    constexpr int kEach = sizeof(to.start) / sizeof(float) / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
    const int kept = n - (drop_last && first + n == length_);
    double x[kEach];
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = kEach * lane + e;
      x[e] = i < n ? step(first + i) : 0;
      if (e > 0) x[e] += x[e - 1];
    }
    double before = x[kEach - 1];
#pragma unroll
    for (int by = 1; by < kWarpSize; by *= 2) {
      const double other = __shfl_up_sync(kFullWarp, before, by);
      if (lane >= by) before += other;
    }
    const double last = __shfl_sync(kFullWarp, before, kWarpSize - 1);
    before = __shfl_up_sync(kFullWarp, before, 1);
    if (lane == 0) before = 0;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = kEach * lane + e;
      const double sum = before + x[e];
      to.start[i] = (scale_keys ? 1 : scale) * exp2_exact(sum);
      to.end[i] = i < kept ? (scale_keys ? scale : 1) * exp2_exact(last - sum) : 0;
      to.high[i] = static_cast<float>(sum);
      to.low[i] = static_cast<float>(sum - to.high[i]);
    }
    if (lane == 0) to.total[0] = exp2_exact(last);
  }

 private:
  __device__ double step(int i) const {
    if (reverse_ && i == 0) return 0;
    if (!per_token_) return head_;
    return of_token(reverse_ ? length_ - i : i);
  }

  __device__ double of_token(int token) const {
    return log2_decay(data_[token * step_], kMinTokenDecay);
  }

  bool per_token_, reverse_;
  int length_;
  int64_t step_;
  const float* data_;
  double head_ = 0;
};

}  // namespace tokenmill::cuda::linear_attention
