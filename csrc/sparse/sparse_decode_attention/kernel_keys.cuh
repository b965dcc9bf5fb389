// Key sequence of a list head, as a key source of the attention_decode engine.
#pragma once
#include "dense/attention_decode/kernel_products.cuh"
#include "sparse/sparse_decode_attention/params.h"

namespace tokenmill::cuda::sparse_decode_attention {

// Launch parameters added by the host.
template <class Params>
struct ListedLaunch : Params {
  // For mass: log2-unit exponents of listed keys, one row of `logit_row` per row of each list head.
  // Null without mass.
  float* logits;
  int64_t logit_row;
  int2* listed;      // [B, row heads], range of entries that each list adds: first and last + 1
  bool wide_tables;  // rotary tables allow vector loads of four elements
  int cut_keys;  // splits begin at multiples of cut_keys in the sequence: a tile, or a part of one
};
struct SparseLaunch : ListedLaunch<SparseDecodeParams> {};

// Minimum number of keys per split when the host splits for more CTAs.
constexpr int kMinCut = 32;

// Alignment of the first key in a row of logits: the kernel stores whole steps.
constexpr int kLogitAlign = 16;

// KeyRow::of, computed by all threads of the CTA. Each warp searches for both ends of the list at
// once, four halvings per round: half a warp reads the 15 entries that these may need.
template <class Params>
__device__ __forceinline__ KeyRow find_row(const Params& d, int64_t b, int64_t h) {
  const int lane = threadIdx.x % kWarpSize, node = lane % 16;
  const KeyRow::Listed listed = KeyRow::Listed::of(d, b);
  const int64_t key = lane < 16 ? listed.first_block(d.log2_block) : listed.end;
  const int32_t* list = d.list(b, h);
  const int count = static_cast<int>(d.count(b, h));
  bool ascends = true;
#pragma unroll 1
  for (int e = 1 + static_cast<int>(threadIdx.x); e < count; e += kDecodeThreads)
    ascends &= list[e] > list[e - 1];
  ascends = __syncthreads_and(ascends);
  int low = 0, high = count;
  if (!ascends) low = high = static_cast<int>(KeyRow::scan(list, count, key, d.log2_block));
  const auto halve = [](int& from, int& to, bool below) {
    if (from >= to) return;
    const int middle = (from + to) / 2;
    below ? from = middle + 1 : to = middle;
  };
  while (__any_sync(kFullWarp, low < high)) {
    int from = low, to = high;
    for (int level = 30 - __clz(max(node, 1)); level >= 0; --level)
      halve(from, to, node >> level & 1);
    const bool below = node > 0 && from < to &&
                       int64_t{list[(from + to) / 2]} * (int64_t{1} << d.log2_block) < key;
    const unsigned found = __ballot_sync(kFullWarp, below) >> (lane & 16);
#pragma unroll
    for (int level = 0, at = 1; level < 4; ++level) {
      const bool right = found >> at & 1;
      halve(low, high, right);
      at = 2 * at + right;
    }
  }
  return KeyRow::of(d, b, int64_t{__shfl_sync(kFullWarp, low, 0)},
                    int64_t{__shfl_sync(kFullWarp, low, 16)}, ascends);
}

// Metadata of a key in registers, on its way to shared memory.
struct ListedKey {
  KvCache::Slot at;
  int2 seen_by;      // positions begin .. end - 1 of the queries that see it
  float log2_count;  // log2 of the number of keys that it represents
  int turn;          // row of the rotary tables, -1: no rotation
};

// Key of a Float8 cache.
struct ScaledListedKey : ListedKey {
  float k_scale, v_scale;
};

template <typename Keys>
class SparseWarp;

// Extra keys next to a Float8 cache have type T. Their values are converted to bfloat16: float16
// values in two parts, for which the key occurs twice in the sequence, with half its weight and
// twice its scale.
template <typename T, int kBucket, typename Cache = T, typename Launch = SparseLaunch>
class ListedKeys {
 public:
  using Params = Launch;
  using Element = T;
  using Shape = DecodeShape<T, kBucket, Cache>;
  using Warp = SparseWarp<ListedKeys>;
  static constexpr bool kFloat8 = Shape::kFloat8, kExtras = kFloat8;
  static constexpr bool kSplitsExtras = kFloat8 && kTwoWeights<T>;
  using Key = std::conditional_t<kFloat8, ScaledListedKey, ListedKey>;
  static constexpr int kTile = Shape::kTileKeys;
  // Four tiles: one being computed, one being loaded, one being looked up, and the previous one,
  // which slower warps may still read.
  static constexpr int kRing = 4 * kTile;
  static constexpr int kRowBytes = 128;
  static_assert(sizeof(KeyRow) <= kRowBytes);
  static constexpr int kBytes = kRowBytes + kRing * static_cast<int>(sizeof(Key));
  static constexpr bool kTurns = true;
  static constexpr bool kMasked = false;

