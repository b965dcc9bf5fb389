// Attention of the newest tokens of a request to a subset of its keys. Free of torch.
//
// The keys that a list head attends to form a sequence: the first tokens of the request (sinks),
// the blocks of its list, the last tokens (recent), and keys from outside the cache. Kernels
// iterate over this sequence.
#pragma once
#include "cpu/isa.h"
#include "dense/attention_decode/params.h"

namespace tokenmill {

// attention: softmax; no bias, score bias, ALiBi, window or packing.
struct SparseDecodeParams : CacheAttention {
  const int32_t* indices;  // [B, list heads, entries], strided
  int64_t indices_batch, indices_head, entries;
  const int32_t* counts;  // [B, list heads], strided
  int64_t counts_batch, counts_head;
  int64_t list_heads;  // 1, KV heads or query heads
  int32_t log2_block;  // log2 of the keys per entry
  int64_t num_sink, num_recent;
  // [positions, pairs] with a stride between positions, or null: no rotation.
  const float *cos, *sin;
  int64_t cos_stride, sin_stride, positions, pairs;
  bool interleaved;  // pairs (2 i, 2 i + 1), or (i, i + pairs)
  // keys are rotated by their index in the sequence, not by position in the request
  bool cache_positions;
  Rows extra_k, extra_v;         // [B, extra, Hk, D]
  const float* extra_log_count;  // [B, Hk, extra], strided
  int64_t extra, extra_log_count_batch, extra_log_count_head;
  int64_t num_splits;  // 0: automatic
  float* mass;         // [B, KV heads or query heads, entries], or null
  void* workspace;     // CUDA

  // Heads of the key sequences: the KV heads, or the query heads if each has its own list. All
  // query rows of one such head read the same keys.
  TOKENMILL_HOST_DEVICE int64_t row_heads() const {
    return list_heads > attention.kv_heads ? attention.heads : attention.kv_heads;
  }
  TOKENMILL_HOST_DEVICE int64_t kv_head(int64_t h) const {
    return h / (row_heads() / attention.kv_heads);
  }
  TOKENMILL_HOST_DEVICE const int32_t* list(int64_t b, int64_t h) const {
    return indices + b * indices_batch + (list_heads == 1 ? 0 : h) * indices_head;
  }
  TOKENMILL_HOST_DEVICE int64_t count(int64_t b, int64_t h) const {
    const int64_t n = counts[b * counts_batch + (list_heads == 1 ? 0 : h) * counts_head];
    return n < 0 ? 0 : n > entries ? entries : n;
  }
  TOKENMILL_HOST_DEVICE KvCache::Slot find(int64_t b, int64_t position) const {
    return cache.find(b, position);
  }
};

// Address of a key of the sequence, and its position in the request.
struct RowKey {
  static constexpr int32_t kExtra = -1;  // value of `row` for an extra key; `page` is its index
  static constexpr int32_t kNowhere = 0x7fffffff;  // value of `position`: no query sees the key

  KvCache::Slot at{0, 0};
  int32_t position = kNowhere;
};

// Key sequence of one head h < row_heads() of one request. A query at position p sees sink and
// listed keys (before list_end) at positions up to p - num_recent, recent keys at positions from
// there up to p, and all extra keys.
struct KeyRow {
  int64_t length, sinks, first, last;  // keys of the request; entries first .. last - 1 of the list
  int64_t recent_begin;                // position in the request
  // indices in the sequence: bounds of the list, end of the cached keys, total
  int64_t list_begin, list_end, cached, total;
  bool ascends;  // whether the list is ascending

  // Range of positions that any query sees through its list. It starts with the first entry that is
  // not wholly among the sinks, and ends before the first one wholly past the range.
  struct Listed {
    int64_t begin, end;

    template <class Params>
    TOKENMILL_HOST_DEVICE static Listed of(const Params& d, int64_t b) {
      const int64_t length = d.length(b);
      const int64_t old = length > d.num_recent ? length - d.num_recent : 0;
      return {d.num_sink < old ? d.num_sink : old, old};
    }
    // First key of the block that contains `begin`.
    TOKENMILL_HOST_DEVICE int64_t first_block(int32_t log2_block) const {
      return (begin >> log2_block) << log2_block;
    }
  };

