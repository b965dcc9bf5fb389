#include "select/kv_cache_compact/kernel.cuh"

namespace tokenmill {
namespace cuda {
namespace {

CompactPlan plan_of(int64_t units) {
  int lanes = 1;
  while (lanes < kWarpSize && lanes < units) lanes *= 2;
  return {lanes, static_cast<int>(units), static_cast<unsigned>(ceil_div(units, lanes))};
}

unsigned grid_of(const CompactParams& p, unsigned blocks) {
  return static_cast<unsigned>(p.batch * p.heads * blocks);
}

template <typename T>
void move_rows(const CompactParams& p, const Rows& rows, int64_t dim, cudaStream_t stream) {
  if (is_vectorizable<T>(rows.data, dim, rows.batch, rows.seq, rows.head)) {
    const CompactPlan plan = plan_of(dim * static_cast<int64_t>(sizeof(T)) / 16);
    move_rows_kernel<uint4><<<grid_of(p, plan.blocks), kCompactThreads, 0, stream>>>(p, rows, plan);
  } else {
    const CompactPlan plan = plan_of(dim);
    move_rows_kernel<T><<<grid_of(p, plan.blocks), kCompactThreads, 0, stream>>>(p, rows, plan);
  }
}

template <typename T>
void sum_dropped(const CompactParams& p, const Rows& rows, int64_t dim, float* sums,
                 int32_t* dropped, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(dim, kWarpSize));
  sum_dropped_kernel<T><<<grid_of(p, blocks), kCompactThreads, 0, stream>>>(
      p, rows, static_cast<int>(dim), blocks, sums, dropped);
}

template <typename T>
void launch(const CompactParams& p, cudaStream_t stream) {
  const int64_t lists = p.batch * (p.per_head ? p.heads : 1);
  if (lists > 0)
    new_lengths_kernel<<<static_cast<unsigned>(ceil_div(lists, kCompactThreads)), kCompactThreads,
                         0, stream>>>(p);
  if (p.heads == 0) return;
  if (p.k_sum) {
    sum_dropped<T>(p, p.k, p.key_dim, p.k_sum, p.dropped, stream);
    sum_dropped<T>(p, p.v, p.value_dim, p.v_sum, nullptr, stream);
  }
  if (p.entries == 0) return;
  if (p.turns) {
    const CompactPlan plan = plan_of(p.key_dim - p.pairs);
    turn_rows_kernel<T><<<grid_of(p, plan.blocks), kCompactThreads, 0, stream>>>(p, plan);
  } else {
    move_rows<T>(p, p.k, p.key_dim, stream);
  }
  move_rows<T>(p, p.v, p.value_dim, stream);
}

}  // namespace
}  // namespace cuda

const char* launch_cuda(const CompactParams& p, void* stream) {
  cuda::visit_dtype(p.dtype,
                    [&]<typename T>() { cuda::launch<T>(p, static_cast<cudaStream_t>(stream)); });
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tokenmill
