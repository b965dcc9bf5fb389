// What attention_decode knows of the keys of a request, and what its scores become: masks and
// score mod.
#pragma once
#include "dense/attention_decode/kernel_products.cuh"

namespace tokenmill::cuda {

template <typename T, int kBucket>
class DecodeWarp;

// Key t of a row is key t of the request: where dense and paged caches differ.
template <typename T, int kBucket>
class CacheKeys {
 public:
  using Params = DecodeParams;
  using Element = T;
  using Shape = DecodeShape<T, kBucket>;
  using Warp = DecodeWarp<T, kBucket>;
  using Key = KvCache::Slot;
  static constexpr int kBytes = 2 * Shape::kTileKeys * static_cast<int>(sizeof(Key));
  static constexpr bool kTurns = false;

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

template <typename T, int kBucket>
class DecodeWarp : public DecodeProducts<T, kBucket> {
 public:
  using Products = DecodeProducts<T, kBucket>;
  using typename Products::Addresses;
  using typename Products::Shape;

  __device__ DecodeWarp(const DecodeParams& d, const DecodePlan& plan, uint32_t queries)
      : Products(plan, queries),
        p_(d.attention),
        softmax_(p_.map == ScoreMap::softmax),
        unit_(softmax_ ? kLog2e : 1) {}

  // Rows that do not exist see no key.
  __device__ __forceinline__ void start(const DecodePlan& plan, const Segment& s,
                                        const DecodeParams& d, const CacheKeys<T, kBucket>&) {
    const int length = static_cast<int>(d.cache.length(s.b));
    const int first = s.row_tile * plan.tile_rows + row_warp_ * 16;
    const int diagonal = length - static_cast<int>(p_.seqlen_q);
    const Band band = decode_band(p_, length);
    active_ = first < plan.rows;
    const int last = min(first + 15, plan.rows - 1);
    whole_begin_ = static_cast<int>(band.begin(last / plan.group));
    whole_end_ = first / plan.group + diagonal + 1;
    general_ = p_.softcap > 0 || p_.alibi_slopes;
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
  __device__ __forceinline__ void add_step(const CacheKeys<T, kBucket>&, const Addresses& at, int,
                                           int key, int end) {
    float s[kKeyTiles][4];
    this->multiply_keys(s, at);
    if (general_) {
      apply_score_mod(s, key);
    } else {
      const float factor = unit_ * p_.scale;
      Products::each_score(
          s, [&](float& x, int half, int) { x = fmaf(x, factor, unit_ * constant_[half]); });
    }
    const bool cut = key < whole_begin_ || key + Shape::kStepKeys > min(whole_end_, end);
    if (cut) hide(s, key, end);
    if (softmax_)
      this->exponentiate(s);
    else
      visit_map<T, true>(p_.map, [&](const auto& map) {
        Products::each_score(s, [&](float& z, int half, int) { sum_[half] += z = map(z); });
      });
    this->multiply_values(
        s, at, cut, [&](int half, int k) { return sees(half, key + k, end); },
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

  const AttentionParams& p_;
  bool softmax_, general_;
  float unit_;
  int whole_begin_, whole_end_;  // of the keys that all rows see
  int begin_[2], end_[2];        // of rows g and g + 8
  float slope_[2], constant_[2];
};

}  // namespace tokenmill::cuda
