// A tensor map: a tensor in global memory and the box that one copy moves. CUDA does not define the
// 128 bytes of a CUtensorMap, but host code writes some of them itself: CUTLASS clears a bit of
// them, and CuTe's DSL writes all. So the machine uses the layout that the DSL writes, in which the
// last 64 bytes hold nothing.
#pragma once
#include <cstdint>
#include <string>

#include "ptxvm/async.h"

namespace ptxvm {

constexpr int kMaxRank = 5;
constexpr int kTensorMapWords = 16;  // of 64 bits

struct TensorMap {
  uint64_t base = 0;
  uint64_t strides[kMaxRank] = {};  // bytes; strides[0] is the element size
  uint32_t extents[kMaxRank] = {};  // elements
  uint16_t box[kMaxRank] = {};
  uint8_t rank = 0, element_bytes = 0;
  Transfer::Element element{};
  uint8_t swizzle = 0;    // number of address bits that the swizzle changes: 0, 1, 2 or 3
  uint8_t promotion = 0;  // of L2, CUtensorMapL2promotion: has no effect
  bool fill_nan = false;
};

// The type with this number in PTX (tensormap.replace), which tensor maps use too; false for a type
// that the machine does not know.
bool find_element(uint32_t number, Transfer::Element&, uint8_t& bytes);

void pack(const TensorMap&, uint32_t element_number, uint64_t words[kTensorMapWords]);
// Empty, or why these words are no tensor map.
std::string unpack(const uint64_t words[kTensorMapWords], TensorMap&);

// Writes a field of tensormap.replace, which makes the words a tiled map; empty, or why it cannot.
std::string replace_field(uint64_t words[kTensorMapWords], const std::string& field, int dimension,
                          uint64_t value);

// A swizzle permutes the 16-byte units within 32, 64 or 128 bytes by XOR with the address bits 7
// and up.
constexpr uint64_t swizzled(uint64_t address, int bits) {
  return address ^ ((address >> 3) & (((uint64_t{1} << bits) - 1) << 4));
}

}  // namespace ptxvm
