// Calls with few query rows per key, too few to pay for packing the keys.
#pragma once
#include <algorithm>

#include "cpu/workspace.h"
#include "dense/attention_decode/params.h"

namespace tokenmill::TOKENMILL_ISA {

// Query rows per KV head, and keys in their window, from which on the decode engine is faster:
// kSomeKeys keys for kFewestRows rows or one query; kKeysOfRow keys per row, where packed keys
// leave L2, for up to kFewRows rows.
constexpr int64_t kFewestRows = 8, kSomeKeys = 128;
constexpr int64_t kFewRows = 32, kKeysOfRow = 256;

inline bool has_few_rows(const AttentionParams& p) {
  if (p.cu_seqlens_q || p.bias || p.grid.width > 0 || p.post_decay) return false;
  const int64_t rows = p.heads / p.kv_heads * p.seqlen_q;
  const bool are_fewest = rows <= kFewestRows || p.seqlen_q == 1;
  const int64_t minimum = are_fewest ? kSomeKeys : kKeysOfRow * rows;
  int64_t keys = p.seqlen_k;
  if (p.window_left >= 0 && p.window_left < keys) keys = std::min(keys, p.window_left + p.seqlen_q);
  return (are_fewest || rows <= kFewRows) && keys >= minimum && p.seqlen_k <= 0x7fffffff;
}

// Presents the tensors as a KV cache with one page per request that holds all its keys.
inline void attend_few_rows(const AttentionParams& p) {
  cpu::Workspace memory(p.batch);
  int32_t* const lengths = reinterpret_cast<int32_t*>(memory.take(p.batch));
  std::fill(lengths, lengths + p.batch, static_cast<int32_t>(p.seqlen_k));
  DecodeParams d{};
  d.attention = p;
  d.cache.k = p.k;
  d.cache.v = p.v;
  d.cache.dtype = p.dtype;
  d.cache.seqlens = lengths;
  d.cache.pages = p.batch;
  d.cache.capacity = p.seqlen_k;
  d.num_requests = p.batch;
  d.queries = p.seqlen_q;
  attention_decode(d);
}

}  // namespace tokenmill::TOKENMILL_ISA
