// PTX structure: module directives, functions, scopes, statements.
#include "ptxvm/parse.h"

#include <algorithm>
#include <bit>
#include <cctype>

#include "ptxvm/decode.h"

namespace ptxvm {
namespace {

constexpr uint64_t kMostParameters = 32764;  // bytes of a kernel's parameters (PTX ISA 8.1)
constexpr uint64_t kMostAlignment = 1 << 16;
constexpr uint64_t kMostRegisters = 1 << 20;  // maximum number in one declaration

bool is_blank(char c) { return std::isspace(static_cast<unsigned char>(c)); }
bool is_name(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%';
}

bool is_identifier(const std::string& text) {
  return !text.empty() && !std::isdigit(static_cast<unsigned char>(text[0])) &&
         std::all_of(text.begin(), text.end(), is_name);
}

std::string collapse_blanks(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (!is_blank(c))
      out += c;
    else if (!out.empty() && out.back() != ' ')
      out += ' ';
  }
  return trim(out);
}

uint32_t round_up(uint32_t value, uint32_t to) { return (value + to - 1) / to * to; }

class Parser {
 public:
  explicit Parser(Module& module) : module_(module), text_(module.text) {
    for (size_t i = 0; i < text_.size(); ++i)
      if (text_[i] == '\n') newlines_.push_back(i);
  }

  void run() {
    for (skip_blanks(); at_ < text_.size(); skip_blanks()) parse_directive();
  }

  void parse_body(Function& function);

 private:
  [[noreturn]] void fail(size_t at, const std::string& why) const {
    size_t end = std::min(text_.find_first_of("\n;", at), text_.size());
    throw Fault((place_.empty() ? "PTX" : place_) + ", line " + std::to_string(line_of(at)) + ": " +
                collapse_blanks(text_.substr(at, end - at)) + ": " + why);
  }

  uint32_t line_of(size_t at) const {
    return 1 + static_cast<uint32_t>(std::lower_bound(newlines_.begin(), newlines_.end(), at) -
                                     newlines_.begin());
  }

  void skip_blanks() {
    while (at_ < text_.size() && is_blank(text_[at_])) ++at_;
  }

  // A name, a number, or a directive: ".reg.b16" is two words.
  std::string word() {
    skip_blanks();
    const size_t begin = at_;
    if (at_ < text_.size() && text_[at_] == '.') ++at_;
    while (at_ < text_.size() && is_name(text_[at_])) ++at_;
    return text_.substr(begin, at_ - begin);
  }

  // Text up to one of the characters, which is not consumed. Quoted text is skipped.
  std::string until(const char* stops) {
    const size_t begin = at_;
    bool quoted = false;
    while (at_ < text_.size() && (quoted || !std::strchr(stops, text_[at_]))) {
      if (text_[at_] == '"') quoted = !quoted;
      ++at_;
    }
    if (at_ >= text_.size()) fail(begin, std::string("no '") + stops + "' follows");
    return text_.substr(begin, at_ - begin);
  }

  void expect(char c) {
    skip_blanks();
    if (at_ >= text_.size() || text_[at_] != c)
      fail(std::min(at_, text_.size() - 1), std::string("expected '") + c + "'");
    ++at_;
  }

  void skip_braces() {
    const size_t begin = at_;
    expect('{');
    bool quoted = false;
    for (int depth = 1; depth > 0; ++at_) {
      if (at_ >= text_.size()) fail(begin, "the braces that open here are not closed");
      const char c = text_[at_];
      if (c == '"') quoted = !quoted;
      if (!quoted) depth += (c == '{') - (c == '}');
    }
  }

  void parse_directive() {
    const size_t begin = at_;
    place_.clear();
    std::string directive = word();
    if (directive == ".section") {
      until("{");
      skip_braces();
      return;
    }
    if (directive == ".pragma") {
      until(";");
      ++at_;
      return;
    }
    bool external = false;
    while (directive == ".visible" || directive == ".extern" || directive == ".weak" ||
           directive == ".common") {
      external |= directive == ".extern";
      directive = word();
    }
    if (directive == ".entry" || directive == ".func") {
      parse_function(directive == ".entry", begin);
    } else if (directive == ".global" || directive == ".const" || directive == ".shared") {
      at_ = begin;
      until(";={");
      if (text_[at_] != ';') until(";");
      for (Variable& variable : parse_variables(begin, at_)) {
        variable.external = external;
        if (!module_.variables.emplace(variable.name, variable).second)
          fail(begin, "a second declaration of " + variable.name);
      }
      ++at_;
    } else {
      fail(begin, "unknown directive");
    }
  }

