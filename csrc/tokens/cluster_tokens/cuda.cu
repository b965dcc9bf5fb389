#include <algorithm>

#include "tokens/cluster_tokens/kernel.cuh"
#include "tokens/nearest.cuh"

namespace tokenmill {
namespace cuda::cluster_tokens {
namespace {

// Shared memory for pixels: four CTAs fit on any GPU.
constexpr int64_t kStagedBytes = 24 << 10;
static_assert(kStagedBytes >= kMaxClusterChannels * 4);
// floats of weights in global memory, if a row of cells fits
constexpr int64_t kSlabFloats = int64_t{1} << 24;

unsigned limited(int64_t blocks) { return static_cast<unsigned>(blocks < 65535 ? blocks : 65535); }

int lines_of(const ClusterParams& p, int64_t rows) {
  const int64_t lines = ceil_div(rows * p.height, p.grid_y) + 1;
  return static_cast<int>(lines < p.height ? lines : p.height);
}

// The plan depends only on the shapes of a call, and so does the order of sums.
ClusterPlan make_plan(const ClusterParams& p) {
  ClusterPlan plan{};
  plan.window = static_cast<int>(p.window_y() * p.window_x());
  const int64_t line = p.batch * p.width * plan.window;
  int64_t rows = p.grid_y;
  while (rows > 1 && line * lines_of(p, rows) > kSlabFloats) rows = ceil_div(rows, 2);
  plan.slab_rows = static_cast<int>(rows);
  plan.slab_lines = lines_of(p, rows);
  const int64_t size = p.dtype == DType::float32 ? 4 : 2, row = round_up(p.channels * size, 16);
  const int64_t maximum = ceil_div(p.height, p.grid_y) * ceil_div(p.width, p.grid_x);
  plan.measured = static_cast<int>(std::min({maximum, kStagedBytes / row, int64_t{kMeasured}}));
  plan.pitch = row / size;
  return plan;
}

// Sizes in floats, multiples of 128 bytes.
struct Areas {
  int64_t weights, centroids, sums, masses;