  __device__ ListedKeys(const Params& d, unsigned char* shared)
      : d_(d),
        row_(reinterpret_cast<KeyRow*>(shared)),
        at_(reinterpret_cast<KvCache::Slot*>(shared + kRowBytes)),
        seen_by_(reinterpret_cast<int2*>(at_ + kRing)),
        log2_counts_(reinterpret_cast<float*>(seen_by_ + kRing)),
        turns_(reinterpret_cast<int*>(log2_counts_ + kRing)) {}

  // Key range of this CTA; false if empty. Called by all threads.
  __device__ __forceinline__ bool take(const DecodePlan& plan, Segment& s) {
    const int tiles = static_cast<int>(d_.row_heads()) * plan.row_tiles;
    s.output = blockIdx.x / plan.splits;
    s.b = static_cast<int>(s.output / tiles);
    const int tile = static_cast<int>(s.output % tiles);
    s.h = tile / plan.row_tiles;
    s.row_tile = tile % plan.row_tiles;
    s.first_block = s.output * plan.splits;
    s.part = blockIdx.x % plan.splits;
    const KeyRow found = find_row(d_, s.b, s.h);
    if (threadIdx.x == 0) {
      *row_ = found;
      if (d_.listed && s.part == 0 && s.row_tile == 0)
        d_.listed[s.b * d_.row_heads() + s.h] = {static_cast<int>(found.first),
                                                 static_cast<int>(found.last)};
    }
    __syncthreads();
    const int total = static_cast<int>(found.total + (kSplitsExtras ? d_.extra : 0));
    const int cut = d_.cut_keys, steps = total > 0 ? (total + cut - 1) / cut : 1;
    s.parts = min(plan.splits, steps);
    if (s.part >= s.parts) return false;
    s.begin = static_cast<int>(int64_t{s.part} * steps / s.parts) * cut;
    s.end = min(static_cast<int>(int64_t{s.part + 1} * steps / s.parts) * cut, total);
    return true;
  }

  __device__ __forceinline__ Key find(const Segment& s, int t, int end) const {
    const ListedKey key = find_listed(s, t, end);
    if constexpr (kFloat8) {
      if (key.seen_by.x == kNever) return {key, 1, 1};
      if (key.at.row == RowKey::kExtra) return {key, 1, kSplitsExtras ? 2.f : 1.f};
      const int64_t h = d_.kv_head(s.h);
      return {key, d_.cache.k_scale.at(key.at.page, key.at.row, h),
              d_.cache.v_scale.at(key.at.page, key.at.row, h)};
    } else {
      return key;
    }
  }
  __device__ __forceinline__ ListedKey find_listed(const Segment& s, int t, int end) const {
    ListedKey key{{0, 0}, {kNever, kNever}, 0, -1};
    if (t >= end) return key;
    const int number = t - static_cast<int>(row_->cached);  // index of an extra key, or of its part
    const int part = kSplitsExtras && number >= 0 ? number - number / 2 : 0;
    const RowKey found = row_->key(d_, s.b, s.h, t - part);
    if (found.at.row == RowKey::kExtra) {
      key.at = found.at;
      const float log2_count = extra_log2_count(s, found.at.page);
      if (log2_count == -infinity()) return key;
      key.seen_by.x = -kNever;
      key.log2_count = log2_count;
      if constexpr (kSplitsExtras) key.at.page = number, key.log2_count -= 1;
      return key;
    }
    if (found.position == RowKey::kNowhere) return key;
    // Clamped; more than the length of any request makes no difference.
    const int recent = static_cast<int>(d_.num_recent < kMaxLength ? d_.num_recent : kMaxLength);
    const bool is_recent = t >= row_->list_end;
    const int begin = found.position + (is_recent ? 0 : recent);
    if (begin >= row_->length) return key;
    key.at = found.at;
    key.seen_by = {begin, is_recent ? found.position + recent : kNever};
    if (d_.cos) key.turn = table_row(d_.cache_positions ? t : found.position);
    return key;
  }

