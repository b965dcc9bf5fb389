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
  return visit_dtype(p.dtype, [&]<typename T>() {
    const auto launch_dim = [&]<int kDim>(Index<kDim>) {
      return launch<bias_kernel<T, kDim>>(blocks, kBiasThreads, bias_shared_bytes<T, kDim>(),
                                          stream, args, row_tiles, column_tiles);
    };
    const int64_t dim = args.largest_dim();
    return dim <= 64    ? launch_dim(Index<64>{})
           : dim <= 128 ? launch_dim(Index<128>{})
                        : launch_dim(Index<256>{});
  });
}

}  // namespace tokenmill::cuda
