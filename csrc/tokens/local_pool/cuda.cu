#include "tokens/local_pool/kernel.cuh"

namespace tokenmill {
namespace {

int64_t tokens_of(const LocalPoolParams& p) { return p.batch * p.height * p.width; }

constexpr int64_t kFillBlocks = 128;  // tiles are made smaller before there are fewer CTAs

// Bytes of the tokens, their scales, and the counts of lines and columns.
int64_t tile_bytes(int64_t lines, int64_t pitch, int64_t lanes) {
  return lines * pitch * (lanes * cuda::local_pool::kPoolBytes + 4) + (lines + pitch) * 4;
}

// Tile sizes for windows that extend halo_y and halo_x. False if most of the reads would be halo.
bool find_tiles(const LocalPoolParams& p, int vector, cuda::local_pool::PoolTiles* tiles) {
  constexpr int kMinTokens = 64, kSector = 2, kConflictFree = 8;  // lanes
  const int64_t halo_y = int64_t{p.kernel_y / 2} * p.dilation_y;
  const int64_t halo_x = int64_t{p.kernel_x / 2} * p.dilation_x;
  const int64_t chunks = ceil_div(p.channels, vector);
  int64_t lanes = kSector, columns = 1, lines = 1;
  for (;;) {
    const int64_t width = ceil_div(p.width, columns), height = ceil_div(p.height, lines);
    // Adjacent tokens of a tile stay in different banks from line to line.
    const int64_t pitch = width + round_up(2 * halo_x, kConflictFree / lanes);
    const int64_t lines_staged = height + 2 * halo_y, staged = pitch * lines_staged;
    const int64_t blocks = p.batch * columns * lines * ceil_div(chunks, lanes);
    const bool fits = tile_bytes(lines_staged, pitch, lanes) <= cuda::local_pool::kTileBytes;
    if (!fits || (blocks < kFillBlocks && width * height > kMinTokens)) {
      if (width * height <= kMinTokens) return false;
      width >= height ? columns *= 2 : lines *= 2;
      continue;
    }
    if (lanes < kConflictFree && lanes < chunks && width * height * lanes < cuda::kRowThreads &&
        tile_bytes(lines_staged, pitch, 2 * lanes) <= cuda::local_pool::kTileBytes &&
        blocks >= 2 * kFillBlocks) {
      lanes *= 2;
      continue;
    }
    if (2 * staged > int64_t{p.kernel_y} * p.kernel_x * width * height) return false;
    const auto narrow = [](int64_t n) { return static_cast<int>(n); };
    *tiles = {narrow(height),
              narrow(width),
              narrow(halo_y),
              narrow(halo_x),
              narrow(pitch),
              narrow(ceil_div(p.height, height)),
              narrow(ceil_div(p.width, width)),
              narrow(ceil_div(chunks, lanes)),
              narrow(lanes),
              cuda::FastDivmod::of(narrow(width)),
              cuda::FastDivmod::of(narrow(pitch))};
    return true;
  }
}

struct PoolLaunch {
  cuda::local_pool::PoolPlan plan;
  bool tiled;
  dim3 grid, block;
  int shared;

  PoolLaunch(const LocalPoolParams& p, int vector)
      : plan{cuda::FastDivmod::of(p.width),
             cuda::FastDivmod::of(p.height),
             static_cast<int>(tokens_of(p)),
             {}},
        tiled(vector > 1 && find_tiles(p, vector, &plan.tiles)),
        shared(0) {
    const cuda::RowGrid g(ceil_div(p.channels, vector), tokens_of(p), 1);
    grid = g.grid;
    block = g.block;
    if (!tiled) return;
    const cuda::local_pool::PoolTiles& t = plan.tiles;
    grid = dim3(static_cast<unsigned>(p.batch * t.lines * t.columns * t.slices));
    block = dim3(t.lanes, cuda::kRowThreads / t.lanes);
    shared = static_cast<int>(tile_bytes(t.height + 2 * t.halo_y, t.pitch, t.lanes));
  }
};

// run.operator()<kTiled>(launch)
template <int kVector, typename Run>
const char* run_pool(const LocalPoolParams& p, const Run& run) {
  const PoolLaunch planned(p, kVector);
  return kVector > 1 && planned.tiled ? run.template operator()<(kVector > 1)>(planned)
                                      : run.template operator()<false>(planned);
}

template <typename T, int kVector>
const char* launch_pool(const LocalPoolParams& p, cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::local_pool;
  return run_pool<kVector>(p, [&]<bool kTiled>(const PoolLaunch& l) {
    return p.is_max ? launch<local_pool_kernel<T, kVector, true, kTiled>>(l.grid, l.block, l.shared,
                                                                          stream, p, l.plan)
                    : launch<local_pool_kernel<T, kVector, false, kTiled>>(
                          l.grid, l.block, l.shared, stream, p, l.plan);
  });
}

template <typename T, int kVector>
const char* launch_backward(const LocalPoolBackwardParams& q, cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::local_pool;
  const LocalPoolParams& p = q.forward;
  return run_pool<kVector>(p, [&]<bool kTiled>(const PoolLaunch& l) {
    if (p.is_max) {
      auto* taps = static_cast<uint16_t*>(q.workspace);
      if (const char* error = launch<pool_taps_kernel<T, kVector, kTiled>>(
              l.grid, l.block, l.shared, stream, p, l.plan, taps))
        return error;
      const RowGrid g(ceil_div(p.channels, kVector), tokens_of(p), 1);
      return launch<maximum_backward_kernel<T, kVector>>(g.grid, g.block, 0, stream, q, l.plan,
                                                         taps);
    }
    const bool scaled = !kTiled || p.mask;
    auto* const scales = scaled ? static_cast<float*>(q.workspace) : nullptr;
    const RowGrid tokens(1, tokens_of(p), 1);
    if (scaled)
      if (const char* error =
              launch<pool_scales_kernel>(tokens.grid, tokens.block, 0, stream, p, l.plan, scales))
        return error;
    return launch<mean_backward_kernel<T, kVector, kTiled>>(l.grid, l.block, l.shared, stream, q,
                                                            l.plan, scales);
  });
}

template <typename T>
bool is_vectorizable(const LocalPoolParams& p) {
  return cuda::is_vectorizable<T>(p.x, p.channels, p.x_batch, p.x_line, p.x_token);
}

}  // namespace

int64_t workspace_bytes(const LocalPoolBackwardParams& q) {
  const LocalPoolParams& p = q.forward;
  return tokens_of(p) * (p.is_max ? p.channels * static_cast<int64_t>(sizeof(uint16_t))
                                  : static_cast<int64_t>(sizeof(float)));
}

const char* launch_cuda(const LocalPoolParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    return is_vectorizable<T>(p) ? launch_pool<T, 16 / sizeof(T)>(p, s) : launch_pool<T, 1>(p, s);
  });
}

const char* launch_cuda(const LocalPoolBackwardParams& q, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t channels = q.forward.channels;
  return cuda::visit_dtype(q.forward.dtype, [&]<typename T>() {
    const bool vector =
        is_vectorizable<T>(q.forward) &&
        cuda::is_vectorizable<T>(q.dout, channels, q.dout_batch, q.dout_line, q.dout_token);
    return vector ? launch_backward<T, 16 / sizeof(T)>(q, s) : launch_backward<T, 1>(q, s);
  });
}

}  // namespace tokenmill
