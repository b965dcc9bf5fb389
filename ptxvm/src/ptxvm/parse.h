// Parsed PTX: variables, functions, and the statements of their bodies. The decoder interprets the
// statements.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "ptxvm/machine.h"

namespace ptxvm {

struct Variable {
  std::string name;
  Space space = Space::generic;
  uint32_t alignment = 1;
  uint64_t bytes = 0;
  uint32_t element_bytes = 1;
  bool external = false;  // .shared: dynamic; other spaces: not defined in this module
  std::string initial;    // text after "="
  uint32_t line = 0;
  char* memory = nullptr;  // .global and .const: set once the module is loaded
};

struct Scope {
  int parent = -1;
  std::unordered_map<std::string, int> registers;  // name -> bits
  std::unordered_map<std::string, Variable> variables;
  std::unordered_map<std::string, uint32_t> labels;                  // name -> statement
  std::unordered_map<std::string, std::vector<std::string>> tables;  // .branchtargets
};

struct Function {
  std::string name;
  uint32_t line = 0;
  size_t body = 0;  // offset of the body in the module's text; 0: a declaration
  std::vector<Parameter> parameters, results;
  uint32_t parameter_bytes = 0;
  uint32_t max_threads = 0;
  uint32_t required[3] = {};
  uint32_t cluster[3] = {};
  uint32_t min_blocks = 1;
  // Body, present only while a kernel is decoded: it is many times larger than its text.
  std::vector<Scope> scopes;
  std::vector<Statement> statements;
};

// C++ source position of a line of PTX and of the lines that follow it (.loc, from nvcc -lineinfo).
struct SourceLine {
  uint32_t ptx_line, file, line;
};

struct Module {
  std::string text;  // without comments
  std::vector<SourceLine> source_lines;
  std::unordered_map<uint32_t, std::string> source_files;
  std::unordered_map<std::string, Variable> variables;
  std::map<std::string, std::unique_ptr<Function>> functions;  // kernels among them
  std::map<std::string, std::unique_ptr<Kernel>> kernels;
  std::vector<std::unique_ptr<void, void (*)(void*)>> memory;

  Module() = default;
  Module(const Module&) = delete;
  ~Module();
};

// Parses the text and allocates and initialises the variables of the module. Throws Fault.
std::unique_ptr<Module> load_module(const std::string& ptx);

// The C++ name of a mangled one ("_Z1kPf": "k(float*)"); any other name as it is.
std::string demangled(const std::string& name);

// Source file and line of a line of PTX; line 0 if they are not known.
std::pair<std::string, uint32_t> source_position(const Module&, uint32_t ptx_line);
// " (file.cuh:12)" for a line of PTX, or an empty string.
std::string source_of(const Module&, uint32_t ptx_line);

// Value of a pointer to a function, which can be neither read nor called. False if there is no such
// function.
bool function_address(const Module&, const std::string& name, uint64_t& address);

// Registers the variables of a module as memory that kernels may touch.
void register_variables(const Module&);

// Maximum size in bytes of the variables of a space.
uint64_t limit_of(Space);

// Sets the size of a variable with elements of `bytes` bytes and extents "[2][3]"; an empty extent
// takes the number of initial values. Returns what the variable must have instead, or an empty
// string.
std::string give_size(Variable&, uint64_t bytes, const std::string& extents);

// Value of an integer or floating-point literal in a field of `bits` bits; false if it is none.
bool parse_literal(const std::string& text, int bits, uint64_t& value);

// An unsigned integer from 0 to `most`; false for any other text.
bool parse_count(const std::string& text, uint64_t most, uint64_t& value);

// Splits a list at top-level commas: those outside (), [] and {}. Parts are trimmed.
std::vector<std::string> split_list(const std::string& text);
std::string trim(const std::string& text);

// Parses the scopes and statements of a function. Throws Fault.
void parse_body(Module&, Function&);

// Stages of load_module.
void read_source_lines(Module&, const std::string& ptx);
std::string blank_comments(std::string ptx);  // replaces comments, .loc and .file by blanks
void parse_declarations(Module&);             // of module.text
void place_variables(Module&);

}  // namespace ptxvm
