// Keys of attention_decode in a KV cache, and the masks and score_mod of its warps.
#pragma once
#include "attention/pair_mask.cuh"
#include "dense/attention_decode/kernel_products.cuh"

namespace tokenmill::cuda {

template <typename Keys>
class DecodeWarp;

// Slot and scales of a key in a Float8 cache.
struct ScaledKey {
  KvCache::Slot at;
  float k_scale, v_scale;
};

// Keys of a request: row t is key t. Hides the difference between dense and paged caches. kMasked_:
// calls with a mask have instances of their own; Float8 caches and latent heads have one instance
// for both.
template <typename T, int kBucket, bool kMasked_ = false, typename Cache = T>
class CacheKeys {
 public:
  using Params = DecodeParams;
  using Element = T;
  using Shape = DecodeShape<T, kBucket, Cache>;
  using Warp = DecodeWarp<CacheKeys>;
  static constexpr bool kFloat8 = Shape::kFloat8;
  using Key = std::conditional_t<kFloat8, ScaledKey, KvCache::Slot>;
  // Ring of two tiles or, where scales are read while a tile is processed, of four: one processed,
  // one loading, one looked up, and one that slower warps may still process.
  static constexpr int kRing = kFloat8 ? 4 : 2;
  static constexpr int kSlots = kRing * Shape::kTileKeys;
  static constexpr int kBytes = kSlots * static_cast<int>(sizeof(Key));
  static constexpr bool kTurns = false, kExtras = false;
  static constexpr bool kMasked = kMasked_;
  static_assert(kMasked || !(kFloat8 || Shape::kLatent));

  __device__ CacheKeys(const DecodeParams& d, unsigned char* shared)
      : d_(d), slots_(reinterpret_cast<KvCache::Slot*>(shared)) {}

  __device__ __forceinline__ Key find(const Segment& s, int t, int end) const {
    const KvCache::Slot at = d_.cache.slot(s.b, min(t, end - 1));
    if constexpr (kFloat8)
      return {at, d_.cache.k_scale.at(at.page, at.row, s.h),
              d_.cache.v_scale.at(at.page, at.row, s.h)};
    else
      return at;
  }

  // First entry in shared memory of the keys of the tile that starts at key `key0`.
  static __device__ __forceinline__ int place(int stage, int key0) {
    return (kFloat8 ? key0 / Shape::kTileKeys % kRing : stage) * Shape::kTileKeys;
  }
  __device__ __forceinline__ void store(int at, Key key) {
    if constexpr (kFloat8) {
      slots_[at] = key.at;
      scales()[at] = key.k_scale;
      scales()[kSlots + at] = key.v_scale;
    } else {
      slots_[at] = key;
    }
  }

  template <bool kValues>
  __device__ __forceinline__ const Cache* row(const Segment& s, int at) const {
    const Rows& rows = kValues ? d_.cache.v : d_.cache.k;
    return static_cast<const Cache*>(rows.data) + KvCache::offset(rows, slots_[at], s.h);
  }
  // Shared-memory address of the scales from entry `at` on.
  __device__ uint32_t k_scales(int at) const { return shared_address(scales() + at); }
  __device__ uint32_t v_scales(int at) const { return shared_address(scales() + kSlots + at); }
  __device__ static bool exists(int) { return true; }

 private:
  __device__ float* scales() const { return reinterpret_cast<float*>(slots_ + kSlots); }

  const DecodeParams& d_;
  KvCache::Slot* slots_;
};

template <typename Keys>
class DecodeWarp
    : public DecodeProducts<typename Keys::Element, Keys::Shape::kBucket, typename Keys::Shape> {
 public:
  using T = typename Keys::Element;
  using Shape = typename Keys::Shape;
  using Products = DecodeProducts<T, Shape::kBucket, Shape>;
  using typename Products::Addresses;
  static constexpr bool kMasked = Keys::kMasked;

  __device__ DecodeWarp(const DecodeParams& d, const DecodePlan& plan, uint32_t queries)
      : Products(plan, queries),
        p_(d.attention),
        group_(plan.group),
        softmax_(p_.map == ScoreMap::softmax),
        unit_(softmax_ ? kLog2e : 1) {}

  // Rows beyond the last one see no key.
  __device__ __forceinline__ void start(const DecodePlan& plan, const Segment& s,
                                        const DecodeParams& d, const Keys&) {
    const int length = static_cast<int>(d.cache.length(s.b));
    const int first = s.row_tile * plan.tile_rows + row_warp_ * 16;
    const int diagonal = length - static_cast<int>(p_.seqlen_q);
    const Band band = decode_band(p_, p_.seqlen_q, length);
    active_ = first < plan.rows;
    const int last = min(first + 15, plan.rows - 1);
    whole_begin_ = static_cast<int>(band.begin(last / plan.group));
    whole_end_ = first / plan.group + diagonal + 1;
    general_ = p_.softcap > 0 || p_.alibi_slopes;
    b_ = s.b, kv_head_ = s.h, first_row_ = first;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + 8 * half + static_cast<int>(threadIdx.x % kWarpSize) / 4;
      const int i = row / plan.group, h = s.h * plan.group + row % plan.group;
      const bool exists = row < plan.rows;
      begin_[half] = exists ? static_cast<int>(band.begin(i)) : 0;
      end_[half] = exists ? i + diagonal + 1 : 0;
      slope_[half] = exists && p_.alibi_slopes ? p_.alibi_slopes[s.b * p_.alibi_batch + h] : 0;
      constant_[half] = exists && !softmax_ ? constant_of(p_, s.b, h, length) : 0;
    }
  }

