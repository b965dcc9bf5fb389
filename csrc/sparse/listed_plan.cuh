// How the host launches kernels on lists.
#pragma once
#include "cuda/vector.cuh"
#include "sparse/listed.h"

namespace tokenmill::cuda {

constexpr int64_t kMaxGrid = 0x7fffffff;

template <typename T, typename... Lines>
bool has_whole_chunks(const Rows& rows, int64_t columns, Lines... lines) {
  return is_vectorizable<T>(rows.data, columns, rows.batch, rows.seq, rows.head, lines...);
}

// True if so many elements make fewer than 2^32 chunks.
template <typename T>
bool is_compact(int64_t elements) {
  return elements / (16 / static_cast<int64_t>(sizeof(T))) < int64_t{1} << 32;
}

// visit.operator()<bucket>()
template <typename Visit>
auto visit_bucket(const AttentionParams& p, const Visit& visit) {
  const int64_t dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if (dim <= 64) return visit.template operator()<64>();
  if (dim <= 128) return visit.template operator()<128>();
  return visit.template operator()<256>();
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
