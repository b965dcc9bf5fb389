// wgmma operands in shared memory.
#pragma once
#include <cstdint>

#include "ptxvm/tensor_map.h"

namespace ptxvm {

// Layout of a matrix in shared memory: PTX ISA, "Matrix descriptor".
class Descriptor {
 public:
  Descriptor(uint64_t bits, bool transposed)
      : base_(address_in(bits)),
        leading_(address_in(bits >> 16)),
        stride_(address_in(bits >> 32)),
        offset_(bits >> 49 & 7),
        swizzle_(static_cast<int>(4 - (bits >> 62)) & 3),
        transposed_(transposed) {}

  bool has_offset() const { return offset_ != 0; }
  // Address of row `row` (16 bytes) of the 8 x 16-byte core matrix that starts at row or column
  // `first` of M or N and at byte 16 * `chunk` of k. A transposed core matrix has rows of 8
  // elements of M or N, one row per k.
  uint64_t row_of_core(uint32_t first, uint32_t chunk, uint32_t row) const {
    const uint64_t pitch = uint64_t{16} << swizzle_, in_pitch = pitch / 16;
    uint64_t address = base_ + row * pitch;
    if (!transposed_)
      address += first / 8 * stride_ + chunk * (swizzle_ ? 16 : leading_);
    else if (swizzle_)
      address += first / 8 / in_pitch * leading_ + first / 8 % in_pitch * 16 + chunk * stride_;
    else
      address += first / 8 * stride_ + chunk * leading_;
    return swizzled(address, swizzle_);
  }
  bool transposed() const { return transposed_; }

 private:
  static uint64_t address_in(uint64_t bits) { return (bits & 0x3fff) << 4; }

  uint64_t base_, leading_, stride_, offset_;
  int swizzle_;
  bool transposed_;
};

}  // namespace ptxvm
