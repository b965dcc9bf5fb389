#include "cuda/launch.cuh"
#include "select/attention_row_scores/kernel.cuh"

namespace tokenmill {
namespace cuda::attention_row_scores {
namespace {

template <typename T, int kBucket>
const char* launch_exponents(const RowScoresParams& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(p.seqlen_k, kBlockKeys));
  const bool aligned = is_vectorizable<T>(p.k.data, p.head_dim, p.k.batch, p.k.seq, p.k.head);
  return launch<row_exponents_kernel<T, kBucket>>(blocks * p.batch * p.kv_heads, kRowThreads, 0,
                                                  stream, p, blocks, aligned);
}

}  // namespace
}  // namespace cuda::attention_row_scores

const char* launch_cuda(const RowScoresParams& p, void* stream_handle) {
  using namespace cuda;
  using namespace cuda::attention_row_scores;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (const char* error = visit_dtype(p.dtype, [&]<typename T>() {
        if (p.head_dim <= 64) return launch_exponents<T, 64>(p, stream);
        if (p.head_dim <= 128) return launch_exponents<T, 128>(p, stream);
        return launch_exponents<T, 256>(p, stream);
      }))
    return error;
  const int64_t rows = p.batch * p.heads * p.rows;
  if (p.reduce == RowReduce::argmax)
    return launch<row_argmax_kernel>(rows, kRowThreads, 0, stream, p);
  if (const char* error = launch<row_weights_kernel>(rows, kRowThreads, 0, stream, p)) return error;
  const int64_t results =
      p.batch * (p.seqlen_k - p.skip) * (p.reduce == RowReduce::none ? p.heads * p.rows : 1);
  return launch<reduce_rows_kernel>(ceil_div(results, kRowThreads), kRowThreads, 0, stream, p);
}

}  // namespace tokenmill