  static __device__ __forceinline__ int place(int, int key0) { return key0 & (kRing - kTile); }

  __device__ __forceinline__ void store(int at, const Key& key) {
    at_[at] = key.at;
    seen_by_[at] = key.seen_by;
    log2_counts_[at] = key.log2_count;
    turns_[at] = key.turn;
    if constexpr (kFloat8) scales()[at] = key.k_scale, scales()[kRing + at] = key.v_scale;
  }

  template <bool kValues>
  __device__ __forceinline__ const Cache* row(const Segment& s, int at) const {
    const KvCache::Slot slot = at_[at];
    const bool extra = !kFloat8 && slot.row == RowKey::kExtra;
    const Rows& cache = kValues ? d_.cache.v : d_.cache.k;
    const Rows& added = kValues ? d_.extra_v : d_.extra_k;
    const int64_t h = d_.kv_head(s.h);
    const int64_t offset = extra ? s.b * added.batch + slot.page * added.seq + h * added.head
                                 : KvCache::offset(cache, slot, h);
    return static_cast<const Cache*>(extra ? added.data : cache.data) + offset;
  }
  // False for masked keys, whose rows are not read, and for extra keys next to a Float8 cache,
  // which extra_row reads.
  __device__ __forceinline__ bool exists(int at) const {
    return seen_by_[at].x != kNever && !(kFloat8 && at_[at].row == RowKey::kExtra);
  }
  // Row of an extra key next to a Float8 cache, or null.
  template <bool kValues>
  __device__ __forceinline__ const T* extra_row(const Segment& s, int at) const {
    if (at_[at].row != RowKey::kExtra) return nullptr;
    const Rows& added = kValues ? d_.extra_v : d_.extra_k;
    const int64_t number = at_[at].page / (kSplitsExtras ? 2 : 1);
    return static_cast<const T*>(added.data) + s.b * added.batch + number * added.seq +
           d_.kv_head(s.h) * added.head;
  }
  __device__ bool is_lost_part(int at) const { return at_[at].page % 2; }

  // Shared memory addresses of the scales of the keys from a place on.
  __device__ uint32_t k_scales(int at) const { return shared_address(scales() + at); }
  __device__ uint32_t v_scales(int at) const { return shared_address(scales() + kRing + at); }

  __device__ __forceinline__ int2 seen_by(int at) const { return seen_by_[at]; }
  __device__ __forceinline__ float log2_count(int at) const { return log2_counts_[at]; }
  __device__ const KeyRow& row() const { return *row_; }

  // Rotates the keys of a tile in shared memory, and the queries unless null.
  __device__ __forceinline__ void turn(const DecodePlan& plan, const Segment& s,
                                       unsigned char* tile, int place, unsigned char* queries) {
    if (!d_.cos) return;
    turn_rows(tile, kTile, [&](int r) { return turns_[place + r]; });
    if (queries) {
      const int length = static_cast<int>(row_->length - d_.attention.seqlen_q);
      turn_rows(queries, plan.tile_rows, [&](int r) {
        const int query = (s.row_tile * plan.tile_rows + r) / plan.group;
        return table_row(d_.cache_positions ? static_cast<int>(row_->cached) - 1 : length + query);
      });
    }
    __syncthreads();
  }

