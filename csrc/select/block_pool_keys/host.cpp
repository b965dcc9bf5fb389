#include "select/block_pool_keys/pool.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "block_pool_keys";

struct BlockPoolKeysArgs : Record {
  View k;
  int64_t block;
  std::string_view mode;
  View lengths, block_table;
};

Array block_pool_keys(const BlockPoolKeysArgs& a) {
  PoolParams p = pool_params(kOp, a.k, a.block, a.mode, a.lengths, a.block_table);
  Array pooled = empty(pooled_sizes(p), a.k);
  set_pooled(p, pooled);
  run_pool(kOp, p, a.k);
  return pooled;
}

const Registration kOperators({&implement<block_pool_keys>("block_pool_keys")});

}  // namespace
}  // namespace tokenmill
