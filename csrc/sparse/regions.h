// Feature maps cut into regions. Free of torch.
#pragma once
#include "core/dtype.h"

namespace tokenmill {

// Pixels [y, y + height) x [x, x + width) of a map.
struct Region {
  int32_t y, x, height, width;

  TOKENMILL_HOST_DEVICE int32_t pixels() const { return height * width; }
};

// Row-major grid of regions. Regions at the right and lower borders are smaller if the region size
// does not divide the map.
struct RegionGrid {
  int32_t height, width, region_height, region_width;

  TOKENMILL_HOST_DEVICE int32_t rows() const {
    return (height + region_height - 1) / region_height;
  }
  TOKENMILL_HOST_DEVICE int32_t columns() const {
    return (width + region_width - 1) / region_width;
  }
  TOKENMILL_HOST_DEVICE int32_t regions() const { return rows() * columns(); }
  // Pixels of a full region.
  TOKENMILL_HOST_DEVICE int32_t pixels() const { return region_height * region_width; }
  TOKENMILL_HOST_DEVICE Region region(int32_t i) const {
    const int32_t y = i / columns() * region_height, x = i % columns() * region_width;
    const int32_t down = height - y, right = width - x;
    return {y, x, down < region_height ? down : region_height,
            right < region_width ? right : region_width};
  }
};

}  // namespace tokenmill
