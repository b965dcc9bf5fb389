#include "dense/attention/kernel_backward_launch.cuh"
#include "dense/attention/kernel_backward_rows.cuh"
#include "dense/attention/kernel_backward_statistics.cuh"

namespace tokenmill {
namespace cuda {

extern template const char* launch_pairs<__half, Mode::softmax>(const BackwardArgs&, cudaStream_t);
extern template const char* launch_pairs<__half, Mode::sigmoid>(const BackwardArgs&, cudaStream_t);
extern template const char* launch_pairs<__half, Mode::fast_sigmoid>(const BackwardArgs&,
                                                                     cudaStream_t);
extern template const char* launch_pairs<__half, Mode::general>(const BackwardArgs&, cudaStream_t);
extern template const char* launch_pairs<__nv_bfloat16, Mode::softmax>(const BackwardArgs&,
                                                                       cudaStream_t);
extern template const char* launch_pairs<__nv_bfloat16, Mode::sigmoid>(const BackwardArgs&,
                                                                       cudaStream_t);
extern template const char* launch_pairs<__nv_bfloat16, Mode::fast_sigmoid>(const BackwardArgs&,
                                                                            cudaStream_t);
extern template const char* launch_pairs<__nv_bfloat16, Mode::general>(const BackwardArgs&,
                                                                       cudaStream_t);
extern template const char* launch_pairs<float, Mode::general>(const BackwardArgs&, cudaStream_t);
const char* launch_bias(const BackwardArgs&, cudaStream_t);

namespace {

template <typename T>
const char* launch_backward(BackwardArgs args, cudaStream_t stream) {
  const AttentionBackwardParams& bp = args.p;
  const AttentionParams& p = bp.forward;
  const auto vectorizable = [&](const Rows& r, int64_t dim) {
    return is_vectorizable<T>(r.data, dim, r.batch, r.seq, r.head);
  };
  args.vectors = vectorizable(p.q, p.head_dim) && vectorizable(p.k, p.head_dim) &&
                 vectorizable(p.v, p.value_dim) && vectorizable(bp.dout, p.value_dim);
  args.store_vectors = p.head_dim % (8 / sizeof(T)) == 0 && p.value_dim % (8 / sizeof(T)) == 0;
  args.head_sums = blocks_of_sums(p);
  const bool bias_is_broadcast = (p.batch > 1 && !bp.dbias_batch) ||
                                 (p.heads > 1 && !bp.dbias_head) ||
                                 (p.seqlen_q > 1 && !bp.dbias_q) || (p.seqlen_k > 1 && !bp.dbias_k);
  args.direct_bias = bp.dbias && !bias_is_broadcast;
  const bool softmax = p.map == ScoreMap::softmax;
  const bool general = sizeof(T) == 4 || bp.sums || p.bias || p.alibi_slopes || p.softcap > 0;
  args.factor = softmax ? p.scale * kLog2e : p.fast ? p.scale * 0.5f : -p.scale * kLog2e;
  const char* error = nullptr;
  if (softmax && p.seqlen_q > 0) error = launch_statistics<T>(args, general, stream);
  if (error) return error;
  if constexpr (sizeof(T) == 2) {
    if (!general)
      error = softmax  ? launch_pairs<T, Mode::softmax>(args, stream)
              : p.fast ? launch_pairs<T, Mode::fast_sigmoid>(args, stream)
                       : launch_pairs<T, Mode::sigmoid>(args, stream);
  }
  if (general) error = launch_pairs<T, Mode::general>(args, stream);
  if (!error && bp.dbias && bias_is_broadcast && p.seqlen_q > 0 && p.seqlen_k > 0)
    error = launch_bias(args, stream);
  if (error || !(bp.sums || bp.dsink || bp.dscore_bias)) return error;
  return launch<sum_kernel>(p.batch * p.heads, kSumThreads, 0, stream, args,
                            rows_of_sum<T>(args.largest_dim()));
}

}  // namespace
}  // namespace cuda

const char* launch_cuda(const AttentionBackwardParams& p, void* stream) {
  return cuda::visit_dtype(p.forward.dtype, [&]<typename T>() {
    return cuda::launch_backward<T>({.p = p}, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace tokenmill
