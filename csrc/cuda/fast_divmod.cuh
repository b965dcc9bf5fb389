// Division by a number known on the host.
#pragma once
#include <bit>
#include <cstdint>

namespace tokenmill::cuda {

// Division of 31-bit numbers by one multiplication (Granlund and Montgomery 1994, figure 4.1).
struct FastDivmod {
  int value;
  uint32_t multiplier;
  int shift;

  // An empty tensor has nothing to divide: 0 is taken as 1.
  static FastDivmod of(int value) {
    if (value < 1) value = 1;
    const int shift = std::bit_width(static_cast<uint32_t>(value) - 1);
    const uint64_t excess = (uint64_t{1} << shift) - static_cast<uint64_t>(value);
    return {value, static_cast<uint32_t>((excess << 32) / static_cast<uint64_t>(value) + 1), shift};
  }

  __device__ __forceinline__ int divide(int n) const {
    const uint32_t x = static_cast<uint32_t>(n);
    return static_cast<int>((__umulhi(x, multiplier) + x) >> shift);
  }
};

}  // namespace tokenmill::cuda