 private:
  static constexpr int kNever = 0x7fffffff;

  __device__ float* scales() const { return reinterpret_cast<float*>(turns_ + kRing); }

  __device__ __forceinline__ float extra_log2_count(const Segment& s, int n) const {
    if (!d_.extra_log_count) return 0;
    return kLog2e * d_.extra_log_count[s.b * d_.extra_log_count_batch +
                                       d_.kv_head(s.h) * d_.extra_log_count_head + n];
  }

  __device__ __forceinline__ int table_row(int position) const {
    return min(max(position, 0), static_cast<int>(d_.positions) - 1);
  }

  // 16 threads per row.
  template <typename TableRow>
  __device__ __forceinline__ void turn_rows(unsigned char* tile, int rows,
                                            const TableRow& table_row) const {
    constexpr int kLanes = 16;
#pragma unroll 1
    for (int r = threadIdx.x / kLanes; r < rows; r += kDecodeThreads / kLanes) {
      const int at = table_row(r);
      if (at < 0) continue;
      const float* cos = d_.cos + at * d_.cos_stride;
      const float* sin = d_.sin + at * d_.sin_stride;
      const int pairs = static_cast<int>(d_.pairs);
      const int lane = threadIdx.x % kLanes;
      if (d_.wide_tables) {
        // Four elements at i and four at i + pairs, in either layout.
#pragma unroll 1
        for (int i = 4 * lane; i < pairs; i += 4 * kLanes)
          turn_four(element(tile, r, i), element(tile, r, i + pairs), cos, sin, i);
      } else {
#pragma unroll 1
        for (int i = lane; i < pairs; i += kLanes) {
          T* a = element(tile, r, d_.interleaved ? 2 * i : i);
          T* b = element(tile, r, d_.interleaved ? 2 * i + 1 : i + pairs);
          float x = static_cast<float>(*a), y = static_cast<float>(*b);
          turn_pair(x, y, cos[i], sin[i]);
          *a = static_cast<T>(x);
          *b = static_cast<T>(y);
        }
      }
    }
  }

  static __device__ __forceinline__ T* element(unsigned char* tile, int r, int column) {
    const int byte = column * static_cast<int>(sizeof(T));
    return reinterpret_cast<T*>(tile + Shape::KeyTile::offset(r, byte / kChunkBytes) +
                                byte % kChunkBytes);
  }

  static __device__ __forceinline__ void turn_pair(float& x, float& y, float cos, float sin) {
    const float turned = fmaf(-y, sin, x * cos);
    y = fmaf(y, cos, x * sin);
    x = turned;
  }

  // Rotates the elements at a and b: columns i and i + pairs.
  __device__ __forceinline__ void turn_four(T* a, T* b, const float* cos, const float* sin,
                                            int i) const {
    float x[4], y[4], c[2][2], s[2][2];
    load_floats(x, a);
    load_floats(y, b);
    if (d_.interleaved) {
      const int second = (i + static_cast<int>(d_.pairs)) / 2;
      load_floats(c[0], cos + i / 2);
      load_floats(c[1], cos + second);
      load_floats(s[0], sin + i / 2);
      load_floats(s[1], sin + second);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        turn_pair(x[2 * n], x[2 * n + 1], c[0][n], s[0][n]);
        turn_pair(y[2 * n], y[2 * n + 1], c[1][n], s[1][n]);
      }
    } else {
      load_floats(reinterpret_cast<float (&)[4]>(c), cos + i);
      load_floats(reinterpret_cast<float (&)[4]>(s), sin + i);
#pragma unroll
      for (int n = 0; n < 4; ++n) turn_pair(x[n], y[n], c[n / 2][n % 2], s[n / 2][n % 2]);
    }
    store_floats(a, x);
    store_floats(b, y);
  }

  const Params& d_;
  KeyRow* row_;  // the pointers below are to shared memory, to save registers
  KvCache::Slot* at_;
  int2* seen_by_;
  float* log2_counts_;
  int* turns_;
};

}  // namespace tokenmill::cuda::sparse_decode_attention
