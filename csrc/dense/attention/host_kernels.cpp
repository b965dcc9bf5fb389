#include "attention/rules_sm90.h"
#include "dense/attention/kernels.h"

namespace tokenmill {
namespace {

using cuda::Sm90Tensors;

void why_not_sm90(const Masked<AttentionParams>& m, Rules& r) {
  const AttentionParams& p = m.params;
  const Sm90Tensors t(p, p.out);
  cuda::check_form<cuda::Sm90HeadDims>(r, p, t) &&
      cuda::check_tokens(r, p.seqlen_q, p.cu_seqlens_q, p.batch, p.seqlen_k) &&
      cuda::check_forward(r, p, t);
}

void why_not_backward_sm90(const AttentionBackwardCall& call, Rules& r) {
  const AttentionBackwardParams& bp = call.params;
  const AttentionParams& p = bp.forward;
  const Sm90Tensors t(p, bp.dout);
  const bool sums_slopes = p.softcap > 0 && bp.dscore_bias && p.map == ScoreMap::sigmoid;
  const int64_t tiles = cuda::sm90_query_tiles(p);
  cuda::check_form<cuda::Sm90HeadDims>(r, p, t) &&
      cuda::check_tokens(r, p.seqlen_q, p.cu_seqlens_q, p.batch, p.seqlen_k) &&
      (!(p.softcap > 0) || cuda::check_scale(r, p)) &&
      r.check(!sums_slopes, "score_bias", "must not require a gradient with a softcap",
              "a tensor that does") &&
      r.check(
          tiles <= 0x7fffffff, "q",
          [&] {
            return "must have fewer than 2^31 tiles of " +
                   std::to_string(cuda::sm90_tile_queries(p.head_dim)) + " rows";
          },
          tiles) &&
      cuda::check_dout(r, t.out);
}

// The kernel does not take a call without workspace.
int64_t workspace_of_sm90(const AttentionBackwardCall& call) {
  if (!knob(Knob::attention_sm90_backward)) return 0;
  return cuda::sm90_workspace_bytes(call.params.forward);
}

constexpr Knob kForwardCuts[] = {Knob::attention_sm90_section, Knob::attention_sm90_grid};

constexpr Kernel<Masked<AttentionParams>> kForward[] = {
    {.name = "csrc/dense/attention/kernel_sm90",
     .chips = cuda::kSm90,
     .why_not = why_not_sm90,
     .launch = TOKENMILL_IF_SM90(cuda::launch_on_sm90),
     .on = Knob::attention_sm90,
     .cuts = kForwardCuts},
    {.name = "csrc/dense/attention", .launch = TOKENMILL_IF_CUDA(cuda::launch_on_sm80)},
};

constexpr Kernel<AttentionBackwardCall> kBackward[] = {
    {.name = "csrc/dense/attention/kernel_backward_sm90",
     .chips = cuda::kSm90,
     .why_not = why_not_backward_sm90,
     .launch = TOKENMILL_IF_SM90(cuda::launch_on_sm90),
     .workspace = workspace_of_sm90,
     .on = Knob::attention_sm90_backward},
    {.name = "csrc/dense/attention", .launch = TOKENMILL_IF_CUDA(cuda::launch_on_sm80)},
};

}  // namespace

std::span<const Kernel<Masked<AttentionParams>>> kernels_of(const Masked<AttentionParams>&) {
  return kForward;
}
std::span<const Kernel<AttentionBackwardCall>> kernels_of(const AttentionBackwardCall&) {
  return kBackward;
}

}  // namespace tokenmill
