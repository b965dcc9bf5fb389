#include "cuda/refuse.cuh"
#include "tokens/gather_fuse/kernel.cuh"

namespace tokenmill {
namespace {

dim3 grid_of(int64_t blocks, int64_t batch) {
  return dim3(static_cast<unsigned>(blocks),
              static_cast<unsigned>(batch < cuda::kMaxBatches ? batch : cuda::kMaxBatches));
}

template <typename T, int kVector>
const char* launch_fuse(const GatherFuseParams& p, cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::gather_fuse;
  const int64_t slices = ceil_div(p.channels, kWarpSize * kVector);
  // The sum of the weights is also required for rows without channels.
  FusePlan plan{static_cast<int>(slices > 0 ? slices : 1), kWarpSize};
  const auto copy_blocks = [&] { return ceil_div((p.rows() - 1) * plan.copy_lanes, kFuseThreads); };
  while (plan.copy_lanes < kFuseThreads && plan.copy_lanes * kVector < p.channels &&
         (plan.slices + copy_blocks()) * p.batch < multiprocessors())
    plan.copy_lanes *= 2;
  const int64_t blocks = plan.slices + copy_blocks();
  if (blocks > kMaxGrid) return refuse("keep", kMaxBlocks, blocks);
  return launch<gather_fuse_kernel<T, kVector>>(grid_of(blocks, p.batch), kFuseThreads, 0, stream,
                                                p, plan);
}

template <typename T, int kVector>
const char* launch_fuse(const GatherFuseBackwardParams& q, cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::gather_fuse;
  const GatherFuseParams& p = q.forward;
  const int64_t entries = p.kept + p.rest;
  const int64_t blocks = ceil_div(p.prefix + p.patches, kFuseRows);
  const int64_t place_blocks = ceil_div(entries, kFuseThreads);
  if (blocks > kMaxGrid) return refuse("x", kMaxBlocks, blocks);
  if (place_blocks > kMaxGrid) return refuse("keep", kMaxBlocks, place_blocks);
  const int64_t bytes = p.batch * p.patches * sizeof(int32_t);
  if (const char* error = set_bytes(q.places, 0xff, bytes, stream)) return error;  // places = -1
  if (const char* error =
          launch<fuse_places_kernel>(grid_of(place_blocks, p.batch), kFuseThreads, 0, stream, q))
    return error;
  return launch<gather_fuse_backward_kernel<T, kVector>>(grid_of(blocks, p.batch), kFuseThreads, 0,
                                                         stream, q);
}

}  // namespace

const char* launch_cuda(const GatherFuseParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    constexpr int kVector = 16 / sizeof(T);
    const bool vector = cuda::is_vectorizable<T>(p.x, p.channels, p.x_batch, p.x_token) &&
                        cuda::is_vectorizable<T>(p.out, p.channels, p.out_batch, p.out_row);
    return vector ? launch_fuse<T, kVector>(p, s) : launch_fuse<T, 1>(p, s);
  });
}

const char* launch_cuda(const GatherFuseBackwardParams& q, void* stream) {
  const GatherFuseParams& p = q.forward;
  const auto s = static_cast<cudaStream_t>(stream);
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    constexpr int kVector = 16 / sizeof(T);
    const bool vector = cuda::is_vectorizable<T>(p.x, p.channels, p.x_batch, p.x_token) &&
                        cuda::is_vectorizable<T>(q.dout, p.channels, q.dout_batch, q.dout_row) &&
                        cuda::is_vectorizable<T>(q.fused, p.channels, q.fused_batch);
    return vector ? launch_fuse<T, kVector>(q, s) : launch_fuse<T, 1>(q, s);
  });
}

}  // namespace tokenmill
