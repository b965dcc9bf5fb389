#include "cuda/launch.cuh"
#include "cuda/refuse.cuh"
#include "select/kv_cache_append/kernel.cuh"

namespace tokenmill {
namespace cuda::kv_cache_append {
namespace {

constexpr int64_t kMaxRows = 65535;  // grid limit along y, in CTAs of at least one row

template <typename T, typename Cache>
bool is_aligned(const AppendedRows& a) {
  constexpr int64_t kVector = 16 / sizeof(T);
  const Rows& to = a.cache;
  return is_vectorizable<T>(a.rows.data, a.dim, a.rows.seq, a.rows.head) &&
         reinterpret_cast<uintptr_t>(to.data) % (kVector * sizeof(Cache)) == 0 &&
         to.batch % kVector == 0 && to.seq % kVector == 0 && to.head % kVector == 0;
}

template <typename T, typename Cache>
const char* launch_append(const AppendParams& p, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const bool vectors =
      is_aligned<T, Cache>(p.k) && is_aligned<T, Cache>(p.v) && p.pairs % kVector == 0 &&
      p.rope_offset % kVector == 0 &&
      (p.query_heads == 0 || is_vectorizable<T>(p.q.data, p.k.dim, p.q.seq, p.q.head));
  const int64_t columns = p.k.dim > p.v.dim ? p.k.dim : p.v.dim;
  const int64_t units = ceil_div(columns, 2 * (vectors ? kVector : 1));
  int log2_lanes = 0;
  while (log2_lanes < 5 && (1 << log2_lanes) < units) ++log2_lanes;
  const int64_t rows = p.heads + p.value_heads + p.query_heads;
  if (rows > kMaxRows)
    return refuse("k", "must have at most 65535 heads with those of v and q on CUDA", rows);
  if (p.tokens > kMaxGrid)
    return refuse("k", "must have at most 2^31 - 1 tokens on CUDA", p.tokens);
  // A latent token has one row: whole warps, and no more of them than have rows.
  const int64_t lanes = rows << log2_lanes;
  const int threads =
      static_cast<int>(lanes < kAppendThreads ? round_up(lanes, 32) : kAppendThreads);
  const dim3 grid(static_cast<unsigned>(p.tokens),
                  static_cast<unsigned>(ceil_div(lanes, kAppendThreads)));
  // Units per thread: enough for 256 columns, or for the 576 of a latent cache.
  const auto append = [&]<int kCount, int kUnits>() {
    constexpr int kMaximum = static_cast<int>(ceil_div(288, 32 * kCount));
    if (units <= 32 * kUnits)
      return launch<append_kernel<T, Cache, kCount, kUnits>>(grid, threads, 0, stream, p,
                                                             log2_lanes);
    return launch<append_kernel<T, Cache, kCount, kMaximum>>(grid, threads, 0, stream, p,
                                                             log2_lanes);
  };
  return vectors ? append.template operator()<kVector, 1>() : append.template operator()<1, 4>();
}

}  // namespace
}  // namespace cuda::kv_cache_append

const char* launch_cuda(const AppendParams& p, void* stream) {
  using namespace cuda::kv_cache_append;
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    auto* const on = static_cast<cudaStream_t>(stream);
    return p.cache_dtype == p.dtype ? launch_append<T, T>(p, on)
                                    : launch_append<T, cuda::Float8>(p, on);
  });
}

}  // namespace tokenmill
