#include "sparse/bilevel_routing_attention/cuda_plan.cuh"

namespace tokenmill {
int64_t workspace_bytes(const BilevelBackwardParams& p) {
  const AttentionParams& f = p.forward.attention;
  return 2 * sizeof(float) * f.batch * f.heads * f.seqlen_q;
}

const char* launch_cuda(const BilevelBackwardParams& p, void* stream) {
  if (const char* error = cuda::bilevel_routing_attention::check_sizes(p.forward)) return error;
  const AttentionParams& f = p.forward.attention;
  cuda::bilevel_routing_attention::RegionGradients d{
      cuda::bilevel_routing_attention::plan_regions(p.forward)};
  d.dout = p.dout;
  d.dout_line = p.dout_line;
  d.dlse = p.dlse;
  d.dq = p.dq;
  d.dk = p.dk;
  d.dv = p.dv;
  d.minus_lse = static_cast<float*>(p.workspace);
  d.minus_delta = d.minus_lse + f.batch * f.heads * f.seqlen_q;
  d.offsets = p.offsets;
  d.listing = p.rows;
  d.query_rows =
      cuda::FastDivmod::of(static_cast<int>(cuda::bilevel_routing_attention::query_rows(d)));
  return cuda::visit_dtype(f.dtype, [&]<typename T>() {
    return cuda::bilevel_routing_attention::launch_bilevel<T>(d, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace tokenmill
