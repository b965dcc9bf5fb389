// Shared by the arithmetic files: parsing of opcode modifiers, and the decode function of each
// class of types, which ops_arithmetic.cpp selects by the opcode's last type.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "ptxvm/decode.h"
#include "ptxvm/floats.h"
#include "ptxvm/lanes.h"

namespace ptxvm {

// Modifiers of an opcode, in order. Each decode function takes those it knows; any that remain at
// the end are an error.
class Modifiers {
 public:
  Modifiers(const Decoder& decoder, const Statement& statement)
      : decoder_(decoder), parts_(statement.opcode.begin() + 1, statement.opcode.end()) {}

  bool take(std::string_view part) {
    for (size_t i = 0; i < parts_.size(); ++i) {
      if (parts_[i] != part) continue;
      parts_.erase(parts_.begin() + static_cast<std::ptrdiff_t>(i));
      return true;
    }
    return false;
  }
  // Takes the last modifier, a type.
  std::string take_type() {
    if (parts_.empty()) decoder_.fail("the opcode has no type");
    std::string type = parts_.back();
    parts_.pop_back();
    return type;
  }
  // Takes the first modifier.
  std::string take_first(const char* what) {
    if (parts_.empty()) decoder_.fail(std::string("the opcode has no ") + what);
    std::string part = parts_.front();
    parts_.erase(parts_.begin());
    return part;
  }
  // .rn, .rz, .rm, .rp; nearest by default.
  Rounding take_rounding(bool* found = nullptr) {
    static constexpr const char* names[] = {"rn", "rz", "rm", "rp"};
    for (int i = 0; i < 4; ++i) {
      if (!take(names[i])) continue;
      if (found) *found = true;
      return static_cast<Rounding>(i);
    }
    if (found) *found = false;
    return Rounding::nearest;
  }
  void finish() const {
    if (!parts_.empty()) decoder_.fail("modifier ." + parts_.front() + " is not supported here");
  }

 private:
  const Decoder& decoder_;
  std::vector<std::string> parts_;
};

inline void expect_operands(const Decoder& decoder, const Statement& statement, size_t count) {
  if (statement.operands.size() != count)
    decoder.fail("expected " + std::to_string(count) + " operands, got " +
                 std::to_string(statement.operands.size()));
}

// Destination, then the sources, all of the same width.
inline void read_operands(Decoder& decoder, const Statement& statement, size_t count, int bits) {
  expect_operands(decoder, statement, count);
  decoder.write(statement.operands[0], bits);
  for (size_t i = 1; i < count; ++i) decoder.read(statement.operands[i], bits);
}

// A predicate source: pushes its slot and returns whether it is negated.
inline bool read_predicate_operand(Decoder& decoder, const std::string& operand) {
  const bool negated = !operand.empty() && operand[0] == '!';
  decoder.read(negated ? operand.substr(1) : operand, 1);
  return negated;
}

// Splits "d|p"; the second part is "_" if it is absent.
inline std::pair<std::string, std::string> split_pair(const std::string& operand) {
  const size_t bar = operand.find('|');
  if (bar == std::string::npos) return {operand, "_"};
  const auto trim = [](std::string text) {
    while (!text.empty() && text.front() == ' ') text.erase(text.begin());
    while (!text.empty() && text.back() == ' ') text.pop_back();
    return text;
  };
  return {trim(operand.substr(0, bar)), trim(operand.substr(bar + 1))};
}

// f(T{}) for the integer type of that name, or nullptr. "b" types count as unsigned.
template <typename F>
Handler with_integer(const std::string& type, F f) {
  if (type == "u16" || type == "b16") return f(uint16_t{});
  if (type == "s16") return f(int16_t{});
  if (type == "u32" || type == "b32") return f(uint32_t{});
  if (type == "s32") return f(int32_t{});
  if (type == "u64" || type == "b64") return f(uint64_t{});
  if (type == "s64") return f(int64_t{});
  return nullptr;
}

// Only types of `bits` bits, as unsigned.
template <typename F>
Handler with_bits(int bits, F f) {
  if (bits == 8) return f(uint8_t{});
  if (bits == 16) return f(uint16_t{});
  if (bits == 32) return f(uint32_t{});
  if (bits == 64) return f(uint64_t{});
  return nullptr;
}

void decode_integer(Decoder&, const Statement&, Instruction&);  // ops_integer.cpp
void decode_video(Decoder&, const Statement&, Instruction&);    // ops_integer.cpp: vabsdiff4
void decode_float(Decoder&, const Statement&, Instruction&);    // ops_float.cpp: f32, f64
void decode_half(Decoder&, const Statement&, Instruction&);     // ops_half.cpp: f16, bf16, pairs
void add_bit_operations(OpcodeTable&);                          // ops_bit.cpp
void add_compare(OpcodeTable&);                                 // ops_compare.cpp
void add_convert(OpcodeTable&);                                 // ops_convert.cpp
void add_move(OpcodeTable&);                                    // ops_move.cpp
void add_approximate(OpcodeTable&);                             // ops_approximate.cpp

}  // namespace ptxvm