  uint32_t alignment_of(size_t begin, const std::string& text) {
    uint64_t value = 0;
    if (!parse_count(text, kMostAlignment, value) || !std::has_single_bit(value))
      fail(begin, "an alignment must be a power of two, at most " + std::to_string(kMostAlignment) +
                      "; got '" + text + "'");
    return static_cast<uint32_t>(value);
  }

  // Parses ".visible .global .align 8 .b8 name[4] = {1, 2, 3, 4}, other" in [begin, end).
  std::vector<Variable> parse_variables(size_t begin, size_t end) {
    std::vector<Variable> variables;
    Variable common;
    common.line = line_of(begin);
    int bits = 0, vector = 1;
    uint32_t alignment = 0;
    at_ = begin;
    for (skip_blanks(); text_[at_] == '.'; skip_blanks()) {
      const std::string directive = word();
      if (directive == ".align") {
        alignment = alignment_of(begin, word());
      } else if (directive == ".attribute") {
        until(")");
        ++at_;
      } else if (directive == ".global") {
        common.space = Space::global;
      } else if (directive == ".const") {
        common.space = Space::constant;
      } else if (directive == ".shared") {
        common.space = Space::shared;
      } else if (directive == ".local") {
        common.space = Space::local;
      } else if (directive == ".param") {
        common.space = Space::param;
      } else if (directive == ".v2" || directive == ".v4") {
        vector = directive[2] - '0';
      } else if (directive == ".visible" || directive == ".extern" || directive == ".weak" ||
                 directive == ".common") {
        continue;
      } else if (!(bits = bits_of_type(directive.substr(1)))) {
        fail(begin, "unknown type or directive " + directive);
      }
    }
    if (bits < 8) fail(begin, "a variable needs a type of 8 bits or more");
    common.element_bytes = static_cast<uint32_t>(bits / 8);
    if (at_ > end) fail(begin, "no ';' follows");
    common.alignment = common.element_bytes * static_cast<uint32_t>(vector);
    if (alignment) common.alignment = alignment;
    for (const std::string& declaration : split_list(text_.substr(at_, end - at_))) {
      Variable variable = common;
      const size_t equals = declaration.find('=');
      if (equals != std::string::npos) variable.initial = trim(declaration.substr(equals + 1));
      const std::string declared = trim(declaration.substr(0, equals));
      const size_t bracket = declared.find('[');
      variable.name = trim(declared.substr(0, bracket));
      if (!is_identifier(variable.name)) fail(begin, "a variable without a name");
      const auto bytes = common.element_bytes * static_cast<uint32_t>(vector);
      const std::string extents = bracket == std::string::npos ? "" : declared.substr(bracket);
      if (const std::string rule = give_size(variable, bytes, extents); !rule.empty())
        fail(begin, variable.name + " must have " + rule);
      variables.push_back(variable);
    }
    at_ = end;
    return variables;
  }

  // Parses "(.param .u64 .ptr .global .align 1 name, ...)".
  std::vector<Parameter> parse_parameters(uint64_t most, uint32_t* total) {
    std::vector<Parameter> parameters;
    expect('(');
    const size_t begin = at_;
    const std::string list = until(")");
    ++at_;
    uint32_t offset = 0;
    for (const std::string& item : split_list(list)) {
      Parameter parameter{};
      uint32_t alignment = 0, bytes = 0;
      bool pointer = false;
      std::string declared;
      size_t at = 0;
      const auto next = [&] {
        while (at < item.size() && is_blank(item[at])) ++at;
        const size_t from = at;
        while (at < item.size() && !is_blank(item[at]) && (at == from || item[at] != '.')) ++at;
        return item.substr(from, at - from);
      };
      for (std::string part = next(); !part.empty(); part = next()) {
        if (part == ".align") {
          const uint32_t value = alignment_of(begin, next());
          if (!pointer) alignment = value;  // after .ptr, .align describes the pointed-to memory
        } else if (part == ".ptr") {
          pointer = true;
        } else if (part == ".param" || (pointer && (part == ".global" || part == ".shared" ||
                                                    part == ".local" || part == ".const"))) {
          continue;
        } else if (part[0] == '.') {
          parameter.type = part.substr(1);
          bytes = static_cast<uint32_t>(bits_of_type(parameter.type) / 8);
          if (!bytes) fail(begin, "unknown type or directive " + part + " of a parameter");
        } else {
          declared += part;
        }
      }
      const size_t bracket = declared.find('[');
      parameter.name = declared.substr(0, bracket);
      parameter.alignment = alignment ? alignment : bytes;
      parameter.bytes = bytes;
      if (!is_identifier(parameter.name) || !bytes) fail(begin, "a parameter without name or type");
      if (bracket != std::string::npos) {
        const std::string extent = declared.substr(bracket);
        uint64_t count = 0;
        if (extent.find_first_not_of("0123456789", 1) != extent.size() - 1 ||
            extent.back() != ']' ||
            !parse_count(extent.substr(1, extent.size() - 2), most / bytes, count) || !count)
          fail(begin, "parameter " + parameter.name +
                          ": the number of elements must be from 1 to " +
                          std::to_string(most / bytes) + "; got '" + extent + "'");
        parameter.count = static_cast<uint32_t>(count);
        parameter.bytes *= parameter.count;
      }
      offset = round_up(offset, parameter.alignment);
      parameter.offset = offset;
      offset += parameter.bytes;
      if (offset > most)
        fail(begin, "parameters must have at most " + std::to_string(most) + " bytes; got " +
                        std::to_string(offset) + " up to " + parameter.name);
      parameters.push_back(parameter);
    }
    if (total) *total = offset;
    return parameters;
  }

