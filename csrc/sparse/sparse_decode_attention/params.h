// Attention of the newest tokens of a request to some of its keys. Free of torch.
//
// The keys that a list head attends to stand in a row: the first tokens of the request, the blocks
// of its list, the last tokens, and keys from outside the cache. Kernels stream over that row.
#pragma once
#include "cpu/isa.h"
#include "dense/attention_decode/params.h"

namespace tokenmill {

// attention: softmax; neither bias, score bias, ALiBi, window nor packed.
struct SparseDecodeParams : CacheAttention {
  const int32_t* indices;  // [B, list heads, entries] with strides
  int64_t indices_batch, indices_head, entries;
  const int32_t* counts;  // [B, list heads] with strides
  int64_t counts_batch, counts_head;
  int64_t list_heads;  // 1, KV heads or query heads
  int32_t log2_block;  // keys of an entry
  int64_t num_sink, num_recent;
  // [positions, pairs] with strides between positions, or null: no rotation.
  const float *cos, *sin;
  int64_t cos_stride, sin_stride, positions, pairs;
  bool interleaved;              // pairs (2 i, 2 i + 1), or (i, i + pairs)
  bool cache_positions;          // keys are turned by their place in the row, not in the request
  Rows extra_k, extra_v;         // [B, extra, Hk, D]
  const float* extra_log_count;  // [B, Hk, extra] with strides
  int64_t extra, extra_log_count_batch, extra_log_count_head;
  int64_t num_splits;  // 0: automatic
  float* mass;         // [B, KV heads or query heads, entries], or null
  void* workspace;     // CUDA

  // Heads with a list of their own or a shared one: those of the cache unless each query head has a
  // list. All rows of one read the same keys.
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

// Where a key of a row lies, and its position in the request.
struct RowKey {
  static constexpr int32_t kExtra = -1;  // for a row: `page` is the number of an extra key
  static constexpr int32_t kNowhere = 0x7fffffff;  // for a position: no query sees it

  KvCache::Slot at{0, 0};
  int32_t position = kNowhere;
};

// The row of keys of one head h < row_heads() of one request. A query at position p sees keys
// before list_end if they lie at p - num_recent or before, those from there on if they lie behind
// that and not behind p, and extra keys.
struct KeyRow {
  int64_t length, sinks, first, last;  // keys of the request; entries first .. last - 1 of the list
  int64_t recent_begin;                // in the request
  int64_t list_begin, list_end, cached, total;  // in the row: of the list, of the cache, of all
  bool ascends;                                 // the list

  // What the blocks of a list hold that any query sees through it. The list goes from its first
  // entry that is not wholly among the first tokens to its first one that is wholly behind that.
  struct Listed {
    int64_t begin, end;

    template <class Params>
    TOKENMILL_HOST_DEVICE static Listed of(const Params& d, int64_t b) {
      const int64_t length = d.length(b);
      const int64_t old = length > d.num_recent ? length - d.num_recent : 0;
      return {d.num_sink < old ? d.num_sink : old, old};
    }
    // The first key of the block in which the first one lies.
    TOKENMILL_HOST_DEVICE int64_t first_block(int32_t log2_block) const {
      return (begin >> log2_block) << log2_block;
    }
  };

  // Always inlined: a copy in an object of one instruction set would be weak.
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

  // With what search or scan found.
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

  // The first of `count` entries whose block begins at key `key` or behind it, `count` if none
  // does: of a list that ascends.
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
  // Of any list.
  TOKENMILL_HOST_DEVICE static int64_t scan(const int32_t* list, int64_t count, int64_t key,
                                            int32_t log2_block) {
    int64_t e = 0;
    while (e < count && int64_t{list[e]} * (int64_t{1} << log2_block) < key) ++e;
    return e;
  }

  // An entry counts if it is greater than all before it. Those before `first` are smaller than that
  // one. A list that does not ascend costs a comparison for each pair of its entries.
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

  // Number t of the row. Entries that do not count, keys that the request does not have and pages
  // that do not exist are nowhere.
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

// null, or what went wrong
const char* launch_cuda(const SparseDecodeParams&, void* stream);
int64_t workspace_bytes(const SparseDecodeParams&);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(sparse_decode_attention, SparseDecodeParams)
