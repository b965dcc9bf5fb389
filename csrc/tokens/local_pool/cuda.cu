#include "tokens/local_pool/kernel.cuh"

namespace tokenmill {
namespace {

int64_t tokens_of(const LocalPoolParams& p) { return p.batch * p.height * p.width; }

cuda::PoolPlan plan_of(const LocalPoolParams& p) {
  return {cuda::Divisor::of(p.width), cuda::Divisor::of(p.height), static_cast<int>(tokens_of(p))};
}

cuda::RowGrid grid_of(const LocalPoolParams& p, int vector) {
  return cuda::RowGrid(ceil_div(p.channels, vector), tokens_of(p), 1);
}

template <typename T, int kVector>
const char* launch_pool(const LocalPoolParams& p, cudaStream_t stream) {
  using namespace cuda;
  const RowGrid g = grid_of(p, kVector);
  if (p.is_max)
    local_pool_kernel<T, kVector, true><<<g.grid, g.block, 0, stream>>>(p, plan_of(p));
  else
    local_pool_kernel<T, kVector, false><<<g.grid, g.block, 0, stream>>>(p, plan_of(p));
  return last_error();
}

template <typename T, int kVector>
const char* launch_backward(const LocalPoolBackwardParams& q, cudaStream_t stream) {
  using namespace cuda;
  const LocalPoolParams& p = q.forward;
  const PoolPlan plan = plan_of(p);
  const RowGrid g = grid_of(p, kVector);
  if (p.is_max) {
    auto* taps = static_cast<uint16_t*>(q.workspace);
    pool_taps_kernel<T, kVector><<<g.grid, g.block, 0, stream>>>(p, plan, taps);
    maximum_backward_kernel<T, kVector><<<g.grid, g.block, 0, stream>>>(q, plan, taps);
  } else {
    auto* scales = static_cast<float*>(q.workspace);
    const RowGrid tokens(1, tokens_of(p), 1);
    pool_scales_kernel<<<tokens.grid, tokens.block, 0, stream>>>(p, plan, scales);
    mean_backward_kernel<T, kVector><<<g.grid, g.block, 0, stream>>>(q, plan, scales);
  }
  return last_error();
}

template <typename T>
bool is_vectorizable(const LocalPoolParams& p) {
  return cuda::is_vectorizable<T>(p.x, p.channels, p.x_batch, p.x_line, p.x_token);
}

}  // namespace

int64_t workspace_bytes(const LocalPoolBackwardParams& q) {
  const LocalPoolParams& p = q.forward;
  return tokens_of(p) * (p.is_max ? p.channels * static_cast<int64_t>(sizeof(uint16_t))
                                  : static_cast<int64_t>(sizeof(float)));
}

const char* launch_cuda(const LocalPoolParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const char* error = nullptr;
  cuda::visit_dtype(p.dtype, [&]<typename T>() {
    error = is_vectorizable<T>(p) ? launch_pool<T, 16 / sizeof(T)>(p, s) : launch_pool<T, 1>(p, s);
  });
  return error;
}

const char* launch_cuda(const LocalPoolBackwardParams& q, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t channels = q.forward.channels;
  const char* error = nullptr;
  cuda::visit_dtype(q.forward.dtype, [&]<typename T>() {
    const bool vector =
        is_vectorizable<T>(q.forward) &&
        cuda::is_vectorizable<T>(q.dout, channels, q.dout_batch, q.dout_line, q.dout_token);
    error = vector ? launch_backward<T, 16 / sizeof(T)>(q, s) : launch_backward<T, 1>(q, s);
  });
  return error;
}

}  // namespace tokenmill
