#include "core/stream.h"
#include "tokens/checks.h"
#include "tokens/mask_partition/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "mask_partition";

// On the CPU alone.
void check_values(const MaskPartitionParams& p) {
  int64_t taken = 0;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t i = 0; i < p.tokens; ++i) taken += p.mask[b * p.mask_batch + i] != 0;
  check(taken <= p.size, kOp, "max_total",
        Rule("must be at least the number of tokens taken, ", taken), p.size);
}

void run(MaskPartitionParams& p, const View& mask) {
#if defined(TOKENMILL_WITH_CUDA)
  if (mask.is_cuda) {
    Tensor workspace = empty({workspace_bytes(p)}, mask.tensor, ScalarType::Byte);
    p.workspace = workspace.mutable_data_ptr();
    return launch_on_device(kOp, mask, p);
  }
#endif
  cpu::mask_partition(p);
}

// The checks are those of python/tokenmill/tokens/mask_partition.py, in its order and words.
std::tuple<Tensor, Tensor, Tensor> mask_partition(Tensor mask, std::optional<int64_t> max_total) {
  const View m(mask);
  check(m.dim() == 2, kOp, "mask", "must have 2 dimensions [B, N]", m.dim());
  check(m.dtype == ScalarType::Bool, kOp, "mask", "must be bool", m.dtype);
  check_last_contiguous(kOp, "mask", m);
  MaskPartitionParams p{};
  p.batch = m.size(0);
  p.tokens = m.size(1);
  const int64_t all = p.batch * p.tokens, limit = int64_t{1} << 31;
  check(all < limit, kOp, "mask", "must have fewer than 2^31 tokens in all", all);
  p.size = max_total.value_or(all);
  check(p.size >= 0 && p.size < limit, kOp, "max_total", "must be 0 to 2^31 - 1", p.size);
  p.mask = m.data<uint8_t>();
  p.mask_batch = m.step(0);
  if (max_total && !m.is_cuda) check_values(p);
  Tensor indices = empty({p.size}, mask, ScalarType::Int);
  Tensor cu_seqlens = empty({p.batch + 1}, mask, ScalarType::Int);
  Tensor inverse = empty(m.sizes, mask, ScalarType::Int);
  p.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  p.cu_seqlens = static_cast<int32_t*>(cu_seqlens.mutable_data_ptr());
  p.inverse = static_cast<int32_t*>(inverse.mutable_data_ptr());
  run(p, m);
  return {indices, cu_seqlens, inverse};
}

}  // namespace

TOKENMILL_IMPL(CPU, m) { m.impl("mask_partition", TOKENMILL_BOX(mask_partition)); }

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) { m.impl("mask_partition", TOKENMILL_BOX(mask_partition)); }
#endif

}  // namespace tokenmill
