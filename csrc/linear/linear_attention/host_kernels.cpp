#include "cuda/arch/sm90/calls.h"
#include "linear/linear_attention/kernels.h"
#include "linear/linear_attention/per_channel.h"

namespace tokenmill {
namespace {

void why_not_sm90(const LinearAttentionParams& p, Rules& r) {
  using namespace cuda;
  using Dims = HeadDimList<128, 256>;
  const int64_t batch = p.cu_seqlens ? 1 : p.batch;
  check_dtype(r, p.dtype) && check_head_dim<Dims>(r, "q", p.head_dim) &&
      check_head_dim<Dims>(r, "v", p.value_dim) &&
      r.check(p.map == FeatureMap::identity, "feature_map", "must be 'identity'") &&
      r.check(!p.normalize, "normalize", "must be False") &&
      check_tokens(r, p.seqlen, p.cu_seqlens, p.batch, p.seqlen) &&
      check_layout(r, "q", {p.q, batch, p.seqlen, p.heads, p.head_dim}) &&
      check_layout(r, "k", {p.k, batch, p.seqlen, p.kv_heads, p.head_dim}) &&
      check_layout(r, "v", {p.v, batch, p.seqlen, p.kv_heads, p.value_dim}) &&
      check_out(r, {p.out, batch, p.seqlen, p.heads, p.value_dim});
}

[[maybe_unused]] const char* launch_per_channel(const LinearAttentionParams& p, void* stream) {
  return launch_cuda(without_correction(p), stream);
}

constexpr Kernel<LinearAttentionParams> kPerChannel[] = {
    {.name = "csrc/linear/delta_attention", .launch = TOKENMILL_IF_CUDA(launch_per_channel)},
};

constexpr Kernel<LinearAttentionParams> kKernels[] = {
    {.name = "csrc/linear/linear_attention/kernel_sm90",
     .chips = cuda::kSm90,
     .why_not = why_not_sm90,
     .launch = TOKENMILL_IF_SM90(cuda::linear_attention::launch_on_sm90),
     .on = Knob::linear_attention_sm90},
    {.name = "csrc/linear/linear_attention",
     .launch = TOKENMILL_IF_CUDA(cuda::linear_attention::launch_on_sm80)},
};

}  // namespace

std::span<const Kernel<LinearAttentionParams>> kernels_of(const LinearAttentionParams& p) {
  if (p.decay.per_channel) return kPerChannel;
  return kKernels;
}

}  // namespace tokenmill
