#include "attention/backward_rows.cuh"
#include "attention/backward_shape.cuh"
#include "attention/backward_statistics.cuh"
#include "attention/mask_bounds.cuh"
#include "cuda/choose.h"
#include "cuda/launch.cuh"
#include "dense/attention/kernels.h"
#include "dense/attention/launch.cuh"

namespace tokenmill {
namespace cuda {
namespace {

// Rows per entry of sums on the queries' side.
template <typename T>
int rows_of_sum(int64_t dim) {
  return visit_head_dim(
      dim, []<int kDim>(Index<kDim>) { return int{PairShape<T, kDim, Mode::general>::kRows}; });
}

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
const char* launch_main_sm80(BackwardArgs& args, Mode mode, cudaStream_t stream) {
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

// Calls launch_main(args, mode), which computes dq, dk and dv, between the kernels
// that all chips share. step: rows that it sums together, in args.p.sums.
template <typename T, typename Main>
const char* launch_backward(const AttentionBackwardCall& call, int step, cudaStream_t stream,
                            const Main& launch_main) {
  BackwardArgs args{.p = call.params, .bounds = call.bounds};
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
  error = launch_main(args, mode);
  if (!error && bp.dbias && bias_is_broadcast && p.seqlen_q > 0 && p.seqlen_k > 0)
    error = launch_bias<T>(args, stream);
  if (error || !(bp.sums || bp.dsink || bp.dscore_bias)) return error;
  return launch<sum_kernel>(p.batch * p.heads, kSumThreads, 0, stream, args, step);
}

}  // namespace

const char* launch_on_sm80(const AttentionBackwardCall& call, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const AttentionParams& p = call.params.forward;
  return visit_dtype(p.dtype, [&]<typename T>() {
    const int64_t dim = std::max(p.head_dim, p.value_dim);
    return launch_backward<T>(call, rows_of_sum<T>(dim), on, [&](BackwardArgs& args, Mode mode) {
      return launch_main_sm80<T>(args, mode, on);
    });
  });
}

#if defined(TOKENMILL_SM90)
const char* launch_on_sm90(const AttentionBackwardCall& call, void* stream) {
  if (!call.workspace) return kNotMapped;
  const auto on = static_cast<cudaStream_t>(stream);
  const int step = sm90_tile_queries(call.params.forward.head_dim);
  const auto launch_main = [&]<typename T>() {
    return launch_backward<T>(call, step, on, [&](BackwardArgs& args, Mode) {
      const Sm90Backward on_sm90{args.p, static_cast<float*>(call.workspace)};
      return args.p.forward.map == ScoreMap::softmax
                 ? launch_backward_sm90<T, Weights::softmax>(on_sm90, on)
                 : launch_backward_sm90<T, Weights::sigmoid>(on_sm90, on);
    });
  };
  return call.params.forward.dtype == DType::float16
             ? launch_main.template operator()<__half>()
             : launch_main.template operator()<__nv_bfloat16>();
}
#endif

}  // namespace cuda

int64_t workspace_bytes(const AttentionBackwardCall& call) {
  return cuda::workspace_of(kernels_of(call), call);
}

const char* launch_cuda(const AttentionBackwardCall& call, void* stream) {
  return cuda::launch_first(kernels_of(call), call, stream);
}

}  // namespace tokenmill
