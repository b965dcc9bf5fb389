// How kernels see the rows of a tensor.
#pragma once
#include <cstdint>

namespace tokenmill {

// [B, S, H, D] with a contiguous last dimension, strides in elements. Packed tensors have batch =
// 0: the sequences lie behind each other along seq.
struct Rows {
  void* data;
  int64_t batch, seq, head;
};

}  // namespace tokenmill
