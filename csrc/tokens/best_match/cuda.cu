#include "core/knobs.h"
#include "cuda/launch.cuh"
#include "tokens/best_match/kernel.cuh"

namespace tokenmill {
namespace cuda::best_match {
namespace {

template <typename T>
const char* launch_factors(const GlobalRows<T>& from, int64_t from_batch, int64_t batch,
                           float* factors, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(from.rows, kMatchWarps)),
                  static_cast<unsigned>(batch < 65535 ? batch : 65535));
  return launch<factor_kernel<T>>(grid, kMatchThreads, 0, stream, from, from_batch, batch, factors);
}

template <typename T>
const char* launch_factors(const MatchParams& p, MatchPlan& plan, cudaStream_t stream) {
  float* const factors_a = static_cast<float*>(p.workspace);
  float* const factors_b = factors_a + p.batch * p.rows;
  const int channels = static_cast<int>(p.channels);
  const GlobalRows<T> a{static_cast<const T*>(p.a), p.a_row, static_cast<int>(p.rows), channels,
                        plan.aligned_a};
  const GlobalRows<T> b{static_cast<const T*>(p.b), p.b_row, static_cast<int>(p.partners), channels,
                        plan.aligned_b};
  plan.factors_a = factors_a;
  plan.factors_b = factors_b;
  const char* error = launch_factors(a, p.a_batch, p.batch, factors_a, stream);
  return error ? error : launch_factors(b, p.b_batch, p.batch, factors_b, stream);
}

template <typename T, int kRowTiles>
const char* launch_match(const MatchParams& p, MatchPlan plan, cudaStream_t stream) {
  using Shape = MatchShape<kRowTiles>;
  plan.row_tiles = static_cast<int>(ceil_div(p.rows, Shape::kRows));
  return launch<match_kernel<T, kRowTiles>>(p.batch * plan.row_tiles, kMatchThreads,
                                            Shape::shared_bytes(plan.slices), stream, p, plan);
}

}  // namespace
}  // namespace cuda::best_match

int64_t workspace_bytes(const MatchParams& p) {
  return p.normalize ? p.batch * (p.rows + p.partners) * static_cast<int64_t>(sizeof(float)) : 0;
}

const char* launch_cuda(const MatchParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    cuda::best_match::MatchPlan plan{};
    plan.slices =
        static_cast<int>(ceil_div(p.channels * sizeof(T), cuda::best_match::kSliceRowBytes));
    plan.aligned_a = cuda::is_vectorizable<T>(p.a, p.channels, p.a_batch, p.a_row);
    plan.aligned_b = cuda::is_vectorizable<T>(p.b, p.channels, p.b_batch, p.b_row);
    if (p.normalize)
      if (const char* error = cuda::best_match::launch_factors<T>(p, plan, s)) return error;
    // Smaller CTAs if larger ones would be half empty, or would leave SMs idle.
    const bool large = p.rows > cuda::best_match::MatchShape<1>::kRows &&
                       p.batch * ceil_div(p.rows, cuda::best_match::MatchShape<2>::kRows) >=
                           knob(Knob::best_match_fill) * cuda::multiprocessors();
    return large ? cuda::best_match::launch_match<T, 2>(p, plan, s)
                 : cuda::best_match::launch_match<T, 1>(p, plan, s);
  });
}

}  // namespace tokenmill
