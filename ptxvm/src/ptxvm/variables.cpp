// Module memory: variables of .global and .const get host memory and their initial values.
#include <algorithm>
#include <cstdlib>
#include <new>

#include "ptxvm/check.h"
#include "ptxvm/decode.h"
#include "ptxvm/parse.h"

namespace ptxvm {
namespace {

// "name", "generic(name)", "name+4" or "0xff00(name)": an address, or the byte of it that a mask
// selects.
uint64_t symbol_value(const Module& module, const Variable& owner, const std::string& text) {
  const auto fail = [&](const std::string& why) {
    throw Fault("PTX, line " + std::to_string(owner.line) + ": initial value of " + owner.name +
                ": " + why);
  };
  std::string symbol = text;
  uint64_t mask = ~uint64_t{0}, addend = 0;
  const size_t parenthesis = symbol.find('(');
  if (parenthesis != std::string::npos && parse_literal(symbol.substr(0, parenthesis), 64, mask))
    symbol = symbol.substr(parenthesis + 1, symbol.rfind(')') - parenthesis - 1);
  const size_t plus = symbol.rfind('+');
  if (plus != std::string::npos) {
    if (!parse_literal(trim(symbol.substr(plus + 1)), 64, addend)) fail("no number after '+'");
    symbol = trim(symbol.substr(0, plus));
  }
  if (symbol.rfind("generic(", 0) == 0) symbol = symbol.substr(8, symbol.rfind(')') - 8);
  symbol = trim(symbol);
  uint64_t address = 0;
  const auto found = module.variables.find(symbol);
  if (found != module.variables.end() && found->second.memory)
    address = reinterpret_cast<uint64_t>(found->second.memory);
  else if (!function_address(module, symbol, address))
    fail("'" + text + "' is neither a number, a variable in global memory nor a function");
  address += addend;
  return (address & mask) >> (mask ? __builtin_ctzll(mask) : 0);
}

void fill(const Module& module, const Variable& variable) {
  std::string list = variable.initial;
  std::erase_if(list, [](char c) { return c == '{' || c == '}'; });
  uint64_t at = 0;
  for (const std::string& item : split_list(list)) {
    if (at + variable.element_bytes > variable.bytes)
      throw Fault("PTX, line " + std::to_string(variable.line) + ": more initial values than " +
                  variable.name + " has elements");
    uint64_t value = 0;
    if (!parse_literal(item, static_cast<int>(variable.element_bytes * 8), value))
      value = symbol_value(module, variable, item);
    std::memcpy(variable.memory + at, &value, std::min<uint32_t>(variable.element_bytes, 8));
    at += variable.element_bytes;
  }
}

bool has_memory(const Variable& variable) {
  return (variable.space == Space::global || variable.space == Space::constant) &&
         !variable.external;
}

}  // namespace

uint64_t limit_of(Space space) {
  switch (space) {
    case Space::global:
    case Space::constant:
      return uint64_t{1} << 40;  // more than any device has
    case Space::shared:
      return uint64_t{1} << kRankShift;
    default:  // local memory of a thread, which also holds arguments of calls
      return 512 << 10;
  }
}

std::string give_size(Variable& variable, uint64_t bytes, const std::string& extents) {
  const uint64_t most = limit_of(variable.space) / bytes;
  uint64_t count = 1;
  for (size_t at = 0; at < extents.size();) {
    const size_t close = extents.find(']', at);
    const std::string inside = trim(extents.substr(at + 1, close - at - 1));
    uint64_t extent = 0;
    const bool open = inside.empty() && close != std::string::npos;
    if (open && !variable.initial.empty()) extent = split_list(variable.initial.substr(1)).size();
    if (extents[at] != '[' || close == std::string::npos ||
        (!open && !parse_count(inside, most, extent)) || (extent && count > most / extent))
      return "extents in brackets, of at most " + std::to_string(most) + " elements; got '" +
             extents + "'";
    count *= extent;
    at = std::min(extents.find_first_not_of(" \t\r\n", close + 1), extents.size());
  }
  variable.bytes = count * bytes;
  return {};
}

bool function_address(const Module& module, const std::string& name, uint64_t& address) {
  const auto found = module.functions.find(name);
  if (found == module.functions.end()) return false;
  address = reinterpret_cast<uint64_t>(found->second.get());
  return true;
}

void place_variables(Module& module) {
  for (auto& [name, variable] : module.variables) {
    if (!has_memory(variable)) continue;
    const uint64_t alignment = std::max<uint64_t>(variable.alignment, 16);
    // calloc: zeros without touching the pages.
    module.memory.emplace_back(std::calloc(variable.bytes + alignment, 1), std::free);
    if (!module.memory.back())
      throw Fault("PTX, line " + std::to_string(variable.line) + ": no memory for the " +
                  std::to_string(variable.bytes) + " bytes of " + name);
    const auto base = reinterpret_cast<uint64_t>(module.memory.back().get());
    variable.memory = reinterpret_cast<char*>((base + alignment - 1) / alignment * alignment);
  }
  for (auto& [name, variable] : module.variables)
    if (has_memory(variable)) fill(module, variable);
}

void register_variables(const Module& module) {
  for (const auto& [name, variable] : module.variables)
    if (variable.memory && variable.bytes)
      register_memory(variable.memory, variable.bytes, variable.space == Space::global);
}

Module::~Module() {
  for (const auto& [name, variable] : variables)
    if (variable.memory && variable.bytes) unregister_memory(variable.memory);
}

std::unique_ptr<Module> load_module(const std::string& ptx) try {
  auto module = std::make_unique<Module>();
  read_source_lines(*module, ptx);
  module->text = blank_comments(ptx);
  parse_declarations(*module);
  place_variables(*module);
  register_variables(*module);
  return module;
} catch (const std::bad_alloc&) {
  throw Fault("PTX: no memory for the module");
}

}  // namespace ptxvm