  // Always inlined: an out-of-line copy in one instruction set's object would be a weak symbol.
  template <class Params>
  __attribute__((always_inline)) static KeyRow of(const Params& d, int64_t b, int64_t h) {
    const Listed listed = Listed::of(d, b);
    const int32_t* list = d.list(b, h);
    const int64_t count = d.count(b, h), first_block = listed.first_block(d.log2_block);
    int descents = 0;
    for (int64_t e = 1; e < count; ++e) descents |= list[e] <= list[e - 1];
    if (descents)
      return of(d, b, scan(list, count, first_block, d.log2_block),
                scan(list, count, listed.end, d.log2_block), false);
    return of(d, b, search(list, count, first_block, d.log2_block),
              search(list, count, listed.end, d.log2_block), true);
  }

  // From the results of search or scan.
  template <class Params>
  TOKENMILL_HOST_DEVICE static KeyRow of(const Params& d, int64_t b, int64_t first, int64_t last,
                                         bool ascends) {
    KeyRow row{};
    row.ascends = ascends;
    row.length = d.length(b);
    row.sinks = Listed::of(d, b).begin;
    row.first = first;
    row.last = last < first ? first : last;
    const int64_t recent = row.length - d.attention.seqlen_q + 1 - d.num_recent;
    row.recent_begin = d.num_recent == 0 ? row.length : recent > 0 ? recent : 0;
    row.list_begin = row.sinks;
    row.list_end = row.list_begin + ((row.last - row.first) << d.log2_block);
    row.cached = row.list_end + row.length - row.recent_begin;
    row.total = row.cached + d.extra;
    return row;
  }

  // Ascending list: index of the first of `count` entries whose block begins at or after key `key`,
  // `count` if there is none.
  TOKENMILL_HOST_DEVICE static int64_t search(const int32_t* list, int64_t count, int64_t key,
                                              int32_t log2_block) {
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (int64_t{list[middle]} * (int64_t{1} << log2_block) < key)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
  // The same for any list.
  TOKENMILL_HOST_DEVICE static int64_t scan(const int32_t* list, int64_t count, int64_t key,
                                            int32_t log2_block) {
    int64_t e = 0;
    while (e < count && int64_t{list[e]} * (int64_t{1} << log2_block) < key) ++e;
    return e;
  }

  // An entry counts if it is greater than all previous ones. Entries before `first` are smaller
  // than entry `first`. A list that is not ascending costs one comparison per pair of entries.
  TOKENMILL_HOST_DEVICE bool counts(const int32_t* list, int64_t entry) const {
    if (ascends) return true;
    const int32_t* const end = list + entry;
#if defined(__CUDACC__)
#pragma unroll 1
#endif
    for (const int32_t* e = list + first; e < end; ++e)
      if (*e >= *end) return false;
    return true;
  }

  // Key t of the sequence. Entries that do not count, keys past the request and invalid pages are
  // kNowhere.
  template <class Params>
  TOKENMILL_HOST_DEVICE RowKey key(const Params& d, int64_t b, int64_t h, int64_t t) const {
    if (t >= cached) return {{static_cast<int32_t>(t - cached), RowKey::kExtra}, 0};
    int64_t position = t;
    if (t >= list_end) {
      position = recent_begin + t - list_end;
    } else if (t >= list_begin) {
      const int32_t* list = d.list(b, h);
      const int64_t entry = first + ((t - list_begin) >> d.log2_block);
      const int64_t block = int64_t{1} << d.log2_block;
      position = list[entry] * block + ((t - list_begin) & (block - 1));
      if (position < sinks || position >= length || !counts(list, entry)) return {};
    }
    const KvCache::Slot at = d.find(b, position);
    if (at.page < 0) return {};
    return {at, static_cast<int32_t>(position)};
  }
};

// null, or an error message
const char* launch_cuda(const SparseDecodeParams&, void* stream);
int64_t workspace_bytes(const SparseDecodeParams&);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(sparse_decode_attention, SparseDecodeParams)
