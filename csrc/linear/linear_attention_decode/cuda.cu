#include "linear/linear_attention_decode/kernel.cuh"

namespace tokenmill {
namespace {

template <typename T, int kVector>
const char* launch(const LinearDecodeParams& p, cudaStream_t stream) {
  const int64_t columns = p.value_dim + p.normalize;
  cuda::DecodePlan plan{1, 1};
  while (plan.lanes < cuda::kWarpSize && plan.lanes * kVector < columns) plan.lanes *= 2;
  if (!p.normalize) plan.slices = static_cast<int>(ceil_div(columns, plan.lanes * kVector));
  const int64_t blocks = p.batch * p.heads * plan.slices;
  if (blocks > 0x7fffffff) return "too many heads for a launch";
  cuda::decode_kernel<T, kVector>
      <<<static_cast<unsigned>(blocks), cuda::kDecodeThreads, 0, stream>>>(p, plan);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_cuda(const LinearDecodeParams& p, void* stream) {
  if (p.batch == 0 || p.heads == 0 || p.seqlen == 0) return nullptr;
  const bool vector = cuda::is_vectorizable<float>(p.state.data, p.value_dim + p.normalize,
                                                   p.state.sequence, p.state.head);
  const char* error = nullptr;
  cuda::visit_dtype(p.dtype, [&]<typename T>() {
    const auto s = static_cast<cudaStream_t>(stream);
    error = vector ? launch<T, 4>(p, s) : launch<T, 1>(p, s);
  });
  return error;
}

}  // namespace tokenmill
