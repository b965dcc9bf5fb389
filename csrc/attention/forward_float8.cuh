// One warp of the forward over a float8_e4m3fn KV cache. Scales are applied to scores and weights
// in float32.
#pragma once
#include "attention/float8_tile.cuh"
#include "attention/forward_warp.cuh"

namespace tokenmill::cuda {

// Scales take registers: a warp owns 16 rows, and reloads Q at each use for large head_dim.
template <typename T, int kBucket>
struct Float8Shape : ForwardShape<T, kBucket> {
  static constexpr int kRowTiles = 1;
  static constexpr int kWarpRows = 16;
  static constexpr bool kQueryInRegisters = kBucket <= 128;
};

// Shared memory after the parked state: one K and V tile in T, two stages of float8 codes, and per
// stage the K scales, then the V scales.
template <typename T, int kBucket>
struct Float8Stages {
  using Shape = Float8Shape<T, kBucket>;
  static constexpr int kCodeTileBytes = Shape::kTileKeys * kBucket;
  static constexpr int kCodesAt = Shape::kStageBytes;
  static constexpr int kScalesAt = kCodesAt + 4 * kCodeTileBytes;
  static constexpr int kScales = 2 * Shape::kTileKeys;  // per stage
  static constexpr int kBytes = kScalesAt + 2 * kScales * 4;

  static __device__ int stage(int key0) { return key0 / Shape::kTileKeys % 2; }
  // Addresses of the K codes and of the K scales of the tile from key0 on; the V codes and the V
  // scales follow them.
  static __device__ uint32_t codes(uint32_t stages, int key0) {
    return stages + kCodesAt + stage(key0) * 2 * kCodeTileBytes;
  }
  static __device__ uint32_t scales(uint32_t stages, int key0) {
    return stages + kScalesAt + stage(key0) * kScales * 4;
  }
};

template <typename T, int kBucket>
class Float8Warp : public ForwardWarp<T, kBucket, Weights::any, true, Float8Shape<T, kBucket>> {
 public:
  using Base = ForwardWarp<T, kBucket, Weights::any, true, Float8Shape<T, kBucket>>;
  using Base::Base, Base::kRowTiles, Base::kTiles;
  using typename Base::Addresses, typename Base::Shape;

  // S = Q K^T, weights, O += P V for the tile of keys from key0 on; `at` is restored.
  __device__ __forceinline__ void add_tile(Addresses& at, int key0) {
    this->each_step(at, key0,
                    [&](auto m, int key, const WarpPlace& own) { add_step<m>(at, key, own); });
  }

 private:
  using Base::kMaskedKeys, Base::kWhole;

  // Shared-memory address of the K scales from key0 on.
  __device__ __forceinline__ uint32_t scales(int key0) const {
    using Stages = Float8Stages<T, kBucket>;
    return shared_address(this->spilled_) + kParkedBytes<true> + Stages::kScalesAt +
           (Stages::stage(key0) * Stages::kScales + key0 % Shape::kTileKeys) * 4;
  }

  // One step: kMaskedKeys keys from key0 on.
  template <int kFirst>
  __device__ __forceinline__ void add_step(const Addresses& at, int key0,
                                           const WarpPlace& of_tile) {
    using Value = Float8Value<T>;
    const auto sees_all = [&] { return this->template sees<kFirst, kWhole>(key0); };
    const auto outside = [&](const WarpPlace& own) {
      return Base::template is_cut<kFirst, kMaskedKeys>(key0, own);
    };
    const bool infinite = (outside(this->recall(of_tile)) || !sees_all()) &&
                          !all_finite<Value, kMaskedKeys, kTiles>(at);
    float s[1][kMaskedKeys / 8][4];
    // S = (Q K^T) k_scale
    this->template multiply_keys<kFirst, 1, kMaskedKeys, 0>(s, at);
    scale_scores(s[0], scales(key0));
    const WarpPlace own = this->recall(of_tile);
    this->template apply_score_mod<kFirst>(s, key0, own);
    if (outside(own)) this->template hide<kFirst>(s, key0, own);
    if (!sees_all()) this->template hide_pairs<kFirst>(s[0], key0);
    weigh_scores<kFirst>(s);  // P = f(S)
    const auto sees_key = [&](int half, int key) {
      const WarpPlace now = this->place();
      const int row = now.first + 16 * kFirst + 8 * half + threadIdx.x % kWarpSize / 4;
      return key0 + key >= now.band.begin(row) && key0 + key < now.band.end(row) &&
             (sees_all() || this->mask_of(now).sees(row, key0 + key));
    };
    // O += (P v_scale) V
    scale_weights(s[0], scales(key0) + 4 * Shape::kTileKeys, sees_key);
    multiply_scaled<T, Value, kFirst, kMaskedKeys>(this->out_, s[0], at, infinite, sees_key,
                                                   this->map() == ScoreMap::linear);
  }

  // Turns scores into weights in place and adds them to row_sum.
  template <int kFirst, int kKeyTiles>
  __device__ __forceinline__ void weigh_scores(float (&s)[1][kKeyTiles][4]) {
    const auto each = [&](const auto& apply_map) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) apply_map(s[0][n][i], i / 2);
    };
    auto& sums = this->sum_[kFirst];
    if (this->weights() == Weights::softmax) {
      update_row_max<kFirst, false>(s, 1, this->neg_row_max_, this->sum_, this->out_);
      each([&](float& x, int half) {
        x = exp2_approx(x + this->neg_row_max_[kFirst][half]);
        sums[half] += x;
      });
      return;
    }
    const bool counts = this->normalize() == Normalize::count;
    visit_map<T, true>(this->map(), [&](const auto& map) {
      each([&](float& z, int half) {
        const bool seen = z != -infinity();
        z = map(z);
        sums[half] += counts ? seen : z;
      });
    });
  }
};

}  // namespace tokenmill::cuda
