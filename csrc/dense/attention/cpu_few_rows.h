// Calls whose keys few rows of queries read, which would not pay for a packed copy of the keys.
#pragma once
#include <algorithm>

#include "cpu/workspace.h"
#include "dense/attention_decode/params.h"

namespace tokenmill::TOKENMILL_ISA {

// Rows that share a key head, and the keys in their window from which on the engine of decode is
// the faster one: some for a few rows or one query, and so many for each of more rows that packed
// keys leave L2.
constexpr int64_t kFewestRows = 8, kSomeKeys = 128;
constexpr int64_t kFewRows = 32, kKeysOfRow = 256;

inline bool has_few_rows(const AttentionParams& p) {
  if (p.cu_seqlens_q || p.bias || p.grid.width > 0 || p.fades) return false;
  const int64_t rows = p.heads / p.kv_heads * p.seqlen_q;
  const bool are_fewest = rows <= kFewestRows || p.seqlen_q == 1;
  const int64_t least = are_fewest ? kSomeKeys : kKeysOfRow * rows;
  int64_t keys = p.seqlen_k;
  if (p.window_left >= 0 && p.window_left < keys) keys = std::min(keys, p.window_left + p.seqlen_q);
  return (are_fewest || rows <= kFewRows) && keys >= least && p.seqlen_k <= 0x7fffffff;
}

// Tensors as a cache in which each request has a page of its own, and all keys of it.
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
