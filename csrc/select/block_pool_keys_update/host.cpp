#include "core/written.h"
#include "select/block_pool_keys/pool.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "block_pool_keys_update";

struct BlockPoolKeysUpdateArgs : Record {
  View k, pooled;
  int64_t block;
  std::string_view mode;
  View start, lengths, block_table;
};

void block_pool_keys_update(const BlockPoolKeysUpdateArgs& a) {
  PoolParams p = pool_params(kOp, a.k, a.block, a.mode, a.lengths, a.block_table);
  p.start = per_request(kOp, "start", a.start, p.batch, "k", a.k);
  const std::vector<int64_t> wanted = pooled_sizes(p);
  check(a.pooled.sizes == wanted, kOp, "pooled", Rule("must have shape ", wanted), a.pooled.sizes);
  check(a.pooled.dtype == a.k.dtype, kOp, "pooled", Rule("must have the dtype of k, ", a.k.dtype),
        a.pooled.dtype);
  check_last_contiguous(kOp, "pooled", a.pooled);
  check_device_of(kOp, "pooled", a.pooled, "k", a.k);
  check_written(kOp, a);
  a.pooled.note(true);
  set_pooled(p, a.pooled);
  run_pool(kOp, p, a.k);
}

const Registration kOperators({&implement<block_pool_keys_update>("block_pool_keys_update")});

}  // namespace
}  // namespace tokenmill
