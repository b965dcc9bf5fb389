// One warp of the sm_80 forward: its query rows, their weights for a step of keys, its output.
#pragma once
#include "attention/mask.cuh"
#include "attention/online_softmax.cuh"
#include "attention/pair_mask.cuh"
#include "attention/qk.cuh"
#include "attention/score_map.cuh"
#include "attention/score_mod.cuh"
#include "attention/stage_addresses.cuh"
#include "attention/tile_shape.cuh"
#include "cuda/load_tile.cuh"

namespace tokenmill::cuda {

// State of a warp that only masks, score_mod and the epilogue need.
struct alignas(16) WarpPlace {
  int b, h, q_start, k_start;
  int first, last;  // rows of the sequence
  MaskBand band;
  float shift;                 // constant of the head, left out of softmax weights
  int block_end;               // end of the keys that any warp of the CTA sees
  int whole_begin, whole_end;  // keys that all rows see
};

// Where registers are short, each warp parks its state at the start of shared memory; after it, in
// general mode, the mask sights of two tiles per warp.
constexpr int kMaxWarps = kMaxThreads / kWarpSize;
constexpr int kSightsAt = kMaxWarps * sizeof(WarpPlace);
template <bool kGeneral>
constexpr int kParkedBytes = kGeneral ? kSightsAt + 128 : kSightsAt;
static_assert(2 * kMaxWarps * 4 <= 128);

template <typename T, int kBucket, Weights kWeights, bool kGeneral,
          typename Shape_ = ForwardShape<T, kBucket>>
class ForwardWarp {
 public:
  using Shape = Shape_;
  static constexpr bool kLean =
      !Shape::kFloat && ((kBucket == 128 && kWeights != Weights::fast_sigmoid) ||
                         (kBucket == 256 && kWeights != Weights::softmax));
  // ptxas would overlap the steps of a tile here, and spill.
  static constexpr bool kRolled = Shape::kFloat && kBucket > 32;
  // Where registers are short, state is parked in shared memory; softmax can keep the key range.
  static constexpr bool kSpillToSmem = kBucket > 64 || Shape::kFloat || kGeneral;
  static constexpr bool kSpillBoundsToSmem = kSpillToSmem && kWeights != Weights::softmax;
  using Addresses = StageAddresses<Shape, kLean>;
  static constexpr int kRowTiles = Shape::kRowTiles;
  static constexpr int kTiles = kBucket / 8;  // 8-column tiles of O

  // Exponents (fast: arguments of tanh) = factor x + offset, x being q.k or the general logit. The
  // factor is computed on the host so that it stays a constant operand.
  static float factor(const AttentionParams& p) {
    const Weights weights = weights_of(p);
    if (kGeneral) return weights == Weights::softmax ? 1 : unit(weights);
    return unit(weights) * p.scale;
  }

