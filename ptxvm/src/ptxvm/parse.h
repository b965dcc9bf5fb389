// PTX text taken apart: variables, functions, and the statements of their bodies. What statements
// mean is the decoder's business.
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
  bool external = false;  // of .shared: dynamic; else defined nowhere
  std::string initial;    // text after "="
  uint32_t line = 0;
  char* memory = nullptr;  // of .global and .const, once the module is loaded
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
  size_t body = 0;  // where it begins in the text of the module; 0: a declaration
  std::vector<Parameter> parameters, results;
  uint32_t parameter_bytes = 0;
  uint32_t max_threads = 0;
  uint32_t required[3] = {};
  uint32_t cluster[3] = {};
  uint32_t min_blocks = 1;
  // Of the body, only while a kernel is decoded: they are many times larger than the text.
  std::vector<Scope> scopes;
  std::vector<Statement> statements;
};

// Where the C++ source of a line of PTX and of those behind it is (.loc, from nvcc -lineinfo).
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

// " (file.cuh:12)" of a line of PTX, or nothing.
std::string source_of(const Module&, uint32_t ptx_line);

// What a pointer to a function holds: nothing that can be read or called. False if there is none.
bool function_address(const Module&, const std::string& name, uint64_t& address);

// Registers the variables of a module as memory that kernels may touch.
void register_variables(const Module&);

// Bytes that variables of a space have at most.
uint64_t limit_of(Space);

// Sets the bytes of a variable of `bytes` an element and of extents "[2][3]", of which an empty one
// is as long as the initial values. What the variable must have instead, or nothing.
std::string give_size(Variable&, uint64_t bytes, const std::string& extents);

// Value of an integer or floating-point literal in a field of `bits`; false if it is none.
bool parse_literal(const std::string& text, int bits, uint64_t& value);

// A whole number of 0 to `most`, without a sign; false if the text is none.
bool parse_count(const std::string& text, uint64_t most, uint64_t& value);

// A list at its top-level commas: those outside (), [] and {}. Parts are trimmed.
std::vector<std::string> split_list(const std::string& text);
std::string trim(const std::string& text);

// Fills in the scopes and statements of a function. Throws Fault.
void parse_body(Module&, Function&);

// Stages of load_module.
void read_source_lines(Module&, const std::string& ptx);
std::string blank_comments(std::string ptx);  // comments, .loc and .file become blanks
void parse_declarations(Module&);             // of module.text
void place_variables(Module&);

}  // namespace ptxvm
