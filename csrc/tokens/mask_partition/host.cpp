#include "core/stream.h"
#include "tokens/checks.h"
#include "tokens/mask_partition/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "mask_partition";

// Checks of values, CPU only.
void check_values(const MaskPartitionParams& p) {
  int64_t taken = 0;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t i = 0; i < p.tokens; ++i) taken += p.mask[b * p.mask_batch + i] != 0;
  check(taken <= p.size, kOp, "max_total",
        Rule("must be at least the number of tokens taken, ", taken), p.size);
}

void run(MaskPartitionParams& p, const View& mask) {
  if (mask.is_cuda) return launch_with_workspace(kOp, mask, p, p.workspace);
  cpu::mask_partition(p);
}

struct MaskPartitionArgs : Record {
  View mask;
  Optional<int64_t> max_total;
};

std::tuple<Array, Array, Array> mask_partition(const MaskPartitionArgs& a) {
  check(a.mask.dim() == 2, kOp, "mask", "must have 2 dimensions [B, N]", a.mask.dim());
  check(a.mask.dtype == ScalarType::Bool, kOp, "mask", "must be bool", a.mask.dtype);
  check_last_contiguous(kOp, "mask", a.mask);
  MaskPartitionParams p{};
  p.batch = a.mask.size(0);
  p.tokens = a.mask.size(1);
  const int64_t all = p.batch * p.tokens, limit = int64_t{1} << 31;
  check(all < limit, kOp, "mask", "must have fewer than 2^31 tokens in all", all);
  p.size = a.max_total.value_or(all);
  check(p.size >= 0 && p.size < limit, kOp, "max_total", "must be 0 to 2^31 - 1", p.size);
  p.mask = a.mask.data<uint8_t>();
  p.mask_batch = a.mask.step(0);
  if (a.max_total && !a.mask.is_cuda) check_values(p);
  Array indices = empty({p.size}, a.mask, ScalarType::Int);
  Array cu_seqlens = empty({p.batch + 1}, a.mask, ScalarType::Int);
  Array inverse = empty(a.mask.sizes, a.mask, ScalarType::Int);
  p.indices = indices.mutable_data<int32_t>();
  p.cu_seqlens = cu_seqlens.mutable_data<int32_t>();
  p.inverse = inverse.mutable_data<int32_t>();
  run(p, a.mask);
  return {indices, cu_seqlens, inverse};
}

const Registration kOperators({&implement<mask_partition>("mask_partition")});

}  // namespace
}  // namespace tokenmill