  void parse_function(bool entry, size_t begin) {
    auto function = std::make_unique<Function>();
    function->line = line_of(begin);
    skip_blanks();
    const uint64_t most = entry ? kMostParameters : limit_of(Space::local);
    if (text_[at_] == '(') function->results = parse_parameters(most, nullptr);
    function->name = word();
    if (!is_identifier(function->name)) fail(begin, "a function without a name");
    place_ = function->name;
    skip_blanks();
    if (text_[at_] == '(')
      function->parameters = parse_parameters(most, &function->parameter_bytes);
    parse_attributes(*function);
    if (text_[at_] == '{') {
      function->body = at_;
      skip_braces();
    } else {
      ++at_;
    }
    auto& known = module_.functions[function->name];
    if (known && known->body) {
      if (function->body) fail(begin, "a second definition of " + function->name);
      return;  // a declaration after the definition
    }
    if (entry) {
      auto kernel = std::make_unique<Kernel>();
      kernel->name = function->name;
      kernel->title = demangled(function->name);
      kernel->module = &module_;
      kernel->parameters = function->parameters;
      kernel->parameter_bytes = function->parameter_bytes;
      kernel->max_threads = function->max_threads;
      std::copy_n(function->required, 3, kernel->required);
      std::copy_n(function->cluster, 3, kernel->cluster);
      kernel->min_blocks = function->min_blocks;
      module_.kernels[function->name] = std::move(kernel);
    }
    known = std::move(function);
  }

  // Parses up to "{" or ";", which is not consumed.
  void parse_attributes(Function& function) {
    for (skip_blanks(); text_[at_] != '{' && text_[at_] != ';'; skip_blanks()) {
      const size_t begin = at_;
      const std::string attribute = word();
      const auto numbers = [&](uint32_t* values) {
        int count = 0;
        do {
          uint64_t value = 0;
          if (count == 3 || !parse_count(word(), UINT32_MAX, value))
            fail(begin, "expected numbers");
          values[count++] = static_cast<uint32_t>(value);
          skip_blanks();
        } while (text_[at_] == ',' && ++at_);
      };
      uint32_t values[3] = {1, 1, 1};
      if (attribute == ".maxntid" || attribute == ".reqntid") {
        numbers(values);
        uint32_t threads = 0;
        if (__builtin_mul_overflow(values[0], values[1], &threads) ||
            __builtin_mul_overflow(threads, values[2], &threads))
          fail(begin, "the number of threads must have 32 bits");
        function.max_threads = threads;
        if (attribute == ".reqntid") std::copy_n(values, 3, function.required);
      } else if (attribute == ".reqnctapercluster") {
        numbers(values);
        std::copy_n(values, 3, function.cluster);
      } else if (attribute == ".minnctapersm") {
        numbers(values);
        function.min_blocks = std::max(values[0], 1u);
      } else if (attribute == ".maxnreg" || attribute == ".maxclusterrank") {
        numbers(values);
      } else if (attribute == ".pragma") {
        until(";");
        ++at_;
      } else if (attribute == ".attribute") {
        until(")");
        ++at_;
      } else if (attribute != ".noreturn" && attribute != ".explicitcluster") {
        fail(begin, "unknown attribute of a function");
      }
      if (at_ >= text_.size()) fail(begin, "the function has no body");
    }
  }

