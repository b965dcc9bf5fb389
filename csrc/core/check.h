// Errors that name operator, argument, rule and value. python/tokenmill/_check.py writes the same
// text for functions composed of operators.
#pragma once
#include <cctype>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/array.h"

namespace tokenmill {

inline std::string show(std::string_view s) { return "'" + std::string(s) + "'"; }
inline std::string show(bool b) { return b ? "True" : "False"; }
inline std::string show(int64_t i) { return std::to_string(i); }
inline std::string show(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", x);
  return text;
}
inline std::string show(std::span<const int64_t> shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + show(shape[i]);
  return text + "]";
}
inline std::string show(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default: {  // Float8_e4m3fn, UInt16: as in Python but for the capitals
      std::string name = torch::headeronly::toString(t);
      for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
      return name;
    }
  }
}

inline std::string show_device(const View& v) {
  if (v.device == kMeta) return "meta";
  return v.on_gpu ? "cuda:" + std::to_string(v.device) : "cpu";
}

[[noreturn]] inline void fail(std::string_view op, std::string_view argument, std::string_view rule,
                              const std::string& value) {
  std::string text = "tokenmill.";
  text.append(op).append(": ").append(argument).append(": ").append(rule);
  throw std::runtime_error(text + "; got " + value);
}

// A rule of several parts, concatenated only if it is broken, since valid calls must not pay for
// it. Text is inserted as it is, other parts as formatted by `show`.
template <typename... Parts>
class Rule {
 public:
  explicit Rule(const Parts&... parts) : parts_(parts...) {}
  std::string text() const {
    return std::apply([](const auto&... parts) { return (std::string() + ... + part(parts)); },
                      parts_);
  }

 private:
  template <typename Part>
  static std::string part(const Part& p) {
    if constexpr (std::is_convertible_v<const Part&, std::string_view>)
      return std::string(std::string_view(p));
    else
      return show(p);
  }
  std::tuple<const Parts&...> parts_;
};

template <typename Value>
void check(bool ok, std::string_view op, std::string_view argument, std::string_view rule,
           const Value& value) {
  if (!ok) [[unlikely]]
    fail(op, argument, rule, show(value));
}

template <typename Value, typename... Parts>
void check(bool ok, std::string_view op, std::string_view argument, const Rule<Parts...>& rule,
           const Value& value) {
  if (!ok) [[unlikely]]
    fail(op, argument, rule.text(), show(value));
}

// A dtype that kernels take.
inline void check_dtype(std::string_view op, std::string_view argument, const View& t) {
  check(has_kernel_dtype(t), op, argument, "must be float16, bfloat16 or float32", t.dtype);
}

// float32, or float64 in a call on float64.
inline void check_wide(std::string_view op, std::string_view argument, const View& t,
                       const View& first) {
  const ScalarType wide = wide_dtype(first);
  check(t.dtype == wide, op, argument, Rule("must be ", wide), t.dtype);
}

// Looks up the value of a name; the error lists all names.
template <typename Value, size_t kCount>
Value choose(std::string_view op, std::string_view argument,
             const std::pair<std::string_view, Value> (&all)[kCount], std::string_view name) {
  for (const auto& [known, value] : all)
    if (name == known) return value;
  std::string rule = "must be ";
  for (size_t i = 0; i < kCount; ++i)
    rule += (i == 0 ? "" : i + 1 < kCount ? ", " : " or ") + show(all[i].first);
  fail(op, argument, rule, show(name));
}

}  // namespace tokenmill
