#include "sparse/block_sparse_attention/rules_sm90.h"

namespace tokenmill {
namespace {

using cuda::block_sparse_attention::Sm90Tensors;

void why_not_sm90(const BlockSparseParams& d, Rules& r) {
  const Sm90Tensors t(d.attention, d.attention.out);
  cuda::block_sparse_attention::check_lists(r, d, t) && cuda::check_out(r, t.out);
}

void why_not_backward_sm90(const BlockSparseBackwardParams& p, Rules& r) {
  const Sm90Tensors t(p.forward.attention, p.dout);
  cuda::block_sparse_attention::check_lists(r, p.forward, t) &&
      r.check(!(p.forward.attention.softcap > 0), "softcap", "must be 0 in float32") &&
      cuda::check_dout(r, t.out);
}

constexpr Kernel<BlockSparseParams> kForward[] = {
    {.name = "csrc/sparse/block_sparse_attention/kernel_sm90",
     .chips = cuda::kSm90,
     .why_not = why_not_sm90,
     .launch = TOKENMILL_IF_SM90(cuda::block_sparse_attention::launch_on_sm90),
     .on = Knob::block_sparse_attention_sm90},
    {.name = "csrc/sparse/block_sparse_attention",
     .launch = TOKENMILL_IF_CUDA(cuda::block_sparse_attention::launch_on_sm80)},
};

constexpr Kernel<BlockSparseBackwardParams> kBackward[] = {
    {.name = "csrc/sparse/block_sparse_attention/kernel_backward_sm90",
     .chips = cuda::kSm90,
     .why_not = why_not_backward_sm90,
     .launch = TOKENMILL_IF_SM90(cuda::block_sparse_attention::launch_on_sm90),
     .on = Knob::block_sparse_attention_sm90_backward},
    {.name = "csrc/sparse/block_sparse_attention",
     .launch = TOKENMILL_IF_CUDA(cuda::block_sparse_attention::launch_on_sm80)},
};

}  // namespace

std::span<const Kernel<BlockSparseParams>> kernels_of(const BlockSparseParams&) { return kForward; }
std::span<const Kernel<BlockSparseBackwardParams>> kernels_of(const BlockSparseBackwardParams&) {
  return kBackward;
}

}  // namespace tokenmill
