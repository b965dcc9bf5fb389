// What the instruction files of memory share: addresses of lanes, and the words that may stand in
// an opcode.
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

// Of cp, by the words behind cp.async: mbarrier (ops_mbarrier.cpp) and bulk (ops_bulk.cpp).
void decode_copy_arrive(Decoder&, const Statement&, Instruction&);
void decode_bulk(Decoder&, const Statement&, Instruction&);

// An 8 x 8 matrix of 16-bit elements, row after row.
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

// What the words of an opcode say about a memory access.
struct Words {
  Space space = Space::generic;
  uint8_t order = 0;  // Instruction::order
  int vector = 1;
  bool cache_hint = false;  // one more operand, a policy
  std::string type;         // the last word
};

// Reads the words after the base opcode; those in `own` are left to the caller, anything else that
// is unknown is an error.
Words read_words(Decoder&, const Statement&, std::initializer_list<const char*> own = {});

// Reads "[a]" and sets offset, variant and flags.
void read_memory_operand(Decoder&, const std::string& operand, const Words&, Instruction&);

}  // namespace ptxvm
