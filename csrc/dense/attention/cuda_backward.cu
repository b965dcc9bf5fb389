#include "attention/backward_rows.cuh"
#include "attention/backward_statistics.cuh"
#include "attention/mask_bounds.cuh"
#include "core/knobs.h"
#include "cuda/capability.h"
#include "dense/attention/kernel_backward_launch.cuh"
#include "dense/attention/launch_backward_sm90.h"

namespace tokenmill {
namespace cuda {

extern template const char* launch_pairs<__half, Mode::softmax>(const BackwardArgs&, cudaStream_t);
extern template const char* launch_pairs<__half, Mode::sigmoid>(const BackwardArgs&, cudaStream_t);
extern template const char* launch_pairs<__half, Mode::fast_sigmoid>(const BackwardArgs&,
                                                                     cudaStream_t);
extern template const char* launch_pairs<__half, Mode::elementwise>(const BackwardArgs&,
                                                                    cudaStream_t);
extern template const char* launch_pairs<__half, Mode::general>(const BackwardArgs&, cudaStream_t);
extern template const char* launch_pairs<__nv_bfloat16, Mode::softmax>(const BackwardArgs&,
                                                                       cudaStream_t);
extern template const char* launch_pairs<__nv_bfloat16, Mode::sigmoid>(const BackwardArgs&,
                                                                       cudaStream_t);
extern template const char* launch_pairs<__nv_bfloat16, Mode::fast_sigmoid>(const BackwardArgs&,
                                                                            cudaStream_t);
extern template const char* launch_pairs<__nv_bfloat16, Mode::elementwise>(const BackwardArgs&,
                                                                           cudaStream_t);
extern template const char* launch_pairs<__nv_bfloat16, Mode::general>(const BackwardArgs&,
                                                                       cudaStream_t);
extern template const char* launch_pairs<float, Mode::general>(const BackwardArgs&, cudaStream_t);
const char* launch_bias(const BackwardArgs&, cudaStream_t);

namespace {

template <typename T>
Mode mode_of(const AttentionBackwardParams& bp, int64_t dim) {
  const AttentionParams& p = bp.forward;
  if (sizeof(T) == 4 || bp.sums || p.bias || p.mask.any() || p.alibi_slopes || p.softcap > 0)
    return Mode::general;
  const bool constant = p.score_bias || p.score_bias_value != 0 || p.score_bias_neg_log_n;
  switch (weights_of(p)) {
    case Weights::softmax:
      return Mode::softmax;
    case Weights::sigmoid:
      return Mode::sigmoid;
    case Weights::fast_sigmoid:
      return Mode::fast_sigmoid;
    default:
      return p.map == ScoreMap::sigmoid || constant || dim > kLargestElementwise
                 ? Mode::general
                 : Mode::elementwise;
  }
}

template <typename T>
const char* launch_on_sm90(const Sm90Backward& call, cudaStream_t stream) {
  if constexpr (kHasSm90 && sizeof(T) == 2) {
    if (call.params.forward.map == ScoreMap::softmax)
      return launch_backward_sm90<T, Weights::softmax>(call, stream);
    return launch_backward_sm90<T, Weights::sigmoid>(call, stream);
  }
  return kNotMapped;
}

template <typename T>
const char* launch_on_every_chip(BackwardArgs& args, Mode mode, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    const auto launch_plain = [&]<Mode kMode>(float unit) {
      args.factor = unit * args.p.forward.scale;
      return launch_pairs<T, kMode>(args, stream);
    };
    if (mode == Mode::softmax) return launch_plain.template operator()<Mode::softmax>(kLog2e);
    if (mode == Mode::sigmoid) return launch_plain.template operator()<Mode::sigmoid>(-kLog2e);
    if (mode == Mode::fast_sigmoid)
      return launch_plain.template operator()<Mode::fast_sigmoid>(0.5f);
    if (mode == Mode::elementwise) return launch_plain.template operator()<Mode::elementwise>(1);
  }
  return launch_pairs<T, Mode::general>(args, stream);
}

template <typename T>
const char* launch_backward(BackwardArgs args, float* dq_sums, cudaStream_t stream) {
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
  args.weight_scale = std::is_same_v<T, __half> && scales_weights(p) ? kHalfScale : 1;
  const Mode mode = mode_of<T>(bp, args.largest_dim());
  const char* error = nullptr;
  if (p.mask.any()) error = launch_bounds(p, args.bounds, stream);
  if (error) return error;
  if (has_backward_statistics(p) && p.seqlen_q > 0)
    error = launch_statistics<T>(args, mode == Mode::general, stream);
  if (error) return error;
  error = dq_sums ? launch_on_sm90<T>({bp, dq_sums}, stream) : kNotMapped;
  const bool on_sm90 = error != kNotMapped;
  if (!on_sm90) error = launch_on_every_chip<T>(args, mode, stream);
  if (!error && bp.dbias && bias_is_broadcast && p.seqlen_q > 0 && p.seqlen_k > 0)
    error = launch_bias(args, stream);
  if (error || !(bp.sums || bp.dsink || bp.dscore_bias)) return error;
  const int step = on_sm90 ? sm90_tile_queries(p.head_dim) : rows_of_sum<T>(args.largest_dim());
  return launch<sum_kernel>(p.batch * p.heads, kSumThreads, 0, stream, args, step);
}

}  // namespace
}  // namespace cuda

int64_t workspace_bytes(const AttentionBackwardParams& bp) {
  const bool sm90 = cuda::kHasSm90 && knob(Knob::attention_sm90_backward) && cuda::takes_sm90(bp) &&
                    cuda::compute_capability() == 90;
  return sm90 ? cuda::sm90_workspace_bytes(bp.forward) : 0;
}

const char* launch_cuda(const Masked<AttentionBackwardParams>& m, void* stream) {
  return cuda::visit_dtype(m.params.forward.dtype, [&]<typename T>() {
    return cuda::launch_backward<T>({.p = m.params, .bounds = m.bounds}, nullptr,
                                    static_cast<cudaStream_t>(stream));
  });
}

const char* launch_cuda(const Sm90Backward& call, void* stream) {
  return cuda::visit_dtype(call.params.forward.dtype, [&]<typename T>() {
    return cuda::launch_backward<T>({.p = call.params}, call.dq_sums,
                                    static_cast<cudaStream_t>(stream));
  });
}

}  // namespace tokenmill
