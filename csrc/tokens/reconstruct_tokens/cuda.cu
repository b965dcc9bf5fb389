#include "cuda/launch.cuh"
#include "tokens/nearest.cuh"
#include "tokens/reconstruct_tokens/kernel.cuh"

namespace tokenmill {
namespace cuda::reconstruct_tokens {
namespace {

dim3 warps_of(int64_t rows, int64_t batch) {
  return {static_cast<unsigned>(ceil_div(rows, kReconstructWarps)),
          static_cast<unsigned>(batch < 65535 ? batch : 65535)};
}

template <typename T>
MapRows<T> rows_of(const void* data, int64_t batch, int64_t row, int64_t count, int64_t channels) {
  const int rows = static_cast<int>(count);
  return {static_cast<const T*>(data),
          batch,
          0,
          row,
          FastDivmod::of(rows),
          rows,
          reads_fours<T>(data, channels, batch, row)};
}

}  // namespace
}  // namespace cuda::reconstruct_tokens

int64_t workspace_bytes(const ReconstructParams& p) { return p.batch * p.tokens * p.k * 8; }

const char* launch_cuda(const ReconstructParams& p, void* stream) {
  using namespace cuda;
  using namespace cuda::reconstruct_tokens;
  const auto s = static_cast<cudaStream_t>(stream);
  Nearest near{};
  near.channels = static_cast<int>(p.channels);
  near.k = static_cast<int>(p.k);
  near.distances = static_cast<float*>(p.workspace);
  near.ids = reinterpret_cast<int32_t*>(near.distances + p.batch * p.tokens * p.k);
  return visit_dtype(p.dtype, [&]<typename T>() {
    if (const char* error = launch_nearest<false>(
            rows_of<T>(p.features, p.features_batch, p.features_row, p.tokens, p.channels),
            rows_of<T>(p.centroids, p.centroids_batch, p.centroids_row, p.clusters, p.channels),
            near, p.batch, s))
      return error;
    const dim3 grid = warps_of(p.tokens, p.batch);
    constexpr int kVector = 16 / sizeof(T);
    return is_vectorizable<T>(p.values, p.value_channels, p.values_batch, p.values_row)
               ? launch<reconstruct_kernel<T, kVector>>(grid, kReconstructThreads, 0, s, p,
                                                        near.distances, near.ids)
               : launch<reconstruct_kernel<T, 1>>(grid, kReconstructThreads, 0, s, p,
                                                  near.distances, near.ids);
  });
}

const char* launch_cuda(const ReconstructBackwardParams& p, void* stream) {
  using namespace cuda;
  using namespace cuda::reconstruct_tokens;
  const auto s = static_cast<cudaStream_t>(stream);
  return visit_dtype(p.dtype, [&]<typename T>() {
    const dim3 grid = warps_of(p.clusters, p.batch);
    return is_vectorizable<T>(p.dout, p.value_channels, p.dout_batch, p.dout_row)
               ? launch<reconstruct_backward_kernel<T, 16 / sizeof(T)>>(grid, kReconstructThreads,
                                                                        0, s, p)
               : launch<reconstruct_backward_kernel<T, 1>>(grid, kReconstructThreads, 0, s, p);
  });
}

}  // namespace tokenmill
