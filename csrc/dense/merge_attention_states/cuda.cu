#include "cuda/launch.cuh"
#include "dense/merge_attention_states/kernel.cuh"

namespace tokenmill {
namespace {

template <auto kKernel, typename Params>
const char* launch_rows(const Params& params, const MergeParams& p, void* stream) {
  const auto limited = [](int64_t blocks) {
    return static_cast<unsigned>(blocks < 65535 ? blocks : 65535);
  };
  const dim3 grid(limited(p.heads),
                  limited(ceil_div(p.seqlen, cuda::merge_attention_states::kMergeWarps)),
                  limited(p.batch));
  return cuda::launch<kKernel>(grid, cuda::merge_attention_states::kMergeThreads, 0,
                               static_cast<cudaStream_t>(stream), params);
}

}  // namespace

const char* launch_cuda(const MergeParams& p, void* stream) {
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    constexpr int kVector = 16 / sizeof(T);
    return cuda::is_vectorizable<T>(p.outs, p.dim, p.outs_part, p.outs_batch, p.outs_seq,
                                    p.outs_head)
               ? launch_rows<cuda::merge_attention_states::merge_kernel<T, kVector>>(p, p, stream)
               : launch_rows<cuda::merge_attention_states::merge_kernel<T, 1>>(p, p, stream);
  });
}

const char* launch_cuda(const MergeBackwardParams& q, void* stream) {
  const MergeParams& p = q.forward;
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    constexpr int kVector = 16 / sizeof(T);
    const bool vector =
        cuda::is_vectorizable<T>(p.outs, p.dim, p.outs_part, p.outs_batch, p.outs_seq,
                                 p.outs_head) &&
        cuda::is_vectorizable<T>(q.dout, p.dim, q.dout_batch, q.dout_seq, q.dout_head);
    return vector ? launch_rows<cuda::merge_attention_states::merge_backward_kernel<T, kVector>>(
                        q, p, stream)
                  : launch_rows<cuda::merge_attention_states::merge_backward_kernel<T, 1>>(q, p,
                                                                                           stream);
  });
}

}  // namespace tokenmill
