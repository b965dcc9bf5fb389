// Launches the sm_80 backward kernels of one element type and mode.
#pragma once
#include "cuda/launch.cuh"
#include "dense/attention/head_dim.cuh"
#include "dense/attention/kernel_backward.cuh"

namespace tokenmill::cuda {

template <typename T, int kDim, Side kSide, Mode kMode>
const char* launch_side(BackwardArgs args, cudaStream_t stream) {
  using Shape = PairShape<T, kDim, kMode>;
  constexpr bool kKeys = kSide == Side::keys;
  const AttentionParams& p = args.p.forward;
  const int64_t tokens = kKeys ? p.seqlen_k : p.seqlen_q;
  if (tokens == 0) return nullptr;
  const int max_bytes = shared_limit();
  int pairs = 4;
  while (pairs > 1 && Shape::shared_bytes(pairs) > max_bytes) pairs /= 2;
  const int64_t group = p.heads / p.kv_heads;
  args.heads_per_block = 1;
  while (!kKeys && args.heads_per_block < pairs && group % (2 * args.heads_per_block) == 0)
    args.heads_per_block *= 2;
  const int32_t* ends = kKeys ? p.cu_seqlens_k : p.cu_seqlens_q;
  args.row_blocks = max_tiles(ends, p.batch, tokens, pairs / args.heads_per_block * Shape::kRows);
  const int64_t heads = kKeys ? p.kv_heads : p.heads / args.heads_per_block;
  const int64_t blocks = args.row_blocks * heads * (ends ? 1 : p.batch);
  args.whole = args.vectors && p.head_dim == kDim && p.value_dim == kDim;
  return launch<backward_kernel<T, kDim, kSide, kMode>>(blocks, 2 * pairs * kWarpSize,
                                                        Shape::shared_bytes(pairs), stream, args);
}

// Rarer modes have fewer instances, and not the largest ones.
constexpr int64_t kLargestElementwise = 128;

// Requires the row statistics.
template <typename T, Mode kMode>
const char* launch_pairs(const BackwardArgs& args, cudaStream_t stream) {
  const auto launch_dim = [&]<int kDim>(Index<kDim>) {
    const char* error = launch_side<T, kDim, Side::queries, kMode>(args, stream);
    return error ? error : launch_side<T, kDim, Side::keys, kMode>(args, stream);
  };
  if constexpr (kMode == Mode::elementwise)
    return args.largest_dim() <= 64 ? launch_dim(Index<64>{}) : launch_dim(Index<128>{});
  else
    return visit_head_dim(args.largest_dim(), launch_dim);
}

// Rows per entry of sums on the queries' side.
template <typename T>
int rows_of_sum(int64_t dim) {
  return visit_head_dim(
      dim, []<int kDim>(Index<kDim>) { return int{PairShape<T, kDim, Mode::general>::kRows}; });
}

}  // namespace tokenmill::cuda