  Areas(const ClusterParams& p, const ClusterPlan& plan, bool backward) {
    const int64_t clusters = p.batch * p.clusters();
    const bool several = plan.slab_rows < p.grid_y && !backward;
    weights = round_up(p.batch * plan.slab_lines * p.width * plan.window, 32);
    centroids = backward ? 0 : round_up(clusters * p.channels, 32);
    sums = several ? centroids : 0;
    masses = several ? round_up(ceil_div(p.channels, kWarpSize) * clusters, 32) : 0;
  }
  int64_t bytes() const { return (weights + centroids + sums + masses) * 4; }
};

void place(ClusterPlan& plan, const ClusterParams& p, bool backward) {
  const Areas areas(p, plan, backward);
  plan.weights = static_cast<float*>(p.workspace);
  plan.centroids = plan.weights + areas.weights;
  plan.sums = plan.centroids + areas.centroids;
  plan.masses = plan.sums + areas.sums;
}

// Calls visit(slab) until it returns an error message.
template <typename Visit>
const char* for_each_slab(const ClusterParams& p, const ClusterPlan& plan, bool final,
                          const Visit& visit) {
  for (int64_t first = 0; first < p.grid_y; first += plan.slab_rows) {
    const int64_t end = first + plan.slab_rows < p.grid_y ? first + plan.slab_rows : p.grid_y;
    const int64_t line = pixels_of_cells(first, first, p.height, p.grid_y).begin;
    if (const char* error = visit(Slab{static_cast<int>(first), static_cast<int>(end - 1),
                                       static_cast<int>(line), first == 0, end == p.grid_y, final}))
      return error;
  }
  return nullptr;
}

dim3 cells_of(const ClusterParams& p, const Slab& slab) {
  return {static_cast<unsigned>(p.grid_x), limited(slab.last - slab.first + 1), limited(p.batch)};
}

template <typename T, bool kAligned, bool kLabels>
const char* weigh(const ClusterParams& p, const ClusterPlan& plan, const Slab& slab,
                  const float* centroids, cudaStream_t s) {
  const int64_t bytes = plan.measured * plan.pitch * static_cast<int64_t>(sizeof(T));
  return launch<weigh_kernel<T, kAligned, kLabels>>(cells_of(p, slab), kClusterThreads, bytes, s, p,
                                                    plan, slab, centroids);
}

template <typename T, bool kAligned>
const char* iterate(const ClusterParams& p, ClusterPlan plan, cudaStream_t s) {
  plan.channel_tiles = static_cast<int>(ceil_div(p.channels, kWarpSize * kLaneChannels<T>));
  const dim3 cells(static_cast<unsigned>(ceil_div(p.grid_x, kClusterWarps)), limited(p.grid_y),
                   limited(p.batch));
  const dim3 spans(static_cast<unsigned>(ceil_div(p.grid_x, kClusterWarps * kSpan)),
                   limited(p.grid_y), limited(p.batch * plan.channel_tiles));
  if (const char* error =
          launch<pool_cells_kernel<T, kAligned>>(cells, kClusterThreads, 0, s, p, plan))
    return error;
  for (int64_t i = 0; i < p.iters; ++i)
    if (const char* error = for_each_slab(p, plan, i + 1 == p.iters, [&](const Slab& slab) {
          const char* failed = weigh<T, kAligned, false>(p, plan, slab, plan.centroids, s);
          return failed ? failed
                        : launch<update_kernel<T, kAligned>>(spans, kClusterThreads, 0, s, p, plan,
                                                             slab);
        }))
      return error;
  if (!p.window_labels) return nullptr;
  return for_each_slab(p, plan, true, [&](const Slab& slab) {
    return weigh<T, kAligned, true>(p, plan, slab, plan.centroids, s);
  });
}

template <typename T>
const char* label(const ClusterParams& p, const ClusterPlan& plan, cudaStream_t s) {
  const int width = static_cast<int>(p.width), clusters = static_cast<int>(p.clusters());
  const bool fours = reads_fours<T>(p.x, p.channels, p.x_batch, p.x_line, p.x_pixel);
  const MapRows<T> pixels{
      static_cast<const T*>(p.x),         p.x_batch, p.x_line, p.x_pixel, FastDivmod::of(width),
      static_cast<int>(p.height) * width, fours};
  const MapRows<float> set{plan.centroids,
                           p.clusters() * p.channels,
                           0,
                           p.channels,
                           FastDivmod::of(clusters),
                           clusters,
                           reads_fours<float>(plan.centroids, p.channels)};
  Nearest near{};
  near.channels = static_cast<int>(p.channels);
  near.k = 1;
  near.labels = p.labels;
  return launch_nearest<true>(pixels, set, near, p.batch, s);
}

}  // namespace
}  // namespace cuda::cluster_tokens

int64_t workspace_bytes(const ClusterParams& p) {
  return cuda::cluster_tokens::Areas(p, cuda::cluster_tokens::make_plan(p), false).bytes();
}

int64_t workspace_bytes(const ClusterBackwardParams& q) {
  return cuda::cluster_tokens::Areas(q.forward, cuda::cluster_tokens::make_plan(q.forward), true)
      .bytes();
}

const char* launch_cuda(const ClusterParams& p, void* stream) {
  using namespace cuda;
  using namespace cuda::cluster_tokens;
  const auto s = static_cast<cudaStream_t>(stream);
  ClusterPlan plan = make_plan(p);
  place(plan, p, false);
  return visit_dtype(p.dtype, [&]<typename T>() {
    const bool vectors = is_vectorizable<T>(p.x, p.channels, p.x_batch, p.x_line, p.x_pixel);
    const char* error = vectors ? iterate<T, true>(p, plan, s) : iterate<T, false>(p, plan, s);
    return error || p.window_labels ? error : label<T>(p, plan, s);
  });
}

const char* launch_cuda(const ClusterBackwardParams& q, void* stream) {
  using namespace cuda;
  using namespace cuda::cluster_tokens;
  const auto s = static_cast<cudaStream_t>(stream);
  const ClusterParams& p = q.forward;
  ClusterPlan plan = make_plan(p);
  place(plan, p, true);
  return visit_dtype(p.dtype, [&]<typename T>() {
    const auto spread = [&]<bool kAligned>() {
      return for_each_slab(p, plan, true, [&](const Slab& slab) {
        const char* failed = weigh<T, kAligned, false>(p, plan, slab, p.previous, s);
        return failed ? failed
                      : launch<spread_kernel<T, kAligned>>(cells_of(p, slab), kClusterThreads, 0, s,
                                                           q, plan, slab);
      });
    };
    if (is_vectorizable<T>(p.x, p.channels, p.x_batch, p.x_line, p.x_pixel) &&
        is_vectorizable<T>(q.dcentroids, p.channels) &&
        reinterpret_cast<uintptr_t>(p.previous) % (4 * kLaneChannels<T>) == 0)
      return spread.template operator()<true>();
    return spread.template operator()<false>();
  });
}

}  // namespace tokenmill
