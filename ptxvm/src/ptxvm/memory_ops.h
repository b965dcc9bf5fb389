// Shared by the memory instruction files: addresses of lanes, and modifiers of opcodes.
#pragma once
#include <initializer_list>

#include "ptxvm/check.h"
#include "ptxvm/clocks.h"
#include "ptxvm/decode.h"

namespace ptxvm {

void add_atomics(OpcodeTable&);   // ops_atomic.cpp
void add_copies(OpcodeTable&);    // ops_copy.cpp: cp.async
void add_matrices(OpcodeTable&);  // ops_matrix.cpp: ldmatrix, stmatrix, movmatrix
void add_hints(OpcodeTable&);     // ops_hints.cpp: fences, prefetches, isspacep
void add_mbarrier(OpcodeTable&);

// cp.async.mbarrier (ops_mbarrier.cpp) and cp.async.bulk (ops_bulk.cpp).
void decode_copy_arrive(Decoder&, const Statement&, Instruction&);
void decode_bulk(Decoder&, const Statement&, Instruction&);
void decode_tensormap(Decoder&, const Statement&, Instruction&);  // ops_tensormap.cpp

// The scope of a modifier: kCta, kClusterScope, or kGpu for .gpu, .gl and .sys.
inline uint8_t scope_named(const std::string& word) {
  return word == "cta" ? kCta : word == "cluster" ? kClusterScope : kGpu;
}

// Transposes an 8 x 8 matrix of 16-bit elements in row-major order.
void transpose(const uint16_t* from, uint16_t* to);

// Bits of Instruction::flags; Instruction::variant is the Space.
constexpr uint8_t kWide = 1;  // the base register of the address has 64 bits

inline Space space_of(const Instruction& in) { return static_cast<Space>(in.variant); }

inline void lane_addresses(Warp& warp, uint32_t slot, int64_t offset, bool wide,
                           uint64_t* addresses) {
  if (wide) {
    const uint64_t* base = lanes<const uint64_t>(warp, slot);
    for (int i = 0; i < kLanes; ++i) addresses[i] = base[i] + static_cast<uint64_t>(offset);
  } else {
    const uint32_t* base = lanes<const uint32_t>(warp, slot);
    for (int i = 0; i < kLanes; ++i) addresses[i] = base[i] + static_cast<uint32_t>(offset);
  }
}

// Modifiers of a memory access.
struct Words {
  Space space = Space::generic;
  uint8_t order = 0;  // Instruction::order
  int vector = 1;
  bool cache_hint = false;  // one more operand, a cache policy
  std::string type;         // the last modifier
};

// Parses the modifiers after the base opcode; those in `own` are left to the caller, other unknown
// ones are an error.
Words read_words(Decoder&, const Statement&, std::initializer_list<const char*> own = {});

// Parses "[a]" and sets offset, variant and flags.
void read_memory_operand(Decoder&, const std::string& operand, const Words&, Instruction&);

}  // namespace ptxvm
