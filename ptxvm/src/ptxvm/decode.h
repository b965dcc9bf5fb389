// Interface through which an instruction file registers its opcodes: a function per base opcode
// parses a statement with the decoder and fills in an instruction.
#pragma once
#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

#include "ptxvm/machine.h"

namespace ptxvm {

// "[register+constant]" or "[symbol+constant]".
struct Address {
  bool wide;  // 64-bit register (a symbol counts as wide)
  int64_t offset;
};

class Decoder {
 public:
  // The slot of a destination or source operand is appended to the instruction's slots; all writes
  // come before the first read. bits is 1 for predicates, else 8 to 128. A register of another
  // width is an error, except for ld, st and cvt: width() returns its width.
  void write(const std::string& operand, int bits);
  void read(const std::string& operand, int bits);   // register, immediate, special, symbol; a
                                                     // predicate's "!" is left to the caller
  Address read_address(const std::string& operand);  // pushes the slot of the base register
  void skip();                                       // pushes kNoSlot (counted as a read)

  int width(const std::string& operand) const;  // bits of the declared register, 0 if not one
  static std::vector<std::string> elements(const std::string& operand);  // of "{a, b}", or itself
  void branch_to(const std::string& label);              // fills in `target` once it is known
  uint32_t branch_to_table(const std::string& table);    // index of the kernel's table
  [[noreturn]] void fail(const std::string& why) const;  // names the PTX line
  Kernel& kernel();

  struct State;  // of decode.cpp
  explicit Decoder(State& state) : state_(state) {}

 private:
  State& state_;
};

// Fills in `run`, `control` and what the handler needs; guard, line, text and slots follow. An
// opcode or modifier that is not understood is an error (decoder.fail), never ignored.
using DecodeFunction = void (*)(Decoder&, const Statement&, Instruction&);
using OpcodeTable = std::unordered_map<std::string, DecodeFunction>;  // by base opcode

void add_arithmetic(
    OpcodeTable&);               // ops_arithmetic*.cpp: mov, integer, float, half, cvt, setp, ...
void add_warp(OpcodeTable&);     // ops_warp.cpp: shfl, vote, match, redux, activemask, elect
void add_memory(OpcodeTable&);   // ops_memory.cpp: ld, st, atom, red, cp.async, ldmatrix, fences
void add_tensor(OpcodeTable&);   // ops_tensor.cpp: mma
void add_control(OpcodeTable&);  // control.cpp: bra, ret, exit, bar, barrier, trap, call
void add_cluster(OpcodeTable&);  // ops_cluster.cpp: mapa, getctarank, setmaxnreg, griddepcontrol
void add_wgmma(OpcodeTable&);    // ops_wgmma.cpp
void add_wmma(OpcodeTable&);     // ops_wmma.cpp
void add_stack(OpcodeTable&);    // ops_stack.cpp: alloca, stacksave, stackrestore, pmevent

void decode_cluster_barrier(Decoder&, const Statement&, Instruction&);  // ops_cluster.cpp

// Fills in the code of a kernel, unless it is there already. Throws Fault.
void decode(Kernel&);

// Size in bits of a type suffix: "f16x2" 32, "pred" 1, "b128" 128; 0 if it is no type.
int bits_of_type(const std::string& suffix);

}  // namespace ptxvm
