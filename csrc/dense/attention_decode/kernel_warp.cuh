// What attention_decode knows of the keys of a request, and what its scores become: masks and
// score mod.
#pragma once
#include "cuda/attention/pair_mask.cuh"
#include "dense/attention_decode/kernel_products.cuh"

namespace tokenmill::cuda {

template <typename T, int kBucket, bool kMasked>
class DecodeWarp;

// Key t of a row is key t of the request: where dense and paged caches differ. kMasked_: calls with
// a mask, which have instances of their own.
template <typename T, int kBucket, bool kMasked_ = false>
class CacheKeys {
 public:
  using Params = DecodeParams;
  using Element = T;
  using Shape = DecodeShape<T, kBucket>;
  using Warp = DecodeWarp<T, kBucket, kMasked_>;
  using Key = KvCache::Slot;
  static constexpr int kBytes = 2 * Shape::kTileKeys * static_cast<int>(sizeof(Key));
  static constexpr bool kTurns = false;
  static constexpr bool kMasked = kMasked_;

  __device__ CacheKeys(const DecodeParams& d, unsigned char* shared)
      : d_(d), slots_(reinterpret_cast<Key*>(shared)) {}

  __device__ __forceinline__ Key find(const Segment& s, int t, int end) const {
    return d_.cache.slot(s.b, min(t, end - 1));
  }

  // Where in shared memory the keys of a tile are kept, which starts at key `key0`.
  static __device__ __forceinline__ int place(int stage, int) { return stage * Shape::kTileKeys; }
  __device__ __forceinline__ void store(int at, Key key) { slots_[at] = key; }

  template <bool kValues>
  __device__ __forceinline__ const T* row(const Segment& s, int at) const {
    const Rows& rows = kValues ? d_.cache.v : d_.cache.k;
    return static_cast<const T*>(rows.data) + KvCache::offset(rows, slots_[at], s.h);
  }
  __device__ static bool exists(int) { return true; }

 private:
  const DecodeParams& d_;
  Key* slots_;
};

template <typename T, int kBucket, bool kMasked>
class DecodeWarp : public DecodeProducts<T, kBucket> {
 public:
  using Products = DecodeProducts<T, kBucket>;
  using typename Products::Addresses;
  using typename Products::Shape;

  __device__ DecodeWarp(const DecodeParams& d, const DecodePlan& plan, uint32_t queries)
      : Products(plan, queries),
        p_(d.attention),
        group_(plan.group),
        softmax_(p_.map == ScoreMap::softmax),
        unit_(softmax_ ? kLog2e : 1) {}

  // Rows that do not exist see no key.
  __device__ __forceinline__ void start(const DecodePlan& plan, const Segment& s,
                                        const DecodeParams& d,
                                        const CacheKeys<T, kBucket, kMasked>&) {
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

  // Adds the kStepKeys keys from `key` on, at `at`. Nothing behind `end` counts.
  __device__ __forceinline__ void add_step(const CacheKeys<T, kBucket, kMasked>&,
                                           const Addresses& at, int, int key, int end) {
    unsigned seen = 0;
    if constexpr (kMasked) {
      seen = seen_pairs(key, end);
      if (!__any_sync(kFullWarp, seen)) return;
    }
    float s[kKeyTiles][4];
    this->multiply_keys(s, at);
    if (general_) {
      apply_score_mod(s, key);
    } else {
      const float factor = unit_ * p_.scale;
      Products::each_score(
          s, [&](float& x, int half, int) { x = fmaf(x, factor, unit_ * constant_[half]); });
    }
    bool cut = key < whole_begin_ || key + Shape::kStepKeys > min(whole_end_, end);
    if constexpr (kMasked) {
      cut = !__all_sync(kFullWarp, seen == (1u << 4 * kKeyTiles) - 1);
      hide_unseen(s, seen);
    } else if (cut) {
      hide(s, key, end);
    }
    if (softmax_)
      this->exponentiate(s);
    else
      visit_map<T, true>(p_.map, [&](const auto& map) {
        Products::each_score(s, [&](float& z, int half, int) { sum_[half] += z = map(z); });
      });
    this->multiply_values(
        s, at, cut,
        [&](int half, int k) {
          return sees(half, key + k, end) && (!kMasked || shows(8 * half, key + k));
        },
        p_.map == ScoreMap::linear);
  }

 private:
  using Products::active_, Products::row_warp_, Products::sum_, Products::kKeyTiles;

  __device__ __forceinline__ void apply_score_mod(float (&s)[kKeyTiles][4], int key0) const {
    Products::each_score(s, [&](float& x, int half, int key) {
      float z = x * p_.scale;
      if (p_.softcap > 0) z = apply_softcap(z, p_.softcap);
      const int distance = end_[half] - 1 - (key0 + key);  // the row's own key is its last one
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

  // What the mask shows to row g, or to the one `more` rows behind it, which must exist.
  __device__ __forceinline__ bool shows(int more, int key) const {
    const int row = first_row_ + more + static_cast<int>(threadIdx.x % kWarpSize) / 4;
    const int h = kv_head_ * group_ + row % group_;
    return sees_pair(p_.mask, b_, h, row / group_, key, key);
  }

  // Scores 4 n + i that the mask and the band show, as bits.
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
  int whole_begin_, whole_end_;  // of the keys that all rows see
  int begin_[2], end_[2];        // of rows g and g + 8
  float slope_[2], constant_[2];
};

}  // namespace tokenmill::cuda
