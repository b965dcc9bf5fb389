// Soft clustering of the pixels of a feature map. Free of torch.
#pragma once
#include "core/dtype.h"
#include "cpu/isa.h"

namespace tokenmill {

constexpr int64_t kMaxClusterChannels = 4096;

// x [B, Y, X, C] with a contiguous last dimension; strides in elements. Clusters are cells of a
// grid; a pixel is assigned weights for the clusters at most `reach` rows and columns from its home
// cell.
struct ClusterParams {
  int64_t batch, height, width, channels, grid_y, grid_x, iters, reach;
  DType dtype;
  bool window_labels;
  float tau;
  const void* x;
  int64_t x_batch, x_line, x_pixel;
  void* centroids;  // [B, gy, gx, C]
  int32_t* labels;  // [B, Y, X]
  float* mass;      // [B, gy, gx]
  float* previous;  // [B, gy, gx, C]: centroids to which the last iteration measured distances
  void* workspace;  // CUDA only

  TOKENMILL_HOST_DEVICE int64_t clusters() const { return grid_y * grid_x; }
  // Maximum clusters per pixel along Y, along X.
  TOKENMILL_HOST_DEVICE int64_t window_y() const { return window(grid_y); }
  TOKENMILL_HOST_DEVICE int64_t window_x() const { return window(grid_x); }
  TOKENMILL_HOST_DEVICE int64_t window(int64_t cells) const {
    return 2 * reach + 1 < cells ? 2 * reach + 1 : cells;
  }
  TOKENMILL_HOST_DEVICE int64_t x_at(int64_t b, int64_t y, int64_t at_x) const {
    return b * x_batch + y * x_line + at_x * x_pixel;
  }
};

struct ClusterBackwardParams {
  ClusterParams forward;   // includes mass and previous; the outputs are unused
  const void* dcentroids;  // [B, gy, gx, C] contiguous
  void* dx;                // [B, Y, X, C] contiguous
};

struct CellRange {
  int64_t begin, end;
};

// Along one side: pixels whose home is one of the cells first .. last.
TOKENMILL_HOST_DEVICE inline CellRange pixels_of_cells(int64_t first, int64_t last, int64_t pixels,
                                                       int64_t cells) {
  return {ceil_div(first * pixels, cells), ceil_div((last + 1) * pixels, cells)};
}
// Along one side: cells at most `reach` from a cell.
TOKENMILL_HOST_DEVICE inline CellRange cells_near(int64_t cell, int64_t reach, int64_t cells) {
  return {cell > reach ? cell - reach : 0, cell + reach + 1 < cells ? cell + reach + 1 : cells};
}
// Along one side: pixels whose mean initializes a cell.
TOKENMILL_HOST_DEVICE inline CellRange pooled_pixels(int64_t cell, int64_t pixels, int64_t cells) {
  return {cell * pixels / cells, ceil_div((cell + 1) * pixels, cells)};
}

// Weights below this, relative to a pixel's largest, are 0, so that no denormals occur in later
// arithmetic.
constexpr float kMinLog2Weight = -100;

// Distances that are not finite are clamped to the largest float.
constexpr float kMaxDistance = 3.402823466e38f;

// null, or an error message
const char* launch_cuda(const ClusterParams&, void* stream);
const char* launch_cuda(const ClusterBackwardParams&, void* stream);
int64_t workspace_bytes(const ClusterParams&);  // CUDA
int64_t workspace_bytes(const ClusterBackwardParams&);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(cluster_tokens, ClusterParams)
TOKENMILL_CPU_KERNEL(cluster_tokens_backward, ClusterBackwardParams)
