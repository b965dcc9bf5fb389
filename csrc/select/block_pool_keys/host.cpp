#include "select/block_pool_keys/pool.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "block_pool_keys";

Tensor block_pool_keys(Tensor k, int64_t block, std::string mode, OptTensor lengths,
                       OptTensor block_table) {
  const View keys(k);
  PoolParams p = pool_params(kOp, keys, block, mode, lengths, block_table);
  Tensor pooled = empty(pooled_sizes(p), k);
  set_pooled(p, View(pooled));
  run_pool(kOp, p, keys);
  return pooled;
}

}  // namespace

TOKENMILL_IMPL(CPU, m) { m.impl("block_pool_keys", TOKENMILL_BOX(block_pool_keys)); }

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) { m.impl("block_pool_keys", TOKENMILL_BOX(block_pool_keys)); }
#endif

}  // namespace tokenmill