  void parse_declaration(Scope& scope, size_t begin, size_t end) {
    at_ = begin;
    const std::string directive = word();
    if (directive == ".reg") {
      const std::string type = word();
      const int bits = bits_of_type(type.empty() ? type : type.substr(1));
      if (!bits) fail(begin, "unknown register type " + type);
      for (const std::string& name : split_list(text_.substr(at_, end - at_))) {
        const size_t angle = name.find('<');
        if (angle == std::string::npos) {
          scope.registers[name] = bits;
          continue;
        }
        const std::string number = name.substr(angle + 1, name.size() - angle - 2);
        uint64_t count = 0;
        if (name.back() != '>' || !parse_count(number, kMostRegisters, count))
          fail(begin, "the number of registers must be at most " + std::to_string(kMostRegisters) +
                          "; got '" + name + "'");
        const std::string stem = name.substr(0, angle);
        for (uint64_t i = 0; i < count; ++i) scope.registers[stem + std::to_string(i)] = bits;
      }
    } else if (directive == ".shared" || directive == ".local" || directive == ".param" ||
               directive == ".extern") {
      for (Variable& variable : parse_variables(begin, end)) {
        variable.external = directive == ".extern";
        scope.variables[variable.name] = variable;
      }
    } else if (directive != ".pragma") {
      fail(begin, "unknown directive");
    }
    at_ = end + 1;
  }

  Statement make_statement(std::string text, size_t begin, int scope) {
    Statement statement;
    statement.line = line_of(begin);
    statement.scope = scope;
    if (text[0] == '@') {
      const size_t blank = text.find(' ');
      if (blank == std::string::npos) fail(begin, "a guard without an instruction");
      statement.guard_negated = text[1] == '!';
      statement.guard =
          text.substr(1 + statement.guard_negated, blank - 1 - statement.guard_negated);
      if (statement.guard.empty()) fail(begin, "a guard without a register");
      text = trim(text.substr(blank));
    }
    statement.text = text;
    const size_t end = std::min(text.find_first_of(" [{("), text.size());
    for (size_t from = 0; from <= end;) {
      const size_t dot = std::min(text.find('.', from), end);
      statement.opcode.push_back(text.substr(from, dot - from));
      from = dot + 1;
    }
    statement.operands = split_list(text.substr(end));
    return statement;
  }

  Module& module_;
  const std::string& text_;
  size_t at_ = 0;
  std::vector<size_t> newlines_;
  std::string place_;  // kernel, for messages
};

void Parser::parse_body(Function& function) {
  place_ = function.name;
  at_ = function.body;
  function.scopes.push_back({});
  int scope = 0;
  const auto label_here = [&]() -> std::string {
    size_t end = at_;
    while (end < text_.size() && is_name(text_[end])) ++end;
    size_t colon = end;
    while (colon < text_.size() && is_blank(text_[colon])) ++colon;
    if (end == at_ || text_[colon] != ':' || text_[colon + 1] == ':') return {};
    const std::string label = text_.substr(at_, end - at_);
    at_ = colon + 1;
    return label;
  };
  expect('{');
  while (scope >= 0) {
    skip_blanks();
    const size_t begin = at_;
    if (text_[at_] == '{') {
      ++at_;
      function.scopes.push_back({});
      function.scopes.back().parent = scope;
      scope = static_cast<int>(function.scopes.size()) - 1;
      continue;
    }
    if (text_[at_] == '}') {
      ++at_;
      scope = function.scopes[scope].parent;
      continue;
    }
    if (text_[at_] == ';') {
      ++at_;
      continue;
    }
    Scope& here = function.scopes[scope];
    if (const std::string label = label_here(); !label.empty()) {
      skip_blanks();
      const size_t after = at_;
      if (const std::string directive = word(); directive == ".branchtargets") {
        here.tables[label] = split_list(until(";"));
        ++at_;
        continue;
      } else if (directive == ".callprototype" || directive == ".calltargets") {
        until(";");
        ++at_;
        continue;
      }
      at_ = after;
      if (!here.labels.emplace(label, function.statements.size()).second)
        fail(begin, "a second label " + label);
      continue;
    }
    const std::string text = until(";");
    ++at_;
    if (std::count(text.begin(), text.end(), '{') < std::count(text.begin(), text.end(), '}'))
      fail(begin, "no ';' follows");
    if (text[0] == '.')
      parse_declaration(here, begin, at_ - 1);
    else
      function.statements.push_back(make_statement(collapse_blanks(text), begin, scope));
  }
}

}  // namespace

void parse_declarations(Module& module) { Parser(module).run(); }

void parse_body(Module& module, Function& function) { Parser(module).parse_body(function); }

}  // namespace ptxvm
