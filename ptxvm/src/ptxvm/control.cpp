// Decoding of control flow: branches, calls, barriers, traps. sched.cpp executes them.
#include "ptxvm/control.h"

#include <algorithm>

#include "ptxvm/check.h"
#include "ptxvm/decode_state.h"
#include "ptxvm/heap.h"
#include "ptxvm/reports.h"

namespace ptxvm {
namespace {

void do_nothing(Warp&, const Instruction&, Mask) {}

void raise_trap(Warp& warp, const Instruction& instruction, Mask mask) {
  fault(warp, instruction, __builtin_ctz(mask), "the kernel stopped itself");
}

// int vprintf(format, arguments): prints nothing.
void ignore_printf(Warp& warp, const Instruction& instruction, Mask mask) {
  for (int lane = 0; lane < kLanes; ++lane)
    if (mask >> lane & 1)
      std::memset(access(warp, instruction, Space::local, static_cast<uint64_t>(instruction.offset),
                         lane, 4, Access::write),
                  0, 4);
}

template <typename T>
T argument(Warp& warp, const Instruction& instruction, int lane, uint64_t address) {
  T value;
  std::memcpy(&value,
              access(warp, instruction, Space::local, address, lane, sizeof(T), Access::read),
              sizeof(T));
  return value;
}

std::string text_at(Warp& warp, const Instruction& instruction, int lane, uint64_t address) {
  std::string text;
  for (; text.size() < 500; ++address) {
    const char c = *access(warp, instruction, Space::generic, address, lane, 1, Access::read);
    if (!c) break;
    text += c;
  }
  return text;
}

// void __assertfail(message, file, line, function, character size).
void fail_assertion(Warp& warp, const Instruction& instruction, Mask mask) {
  const int lane = __builtin_ctz(mask);
  const auto text = [&](int64_t where) {
    return text_at(warp, instruction, lane,
                   argument<uint64_t>(warp, instruction, lane, static_cast<uint64_t>(where)));
  };
  const auto line = argument<uint32_t>(warp, instruction, lane, kLocalWindow + instruction.target);
  throw KernelFault(finding_at(warp, instruction, lane, "assertion",
                               "assertion '" + text(instruction.offset) + "' failed at " +
                                   text(instruction.offset2) + ":" + std::to_string(line)));
}

// void* malloc(bytes).
void run_malloc(Warp& warp, const Instruction& instruction, Mask mask) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    void* const memory = allocate_on_heap(
        argument<uint64_t>(warp, instruction, lane, static_cast<uint64_t>(instruction.offset2)));
    std::memcpy(access(warp, instruction, Space::local, static_cast<uint64_t>(instruction.offset),
                       lane, sizeof memory, Access::write),
                &memory, sizeof memory);
  }
}

// void free(pointer).
void run_free(Warp& warp, const Instruction& instruction, Mask mask) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const auto address =
        argument<uint64_t>(warp, instruction, lane, static_cast<uint64_t>(instruction.offset));
    if (address && !free_on_heap(address))
      fault(warp, instruction, lane,
            "free of what malloc did not return, or of what was freed before");
  }
}

void only(Decoder& decoder, const Statement& statement,
          std::initializer_list<const char*> modifiers, size_t operands) {
  for (size_t i = 1; i < statement.opcode.size(); ++i) {
    bool known = false;
    for (const char* modifier : modifiers) known |= statement.opcode[i] == modifier;
    if (!known) decoder.fail("unknown modifier ." + statement.opcode[i]);
  }
  if (statement.operands.size() != operands)
    decoder.fail("expected " + std::to_string(operands) + " operands");
}

void decode_branch(Decoder& decoder, const Statement& statement, Instruction& instruction) {
  only(decoder, statement, {"uni"}, 1);
  instruction.control = Control::branch;
  decoder.branch_to(statement.operands[0]);
}

void decode_indirect_branch(Decoder& decoder, const Statement& statement,
                            Instruction& instruction) {
  only(decoder, statement, {"idx", "uni"}, 2);
  if (!statement.has("idx")) decoder.fail("unknown opcode");
  instruction.control = Control::indirect;
  instruction.target = decoder.branch_to_table(statement.operands[1]);
  decoder.read(statement.operands[0], 32);
}

void decode_exit(Decoder& decoder, const Statement& statement, Instruction& instruction) {
  only(decoder, statement, {"uni"}, 0);
  instruction.control = Control::exit;
}

void decode_trap(Decoder& decoder, const Statement& statement, Instruction& instruction) {
  only(decoder, statement, {}, 0);
  instruction.run = raise_trap;
}