  // first: the warp's first row within the sequence. parked: room for the state of all warps.
  __device__ ForwardWarp(const AttentionParams& p, const Sequence& s, const MaskBand& band, int b,
                         int h, int first, int block_end, const GlobalRows<T>& queries,
                         float factor, const MaskBounds& bounds, WarpPlace* parked)
      : place_{b,
               h,
               s.q_start,
               s.k_start,
               first,
               min(first + Shape::kWarpRows, s.q_length) - 1,
               band,
               constant_of(p, b, h, s.k_length),
               block_end,
               band.begin(min(first + Shape::kWarpRows, s.q_length) - 1),
               band.end(first)},
        score_mod_(p, b, h, s, p.map == ScoreMap::softmax ? 0 : place_.shift),
        factor_(factor),
        queries_(queries),
        mask_(p.mask),
        bounds_(bounds),
        spilled_(parked) {
    weights_ = weights_of(p);
    map_ = p.map;
    normalize_ = p.normalize;
    if constexpr (kSpillToSmem) spilled_[threadIdx.x / kWarpSize] = place_;
    if constexpr (!kGeneral) {
      offset_ = unit(weights()) * place_.shift;
      // a hidden pair, whose logit is -inf, stays hidden
      offset_ = offset_ > kFloatMax ? kFloatMax : offset_ < -kFloatMax ? -kFloatMax : offset_;
    }
    if (weights() == Weights::sigmoid) offset_ -= kLog2Scale<T>;
    tail_ = place_.shift < -3;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
        out_[m][n][0] = out_[m][n][1] = out_[m][n][2] = out_[m][n][3] = 0;
      // Initial row_max: a row's first weights overflow it, which sets its row_max. -FLT_MAX, the
      // most negative finite exponent, needs no other one.
      neg_row_max_[m][0] = neg_row_max_[m][1] = kFloatMax;
      sum_[m][0] = sum_[m][1] = 0;
    }
    if constexpr (Shape::kQueryInRegisters) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int j = 0; j < Shape::kSlices; ++j) load_query(q_[m][j], m, j, first);
    }
  }

  __device__ WarpPlace place() const {
    if constexpr (!kSpillToSmem) return place_;
    int thread = threadIdx.x;
    opt_barrier(thread);
    return spilled_[thread / kWarpSize];
  }

  // S = Q K^T, weights, O += P V for the tile of keys from key0 on; `at` is restored.
  __device__ __forceinline__ void add_tile(Addresses& at, int key0) {
    const WarpPlace whole = kSpillBoundsToSmem ? place() : place_;
    if (!kGeneral && key0 >= whole.whole_begin && key0 + Shape::kTileKeys <= whole.whole_end) {
      if constexpr (kRolled) {
#pragma unroll 1
        for (int i = 0; i < Shape::kTileKeys; i += Shape::kStepKeys) {
          add_step<0, kRowTiles, Shape::kStepKeys, 0, false>(at, key0, {});
          at.move(Shape::kStepKeys * Shape::kRowBytes);
        }
        at.move(-Shape::kTileBytes);
      } else {
        int keys = whole.whole_end - key0;
        if constexpr (kBucket > 64) opt_barrier(keys);
        unroll<Shape::kTileKeys / Shape::kStepKeys>([&](auto i) {
          // Without this branch, never taken, ptxas would overlap the steps, and spill.
          if (kBucket > 64 && i > 0 && keys <= i * Shape::kStepKeys) return;
          add_step<0, kRowTiles, Shape::kStepKeys, i * Shape::kStepKeys, false>(at, key0, {});
        });
      }
      return;
    }
    each_step(at, key0, [&](auto m, int key, const WarpPlace& own) {
      add_step<m, 1, kMaskedKeys, 0, true>(at, key, own);
    });
  }

  // Visibility of a tile's pairs: bit m (some) and bit 16 + m (all) for the first kMaskedKeys keys
  // and row tile m, kRowTiles bits higher for each further kMaskedKeys keys.
  __device__ __forceinline__ void find_sights(int key0) const {
    if (!kGeneral || !mask_.any()) return;
    const WarpPlace own = place();
    const int lane = threadIdx.x % kWarpSize, row = own.first + lane % kRowTiles * 16;
    const int key = key0 + lane / kRowTiles * kMaskedKeys;
    Visibility visibility{false, false};
    if (key < min(key0 + Shape::kTileKeys, own.band.columns) && row <= own.last)
      visibility = mask_of(own).visibility(row, key, kMaskedKeys);
    const unsigned some = __ballot_sync(kFullWarp, visibility.some);
    const unsigned all = __ballot_sync(kFullWarp, visibility.all);
    if (lane == 0) store_shared(sights_address(key0), some | all << 16);
    __syncwarp();
  }
  // True if any warp sees some of a tile. All warps have called find_sights().
  __device__ __forceinline__ bool block_sees(int key0) const {
    if (!kGeneral || !mask_.any()) return true;
    unsigned seen = 0;
    for (unsigned i = 0; i < blockDim.x / kWarpSize; ++i)
      seen |= load_word<0>(sights_of_tile(key0) + i * 4);
    return seen & 0xffff;
  }

  __device__ float scale() const {
    if (weights() == Weights::elementwise) return scale_of<T>(map_);
    return weights() == Weights::sigmoid ? kScale<T> : 1;
  }
  __device__ Weights weights() const { return kWeights == Weights::any ? weights_ : kWeights; }
  __device__ ScoreMap map() const { return map_; }
  __device__ Normalize normalize() const { return normalize_; }

  float out_[kRowTiles][kTiles][4];
  float neg_row_max_[kRowTiles][2], sum_[kRowTiles][2];  // rows g, g + 8; sum_: of this lane's keys

 protected:
  static constexpr int kMaskedKeys = Shape::kMaskedKeys;
  static constexpr int kPart = 0, kWhole = 1;  // queries of `sees`
  static constexpr int kDepth = kMmaDepth<T>;
  static constexpr bool kHasTail = !Shape::kFloat && !kGeneral && kBucket <= 64;

  __host__ __device__ static float unit(Weights weights) {
    if (weights == Weights::elementwise) return 1;
    return weights == Weights::softmax ? kLog2e : weights == Weights::sigmoid ? -kLog2e : 0.5f;
  }

  // Rows beyond the sequence repeat its last one.
  __device__ __forceinline__ void load_query(QuerySlice& to, int m, int slice, int first) const {
    const int lane = threadIdx.x % kWarpSize, chunk = 4 * slice + lane % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = min(first + 16 * m + 8 * h + lane / 4, queries_.rows - 1);
      const T* from = queries_.data + row * queries_.stride;
      load_chunk(to.words[h], from, chunk, queries_.columns,
                 queries_.aligned && queries_.columns == kBucket);
    }
  }

  // Calls step(Index<m>, key, place) for each row tile m and kMaskedKeys keys that it may see.
  template <typename Step>
  __device__ __forceinline__ void each_step(Addresses& at, int key0, const Step& step) const {
    const WarpPlace own = place();
#pragma unroll 1
    for (const int end = key0 + Shape::kTileKeys; key0 < end; key0 += kMaskedKeys) {
      unroll<kRowTiles>([&](auto m) {
        const WarpPlace now = recall(own);
        int row = now.first + 16 * m;
        opt_barrier(row);
        const int row_end = min(row + 16, now.last + 1);
        if (row < row_end && key0 < now.band.end(row_end - 1) &&
            key0 + kMaskedKeys > now.band.begin(row) && sees<m, kPart>(key0))
          step(m, key0, own);
      });
      at.move(kMaskedKeys * Shape::kRowBytes);
    }
    at.move(-Shape::kTileBytes);
  }

  // Where registers are short, state is reloaded, not kept from the start of a tile on.
  __device__ WarpPlace recall(const WarpPlace& of_tile) const {
    return kGeneral || kLean ? place() : of_tile;
  }

  // Mask of the warp's head.
  __device__ __forceinline__ HeadMask mask_of(const WarpPlace& own) const {
    return {
        mask_, bounds_, own.b, own.h, {own.q_start, own.k_start, own.last + 1, own.band.columns}};
  }

  __device__ uint32_t sights_of_tile(int key0) const {
    const int second = key0 / Shape::kTileKeys % 2;
    return shared_address(spilled_) + kSightsAt + second * kMaxWarps * 4;
  }
  __device__ uint32_t sights_address(int key0) const {
    return sights_of_tile(key0) + thread_index() / kWarpSize * 4;
  }
  // True if some (kWhole: all) pairs of row tile kFirst and kMaskedKeys keys are visible.
  template <int kFirst, int kAsked>
  __device__ __forceinline__ bool sees(int key0) const {
    if (!kGeneral || !mask_.any()) return true;
    const int step = key0 % Shape::kTileKeys / kMaskedKeys;
    return load_word<0>(sights_address(key0)) >> (step * kRowTiles + kFirst + 16 * kAsked) & 1;
  }

  template <int kFirst, int kCount, int kKeys, int kOffset, bool kMasked>
  __device__ __forceinline__ void add_step(const Addresses& at, int key0,
                                           const WarpPlace& of_tile) {
    // Tested before S: later there would be no registers for it.
    bool infinite = false;
    if constexpr (kMasked)
      infinite = (is_cut<kFirst, kKeys>(key0, recall(of_tile)) || !sees<kFirst, kWhole>(key0)) &&
                 !all_finite<T, kKeys, kTiles>(at);
    float s[kCount][kKeys / 8][4];
    multiply_keys<kFirst, kCount, kKeys, kOffset>(s, at);  // S = Q K^T
    const WarpPlace own = recall(of_tile);
    if constexpr (kGeneral) apply_score_mod<kFirst>(s, key0, own);
    const bool cut = kMasked && is_cut<kFirst, kKeys>(key0, own);
    if constexpr (kMasked)
      if (cut) hide<kFirst>(s, key0, own);
    if constexpr (kGeneral && kMasked)
      if (!sees<kFirst, kWhole>(key0)) hide_pairs<kFirst>(s[0], key0);
    Fragment<T, 4> p[kCount][kKeys / kDepth];  // P = f(S)
    if (weights() == Weights::softmax) {
      softmax_weights<kFirst, false>(s, factor_, neg_row_max_, sum_, out_, p);
      if constexpr (kGeneral)
        if (score_mod_.p.post_decay) fade<kFirst>(p[0], key0);
    } else if (weights() == Weights::sigmoid) {
      sigmoid_weights(s, p, tail_ && !cut);
    } else if (weights() == Weights::elementwise) {
      elementwise_weights<kFirst, kMasked>(s, p);
    } else {
      fast_sigmoid_weights(s, p);
    }
    const auto nothing = [](auto) {};
    if constexpr (kMasked) {
      if (infinite) {
        const WarpPlace now = place();
        const int row = now.first + 16 * kFirst + threadIdx.x % kWarpSize / 4;
        const bool sees_all = sees<kFirst, kWhole>(key0);
        const auto sees = [&](int half, int key) {
          return key0 + key >= now.band.begin(row + 8 * half) &&
                 key0 + key < now.band.end(row + 8 * half) &&
                 (sees_all || mask_of(now).sees(row + 8 * half, key0 + key));
        };
        const bool any_sign = weights() == Weights::elementwise && map_ == ScoreMap::linear;
        multiply_seen_values<T, kFirst, kKeys>(out_, p, at, nothing, sees, any_sign);
        return;
      }
    }
    multiply_values<T, kFirst, kOffset>(out_, p, at, nothing);  // O += P V
  }

  template <int kFirst, int kCount, int kKeys, int kOffset>
  __device__ __forceinline__ void multiply_keys(float (&s)[kCount][kKeys / 8][4],
                                                const Addresses& at) {
    if constexpr (Shape::kQueryInRegisters) {
      multiply_held<T, Shape::kSlices, kOffset>(s, at,
                                                [&](int m, auto j) { return q_[kFirst + m][j]; });
    } else {
      const int first = place().first;
      multiply_loaded<T, Shape::kSlices, kOffset>(
          s, at,
          [&](int m, auto j, int i) {
            QuerySlice slice;
            load_query(slice, kFirst + m, i + j, first);
            return slice;
          },
          [] {});
    }
  }

  // Calls visit(row tile, key tile, i, row, key) for the accumulators of this lane.
  template <int kFirst, int kCount, int kKeyTiles, typename Visit>
  __device__ __forceinline__ void each_pair(int key0, const WarpPlace& own,
                                            const Visit& visit) const {
    int lane = threadIdx.x % kWarpSize;
    opt_barrier(lane);
#pragma unroll
    for (int m = 0; m < kCount; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
          visit(m, n, i, own.first + 16 * (kFirst + m) + 8 * (i / 2) + lane / 4,
                key0 + 8 * n + 2 * (lane % 4) + i % 2);
  }

  template <int kFirst, int kCount, int kKeyTiles>
  __device__ __forceinline__ void apply_score_mod(float (&s)[kCount][kKeyTiles][4], int key0,
                                                  const WarpPlace& own) const {
    each_pair<kFirst, kCount, kKeyTiles>(key0, own, [&](int m, int n, int i, int row, int key) {
      const float z = score_mod_.logit(s[m][n][i], row, key);
      s[m][n][i] = weights() == Weights::softmax ? score_mod_.softmax_exponent(z) : z;
    });
  }

  // ALiBi as decay: scales softmax weights after the row sum.
  template <int kFirst, int kBlocks>
  __device__ __forceinline__ void fade(Fragment<T, 4> (&p)[kBlocks], int key0) const {
    scale_weights<T>(p, [&](int half, int column) {
      int lane = threadIdx.x % kWarpSize;
      opt_barrier(lane);
      const int row = place().first + 16 * kFirst + 8 * half + lane / 4;
      return score_mod_.fade(score_mod_.distance(row, key0 + column + 2 * (lane % 4)));
    });
  }

  // True if some row of tile kFirst does not see some of kKeys keys (band mask).
  template <int kFirst, int kKeys>
  static __device__ __forceinline__ bool is_cut(int key0, const WarpPlace& own) {
    const int first = own.first + 16 * kFirst;
    return key0 < own.band.begin(min(first + 15, own.last)) || key0 + kKeys > own.band.end(first);
  }

  template <int kFirst, int kCount, int kKeyTiles>
  __device__ __forceinline__ void hide(float (&s)[kCount][kKeyTiles][4], int key0,
                                       const WarpPlace& own) const {
    each_pair<kFirst, kCount, kKeyTiles>(key0, own, [&](int m, int n, int i, int row, int key) {
      if (key < own.band.begin(row) || key >= own.band.end(row)) s[m][n][i] = -infinity();
    });
  }

  // Masks of ranges and spans: S = -inf for hidden pairs.
  template <int kFirst, int kKeyTiles>
  __device__ __forceinline__ void hide_pairs(float (&s)[kKeyTiles][4], int key0) const {
    const WarpPlace own = place();
    int lane = threadIdx.x % kWarpSize;
    opt_barrier(lane);
    unsigned seen = 0;
#pragma unroll 1
    for (int i = 0; i < 4 * kKeyTiles; ++i) {
      const int row = own.first + 16 * kFirst + i / 2 % 2 * 8 + lane / 4;
      const int key = key0 + i / 4 * 8 + 2 * (lane % 4) + i % 2;
      seen |= static_cast<unsigned>(mask_of(own).sees(row, key)) << i;
    }
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (!(seen >> (4 * n + i) & 1)) s[n][i] = -infinity();
  }

  // 1 / (1 + 2^t), two special functions each. Where those bind, weights take only one if all of
  // the warp's are small; not where a mask cuts: a row would depend on keys that it does not see.
  template <int kCount, int kKeyTiles, int kBlocks>
  __device__ __forceinline__ void sigmoid_weights(const float (&s)[kCount][kKeyTiles][4],
                                                  Fragment<T, 4> (&p)[kCount][kBlocks],
                                                  bool tail) const {
    if constexpr (kHasTail)
      if (tail && tail_weights(s, p)) return;
    apply_map(s, p, [&](float x) {
      return reciprocal_approx(exp2_approx(fmaf(x, factor_, offset_)) + 1 / kScale<T>);
    });
  }

  // e / (1 + e), e = 2^-t, as e + e^2 (a + b e), relative error 2^-12 up to e = 0.2. Returns false,
  // warp by warp, if a weight is larger. float16 has the digits to do it on packed pairs: only e
  // and the sum are rounded to relative 2^-12.
  template <int kCount, int kKeyTiles, int kBlocks>
  __device__ __forceinline__ bool tail_weights(const float (&s)[kCount][kKeyTiles][4],
                                               Fragment<T, 4> (&p)[kCount][kBlocks]) const {
    constexpr float kA = -0.98670116f, kB = 0.77178835f;
    constexpr bool kPacked = std::is_same_v<T, __half>;
    apply_map(s, p, [&](float x) {
      const float e = exp2_approx(fmaf(x, -factor_, -offset_));
      return kPacked ? e : fmaf(e * e, fmaf(e, kB, kA), e);
    });
    constexpr uint32_t kInverseScale2 = 0x02000200, kA2 = 0xbbe5bbe5, kB2 = 0x3a2d3a2d;
    uint32_t top = p[0][0].words[0];
#pragma unroll
    for (int m = 0; m < kCount; ++m)
#pragma unroll
      for (int k = 0; k < kBlocks; ++k)
#pragma unroll
        for (uint32_t& word : p[m][k].words) {
          top = max_packed<T>(top, word);
          if constexpr (kPacked) {
            const uint32_t e = mul_packed(word, kInverseScale2);
            word = fma_packed(mul_packed(fma_packed(e, kB2, kA2), e), word, word);
          }
        }
    // Weights are not negative, so their bits compare like integers.
    top = max(top & 0xffff, top >> 16);
    return !__any_sync(kFullWarp, top > pack<T>(kPacked ? kScale<T> / 5 : 1 / 6.f, 0));
  }

  // Elementwise weights and row sums; for Normalize::count the sums count visible keys.
  template <int kFirst, bool kMasked, int kCount, int kKeyTiles, int kBlocks>
  __device__ __forceinline__ void elementwise_weights(const float (&s)[kCount][kKeyTiles][4],
                                                      Fragment<T, 4> (&p)[kCount][kBlocks]) {
    visit_map<T, kMasked || kGeneral>(map_, [&](const auto& map) {
#pragma unroll
      for (int m = 0; m < kCount; ++m) {
        float e[kKeyTiles][4], sums[2] = {0, 0};
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float z = kGeneral ? s[m][n][i] : fmaf(s[m][n][i], factor_, offset_);
            e[n][i] = map(z);
            const bool counts = kGeneral && normalize_ == Normalize::count;
            sums[i / 2] += counts ? z != -infinity() : e[n][i];
          }
        sum_[kFirst + m][0] += sums[0];
        sum_[kFirst + m][1] += sums[1];
        set_fragments(p[m], e);
      }
    });
  }

  template <int kCount, int kKeyTiles, int kBlocks, typename Map>
  static __device__ __forceinline__ void apply_map(const float (&s)[kCount][kKeyTiles][4],
                                                   Fragment<T, 4> (&p)[kCount][kBlocks],
                                                   const Map& map) {
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      float e[kKeyTiles][4];
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) e[n][i] = map(s[m][n][i]);
      set_fragments(p[m], e);
    }
  }

  template <int kCount, int kKeyTiles, int kBlocks>
  __device__ __forceinline__ void fast_sigmoid_weights(const float (&s)[kCount][kKeyTiles][4],
                                                       Fragment<T, 4> (&p)[kCount][kBlocks]) const {
    // float16 keeps what tanh.approx resolves near -1; bfloat16 would not.
    constexpr bool kPacked = std::is_same_v<T, __half>;
    apply_map(s, p, [&](float x) {
      const float t = tanh_approx(fmaf(x, factor_, offset_));
      return kPacked ? t : fmaf(t, 0.5f, 0.5f);
    });
    if constexpr (kPacked) {
#pragma unroll
      for (int m = 0; m < kCount; ++m)
#pragma unroll
        for (int k = 0; k < kBlocks; ++k)
#pragma unroll
          for (uint32_t& word : p[m][k].words) word = half_plus_half(word);
    }
  }

  WarpPlace place_;
  Weights weights_;
  ScoreMap map_;
  Normalize normalize_;
  ScoreMod score_mod_;
  float factor_, offset_ = 0;
  bool tail_;  // most weights are small
  GlobalRows<T> queries_;
  const PairMask& mask_;
  const MaskBounds& bounds_;
  WarpPlace* spilled_;
  QuerySlice q_[kRowTiles][Shape::kQueryInRegisters ? Shape::kSlices : 1];
};

}  // namespace tokenmill::cuda
