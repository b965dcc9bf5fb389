#pragma once
#include "cpu/isa.h"
#include "select/keys.h"

namespace tokenmill {

enum class PoolMode : int32_t { mean, max, minmax };

// Pools blocks of keys: all of them or, with `start`, only the blocks that tokens start[b] ..
// length - 1 touch.
struct PoolParams {
  int64_t batch, kv_heads, head_dim, block, blocks;
  PoolMode mode;
  DType dtype;
  KeyRows k;
  const int32_t* lengths;  // [B], clamped; null: all tokens
  const int32_t* start;    // [B], clamped at 0; null: all blocks are written
  void* out;               // [B, blocks, Hk, D], minmax [B, blocks, Hk, 2, D], of dtype
  int64_t out_batch, out_block, out_head, out_half;
};

struct PoolBlocks {
  int64_t begin, end, length;
};

// Blocks of a request that are written.
TOKENMILL_HOST_DEVICE inline PoolBlocks pool_blocks(const PoolParams& p, int64_t b) {
  const int64_t length = clamped_length(p.lengths, b, p.k.rows);
  if (!p.start) return {0, p.blocks, length};
  const int64_t start = p.start[b] < 0 ? 0 : p.start[b];
  return {start < length ? start / p.block : 0, start < length ? ceil_div(length, p.block) : 0,
          length};
}

// null, or an error message
const char* launch_cuda(const PoolParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(block_pool_keys, PoolParams)
