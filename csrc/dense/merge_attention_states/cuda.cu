#include "dense/merge_attention_states/kernel.cuh"

namespace tokenmill {
namespace {

template <typename Kernel, typename Params>
const char* launch_rows(Kernel kernel, const Params& params, int64_t rows, void* stream) {
  const int64_t rows_per_block = cuda::kMergeThreads / cuda::kWarpSize;
  const int64_t blocks = ceil_div(rows, rows_per_block);
  const unsigned grid = static_cast<unsigned>(blocks < (1 << 24) ? blocks : (1 << 24));
  kernel<<<grid, cuda::kMergeThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_cuda(const MergeParams& p, void* stream) {
  const char* error = nullptr;
  cuda::visit_dtype(p.dtype, [&]<typename T>() {
    const int64_t rows = p.batch * p.seqlen * p.heads;
    constexpr int kVector = 16 / sizeof(T);
    error =
        cuda::is_vectorizable<T>(p.outs, p.dim, p.outs_part, p.outs_batch, p.outs_seq, p.outs_head)
            ? launch_rows(cuda::merge_kernel<T, kVector>, p, rows, stream)
            : launch_rows(cuda::merge_kernel<T, 1>, p, rows, stream);
  });
  return error;
}

const char* launch_cuda(const MergeBackwardParams& q, void* stream) {
  const MergeParams& p = q.forward;
  const char* error = nullptr;
  cuda::visit_dtype(p.dtype, [&]<typename T>() {
    const int64_t rows = p.batch * p.seqlen * p.heads;
    constexpr int kVector = 16 / sizeof(T);
    const bool vector =
        cuda::is_vectorizable<T>(p.outs, p.dim, p.outs_part, p.outs_batch, p.outs_seq,
                                 p.outs_head) &&
        cuda::is_vectorizable<T>(q.dout, p.dim, q.dout_batch, q.dout_seq, q.dout_head);
    error = vector ? launch_rows(cuda::merge_backward_kernel<T, kVector>, q, rows, stream)
                   : launch_rows(cuda::merge_backward_kernel<T, 1>, q, rows, stream);
  });
  return error;
}

}  // namespace tokenmill
