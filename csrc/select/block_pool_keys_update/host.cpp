#include "core/written.h"
#include "select/block_pool_keys/pool.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "block_pool_keys_update";

void block_pool_keys_update(Tensor k, Tensor pooled, int64_t block, std::string mode, Tensor start,
                            OptTensor lengths, OptTensor block_table) {
  const View keys(k), out(pooled);
  PoolParams p = pool_params(kOp, keys, block, mode, lengths, block_table);
  p.start = per_request(kOp, "start", start, p.batch, "k", keys);
  const std::vector<int64_t> wanted = pooled_sizes(p);
  check(out.sizes == wanted, kOp, "pooled", Rule("must have shape ", wanted), out.sizes);
  check(out.dtype == keys.dtype, kOp, "pooled", Rule("must have the dtype of k, ", keys.dtype),
        out.dtype);
  check_last_contiguous(kOp, "pooled", out);
  check_device_of(kOp, "pooled", out, "k", keys);
  std::optional<View> limits, table;
  if (lengths) limits.emplace(*lengths);
  if (block_table) table.emplace(*block_table);
  check_written(kOp, "pooled", out,
                {{"k", keys}, {"start", View(start)}, {"lengths", limits}, {"block_table", table}});
  out.note(true);
  set_pooled(p, out);
  run_pool(kOp, p, keys);
}

}  // namespace

TOKENMILL_IMPL(CPU, m) { m.impl("block_pool_keys_update", TOKENMILL_BOX(block_pool_keys_update)); }

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) { m.impl("block_pool_keys_update", TOKENMILL_BOX(block_pool_keys_update)); }
#endif

}  // namespace tokenmill
