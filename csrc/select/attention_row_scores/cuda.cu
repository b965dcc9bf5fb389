#include "select/attention_row_scores/kernel.cuh"

namespace tokenmill {
namespace cuda {
namespace {

unsigned blocks_of(int64_t elements, int64_t each) {
  return static_cast<unsigned>(ceil_div(elements, each));
}

template <typename T, int kBucket>
void launch_exponents(const RowScoresParams& p, cudaStream_t stream) {
  const unsigned blocks = blocks_of(p.seqlen_k, kBlockKeys);
  const bool aligned = is_vectorizable<T>(p.k.data, p.head_dim, p.k.batch, p.k.seq, p.k.head);
  row_exponents_kernel<T, kBucket>
      <<<static_cast<unsigned>(blocks * p.batch * p.kv_heads), kRowThreads, 0, stream>>>(p, blocks,
                                                                                         aligned);
}

}  // namespace
}  // namespace cuda

const char* launch_cuda(const RowScoresParams& p, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  cuda::visit_dtype(p.dtype, [&]<typename T>() {
    if (p.head_dim <= 64)
      cuda::launch_exponents<T, 64>(p, stream);
    else if (p.head_dim <= 128)
      cuda::launch_exponents<T, 128>(p, stream);
    else
      cuda::launch_exponents<T, 256>(p, stream);
  });
  const int64_t rows = p.batch * p.heads * p.rows;
  cuda::row_weights_kernel<<<static_cast<unsigned>(rows), cuda::kRowThreads, 0, stream>>>(p);
  const int64_t results =
      p.batch * (p.seqlen_k - p.skip) * (p.reduce == RowReduce::none ? p.heads * p.rows : 1);
  cuda::reduce_rows_kernel<<<cuda::blocks_of(results, cuda::kRowThreads), cuda::kRowThreads, 0,
                             stream>>>(p);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tokenmill
