#include <algorithm>

#include "cuda/launch.cuh"
#include "dense/additive_attention/kernel.cuh"

namespace tokenmill {
namespace cuda::additive_attention {
namespace {

unsigned limited(int64_t blocks) { return static_cast<unsigned>(std::min<int64_t>(blocks, 65535)); }

using WholeTile = ScoreTile<16, 16, 4, 4>;
using LowTile = ScoreTile<4, 64, 1, 1>;  // for few queries, or to have more CTAs

template <typename Tile>
dim3 grid_of(const AdditiveParams& p) {
  return {static_cast<unsigned>(ceil_div(p.keys, Tile::kTileKeys)),
          limited(ceil_div(p.rows, Tile::kTileRows)), limited(p.batch)};
}

template <typename T, typename Tile>
const char* launch_scores(const AdditiveParams& p, cudaStream_t stream) {
  if (ceil_div(p.keys, Tile::kTileKeys) > kMaxGrid) return "2^31 - 1 blocks at most on CUDA";
  return launch<scores_kernel<T, Tile>>(grid_of<Tile>(p), kThreads, 0, stream, p);
}

// For one or two queries, for which most threads of a 4-row tile would be idle.
template <typename T>
const char* launch_rows(const AdditiveParams& p, cudaStream_t stream) {
  const int64_t tiles = ceil_div(p.keys, kRowTile);
  if (tiles > kMaxGrid) return "2^31 - 1 blocks at most on CUDA";
  const dim3 grid(static_cast<unsigned>(tiles), limited(p.rows), limited(p.batch));
  return launch<row_scores_kernel<T>>(grid, kThreads, 0, stream, p);
}

// Cuts the other side into parts so that the CTAs fill the device.
SidePass pass_of(const AdditiveParams& p, const Side& own, const Side& other) {
  SidePass pass{own, other};
  pass.tiles = ceil_div(own.count, kOwnTile);
  const int64_t blocks = pass.tiles * ceil_div(p.width, kStep) * p.batch;
  const int64_t tiles = ceil_div(other.count, kOtherTile);
  const int64_t wanted =
      std::clamp<int64_t>(ceil_div(kBlocks * multiprocessors(), blocks), 1, tiles);
  pass.part_rows = ceil_div(tiles, wanted) * kOtherTile;
  pass.parts = ceil_div(other.count, pass.part_rows);
  return pass;
}

// Both passes, with their parts of the workspace.
struct Plan {
  SidePass queries, keys;
  int64_t floats;

  explicit Plan(const AdditiveBackwardParams& backward) {
    const AdditiveParams& p = backward.forward;
    const Side q{p.q, p.q_batch, p.q_row, p.rows, backward.dscores_row, p.mask_row};
    const Side k{p.k, p.k_batch, p.k_row, p.keys, 1, 1};
    queries = pass_of(p, q, k);
    keys = pass_of(p, k, q);
    float* next = static_cast<float*>(backward.workspace);
    const auto take = [&](int64_t count) {
      floats += count;
      return next ? next + floats - count : nullptr;
    };
    floats = 0;
    queries.sums = take(queries.parts * p.batch * p.rows * p.width);
    keys.sums = take(keys.parts * p.batch * p.keys * p.width);
    queries.dv = take(p.batch * queries.tiles * queries.parts * p.width);
  }
};

template <typename T, bool kDv>
const char* launch_side(const AdditiveBackwardParams& backward, const SidePass& pass, void* to,
                        cudaStream_t stream) {
  const AdditiveParams& p = backward.forward;
  const int64_t blocks = pass.tiles * pass.parts;
  if (blocks > kMaxGrid) return "2^31 - 1 blocks at most on CUDA";
  const dim3 grid(static_cast<unsigned>(blocks), limited(ceil_div(p.width, kStep)),
                  limited(p.batch));
  if (const char* error =
          launch<gradients_kernel<T, kDv>>(grid, kThreads, 0, stream, backward, pass))
    return error;
  const int64_t count = p.batch * pass.own.count * p.width;
  return launch<sum_parts_kernel<T>>(std::min(ceil_div(count, kThreads), kMaxGrid), kThreads, 0,
                                     stream, pass.sums, static_cast<T*>(to), count, pass.parts);
}

}  // namespace
}  // namespace cuda::additive_attention

int64_t workspace_bytes(const AdditiveBackwardParams& p) {
  return cuda::additive_attention::Plan(p).floats * static_cast<int64_t>(sizeof(float));
}

const char* launch_cuda(const AdditiveParams& p, void* stream) {
  using namespace cuda::additive_attention;
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t blocks =
      ceil_div(p.keys, WholeTile::kTileKeys) * ceil_div(p.rows, WholeTile::kTileRows) * p.batch;
  const bool low = p.rows <= 2 * LowTile::kTileRows || blocks < cuda::multiprocessors();
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    if (p.rows <= 2) return launch_rows<T>(p, s);
    return low ? launch_scores<T, LowTile>(p, s) : launch_scores<T, WholeTile>(p, s);
  });
}

const char* launch_cuda(const AdditiveBackwardParams& p, void* stream) {
  using namespace cuda::additive_attention;
  const auto s = static_cast<cudaStream_t>(stream);
  const Plan plan(p);
  return cuda::visit_dtype(p.forward.dtype, [&]<typename T>() {
    if (const char* error = launch_side<T, true>(p, plan.queries, p.dq, s)) return error;
    if (const char* error = launch_side<T, false>(p, plan.keys, p.dk, s)) return error;
    const int64_t width = p.forward.width;
    const int64_t rows = p.forward.batch * plan.queries.tiles * plan.queries.parts;
    return cuda::launch<sum_rows_kernel<T>>(
        std::min<int64_t>(ceil_div(width, cuda::kWarpSize), cuda::kMaxGrid), kThreads, 0, s,
        plan.queries.dv, static_cast<T*>(p.dv), rows, width);
  });
}

}  // namespace tokenmill
