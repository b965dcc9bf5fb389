#include "select/topk_select/kernel.cuh"

namespace tokenmill {
namespace cuda {
namespace {

// A row of more columns is worth the launches that several blocks take, if rows do not fill the
// GPU.
constexpr int64_t kOneBlockColumns = 131072;
constexpr int64_t kPartColumns = 16384;  // at least, of a block

int parts_of(const TopkParams& p) {
  int device = 0, sms = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (p.columns <= kOneBlockColumns || 2 * p.rows > sms) return 1;
  const int64_t most = ceil_div(p.columns, kPartColumns), filling = 2 * sms / p.rows;
  return static_cast<int>(most < filling ? most : filling);
}

int64_t sort_stride(const TopkParams& p) {
  if (!p.by_score) return 0;
  int64_t size = 1;
  while (size < p.k) size *= 2;
  return size;
}

template <typename T>
const char* launch(const TopkParams& p, cudaStream_t stream) {
  TopkMemory memory{};
  memory.parts = parts_of(p);
  memory.sort_stride = sort_stride(p);
  memory.sort_keys = static_cast<uint64_t*>(p.workspace);
  if (memory.parts == 1) {
    const unsigned blocks = static_cast<unsigned>(p.rows < 0x7fffffff ? p.rows : 0x7fffffff);
    topk_row_kernel<T><<<blocks, kTopkThreads, 0, stream>>>(p, memory);
  } else {
    memory.part_counts = reinterpret_cast<int2*>(memory.sort_keys + p.rows * memory.sort_stride);
    memory.rows = reinterpret_cast<TopkSharedRow*>(memory.part_counts + p.rows * memory.parts);
    cudaMemsetAsync(memory.rows, 0, p.rows * sizeof(TopkSharedRow), stream);
    const dim3 grid(memory.parts, static_cast<unsigned>(p.rows));
    for (int digit = 0; digit < kDigits; ++digit)
      topk_digit_kernel<T><<<grid, kTopkThreads, 0, stream>>>(p, memory, digit);
    topk_count_kernel<T><<<grid, kTopkThreads, 0, stream>>>(p, memory);
    topk_write_kernel<T><<<grid, kTopkThreads, 0, stream>>>(p, memory);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace cuda

int64_t workspace_bytes(const TopkParams& p) {
  const int parts = cuda::parts_of(p);
  int64_t bytes = p.rows * cuda::sort_stride(p) * 8;
  if (parts > 1) bytes += p.rows * (parts * sizeof(int2) + sizeof(cuda::TopkSharedRow));
  return bytes;
}

const char* launch_cuda(const TopkParams& p, void* stream) {
  const char* error = nullptr;
  cuda::visit_dtype(p.dtype, [&]<typename T>() {
    error = cuda::launch<T>(p, static_cast<cudaStream_t>(stream));
  });
  return error;
}

}  // namespace tokenmill
