// Lexical level of PTX: comments, lists, literals, types.
#include <cxxabi.h>

#include <algorithm>
#include <bit>
#include <cctype>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "ptxvm/decode.h"
#include "ptxvm/parse.h"

namespace ptxvm {

std::string trim(const std::string& text) {
  const char* blanks = " \t\r\n";
  const size_t first = text.find_first_not_of(blanks);
  if (first == std::string::npos) return {};
  return text.substr(first, text.find_last_not_of(blanks) - first + 1);
}

std::vector<std::string> split_list(const std::string& text) {
  std::vector<std::string> parts;
  int depth = 0;
  size_t begin = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '(' || c == '[' || c == '{') ++depth;
    if (c == ')' || c == ']' || c == '}') --depth;
    if (c != ',' || depth != 0) continue;
    parts.push_back(trim(text.substr(begin, i - begin)));
    begin = i + 1;
  }
  const std::string last = trim(text.substr(begin));
  if (!last.empty() || !parts.empty()) parts.push_back(last);
  return parts;
}

namespace {

bool starts_line_directive(const std::string& text, size_t at) {
  for (const char* word : {".loc", ".file", ".version", ".target", ".address_size"}) {
    const size_t length = std::strlen(word);
    if (text.compare(at, length, word) == 0 && at + length < text.size() &&
        std::isspace(static_cast<unsigned char>(text[at + length])))
      return true;
  }
  return false;
}

}  // namespace

std::string blank_comments(std::string text) {
  bool line_start = true;
  bool quoted = false;
  const auto blank_to = [&](size_t from, size_t to) {
    for (size_t i = from; i < to && i < text.size(); ++i)
      if (text[i] != '\n') text[i] = ' ';
  };
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '"') quoted = !quoted;
    if (quoted) continue;
    size_t end = i;
    if (c == '/' && text.compare(i, 2, "//") == 0)
      end = std::min(text.find('\n', i), text.size());
    else if (c == '/' && text.compare(i, 2, "/*") == 0)
      end = std::min(text.find("*/", i + 2), text.size() - 2) + 2;
    else if (c == '.' && line_start && starts_line_directive(text, i))
      end = std::min(text.find('\n', i), text.size());
    if (end > i) {
      blank_to(i, end);
      i = end - 1;
      continue;
    }
    if (c == '\n')
      line_start = true;
    else if (!std::isspace(static_cast<unsigned char>(c)))
      line_start = false;
  }
  return text;
}

void read_source_lines(Module& module, const std::string& ptx) {
  uint32_t line = 1;
  for (size_t at = 0; at < ptx.size(); ++line) {
    const size_t end = std::min(ptx.find('\n', at), ptx.size());
    const size_t first = ptx.find_first_not_of(" \t", at);
    uint32_t file = 0, source = 0;
    if (first < end && ptx.compare(first, 4, ".loc") == 0) {
      if (std::sscanf(&ptx[first], ".loc %u %u", &file, &source) == 2)
        module.source_lines.push_back({line, file, source});
    } else if (first < end && ptx.compare(first, 5, ".file") == 0) {
      const size_t open = ptx.find('"', first), close = ptx.find('"', open + 1);
      if (close < end && std::sscanf(&ptx[first], ".file %u", &file) == 1)
        module.source_files[file] = ptx.substr(open + 1, close - open - 1);
    }
    at = end + 1;
  }
}

namespace {

// Of a mangled name the scopes and the name itself: "_ZN7cutlass13device_kernelI..." is
// "cutlass::device_kernel<...>". Any other name as it is.
std::string outer_names(const std::string& mangled) {
  std::string names;
  size_t at = mangled.starts_with("_ZN") ? 3 : 2;
  while (at < mangled.size() && std::isdigit(static_cast<unsigned char>(mangled[at]))) {
    const char* const rest = mangled.c_str() + at;
    char* name = nullptr;
    const size_t length = std::strtoull(rest, &name, 10);
    const size_t end = at + static_cast<size_t>(name - rest) + length;
    if (length > mangled.size() || end > mangled.size()) return mangled;
    names += (names.empty() ? "" : "::") + std::string(name, length);
    at = end;
  }
  if (names.empty()) return mangled;
  return names + (at < mangled.size() && mangled[at] == 'I' ? "<...>" : "");
}

}  // namespace

std::string demangled(const std::string& name) {
  if (!name.starts_with("_Z")) return name;
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(
      abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status), std::free);
  // libstdc++ cannot read some names of nvcc, such as those of CUTLASS.
  return text ? text.get() : outer_names(name);
}

