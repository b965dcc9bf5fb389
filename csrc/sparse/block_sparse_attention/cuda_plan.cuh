// How the host cuts a call into blocks, forward and backward.
#pragma once
#include "sparse/block_sparse_attention/kernel_keys.cuh"

namespace tokenmill::cuda {

constexpr int64_t kMaxGrid = 0x7fffffff;

template <typename T>
bool has_whole_chunks(const Rows& rows, int64_t columns) {
  return is_vectorizable<T>(rows.data, columns, rows.batch, rows.seq, rows.head);
}

// visit.operator()<bucket>()
template <typename Visit>
auto visit_bucket(const AttentionParams& p, const Visit& visit) {
  const int64_t dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if (dim <= 64) return visit.template operator()<64>();
  if (dim <= 128) return visit.template operator()<128>();
  return visit.template operator()<256>();
}

// Tiles of the rows of a block of queries, by the least warps that hold them, `least` to `most`.
inline BlockSparseLaunch plan_queries(const BlockSparseParams& d, int least, int most) {
  BlockSparseLaunch launch{d};
  const int64_t block_q = int64_t{1} << d.log2_block_q;
  const int64_t queries = block_q < d.attention.seqlen_q ? block_q : d.attention.seqlen_q;
  const int64_t rows = queries * d.heads_together();
  launch.row_warps = least;
  while (launch.row_warps < most && 16 * launch.row_warps < rows) launch.row_warps *= 2;
  launch.tiles = static_cast<int>(ceil_div(rows, 16 * launch.row_warps));
  launch.query_blocks = ceil_div(d.attention.seqlen_q, block_q);
  return launch;
}

inline int64_t query_tiles(const BlockSparseLaunch& d) {
  const AttentionParams& p = d.attention;
  return p.batch * (p.heads / d.heads_together()) * d.query_blocks * d.tiles;
}

inline const char* check_sizes(const BlockSparseParams& d) {
  const AttentionParams& p = d.attention;
  if (p.seqlen_q > kMaxLength || p.seqlen_k > kMaxLength)
    return "sequences may have 2^29 tokens at most on CUDA";
  if (d.list.entries << d.log2_block_k > kMaxLength)
    return "lists may have 2^29 keys at most on CUDA";
  return nullptr;
}

// kernel(args) with `threads` threads and `bytes` of shared memory.
template <typename Args>
const char* launch_blocks(void (*kernel)(Args), int64_t blocks, int threads, int bytes,
                          const Args& args, cudaStream_t stream) {
  if (blocks > kMaxGrid) return "2^31 - 1 blocks at most on CUDA";
  cudaError_t error = cudaSuccess;
  if (bytes > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) {
    kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(args);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tokenmill::cuda
