// Checks shared by the operators on keys.
#pragma once
#include <algorithm>

#include "core/qkv.h"
#include "select/keys.h"

namespace tokenmill {

// [B] int32; null if not given
inline const int32_t* per_request(const char* op, const char* name, const View& tensor,
                                  int64_t batch, const char* other, const View& first) {
  if (!tensor) return nullptr;
  const View& t = tensor;
  const std::vector<int64_t> wanted{batch};
  check(t.sizes == wanted, op, name, Rule("must have shape ", wanted), t.sizes);
  check(t.dtype == ScalarType::Int, op, name, "must be int32", t.dtype);
  check_last_contiguous(op, name, t);
  check_device_of(op, name, t, other, first);
  return t.data<int32_t>();
}

inline void check_length_values(const char* op, const char* name, const int32_t* lengths,
                                int64_t batch, int64_t longest) {
  for (int64_t b = 0; lengths && b < batch; ++b)
    check(lengths[b] >= 0 && lengths[b] <= longest, op, name, Rule("must be 0 to ", longest),
          int64_t{lengths[b]});
}

// lse is [B, H, Sq] for q [B, Sq, H, D]; null if not given.
template <typename Params>
void set_lse(const char* op, const View& lse, const View& q, Params& p) {
  if (!lse) return;
  const View& t = lse;
  const std::vector<int64_t> wanted{q.size(0), q.size(2), q.size(1)};
  check(t.sizes == wanted, op, "lse", Rule("must have shape ", wanted), t.sizes);
  check_wide(op, "lse", t, q);
  check_last_contiguous(op, "lse", t);
  check_device_of_q(op, "lse", t, q);
  p.lse = t.data<float>();
  p.lse_batch = t.step(0);
  p.lse_head = t.step(1);
}

// Number of requests in keys [B, S, ...], or in a block_table.
inline int64_t batch_of(const View& k, const View& block_table) {
  return block_table ? block_table.size(0) : k.size(0);
}

inline void check_block_table(const char* op, const View& block_table, const View& k) {
  if (!block_table) return;
  const View& t = block_table;
  check(t.dim() == 2, op, "block_table", "must have 2 dimensions [B, P]", t.dim());
  check(t.dtype == ScalarType::Int, op, "block_table", "must be int32", t.dtype);
  check_last_contiguous(op, "block_table", t);
  check_device_of(op, "block_table", t, "k", k);
}

// Number of requests, with packed or unpacked queries, and packed, padded or paged keys.
inline int64_t check_sequences(const char* op, const View& q, const View& k, const View& seqlens_k,
                               const View& cu_seqlens_q, const View& cu_seqlens_k,
                               const View& block_table, const View& seqlens_q = {}) {
  if (cu_seqlens_k && !cu_seqlens_q)
    fail(op, "cu_seqlens_q", "must be given with cu_seqlens_k", "None");
  int64_t batch = q.size(0);
  if (cu_seqlens_q) {
    check_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, q);
    batch = cu_seqlens_q.size(0) - 1;
    if (seqlens_q) fail(op, "seqlens_q", "must be None with cu_seqlens_q", show(seqlens_q.sizes));
  }
  if (cu_seqlens_k) {
    check_cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, q);
    check(cu_seqlens_k.size(0) == batch + 1, op, "cu_seqlens_k",
          Rule("must have the length of cu_seqlens_q, ", batch + 1), cu_seqlens_k.size(0));
    for (auto [name, t] : {std::pair{"seqlens_k", &seqlens_k}, {"block_table", &block_table}})
      if (*t) fail(op, name, "must be None with cu_seqlens_k", show(t->sizes));
    return batch;
  }
  check_block_table(op, block_table, k);
  const int64_t found = batch_of(k, block_table);
  check(found == batch, op, block_table ? "block_table" : "k",
        Rule("must have the batch size of q, ", batch), found);
  return batch;
}

// k: [B, S, H, ...] or [pages, page_size, H, ...]
inline KeyRows key_rows(const View& k, const View& block_table) {
  KeyRows rows{k.data(), k.step(0), k.step(1), k.step(2), k.size(1), nullptr, 0, k.size(1), 0};
  if (block_table) {
    const View& t = block_table;
    rows.rows = t.size(1) * k.size(1);
    rows.table = t.data<int32_t>();
    rows.table_stride = t.step(0);
    rows.pages = k.size(0);
  }
  return rows;
}

// CPU only: the pages of the first lengths[b] rows must exist.
inline void check_block_table_values(const char* op, const KeyRows& k, int64_t batch,
                                     const int32_t* lengths) {
  for (int64_t b = 0; b < batch && k.table && k.page_size > 0; ++b)
    for (int64_t p = 0; p * k.page_size < clamped_length(lengths, b, k.rows); ++p) {
      const int64_t page = k.table[b * k.table_stride + p];
      check(page >= 0 && page < k.pages, op, "block_table",
            Rule("must hold pages below ", k.pages, " up to the length"), page);
    }
}

}  // namespace tokenmill
