// Host code shared by the functional and the in-place operator.
#pragma once
#include "core/stream.h"
#include "select/block_pool_keys/params.h"
#include "select/checks.h"

namespace tokenmill {

inline PoolParams pool_params(const char* op, const View& k, int64_t block, std::string_view mode,
                              const View& lengths, const View& block_table) {
  check(k.dim() == 4, op, "k", "must have 4 dimensions [B, S, H, D] or [pages, page_size, H, D]",
        k.dim());
  check_dtype(op, "k", k);
  check_last_contiguous(op, "k", k);
  check(block >= 1 && block < (int64_t{1} << 31), op, "block", "must be 1 to 2^31 - 1", block);
  constexpr std::pair<std::string_view, PoolMode> kModes[] = {
      {"mean", PoolMode::mean}, {"max", PoolMode::max}, {"minmax", PoolMode::minmax}};
  const PoolMode chosen = choose(op, "mode", kModes, mode);
  check_block_table(op, block_table, k);
  PoolParams p{};
  p.batch = batch_of(k, block_table);
  p.lengths = per_request(op, "lengths", lengths, p.batch, "k", k);
  p.kv_heads = k.size(2);
  p.head_dim = k.size(3);
  p.block = block;
  p.mode = chosen;
  p.dtype = to_dtype(k.dtype);
  p.k = key_rows(k, block_table);
  p.blocks = ceil_div(p.k.rows, block);
  return p;
}

inline std::vector<int64_t> pooled_sizes(const PoolParams& p) {
  if (p.mode == PoolMode::minmax) return {p.batch, p.blocks, p.kv_heads, 2, p.head_dim};
  return {p.batch, p.blocks, p.kv_heads, p.head_dim};
}

inline void set_pooled(PoolParams& p, const View& pooled) {
  p.out = pooled.mutable_data();
  p.out_batch = pooled.step(0);
  p.out_block = pooled.step(1);
  p.out_head = pooled.step(2);
  p.out_half = p.mode == PoolMode::minmax ? pooled.step(3) : 0;
}

static inline void run_pool(const char* op, const PoolParams& p, const View& k) {
  k.framework->begin();
  if (!k.is_cuda) check_block_table_values(op, p.k, p.batch, p.lengths);
  if (p.batch == 0 || p.blocks == 0 || p.kv_heads == 0 || p.head_dim == 0) return;
  if (k.is_cuda) return launch_on_device(op, k, p);
  cpu::block_pool_keys(p);
}

}  // namespace tokenmill
