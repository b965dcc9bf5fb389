#include "cuda/launch.cuh"
#include "linear/linear_attention_decode/kernel.cuh"

namespace tokenmill {
namespace {

// Minimum columns per CTA when there are fewer heads than SMs: rows of 128 bytes.
constexpr int64_t kMinColumns = 32;

template <typename T, int kVector>
const char* launch_decode(const LinearDecodeParams& p, cudaStream_t stream) {
  const int64_t columns = p.value_dim + p.normalize;
  cuda::linear_attention_decode::DecodePlan plan{1, 1};
  while (plan.lanes < cuda::kWarpSize && plan.lanes * kVector < columns) plan.lanes *= 2;
  if (!p.normalize) {
    const auto slices = [&] { return ceil_div(columns, plan.lanes * kVector); };
    while (plan.lanes * kVector > kMinColumns &&
           p.batch * p.heads * slices() < cuda::multiprocessors())
      plan.lanes /= 2;
    plan.slices = static_cast<int>(slices());
  }
  return cuda::launch<cuda::linear_attention_decode::decode_kernel<T, kVector>>(
      p.batch * p.heads * plan.slices, cuda::linear_attention_decode::kDecodeThreads, 0, stream, p,
      plan);
}

}  // namespace

int64_t workspace_bytes(const LinearDecodeParams& p) {
  const int64_t state = feature_dim(p.map, p.head_dim) * (p.value_dim + p.normalize);
  return p.batch * p.heads * state * static_cast<int64_t>(sizeof(float));
}

const char* launch_cuda(const LinearDecodeParams& p, void* stream) {
  if (p.batch == 0 || p.heads == 0 || p.seqlen == 0) return nullptr;
  const bool vector = cuda::is_vectorizable<float>(p.state.data, p.value_dim + p.normalize,
                                                   p.state.sequence, p.state.head);
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    const auto s = static_cast<cudaStream_t>(stream);
    return vector ? launch_decode<T, 4>(p, s) : launch_decode<T, 1>(p, s);
  });
}

}  // namespace tokenmill
