// Tensor maps, by which the copy engine finds the rows of a tensor.
#pragma once
#include <cuda.h>

#include "core/dtype.h"
#include "core/rows.h"

namespace tokenmill::cuda {

constexpr int kBoxColumns = 64;  // of 16 bits
constexpr int kBoxRowBytes = kBoxColumns * 2;

// A tensor of 16-bit elements as the maps see it.
struct MappedRows {
  Rows rows;
  int64_t batch, tokens, heads, columns;
};

// Addresses and strides must be multiples of 16 bytes, and no stride shorter than a row.
bool can_map(const MappedRows& tensor);

inline constexpr char kNotMapped[] = "the driver has no map of the tensor";

// A map of boxes of box_rows tokens and kBoxColumns columns, in the layout of tma.cuh. null, or
// kNotMapped.
const char* encode_map(CUtensorMap& map, const MappedRows& tensor, DType dtype, int box_rows);

}  // namespace tokenmill::cuda
