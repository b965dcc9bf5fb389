// TMA descriptors (tensor maps).
#pragma once
#include <cuda.h>

#include "cuda/arch/sm90/calls.h"

namespace tokenmill::cuda {

constexpr int kBoxColumns = 64;  // of 16-bit elements
constexpr int kBoxRowBytes = kBoxColumns * 2;

// Encodes a map of boxes of box_rows tokens and kBoxColumns columns, in the layout of tma.cuh.
// Returns null or kNotMapped.
const char* encode_map(CUtensorMap& map, const MappedRows& tensor, DType dtype, int box_rows);

}  // namespace tokenmill::cuda
