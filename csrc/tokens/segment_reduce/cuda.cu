#include "cuda/launch.cuh"
#include "cuda/refuse.cuh"
#include "tokens/segment_reduce/kernel.cuh"

namespace tokenmill {
namespace cuda::segment_reduce {
namespace {

constexpr int64_t kBlockPlaces = 64;   // mean length from which a segment gets a whole CTA
constexpr int64_t kPartPlaces = 1024;  // minimum per part
constexpr int64_t kManyBlocks = 1024;  // enough to fill any GPU
constexpr int64_t kMaxParts = 256;

unsigned limited(int64_t blocks, int64_t maximum) {
  return static_cast<unsigned>(blocks < maximum ? blocks : maximum);
}
constexpr int64_t kMaxYZ = 65535;

template <typename T>
bool vectors(const SegmentReduceParams& p) {
  return is_vectorizable<T>(p.x, p.channels, p.x_batch, p.x_row);
}

bool is_extreme(const SegmentReduceParams& p) {
  return p.reduce == Reduce::amax || p.reduce == Reduce::amin;
}
bool is_end(const SegmentReduceParams& p) {
  return p.reduce == Reduce::first || p.reduce == Reduce::last;
}

SegmentPlan make_plan(const SegmentReduceParams& p) {
  int vector = 1;
  visit_dtype(p.dtype, [&]<typename T>() { vector = vectors<T>(p) ? 16 / sizeof(T) : 1; });
  SegmentPlan plan{};
  const int64_t tiles = ceil_div(p.channels, kWarpSize * vector);
  const int64_t mean = p.segments > 0 ? p.places / p.segments : 0;
  plan.tiles = static_cast<int>(tiles > 0 ? tiles : 1);
  plan.group = mean >= kBlockPlaces ? 1 : kSegmentWarps;
  plan.parts = 1;
  const int64_t blocks = p.batch * p.segments * plan.tiles;
  if (!is_end(p) && blocks > 0 && blocks < kManyBlocks && mean >= 2 * kPartPlaces) {
    int64_t parts = mean / kPartPlaces;
    if (parts > ceil_div(kManyBlocks, blocks)) parts = ceil_div(kManyBlocks, blocks);
    plan.parts = static_cast<int>(parts < kMaxParts ? parts : kMaxParts);
  }
  const int64_t segments = plan.parts * p.batch * p.segments;
  plan.values = static_cast<float*>(p.workspace);
  plan.weights = plan.values + segments * p.channels;
  plan.rows = reinterpret_cast<int32_t*>(plan.weights + segments);
  return plan;
}

template <typename T, int kVector>
const char* launch_ends(const SegmentReduceParams& p, cudaStream_t stream) {
  const dim3 grid(limited(ceil_div(p.segments, kSegmentWarps), kMaxGrid), 1,
                  limited(p.batch, kMaxYZ));
  return launch<segment_end_kernel<T, kVector>>(grid, kSegmentThreads, 0, stream, p);
}

template <typename T, int kVector, bool kExtreme>
const char* launch_reduce(const SegmentReduceParams& p, const SegmentPlan& plan,
                          cudaStream_t stream) {
  const dim3 grid(limited(ceil_div(p.segments, plan.group), kMaxGrid),
                  static_cast<unsigned>(plan.tiles * plan.parts), limited(p.batch, kMaxYZ));
  const char* error =
      launch<segment_kernel<T, kVector, kExtreme>>(grid, kSegmentThreads, 0, stream, p, plan);
  if (error || plan.parts == 1) return error;
  return launch<segment_merge_kernel<T, kExtreme>>(limited(p.batch * p.segments, kMaxGrid),
                                                   kSegmentThreads, 0, stream, p, plan);
}

template <typename T, int kVector>
const char* launch_any(const SegmentReduceParams& p, cudaStream_t stream) {
  if (is_end(p)) return launch_ends<T, kVector>(p, stream);
  const SegmentPlan plan = make_plan(p);
  return is_extreme(p) ? launch_reduce<T, kVector, true>(p, plan, stream)
                       : launch_reduce<T, kVector, false>(p, plan, stream);
}

}  // namespace
}  // namespace cuda::segment_reduce

int64_t workspace_bytes(const SegmentReduceParams& p) {
  const cuda::segment_reduce::SegmentPlan plan = cuda::segment_reduce::make_plan(p);
  if (plan.parts == 1) return 0;
  return plan.parts * p.batch * p.segments * (2 * p.channels + 1) * int64_t{4};
}

const char* launch_cuda(const SegmentReduceParams& p, void* stream) {
  using namespace cuda;
  using namespace cuda::segment_reduce;
  const auto s = static_cast<cudaStream_t>(stream);
  const SegmentPlan plan = make_plan(p);  // several parts only if tiles are few
  if (plan.tiles * int64_t{plan.parts} > kMaxYZ)
    return refuse("x", "must have at most 65535 tiles of 32 loads of channels on CUDA", plan.tiles);
  return visit_dtype(p.dtype, [&]<typename T>() {
    return vectors<T>(p) ? launch_any<T, 16 / sizeof(T)>(p, s) : launch_any<T, 1>(p, s);
  });
}

const char* launch_cuda(const SegmentReduceBackwardParams& q, void* stream) {
  using namespace cuda;
  using namespace cuda::segment_reduce;
  const SegmentReduceParams& p = q.forward;
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t bytes = p.batch * p.tokens * sizeof(int32_t);
  // segment_of_row = -1
  if (const char* error = set_bytes(q.segment_of_row, 0xff, bytes, s)) return error;
  const int64_t threads = is_end(p) ? p.segments : p.places;
  if (threads > 0 && p.segments > 0) {
    const dim3 grid(limited(ceil_div(threads, kSegmentThreads), kMaxGrid),
                    limited(p.batch, kMaxYZ));
    if (const char* error = launch<segment_of_row_kernel>(grid, kSegmentThreads, 0, s, q))
      return error;
  }
  const dim3 grid(limited(ceil_div(p.tokens, kSegmentWarps), kMaxGrid), 1,
                  limited(p.batch, kMaxYZ));
  return visit_dtype(p.dtype, [&]<typename T>() {
    return vectors<T>(p) && is_vectorizable<T>(q.dy, p.channels, q.dy_batch, q.dy_row)
               ? launch<segment_backward_kernel<T, 16 / sizeof(T)>>(grid, kSegmentThreads, 0, s, q)
               : launch<segment_backward_kernel<T, 1>>(grid, kSegmentThreads, 0, s, q);
  });
}

}  // namespace tokenmill
