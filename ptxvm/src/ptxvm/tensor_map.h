// Layout in which the machine's cuTensorMapEncodeTiled fills the 128 bytes of a CUtensorMap (CUDA
// does not define it): a tensor in global memory and the box that one copy moves.
#pragma once
#include <cstdint>

namespace ptxvm {

constexpr int kMaxRank = 5;

struct TensorMap {
  static constexpr uint64_t kMagic = 0x70616d2d6d767874;
  uint64_t magic;
  uint64_t base;
  uint64_t strides[kMaxRank];  // bytes; strides[0] is the element size
  uint32_t extents[kMaxRank];  // elements
  uint16_t box[kMaxRank];
  uint8_t rank, element_bytes;
  uint8_t element;  // Transfer::Element
  uint8_t swizzle;  // number of address bits that the swizzle changes: 0, 1, 2 or 3
  bool fill_nan;
};
static_assert(sizeof(TensorMap) <= 128);

// A swizzle permutes the 16-byte units within 32, 64 or 128 bytes by XOR with the address bits 7
// and up.
constexpr uint64_t swizzled(uint64_t address, int bits) {
  return address ^ ((address >> 3) & (((uint64_t{1} << bits) - 1) << 4));
}

}  // namespace ptxvm
