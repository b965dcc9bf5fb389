#include <algorithm>
#include <bit>

#include "cuda/launch.cuh"
#include "select/topk_select/kernel.cuh"

namespace tokenmill {
namespace cuda::topk_select {
namespace {

// Longer rows pay for the launches of several CTAs per row, if the rows do not fill the GPU.
constexpr int64_t kOneBlockColumns = 16384;
constexpr int64_t kPartColumns = 512;  // minimum per CTA
// Above these, rows whose first digit leaves too many candidates pay for more launches.
constexpr int64_t kListedColumns = 131072, kListedK = 4096;
constexpr int64_t kSharedSort = 8192;  // keys of 8 bytes

int64_t element_bytes(const TopkParams& p) { return p.dtype == DType::float32 ? 4 : 2; }

int parts_of(const TopkParams& p) {
  if (p.columns <= kOneBlockColumns || p.rows == 0) return 1;
  const int64_t sms = multiprocessors();
  if (2 * p.rows > sms) return 1;
  // One vector per thread, less if that leaves SMs idle.
  const int64_t full = ceil_div(p.columns, kTopkThreads * 16 / element_bytes(p));
  const int64_t filling = std::min(ceil_div(p.columns, kPartColumns), ceil_div(sms, p.rows));
  const int64_t maximum = std::min<int64_t>(2 * sms / p.rows, kTopkThreads);
  return static_cast<int>(std::min(std::max(full, filling), maximum));
}

bool is_listed(const TopkParams& p) { return p.columns <= kListedColumns && p.k <= kListedK; }

// Keys in the sort of a row: a power of two.
int64_t sort_size(const TopkParams& p) {
  if (!p.by_score) return 0;
  return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::min(p.k, p.columns))));
}
int64_t sort_stride(const TopkParams& p) { return sort_size(p) > kSharedSort ? sort_size(p) : 0; }
int64_t list_stride(const TopkParams& p, int parts) {
  if (parts == 1 || !is_listed(p)) return 0;
  return std::min<int64_t>(ceil_div(p.columns, parts) + 16 / element_bytes(p), kListed);
}

template <typename T>
const char* launch_topk(const TopkParams& p, cudaStream_t stream) {
  TopkMemory memory{};
  memory.parts = parts_of(p);
  memory.sort_stride = sort_stride(p);
  memory.list_stride = list_stride(p, memory.parts);
  uint64_t* const sort_keys = static_cast<uint64_t*>(p.workspace);
  memory.sort_keys = memory.sort_stride > 0 ? sort_keys : nullptr;
  const int64_t sorted = memory.sort_stride > 0 ? 0 : 8 * sort_size(p);
  if (memory.parts == 1)
    return launch<topk_row_kernel<T>>(p.rows < kMaxGrid ? p.rows : kMaxGrid, kTopkThreads,
                                      std::max<int64_t>(8 * kCandidates, sorted), stream, p,
                                      memory);
  memory.lists = reinterpret_cast<uint2*>(sort_keys + p.rows * memory.sort_stride);
  memory.part_counts =
      reinterpret_cast<int2*>(memory.lists + p.rows * memory.parts * memory.list_stride);
  memory.rows = reinterpret_cast<TopkSharedRow*>(memory.part_counts + p.rows * memory.parts);
  if (const char* error = set_bytes(memory.rows, 0, p.rows * sizeof(TopkSharedRow), stream))
    return error;
  const dim3 grid(memory.parts, static_cast<unsigned>(p.rows));
  const int digits = is_listed(p) ? 1 : kDigits;
  for (int digit = 0; digit < digits; ++digit)
    if (const char* error =
            launch<topk_digit_kernel<T>>(grid, kTopkThreads, 0, stream, p, memory, digit))
      return error;
  if (is_listed(p))
    return launch<topk_list_kernel<T>>(grid, kTopkThreads, 8 * kListed, stream, p, memory);
  if (const char* error = launch<topk_count_kernel<T>>(grid, kTopkThreads, 0, stream, p, memory))
    return error;
  return launch<topk_write_kernel<T>>(grid, kTopkThreads, sorted, stream, p, memory);
}

}  // namespace
}  // namespace cuda::topk_select

int64_t workspace_bytes(const TopkParams& p) {
  using namespace cuda::topk_select;
  const int parts = parts_of(p);
  int64_t bytes = p.rows * sort_stride(p) * 8;
  if (parts > 1)
    bytes += p.rows * (parts * (list_stride(p, parts) + 1) * 8 + sizeof(TopkSharedRow));
  return bytes;
}

const char* launch_cuda(const TopkParams& p, void* stream) {
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    return cuda::topk_select::launch_topk<T>(p, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace tokenmill
