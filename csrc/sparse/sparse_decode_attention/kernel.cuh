// attention_decode's mainloop over the key sequence of a list head.
#pragma once
#include "dense/attention_decode/kernel.cuh"
#include "sparse/sparse_decode_attention/kernel_keys.cuh"

namespace tokenmill::cuda::sparse_decode_attention {

template <typename Keys>
class SparseWarp
    : public DecodeProducts<typename Keys::Element, Keys::Shape::kBucket, typename Keys::Shape> {
 public:
  using Params = typename Keys::Params;
  using Shape = typename Keys::Shape;
  using Products = DecodeProducts<typename Keys::Element, Shape::kBucket, Shape>;
  using typename Products::Addresses;

  __device__ SparseWarp(const Params& d, const DecodePlan& plan, uint32_t queries)
      : Products(plan, queries), d_(d) {}

  __device__ __forceinline__ void start(const DecodePlan& plan, const Segment& s, const Params& d,
                                        const Keys& keys) {
    const KeyRow& row = keys.row();
    const int first = s.row_tile * plan.tile_rows + row_warp_ * 16;
    active_ = first < plan.rows;
    const int own = first + static_cast<int>(threadIdx.x % kWarpSize) / 4;
    const int diagonal = static_cast<int>(row.length - d.attention.seqlen_q);
    rows_ = plan.rows - own;
#pragma unroll
    for (int half = 0; half < 2; ++half) position_[half] = diagonal + (own + 8 * half) / plan.group;
    list_begin_ = static_cast<int>(row.list_begin);
    list_end_ = d.logits && Products::first_column() == 0 ? static_cast<int>(row.list_end) : 0;
    const int64_t in_heads = (s.b * d.row_heads() + s.h) * plan.rows + own;
    logits_ = d.logits + in_heads * d.logit_row - list_begin_ / kLogitAlign * kLogitAlign;
  }

  // Adds the kStepKeys keys from `key` on, in shared memory at `at`; `keys` has their metadata at
  // `place`.
  __device__ __forceinline__ void add_step(const Keys& keys, const Addresses& at, int place,
                                           int key, int) {
    // S = Q K^T
    float s[kKeyTiles][4];
    this->multiply_keys(s, at);
    if constexpr (Shape::kFloat8) scale_scores(s, keys.k_scales(place));
    apply_score_mod(s, keys, place);
    if (key < list_end_ && key + Shape::kStepKeys > list_begin_) store_logits(s, key);
    // online softmax: P = 2^(S - row_max), rescale O where row_max grows
    this->exponentiate(s);
    float minimum = 1;  // weights of masked keys are 0
    Products::each_score(s, [&](float& x, int, int) { minimum = fminf(minimum, x); });
    const auto sees_key = [&](int half, int k) { return sees(half, keys, place + k); };
    if constexpr (Shape::kFloat8) scale_weights(s, keys.v_scales(place), sees_key);
    // O += P V
    this->multiply_values(s, at, __any_sync(kFullWarp, minimum == 0), sees_key);
  }

 private:
  using Products::active_, Products::row_warp_, Products::kKeyTiles;

  __device__ __forceinline__ void apply_score_mod(float (&s)[kKeyTiles][4], const Keys& keys,
                                                  int place) const {
    const float cap = d_.attention.softcap;
    if (cap > 0)
      Products::each_score(
          s, [&](float& x, int, int) { x = apply_softcap(x * d_.attention.scale, cap); });
    const float factor = kLog2e * (cap > 0 ? 1 : d_.attention.scale);
    Products::each_score(s, [&](float& x, int half, int key) {
      const bool seen = sees(half, keys, place + key);
      x = seen ? fmaf(x, factor, keys.log2_count(place + key)) : -infinity();
    });
  }

  __device__ __forceinline__ bool sees(int half, const Keys& keys, int place) const {
    const int2 by = keys.seen_by(place);
    return position_[half] >= by.x && position_[half] < by.y;
  }

  __device__ __forceinline__ void store_logits(const float (&s)[kKeyTiles][4], int key) const {
    const int column = key + 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (8 * half >= rows_) continue;
      float* to = logits_ + 8 * half * d_.logit_row + column;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
        *reinterpret_cast<float2*>(to + 8 * n) = {s[n][2 * half], s[n][2 * half + 1]};
    }
  }

  const Params& d_;
  int position_[2];  // positions in the request of the queries of rows g and g + 8
  int rows_;         // rows from row g on
  int list_begin_, list_end_;
  float* logits_;  // row g, key 0
};

template <typename Keys>
__device__ __forceinline__ void run_listed(const typename Keys::Params& d, const DecodePlan& plan) {
  extern __shared__ __align__(128) unsigned char shared[];
  DecodeBlock<Keys> block(d, plan, shared);
  Segment s;
  if (block.keys().take(plan, s)) block.run(s);
}

template <typename T, int kBucket>
__global__ void __launch_bounds__(kDecodeThreads)
    sparse_decode_kernel(const __grid_constant__ SparseLaunch d,
                         const __grid_constant__ DecodePlan plan) {
  run_listed<ListedKeys<T, kBucket>>(d, plan);
}

// With more than two CTAs per SM ptxas spills.
template <typename T, int kBucket>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    sparse_decode_float8_kernel(const __grid_constant__ SparseLaunch d,
                                const __grid_constant__ DecodePlan plan) {
  run_listed<ListedKeys<T, kBucket, Float8>>(d, plan);
}

}  // namespace tokenmill::cuda::sparse_decode_attention
