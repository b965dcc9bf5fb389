// Decoding of statements into instructions: operands become values, labels become targets, calls
// are inlined.
#include <algorithm>
#include <new>
#include <unordered_set>

#include "ptxvm/decode_state.h"
#include "ptxvm/device.h"
#include "ptxvm/store_buffer.h"

namespace ptxvm {

uint32_t Decoder::State::add_value(Value value) {
  values.push_back(value);
  return static_cast<uint32_t>(values.size() - 1);
}

uint32_t Decoder::State::constant(int bits, uint64_t value, bool dynamic_shared) {
  if (bits < 64) value &= (uint64_t{1} << bits) - 1;
  auto& known = dynamic_shared ? dynamic_constants : constants;
  const auto [entry, is_new] = known.try_emplace({bits, value}, 0);
  if (is_new) entry->second = add_value({Value::Kind::constant, bits, value, dynamic_shared});
  return entry->second;
}

bool Decoder::State::find_register(const std::string& name, uint32_t& value, int& bits) {
  for (int scope = statement->scope; scope >= 0; scope = frame->function->scopes[scope].parent) {
    const auto& declared = frame->function->scopes[scope].registers;
    const auto found = declared.find(name);
    if (found == declared.end()) continue;
    bits = found->second;
    const auto [entry, is_new] = frame->registers[scope].try_emplace(name, 0);
    if (is_new) entry->second = add_value({Value::Kind::variable, bits});
    value = entry->second;
    return true;
  }
  return false;
}

const Variable* Decoder::State::find_variable(const std::string& name) const {
  for (int scope = statement->scope; scope >= 0; scope = frame->function->scopes[scope].parent) {
    const auto& declared = frame->function->scopes[scope].variables;
    const auto found = declared.find(name);
    if (found != declared.end()) return &found->second;
  }
  const auto found = module.variables.find(name);
  return found == module.variables.end() ? nullptr : &found->second;
}

namespace {

// Allocates a variable after `top`. limit_of bounds each variable, so that sums of two fit in 32
// bits.
uint32_t allocate(uint32_t& top, const Variable& variable) {
  const uint32_t alignment = std::max(variable.alignment, 1u);
  const uint32_t offset = (top + alignment - 1) / alignment * alignment;
  const uint64_t most = limit_of(variable.space), end = offset + variable.bytes;
  if (end > most)
    throw Fault("PTX, line " + std::to_string(variable.line) + ": " + variable.name + " and " +
                "those before it must have at most " + std::to_string(most) + " bytes; got " +
                std::to_string(end));
  top = static_cast<uint32_t>(end);
  return offset;
}

}  // namespace

uint32_t Decoder::State::local_offset(const Variable& variable) {
  const auto [entry, is_new] = frame->local_offsets.try_emplace(&variable, 0);
  if (is_new) entry->second = allocate(kernel.local_bytes, variable);
  return entry->second;
}

uint32_t Decoder::State::shared_offset(const Variable& variable) {
  const auto [entry, is_new] = shared_offsets.try_emplace(&variable, 0);
  if (is_new) entry->second = allocate(shared_top, variable);
  return entry->second;
}

bool Decoder::State::find_symbol(const std::string& name, uint64_t& address, bool& dynamic_shared) {
  dynamic_shared = false;
  if (const Variable* variable = find_variable(name)) {
    switch (variable->space) {
      case Space::shared:
        dynamic_shared = variable->external;
        if (dynamic_shared) {
          dynamic = variable;
          dynamic_alignment = std::max(dynamic_alignment, variable->alignment);
        }
        address = dynamic_shared ? 0 : shared_offset(*variable);
        return true;
      case Space::local:
        address = local_offset(*variable);
        return true;
      case Space::param:  // arguments of calls
        address = kLocalWindow + local_offset(*variable);
        return true;
      default:
        if (!variable->memory) return false;  // declared, defined in another module
        address = reinterpret_cast<uint64_t>(variable->memory);
        return true;
    }
  }
  const auto argument = frame->arguments.find(name);
  if (argument != frame->arguments.end()) {
    address = argument->second;
    return true;
  }
  if (frame->depth == 0)
    for (const Parameter& parameter : kernel.parameters)
      if (parameter.name == name) {
        address = parameter.offset;
        return true;
      }
  return function_address(module, name, address);
}

uint32_t Decoder::State::operand(const std::string& text, int bits) {
  uint32_t value = 0;
  int declared = 0, index = 0;
  const std::string& opcode = statement->opcode[0];
  if (find_register(text, value, declared)) {
    // Only these instructions allow operands wider than their type.
    const bool may_differ = opcode == "ld" || opcode == "st" || opcode == "cvt" || opcode == "ldu";
    if (declared != bits && !may_differ)
      Decoder(*this).fail("operand " + text + " has " + std::to_string(declared) +
                          " bits where the instruction has " + std::to_string(bits));
    return value;
  }
  if (find_special(text, index, declared)) {
    const auto [entry, is_new] = specials.try_emplace({index, bits}, 0);
    if (is_new)
      entry->second = add_value({Value::Kind::special, bits, static_cast<uint64_t>(index)});
    return entry->second;
  }
  uint64_t number = 0, addend = 0;
  if (parse_literal(text, bits, number)) {
    if (bits == 1) number = number != 0;
    return constant(bits, number);
  }
  bool dynamic_shared = false;
  const size_t plus = text.find('+');
  if (plus != std::string::npos && !parse_literal(trim(text.substr(plus + 1)), 64, addend))
    Decoder(*this).fail("no number after '+' in operand " + text);
  if (find_symbol(trim(text.substr(0, plus)), number, dynamic_shared))
    return constant(bits, number + addend, dynamic_shared);
  Decoder(*this).fail("unknown operand '" + text + "'");
}

// "_" as a destination: no slot for handlers that expect that, else a slot that nothing reads.
uint32_t Decoder::State::sink(int bits) {
  static const std::unordered_set<std::string> kExpected = {
      "atom", "elect", "ld", "ldmatrix", "ldu", "lop3", "match", "setp", "shfl"};
  if (kExpected.contains(statement->opcode[0])) return kNoSlot;
  return add_value({Value::Kind::variable, bits});
}

void Decoder::write(const std::string& operand, int bits) {
  if (state_.reads) fail("machine error: a destination after a source");
  const uint32_t value = operand == "_" ? state_.sink(bits) : state_.operand(operand, bits);
  if (value != kNoSlot && state_.values[value].kind != Value::Kind::variable)
    fail("destination '" + operand + "' is no register");
  state_.operands.push_back(value);
  ++state_.writes;
}

void Decoder::read(const std::string& operand, int bits) {
  if (operand == "_") fail("a source cannot be '_'");
  const bool negated = bits == 1 && operand[0] == '!';
  state_.operands.push_back(state_.operand(negated ? trim(operand.substr(1)) : operand, bits));
  ++state_.reads;
}

void Decoder::skip() {
  state_.operands.push_back(kNoSlot);
  ++state_.reads;
}

Address Decoder::read_address(const std::string& operand) {
  if (operand.size() < 2 || operand.front() != '[' || operand.back() != ']')
    fail("'" + operand + "' is no address");
  std::string base = trim(operand.substr(1, operand.size() - 2));
  uint64_t offset = 0, number = 0;
  const size_t sign = base.find_first_of("+-", 1);
  if (sign != std::string::npos) {
    std::string rest = trim(base.substr(sign + (base[sign] == '+')));
    if (!parse_literal(rest, 64, offset)) fail("no number after the base of address " + operand);
    base = trim(base.substr(0, sign));
  }
  uint32_t value = 0;
  int bits = 64;
  bool dynamic_shared = false;
  if (state_.find_register(base, value, bits)) {
    if (bits != 32 && bits != 64) fail("register " + base + " is too narrow for an address");
  } else if (state_.find_symbol(base, number, dynamic_shared)) {
    value = state_.constant(64, number, dynamic_shared);
  } else if (parse_literal(base, 64, number)) {
    value = state_.constant(64, number);
  } else {
    fail("unknown address '" + operand + "'");
  }
  state_.operands.push_back(value);
  ++state_.reads;
  return {bits == 64, static_cast<int64_t>(offset)};
}

int Decoder::width(const std::string& operand) const {
  uint32_t value = 0;
  int bits = 0;
  return state_.find_register(operand, value, bits) ? bits : 0;
}

std::vector<std::string> Decoder::elements(const std::string& operand) {
  if (operand.empty() || operand.front() != '{') return {operand};
  return split_list(operand.substr(1, operand.rfind('}') - 1));
}

void Decoder::fail(const std::string& why) const {
  throw Fault(state_.kernel.title + ", line " + std::to_string(state_.statement->line) + ": " +
              state_.statement->text + ": " + why);
}

Kernel& Decoder::kernel() { return state_.kernel; }

void Decoder::branch_to(const std::string& label) {
  const Function& function = *state_.frame->function;
  for (int scope = state_.statement->scope; scope >= 0; scope = function.scopes[scope].parent) {
    const auto found = function.scopes[scope].labels.find(label);
    if (found == function.scopes[scope].labels.end()) continue;
    state_.fixups.push_back(
        {static_cast<uint32_t>(state_.kernel.code.size()), state_.frame, found->second});
    return;
  }
  fail("unknown label " + label);
}

uint32_t Decoder::branch_to_table(const std::string& table) {
  const Function& function = *state_.frame->function;
  for (int scope = state_.statement->scope; scope >= 0; scope = function.scopes[scope].parent) {
    const auto found = function.scopes[scope].tables.find(table);
    if (found == function.scopes[scope].tables.end()) continue;
    const auto number = static_cast<uint32_t>(state_.kernel.tables.size());
    state_.kernel.tables.emplace_back(found->second.size());
    for (size_t i = 0; i < found->second.size(); ++i) {
      branch_to(found->second[i]);
      state_.fixups.back().instruction = static_cast<uint32_t>(i);
      state_.fixups.back().table = static_cast<int>(number);
    }
    return number;
  }
  fail("unknown table of branch targets " + table);
}

void Decoder::State::append(Instruction instruction) {
  instruction.line = statement->line;
  // Texts and slots are stored as indices until the pools have their final sizes.
  instruction.text = reinterpret_cast<const char*>(kernel.texts.size());
  kernel.texts.insert(kernel.texts.end(), statement->text.c_str(),
                      statement->text.c_str() + statement->text.size() + 1);
  instruction.writes = static_cast<uint8_t>(writes);
  instruction.reads = static_cast<uint8_t>(reads);
  if (!statement->guard.empty()) {
    int bits = 0;
    if (!find_register(statement->guard, instruction.guard, bits) || bits != 1)
      Decoder(*this).fail("guard " + statement->guard + " is no predicate");
    instruction.guard_negated = statement->guard_negated;
  }
  if (instruction.member != kNoSlot) instruction.member = operands[instruction.member];
  instruction.slots = reinterpret_cast<const uint32_t*>(kernel.slots.size());
  kernel.slots.insert(kernel.slots.end(), operands.begin(), operands.end());
  kernel.code.push_back(instruction);
}

namespace {

// What an instruction other than ld, st, atom, red and fence does to stores that wait.
uint8_t buffer_rule(const Statement& statement) {
  static const std::unordered_set<std::string> kFlushing = {
      "cp", "mbarrier", "ldmatrix", "stmatrix", "wgmma", "wmma", "griddepcontrol", "tensormap"};
  const std::string& opcode = statement.opcode[0];
  if (opcode == "bar" || opcode == "barrier") return statement.has("cluster") ? kFlushes : kShares;
  return kFlushing.contains(opcode) ? kFlushes : 0;
}

}  // namespace

// Pushes a frame for a function and parses its body if necessary.
Frame& Decoder::State::enter(Function& function) {
  if (function.scopes.empty()) {
    parsed.push_back(&function);
    parse_body(module, function);
  }
  frames.push_back({&function});
  frames.back().registers.resize(function.scopes.size());
  return frames.back();
}

Decoder::State::~State() {
  for (Function* function : parsed) {
    function->scopes = {};
    function->statements = {};
  }
}

void Decoder::State::decode_body(Frame& body) {
  Frame* const caller = frame;
  const Statement* const call = statement;
  frame = &body;
  for (const Statement& next : body.function->statements) {
    statement = &next;
    body.first.push_back(static_cast<uint32_t>(kernel.code.size()));
    operands.clear();
    writes = reads = 0;
    if (next.opcode[0] == "call") {
      decode_call();
      continue;
    }
    if (next.opcode[0] == "ret" && body.depth > 0) {
      decode_return();
      continue;
    }
    const auto found = opcodes.find(next.opcode[0]);
    if (found == opcodes.end()) Decoder(*this).fail("unknown opcode");
    Instruction instruction;
    Decoder decoder(*this);
    check_capability(decoder, next);
    found->second(decoder, next, instruction);
    instruction.order |= buffer_rule(next);
    append(instruction);
  }
  body.first.push_back(static_cast<uint32_t>(kernel.code.size()));
  frame = caller;
  statement = call;
}

void Decoder::State::decode_return() {
  fixups.push_back({static_cast<uint32_t>(kernel.code.size()), frame,
                    static_cast<uint32_t>(frame->function->statements.size())});
  Instruction instruction;
  instruction.control = Control::branch;
  append(instruction);
}

namespace {

const OpcodeTable& opcode_table() {
  static const OpcodeTable table = [] {
    OpcodeTable all;
    add_arithmetic(all);
    add_warp(all);
    add_memory(all);
    add_tensor(all);
    add_control(all);
    add_cluster(all);
    add_wgmma(all);
    add_wmma(all);
    add_stack(all);
    return all;
  }();
  return table;
}

void decode_into(Kernel& kernel) {
  Function& function = *kernel.module->functions.at(kernel.name);
  Decoder::State state{kernel, *kernel.module, opcode_table()};
  kernel.code.clear();
  kernel.slots.clear();
  kernel.texts.clear();
  kernel.tables.clear();
  kernel.tiles.clear();
  kernel.products.clear();
  kernel.copies.clear();
  kernel.constants.clear();
  kernel.specials.clear();
  kernel.local_bytes = kernel.stack = 0;
  kernel.scratch = kNoSlot;
  state.decode_body(state.enter(function));
  Statement end;  // a body may end without ret
  end.line = function.statements.empty() ? function.line : function.statements.back().line;
  end.text = "end of the kernel";
  state.frame = &state.frames.front();
  state.statement = &end;
  state.operands.clear();
  state.writes = state.reads = 0;
  Instruction exit;
  exit.control = Control::exit;
  state.append(exit);
  for (Instruction& instruction : kernel.code)
    instruction.text = kernel.texts.data() + reinterpret_cast<size_t>(instruction.text);
  for (const Fixup& fixup : state.fixups) {
    const uint32_t target = fixup.frame->first[fixup.statement];
    if (fixup.table >= 0)
      kernel.tables[fixup.table][fixup.instruction] = target;
    else
      kernel.code[fixup.instruction].target = target;
  }
  kernel.static_shared = state.shared_top;
  kernel.shared_variables.clear();
  for (const auto& [variable, offset] : state.shared_offsets)
    kernel.shared_variables.push_back(
        {variable->name, offset, static_cast<uint32_t>(variable->bytes)});
  kernel.dynamic_offset = (state.shared_top + state.dynamic_alignment - 1) /
                          state.dynamic_alignment * state.dynamic_alignment;
  if (state.dynamic)
    kernel.shared_variables.push_back({state.dynamic->name, kernel.dynamic_offset, 0});
  kernel.local_bytes = (kernel.local_bytes + 15) / 16 * 16;
  place_slots(state);
}

}  // namespace

void decode(Kernel& kernel) {
  if (!kernel.code.empty() && kernel.device == &device()) return;
  kernel.device = &device();
  try {
    decode_into(kernel);
  } catch (const std::bad_alloc&) {
    kernel.code.clear();
    throw Fault(kernel.title + ": no memory for its instructions");
  } catch (...) {
    kernel.code.clear();
    throw;
  }
}

}  // namespace ptxvm
