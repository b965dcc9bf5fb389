#include "cuda/launch.cuh"
#include "select/topk_select/kernel.cuh"

namespace tokenmill {
namespace cuda::topk_select {
namespace {

// A row of more columns is worth the launches that several blocks take, if rows do not fill the
// GPU.
constexpr int64_t kOneBlockColumns = 131072;
constexpr int64_t kPartColumns = 16384;  // at least, of a block

int parts_of(const TopkParams& p) {
  if (p.columns <= kOneBlockColumns || p.rows == 0) return 1;
  const int sms = multiprocessors();
  if (2 * p.rows > sms) return 1;
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
const char* launch_topk(const TopkParams& p, cudaStream_t stream) {
  TopkMemory memory{};
  memory.parts = parts_of(p);
  memory.sort_stride = sort_stride(p);
  memory.sort_keys = static_cast<uint64_t*>(p.workspace);
  if (memory.parts == 1)
    return launch<topk_row_kernel<T>>(p.rows < kMaxGrid ? p.rows : kMaxGrid, kTopkThreads, 0,
                                      stream, p, memory);
  memory.part_counts = reinterpret_cast<int2*>(memory.sort_keys + p.rows * memory.sort_stride);
  memory.rows = reinterpret_cast<TopkSharedRow*>(memory.part_counts + p.rows * memory.parts);
  if (const char* error = set_bytes(memory.rows, 0, p.rows * sizeof(TopkSharedRow), stream))
    return error;
  const dim3 grid(memory.parts, static_cast<unsigned>(p.rows));
  for (int digit = 0; digit < kDigits; ++digit)
    if (const char* error =
            launch<topk_digit_kernel<T>>(grid, kTopkThreads, 0, stream, p, memory, digit))
      return error;
  if (const char* error = launch<topk_count_kernel<T>>(grid, kTopkThreads, 0, stream, p, memory))
    return error;
  return launch<topk_write_kernel<T>>(grid, kTopkThreads, 0, stream, p, memory);
}

}  // namespace
}  // namespace cuda::topk_select

int64_t workspace_bytes(const TopkParams& p) {
  const int parts = cuda::topk_select::parts_of(p);
  int64_t bytes = p.rows * cuda::topk_select::sort_stride(p) * 8;
  if (parts > 1)
    bytes += p.rows * (parts * sizeof(int2) + sizeof(cuda::topk_select::TopkSharedRow));
  return bytes;
}

const char* launch_cuda(const TopkParams& p, void* stream) {
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    return cuda::topk_select::launch_topk<T>(p, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace tokenmill
