// Shared by decode.cpp, slots.cpp and control.cpp while a kernel is decoded.
#pragma once
#include <deque>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ptxvm/decode.h"
#include "ptxvm/parse.h"

namespace ptxvm {

// A value that takes a slot: a register, a constant or a special register. Until slots are placed,
// the "slots" of instructions are indices of values.
struct Value {
  enum class Kind : uint8_t { variable, constant, special } kind;
  int bits;
  uint64_t bits_of_constant = 0;  // or the index of the special register
  bool dynamic_shared = false;    // a constant relative to the start of dynamic shared memory
};

// A function body being decoded: the kernel, or a function inlined at a call.
struct Frame {
  const Function* function;
  std::vector<std::unordered_map<std::string, uint32_t>> registers;  // per scope: name -> value
  std::unordered_map<const Variable*, uint32_t> local_offsets;
  std::unordered_map<std::string, uint64_t> arguments;  // formal parameter -> its address
  std::vector<uint32_t> first;  // index of the first instruction of each statement
  int depth = 0;
};

struct Fixup {
  uint32_t instruction;
  Frame* frame;
  uint32_t statement;
  int table = -1;  // with `instruction` as the entry in it
};

struct Decoder::State {
  Kernel& kernel;
  Module& module;
  const OpcodeTable& opcodes;
  std::deque<Frame> frames;
  std::vector<Function*> parsed;
  Frame* frame = nullptr;
  const Statement* statement = nullptr;
  std::vector<uint32_t> operands;
  int writes = 0, reads = 0;
  std::vector<Value> values;
  std::map<std::pair<int, uint64_t>, uint32_t> constants, dynamic_constants;
  std::map<std::pair<int, int>, uint32_t> specials;
  std::vector<Fixup> fixups;
  std::unordered_map<const Variable*, uint32_t> shared_offsets;
  uint32_t shared_top = 0, dynamic_alignment = 1;
  const Variable* dynamic = nullptr;  // .extern .shared that the code names, the last one

  uint32_t add_value(Value value);
  uint32_t constant(int bits, uint64_t value, bool dynamic_shared = false);
  // Value and bits of a register visible at the statement; false if there is none.
  bool find_register(const std::string& name, uint32_t& value, int& bits);
  // Address of a variable or parameter; false if there is none.
  bool find_symbol(const std::string& name, uint64_t& address, bool& dynamic_shared);
  const Variable* find_variable(const std::string& name) const;
  uint32_t local_offset(const Variable& variable);
  uint32_t shared_offset(const Variable& variable);
  uint32_t operand(const std::string& text, int bits);
  uint32_t sink(int bits);
  void decode_body(Frame& body);
  void decode_call();
  void decode_return();
  void append(Instruction instruction);
  Frame& enter(Function& function);
  ~State();
};

// Maps values to slots of the register file; registers with disjoint live ranges share a slot.
void place_slots(Decoder::State&);

// Fails for a form that requires a newer device.
void check_capability(const Decoder&, const Statement&);

// Index and size in bits of a special register ("%tid.x"); false if it is none. sched.cpp sets the
// values.
bool find_special(const std::string& name, int& index, int& bits);

}  // namespace ptxvm
