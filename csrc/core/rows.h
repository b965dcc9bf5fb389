// Rows of a tensor as kernels see them.
#pragma once
#include <cstdint>

namespace tokenmill {

// [B, S, H, D] with a contiguous last dimension, strides in elements. Packed tensors have batch =
// 0: the sequences are adjacent along seq.
struct Rows {
  void* data;
  int64_t batch, seq, head;
};

}  // namespace tokenmill
