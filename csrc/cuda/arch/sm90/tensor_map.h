// TMA descriptors (tensor maps).
#pragma once
#include <cuda.h>

#include "core/dtype.h"
#include "core/rows.h"

namespace tokenmill::cuda {

constexpr int kBoxColumns = 64;  // of 16-bit elements
constexpr int kBoxRowBytes = kBoxColumns * 2;

// Shape and strides of a 4-d tensor of 16-bit elements, for its tensor map.
struct MappedRows {
  Rows rows;
  int64_t batch, tokens, heads, columns;
};

// TMA requirements: address and strides are multiples of 16 bytes, no stride is shorter than a row.
bool can_map(const MappedRows& tensor);

inline constexpr char kNotMapped[] = "the driver has no map of the tensor";

// Encodes a map of boxes of box_rows tokens and kBoxColumns columns, in the layout of tma.cuh.
// Returns null or kNotMapped.
const char* encode_map(CUtensorMap& map, const MappedRows& tensor, DType dtype, int box_rows);

}  // namespace tokenmill::cuda