// bar is barrier.aligned; the suffix .cta changes nothing.
void decode_barrier(Decoder& decoder, const Statement& statement, Instruction& instruction) {
  const auto& operands = statement.operands;
  if (statement.has("cluster")) return decode_cluster_barrier(decoder, statement, instruction);
  if (statement.has("warp")) {
    only(decoder, statement, {"warp", "sync"}, 1);
    decoder.read(operands[0], 32);
    instruction.control = Control::converge;
    instruction.run = do_nothing;
    instruction.member = 0;
    instruction.flags = kConvergesAnywhere;
    return;
  }
  instruction.control = Control::barrier;
  if (statement.opcode[0] == "bar" || statement.has("aligned")) instruction.flags = kAligned;
  if (statement.has("red")) {
    only(decoder, statement, {"cta", "red", "popc", "and", "or", "u32", "pred", "aligned"},
         operands.size());
    if (operands.size() != 3 && operands.size() != 4) decoder.fail("expected 3 or 4 operands");
    const bool counts = statement.has("popc");
    if (counts == statement.has("pred") || counts + statement.has("and") + statement.has("or") != 1)
      decoder.fail("the reduction must be .popc.u32, .and.pred or .or.pred");
    instruction.variant = static_cast<uint8_t>(counts                 ? Barrier::sum
                                               : statement.has("and") ? Barrier::all
                                                                      : Barrier::any);
    decoder.write(operands[0], counts ? 32 : 1);
    decoder.read(operands[1], 32);
    if (operands.size() == 4)
      decoder.read(operands[2], 32);
    else
      decoder.skip();
    decoder.read(operands.back(), 1);
    if (operands.back()[0] == '!') instruction.flags |= kNegated;
    return;
  }
  only(decoder, statement, {"cta", "sync", "arrive", "aligned"}, operands.size());
  if (statement.has("arrive") == statement.has("sync") && statement.opcode.size() > 1)
    decoder.fail("one of .sync and .arrive is needed");
  const bool arrives = statement.has("arrive");
  instruction.variant = static_cast<uint8_t>(arrives ? Barrier::arrive : Barrier::sync);
  if (operands.empty() || operands.size() > 2 || (arrives && operands.size() != 2))
    decoder.fail(arrives ? "expected 2 operands" : "expected 1 or 2 operands");
  decoder.read(operands[0], 32);
  if (operands.size() == 2)
    decoder.read(operands[1], 32);
  else
    decoder.skip();
}

void refuse_pointer(Warp& warp, const Instruction& instruction, Mask mask) {
  fault(warp, instruction, __builtin_ctz(mask), "calls through pointers are not supported");
}

// Functions of the device runtime. Positions of their results, then of their arguments: offset,
// offset2, and target from kLocalWindow on.
struct Builtin {
  const char* name;
  size_t results, arguments;
  void (*run)(Warp&, const Instruction&, Mask);
};
constexpr Builtin kBuiltins[] = {{"vprintf", 1, 2, ignore_printf},
                                 {"__assertfail", 0, 5, fail_assertion},
                                 {"malloc", 1, 1, run_malloc},
                                 {"free", 0, 1, run_free}};

std::vector<std::string> names_in(const std::string& list) {
  return split_list(list.substr(1, list.rfind(')') - 1));
}

}  // namespace

// "call.uni (result), function, (argument, ...)": the function's body is inlined.
void Decoder::State::decode_call() {
  Decoder decoder(*this);
  const Statement& call = *statement;
  std::vector<std::string> results, arguments;
  size_t at = 0;
  if (!call.operands.empty() && call.operands[0][0] == '(') results = names_in(call.operands[at++]);
  if (at >= call.operands.size()) decoder.fail("a call without a function");
  const std::string& name = call.operands[at++];
  if (at < call.operands.size() && call.operands[at][0] == '(')
    arguments = names_in(call.operands[at++]);
  const bool through_pointer = at < call.operands.size();
  const auto address = [&](const std::string& variable) {
    uint64_t value = 0;
    bool dynamic_shared = false;
    if (!find_symbol(variable, value, dynamic_shared))
      decoder.fail("argument '" + variable + "' is no .param variable");
    return value;
  };
  Instruction instruction;
  if (through_pointer) {  // an error for lanes that reach it
    decoder.read(name, 64);
    instruction.run = refuse_pointer;
    append(instruction);
    return;
  }
  const auto* const builtin =
      std::find_if(std::begin(kBuiltins), std::end(kBuiltins), [&](const Builtin& each) {
        return name == each.name && results.size() == each.results &&
               arguments.size() == each.arguments;
      });
  if (builtin != std::end(kBuiltins)) {
    std::vector<std::string> variables = results;
    variables.insert(variables.end(), arguments.begin(), arguments.end());
    instruction.run = builtin->run;
    instruction.offset = static_cast<int64_t>(address(variables[0]));
    if (variables.size() > 1) instruction.offset2 = static_cast<int64_t>(address(variables[1]));
    if (variables.size() > 2)
      instruction.target = static_cast<uint32_t>(address(variables[2]) - kLocalWindow);
    append(instruction);
    return;
  }
  const auto found = module.functions.find(name);
  if (found == module.functions.end() || !found->second->body)
    decoder.fail("function " + name + " is not defined in this module");
  Function& function = *found->second;
  if (results.size() != function.results.size() || arguments.size() != function.parameters.size())
    decoder.fail("number of arguments or results differs from that of " + name);
  if (frame->depth == 32) decoder.fail("calls are nested too deeply, or recursive");
  const size_t jump = kernel.code.size();
  if (!call.guard.empty()) {  // lanes without the guard pass over the body
    instruction.control = Control::branch;
    append(instruction);
    kernel.code.back().guard_negated = !kernel.code.back().guard_negated;
  }
  Frame& callee = enter(function);
  callee.depth = frame->depth + 1;
  for (size_t i = 0; i < results.size(); ++i)
    callee.arguments[function.results[i].name] = address(results[i]);
  for (size_t i = 0; i < arguments.size(); ++i)
    callee.arguments[function.parameters[i].name] = address(arguments[i]);
  decode_body(callee);
  if (!call.guard.empty()) kernel.code[jump].target = static_cast<uint32_t>(kernel.code.size());
}

void add_control(OpcodeTable& table) {
  table["bra"] = decode_branch;
  table["brx"] = decode_indirect_branch;
  table["ret"] = decode_exit;
  table["exit"] = decode_exit;
  table["trap"] = decode_trap;
  table["brkpt"] = decode_trap;
  table["bar"] = decode_barrier;
  table["barrier"] = decode_barrier;
}

}  // namespace ptxvm
