#include "dense/merge_attention_states/kernel.cuh"

namespace tokenmill {
namespace {

template <typename Kernel, typename Params>
const char* launch_rows(Kernel kernel, const Params& params, const MergeParams& p, void* stream) {
  const auto limited = [](int64_t blocks) {
    return static_cast<unsigned>(blocks < 65535 ? blocks : 65535);
  };
  const dim3 grid(limited(p.heads), limited(ceil_div(p.seqlen, cuda::kMergeWarps)),
                  limited(p.batch));
  kernel<<<grid, cuda::kMergeThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_cuda(const MergeParams& p, void* stream) {
  const char* error = nullptr;
  cuda::visit_dtype(p.dtype, [&]<typename T>() {
    constexpr int kVector = 16 / sizeof(T);
    error =
        cuda::is_vectorizable<T>(p.outs, p.dim, p.outs_part, p.outs_batch, p.outs_seq, p.outs_head)
            ? launch_rows(cuda::merge_kernel<T, kVector>, p, p, stream)
            : launch_rows(cuda::merge_kernel<T, 1>, p, p, stream);
  });
  return error;
}

const char* launch_cuda(const MergeBackwardParams& q, void* stream) {
  const MergeParams& p = q.forward;
  const char* error = nullptr;
  cuda::visit_dtype(p.dtype, [&]<typename T>() {
    constexpr int kVector = 16 / sizeof(T);
    const bool vector =
        cuda::is_vectorizable<T>(p.outs, p.dim, p.outs_part, p.outs_batch, p.outs_seq,
                                 p.outs_head) &&
        cuda::is_vectorizable<T>(q.dout, p.dim, q.dout_batch, q.dout_seq, q.dout_head);
    error = vector ? launch_rows(cuda::merge_backward_kernel<T, kVector>, q, p, stream)
                   : launch_rows(cuda::merge_backward_kernel<T, 1>, q, p, stream);
  });
  return error;
}

}  // namespace tokenmill
