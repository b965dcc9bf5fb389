#include "cuda/vector.cuh"
#include "dense/attention/kernel_backward_bias.cuh"
#include "dense/attention/kernel_backward_launch.cuh"

namespace tokenmill::cuda {

const char* launch_bias(const BackwardArgs& args, cudaStream_t stream) {
  const AttentionBackwardParams& bp = args.p;
  const AttentionParams& p = bp.forward;
  const int64_t row_tiles = bp.dbias_q ? ceil_div(p.bias_rows, kBiasRows) : 1;
  const int64_t column_tiles = bp.dbias_k ? ceil_div(p.bias_columns, kBiasColumns) : 1;
  const int64_t blocks =
      row_tiles * column_tiles * (bp.dbias_head ? p.heads : 1) * (bp.dbias_batch ? p.batch : 1);
  const char* error = nullptr;
  visit_dtype(p.dtype, [&]<typename T>() {
    const auto launch = [&]<int kDim>(Index<kDim>) {
      constexpr int kBytes = bias_shared_bytes<T, kDim>();
      const auto kernel = bias_kernel<T, kDim>;
      error = check_launch(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
      if (error) return;
      kernel<<<static_cast<unsigned>(blocks), kBiasThreads, kBytes, stream>>>(args, row_tiles,
                                                                              column_tiles);
      error = check_launch(cudaGetLastError());
    };
    const int64_t dim = args.largest_dim();
    dim <= 64 ? launch(Index<64>{}) : dim <= 128 ? launch(Index<128>{}) : launch(Index<256>{});
  });
  return error;
}

}  // namespace tokenmill::cuda
