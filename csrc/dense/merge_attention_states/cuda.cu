#include "cuda/launch.cuh"
#include "dense/merge_attention_states/kernel.cuh"

namespace tokenmill {
namespace {

using namespace cuda::merge_attention_states;
using cuda::kWarpSize;

dim3 grid_of(const MergeParams& p) {
  const auto limited = [](int64_t blocks) {
    return static_cast<unsigned>(blocks < 65535 ? blocks : 65535);
  };
  return {limited(p.heads), limited(ceil_div(p.seqlen, kMergeWarps)), limited(p.batch)};
}

// Fewer rows than SMs are cut into slices of channels, until there is a slice per SM. A slice is at
// least one 32-byte sector.
template <typename T, int kVector>
const char* launch_merge(const MergeParams& p, cudaStream_t stream) {
  constexpr int64_t kSector = 32 / sizeof(T);
  const int64_t rows = p.rows(), wanted = cuda::multiprocessors();
  if (rows >= wanted)
    return cuda::launch<merge_kernel<T, kVector>>(grid_of(p), kMergeThreads, 0, stream, p);
  const int64_t narrow = p.dim / ceil_div(wanted, rows) / kSector * kSector;
  const int64_t slice = narrow > kSector ? narrow : kSector;
  const auto slices = static_cast<unsigned>(p.dim > slice ? ceil_div(p.dim, slice) : 1);
  const dim3 grid(static_cast<unsigned>(p.heads) * slices, static_cast<unsigned>(p.seqlen),
                  static_cast<unsigned>(p.batch));
  return cuda::launch<merge_slices_kernel<T, kVector>>(grid, kWarpSize, 0, stream, p, slices,
                                                       slice);
}

template <typename T, int kVector>
const char* launch_backward(const MergeBackwardParams& q, cudaStream_t stream) {
  const MergeParams& p = q.forward;
  return cuda::launch<merge_backward_kernel<T, kVector>>(grid_of(p), kMergeThreads, 0, stream, q);
}

}  // namespace

const char* launch_cuda(const MergeParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    constexpr int kVector = 16 / sizeof(T);
    return cuda::is_vectorizable<T>(p.outs, p.dim, p.outs_part, p.outs_batch, p.outs_seq,
                                    p.outs_head)
               ? launch_merge<T, kVector>(p, s)
               : launch_merge<T, 1>(p, s);
  });
}

const char* launch_cuda(const MergeBackwardParams& q, void* stream) {
  const MergeParams& p = q.forward;
  const auto s = static_cast<cudaStream_t>(stream);
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    constexpr int kVector = 16 / sizeof(T);
    const bool vector =
        cuda::is_vectorizable<T>(p.outs, p.dim, p.outs_part, p.outs_batch, p.outs_seq,
                                 p.outs_head) &&
        cuda::is_vectorizable<T>(q.dout, p.dim, q.dout_batch, q.dout_seq, q.dout_head);
    return vector ? launch_backward<T, kVector>(q, s) : launch_backward<T, 1>(q, s);
  });
}

}  // namespace tokenmill
