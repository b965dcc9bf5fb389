#include "attention/rules_sm90.h"
#include "dense/attention_decode/kernels.h"

namespace tokenmill {
namespace {

using cuda::Sm90Tensors;

// Rows of a KV head.
int64_t rows_of(const AttentionParams& p) {
  return p.kv_heads > 0 ? p.heads / p.kv_heads * p.seqlen_q : 0;
}

// Without a limit on keys after a query, or packed, no kernel divides the keys of a request. Where
// tiles do not fill a GPU, the decode kernels, which divide them, are faster.
bool fills_a_gpu(Rules& r, const DecodeParams& d) {
  const AttentionParams& p = d.attention;
  if (cuda::prefills(p)) return true;
  const int64_t tiles = cuda::query_tiles(p, 64);
  const bool splits = d.num_splits == 0 ? !d.stream_k : r.described("schedule") == "split";
  return r.check(d.num_splits == 0, "num_splits", "must be 0", d.num_splits) &&
         r.check(!splits, "schedule", "must be 'auto' or 'stream_k'") && [&] {
           const int64_t many = r.value_of(Knob::attention_decode_sm90_tiles);
           return r.check(
               tiles >= many, "q",
               [&] { return "must have " + std::to_string(many) + " tiles of 64 rows"; }, tiles);
         }();
}

void why_not_forward_sm90(const DecodeParams& d, Rules& r) {
  const AttentionParams& p = d.attention;
  const Sm90Tensors t(p, d.cache);
  const bool few = !cuda::prefills(p) && rows_of(p) <= cuda::kMaxSm90DecodeRows;
  cuda::check_cached_form<cuda::Sm90HeadDims>(r, p, d.cache, t) &&
      r.check(p.seqlen_q >= cuda::kMinSm90Tokens, "q", "must have 32 tokens", p.seqlen_q) &&
      r.check(d.max_seqlen_q >= cuda::kMinSm90Tokens || r.described("max_seqlen_q") == "None",
              "max_seqlen_q", "must be 32 or more", d.max_seqlen_q) &&
      fills_a_gpu(r, d) && cuda::check_forward(r, p, t);
  if (few && r.broken()) r.set_other_calls();
  if (p.cu_seqlens_q)
    r.set_rest("csrc/dense/attention_decode for requests with fewer than 32 queries");
}

void why_not_decode_sm90(const DecodeParams& d, Rules& r) {
  const AttentionParams& p = d.attention;
  if (cuda::prefills(p)) r.set_other_calls();
  const int64_t rows = rows_of(p);
  const Sm90Tensors t(p, d.cache);
  const auto suits = [&] {
    return r.check(!p.cu_seqlens_q, "cu_seqlens_q", "must be None") &&
           r.check(p.window_right == 0, "causal", "must be True") &&
           r.check(rows <= cuda::kMaxSm90DecodeRows, "q",
                   "must have at most 64 queries times heads of a KV head, "
                   "or what the forward asks",
                   rows);
  };
  suits() && !r.broken() && cuda::check_cached_form<cuda::HeadDimList<64, 128>>(r, p, d.cache, t) &&
      cuda::check_scale(r, p) && cuda::check_out(r, t.out);
}

constexpr Knob kForwardCuts[] = {Knob::attention_sm90_section, Knob::attention_sm90_grid};

constexpr Kernel<DecodeParams> kKernels[] = {
    {.name = "csrc/dense/attention/kernel_sm90",
     .chips = cuda::kSm90,
     .why_not = why_not_forward_sm90,
     .launch = TOKENMILL_IF_SM90(cuda::launch_forward_on_sm90),
     .on = Knob::attention_decode_sm90,
     .cuts = kForwardCuts},
    {.name = "csrc/dense/attention_decode/kernel_sm90",
     .chips = cuda::kSm90,
     .why_not = why_not_decode_sm90,
     .launch = TOKENMILL_IF_SM90(cuda::launch_decode_on_sm90),
     .workspace = TOKENMILL_IF_SM90(cuda::workspace_of_decode_sm90),
     .on = Knob::attention_decode_sm90},
    {.name = "csrc/dense/attention_decode",
     .launch = TOKENMILL_IF_CUDA(cuda::launch_on_sm80),
     .workspace = TOKENMILL_IF_CUDA(cuda::workspace_of_sm80)},
};

}  // namespace

std::span<const Kernel<DecodeParams>> kernels_of(const DecodeParams&) { return kKernels; }

}  // namespace tokenmill