std::pair<std::string, uint32_t> source_position(const Module& module, uint32_t ptx_line) {
  const auto& lines = module.source_lines;
  auto next = std::upper_bound(lines.begin(), lines.end(), ptx_line,
                               [](uint32_t l, const SourceLine& s) { return l < s.ptx_line; });
  if (next == lines.begin()) return {};
  const auto file = module.source_files.find((--next)->file);
  if (file == module.source_files.end()) return {};
  return {file->second, next->line};
}

std::string source_of(const Module& module, uint32_t ptx_line) {
  const auto [file, line] = source_position(module, ptx_line);
  if (!line) return {};
  // The last two folders distinguish files of the same name.
  size_t from = file.size();
  for (int parts = 0; parts < 3 && from != std::string::npos && from > 0; ++parts)
    from = file.rfind('/', from - 1);
  const size_t begin = from == std::string::npos ? 0 : from + 1;
  return " (" + file.substr(begin) + ":" + std::to_string(line) + ")";
}

namespace {

size_t hexadecimals(const char* text) { return std::strspn(text, "0123456789abcdefABCDEF"); }

}  // namespace

bool parse_literal(const std::string& text, int bits, uint64_t& value) {
  if (text.empty()) return false;
  if (text == "WARP_SZ") {
    value = kLanes;
    return true;
  }
  const bool negative = text[0] == '-';
  const char* digits = text.c_str() + (negative || text[0] == '+');
  if (!std::isdigit(static_cast<unsigned char>(*digits))) return false;
  char* end = nullptr;
  const char kind = digits[1];
  const auto store_real = [&](double real) {
    if (negative) real = -real;
    const float narrow = static_cast<float>(real);
    if (bits == 32)
      value = std::bit_cast<uint32_t>(narrow);
    else
      value = std::bit_cast<uint64_t>(real);
  };
  if (*digits == '0' && (kind == 'f' || kind == 'F') && !std::strchr(digits, '.')) {
    if (hexadecimals(digits + 2) != 8 || digits[10]) return false;
    const auto raw = static_cast<uint32_t>(std::strtoull(digits + 2, nullptr, 16));
    if (bits == 64)
      store_real(std::bit_cast<float>(raw));
    else
      value = raw ^ (negative ? 0x80000000u : 0u);
    return true;
  }
  if (*digits == '0' && (kind == 'd' || kind == 'D') && !std::strchr(digits, '.')) {
    if (hexadecimals(digits + 2) != 16 || digits[18]) return false;
    const uint64_t raw = std::strtoull(digits + 2, nullptr, 16);
    store_real(std::bit_cast<double>(raw));
    return true;
  }
  const bool hexadecimal = *digits == '0' && (kind == 'x' || kind == 'X');
  if (!hexadecimal && std::strpbrk(digits, ".eE")) {
    store_real(std::strtod(digits, &end));
    return *end == 0;
  }
  const bool binary = *digits == '0' && (kind == 'b' || kind == 'B');
  if (binary && digits[2] != '0' && digits[2] != '1') return false;
  errno = 0;
  value = std::strtoull(digits + 2 * binary, &end, binary ? 2 : 0);
  if (errno) return false;  // more than 64 bits
  if (*end == 'U') ++end;
  if (*end) return false;
  if (negative) value = ~value + 1;
  return true;
}

bool parse_count(const std::string& text, uint64_t most, uint64_t& value) {
  const bool hexadecimal = text.size() > 1 && (text[1] == 'x' || text[1] == 'X');
  const bool whole = hexadecimal || text.find_first_of(".eEfFdD") == std::string::npos;
  return whole && !text.empty() && std::isdigit(static_cast<unsigned char>(text[0])) &&
         parse_literal(text, 64, value) && value <= most;
}

int bits_of_type(const std::string& suffix) {
  if (suffix == "pred") return 1;
  if (suffix == "f16x2" || suffix == "bf16x2" || suffix == "tf32" || suffix == "b16x2" ||
      suffix == "u16x2" || suffix == "s16x2")
    return 32;
  if (suffix == "e4m3x2" || suffix == "e5m2x2" || suffix == "bf16") return 16;
  if (suffix == "e4m3" || suffix == "e5m2") return 8;
  if (suffix.size() < 2 || !std::strchr("busf", suffix[0])) return 0;
  int bits = 0;
  for (size_t i = 1; i < suffix.size(); ++i) {
    if (!std::isdigit(static_cast<unsigned char>(suffix[i]))) return 0;
    bits = std::min(bits * 10 + (suffix[i] - '0'), 1000);
  }
  for (const int known : {1, 4, 8, 16, 32, 64, 128})
    if (bits == known) return bits;
  return 0;
}

}  // namespace ptxvm