  // One step: the kStepKeys keys from `key` on, with fragments at `at` and ring entries from
  // `place` on. Keys from `end` on are masked.
  __device__ __forceinline__ void add_step(const Keys& keys, const Addresses& at, int place,
                                           int key, int end) {
    unsigned seen = 0;
    if constexpr (kMasked)
      if (masks()) {
        seen = seen_pairs(key, end);
        if (!__any_sync(kFullWarp, seen)) return;
      }
    float s[kKeyTiles][4];
    this->multiply_keys(s, at);  // S = Q K^T
    if constexpr (Shape::kFloat8) scale_scores(s, keys.k_scales(place));
    if (general_) {
      apply_score_mod(s, key);
    } else {
      const float factor = unit_ * p_.scale;
      Products::each_score(
          s, [&](float& x, int half, int) { x = fmaf(x, factor, unit_ * constant_[half]); });
    }
    bool cut = key < whole_begin_ || key + Shape::kStepKeys > min(whole_end_, end);
    if (masks()) {
      cut = !__all_sync(kFullWarp, seen == (1u << 4 * kKeyTiles) - 1);
      hide_unseen(s, seen);
    } else if (cut) {
      hide(s, key, end);
    }
    if (softmax_)  // P = f(S)
      this->exponentiate(s);
    else
      visit_map<T, true>(p_.map, [&](const auto& map) {
        Products::each_score(s, [&](float& z, int half, int) { sum_[half] += z = map(z); });
      });
    const auto sees_key = [&](int half, int k) {
      return sees(half, key + k, end) && (!masks() || shows(8 * half, key + k));
    };
    if constexpr (Shape::kFloat8) scale_weights(s, keys.v_scales(place), sees_key);
    this->multiply_values(s, at, cut, sees_key, p_.map == ScoreMap::linear);  // O += P V
  }

 private:
  using Products::active_, Products::row_warp_, Products::sum_, Products::kKeyTiles;

  __device__ __forceinline__ bool masks() const {
    return kMasked && (!(Shape::kFloat8 || Shape::kLatent) || p_.mask.any());
  }

  __device__ __forceinline__ void apply_score_mod(float (&s)[kKeyTiles][4], int key0) const {
    Products::each_score(s, [&](float& x, int half, int key) {
      float z = x * p_.scale;
      if (p_.softcap > 0) z = apply_softcap(z, p_.softcap);
      // the row's own key is its last visible one
      const int distance = end_[half] - 1 - (key0 + key);
      z = fmaf(-slope_[half], fabsf(static_cast<float>(distance)), z) + constant_[half];
      x = z * unit_;
    });
  }

  __device__ __forceinline__ void hide(float (&s)[kKeyTiles][4], int key0, int end) const {
    Products::each_score(s, [&](float& x, int half, int key) {
      if (!sees(half, key0 + key, end)) x = -infinity();
    });
  }

  __device__ __forceinline__ bool sees(int half, int key, int end) const {
    return key >= begin_[half] && key < min(end_[half], end);
  }

  // Visibility under the mask of `key` to row g + more, which must exist.
  __device__ __forceinline__ bool shows(int more, int key) const {
    const int row = first_row_ + more + static_cast<int>(threadIdx.x % kWarpSize) / 4;
    const int h = kv_head_ * group_ + row % group_;
    return sees_pair(p_.mask, b_, h, row / group_, key, key);
  }

  // Bits of the scores 4 n + i that mask and band leave visible.
  __device__ __forceinline__ unsigned seen_pairs(int key0, int end) const {
    unsigned seen = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll 1
      for (int i = 0; i < 2 * kKeyTiles; ++i) {
        const int key = key0 + i / 2 * 8 + 2 * (threadIdx.x % 4) + i % 2;
        if (sees(half, key, end) && shows(8 * half, key))
          seen |= 1u << (i / 2 * 4 + 2 * half + i % 2);
      }
    return seen;
  }
  __device__ __forceinline__ void hide_unseen(float (&s)[kKeyTiles][4], unsigned seen) const {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (!(seen >> (4 * n + i) & 1)) s[n][i] = -infinity();
  }

  const AttentionParams& p_;
  int group_, b_, kv_head_, first_row_;  // for masks
  bool softmax_, general_;
  float unit_;
  int whole_begin_, whole_end_;  // keys that all rows see
  int begin_[2], end_[2];        // visible keys of rows g and g + 8
  float slope_[2], constant_[2];
};

}  // namespace tokenmill::cuda
