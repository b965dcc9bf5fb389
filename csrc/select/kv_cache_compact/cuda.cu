#include "cuda/launch.cuh"
#include "select/kv_cache_compact/kernel.cuh"

namespace tokenmill {
namespace cuda::kv_cache_compact {
namespace {

constexpr int64_t kSectorBytes = 32;

// One CTA per group of lanes. If there are fewer heads than SMs, each head gets more CTAs, whose
// lanes read at least one sector of a row.
CompactPlan plan_of(const CompactParams& p, int64_t units, int64_t unit_bytes) {
  int lanes = 1;
  while (lanes < kWarpSize && lanes < units) lanes *= 2;
  const int64_t heads = p.batch * p.heads;
  while (lanes * unit_bytes > kSectorBytes && heads * ceil_div(units, lanes) < multiprocessors())
    lanes /= 2;
  return {lanes, static_cast<int>(units), static_cast<unsigned>(ceil_div(units, lanes))};
}

int64_t grid_of(const CompactParams& p, unsigned blocks) { return p.batch * p.heads * blocks; }

template <typename T>
const char* move_rows(const CompactParams& p, const Rows& rows, int64_t dim, cudaStream_t stream) {
  if (is_vectorizable<T>(rows.data, dim, rows.batch, rows.seq, rows.head)) {
    const CompactPlan plan = plan_of(p, dim * static_cast<int64_t>(sizeof(T)) / 16, 16);
    return launch<move_rows_kernel<uint4>>(grid_of(p, plan.blocks), kCompactThreads, 0, stream, p,
                                           rows, plan);
  }
  const CompactPlan plan = plan_of(p, dim, sizeof(T));
  return launch<move_rows_kernel<T>>(grid_of(p, plan.blocks), kCompactThreads, 0, stream, p, rows,
                                     plan);
}

template <typename T>
const char* sum_dropped(const CompactParams& p, const Rows& rows, int64_t dim, float* sums,
                        int32_t* dropped, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(dim, kWarpSize));
  return launch<sum_dropped_kernel<T>>(grid_of(p, blocks), kCompactThreads, 0, stream, p, rows,
                                       static_cast<int>(dim), blocks, sums, dropped);
}

template <typename T>
const char* move_keys(const CompactParams& p, cudaStream_t stream) {
  if (!p.turns) return move_rows<T>(p, p.k, p.key_dim, stream);
  const CompactPlan plan = plan_of(p, p.key_dim - p.pairs, sizeof(T));
  return launch<turn_rows_kernel<T>>(grid_of(p, plan.blocks), kCompactThreads, 0, stream, p, plan);
}

template <typename T>
const char* launch_compact(const CompactParams& p, cudaStream_t stream) {
  const int64_t lists = p.batch * (p.per_head ? p.heads : 1);
  const char* error =
      launch<new_lengths_kernel>(ceil_div(lists, kCompactThreads), kCompactThreads, 0, stream, p);
  if (!error && p.k_sum) {
    error = sum_dropped<T>(p, p.k, p.key_dim, p.k_sum, p.dropped, stream);
    if (!error) error = sum_dropped<T>(p, p.v, p.value_dim, p.v_sum, nullptr, stream);
  }
  if (error || p.entries == 0) return error;
  error = move_keys<T>(p, stream);
  return error ? error : move_rows<T>(p, p.v, p.value_dim, stream);
}

}  // namespace
}  // namespace cuda::kv_cache_compact

const char* launch_cuda(const CompactParams& p, void* stream) {
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    return cuda::kv_cache_compact::launch_compact<T>(p, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace tokenmill
