// Arithmetic opcodes: dispatch by type to the integer, float and half files.
#include "ptxvm/ops_arithmetic.h"

namespace ptxvm {
namespace {

void decode_by_type(Decoder& decoder, const Statement& statement, Instruction& in) {
  const std::string& type = statement.opcode.back();
  if (type == "f32" || type == "f64") return decode_float(decoder, statement, in);
  if (type == "f16" || type == "f16x2" || type == "bf16" || type == "bf16x2")
    return decode_half(decoder, statement, in);
  return decode_integer(decoder, statement, in);
}

}  // namespace

void add_arithmetic(OpcodeTable& table) {
  for (const char* name : {"add", "sub", "mul", "mad", "fma", "min", "max", "neg", "abs", "div"})
    table[name] = decode_by_type;
  for (const char* name : {"addc", "subc", "madc", "mul24", "mad24", "rem", "sad", "dp4a", "dp2a"})
    table[name] = decode_integer;
  table["vabsdiff4"] = decode_video;
  for (const char* name : {"copysign", "testp"}) table[name] = decode_float;
  add_bit_operations(table);
  add_compare(table);
  add_convert(table);
  add_move(table);
  add_approximate(table);
}

}  // namespace ptxvm
