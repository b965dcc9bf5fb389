// Kernels of an operator for GPUs, as rows of a table. A launch runs the first row that takes the
// call (cuda/choose.h); core/rules.cpp answers which rows do, on any chip. Host code, free of torch
// and of CUDA.
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "core/dtype.h"
#include "core/knobs.h"

namespace tokenmill {

// Result of a launch that the driver has no tensor map for: the next row takes the call.
inline constexpr char kNotMapped[] = "the driver has no map of the tensor";

// Chips that run a kernel: compute capabilities first .. last, as 10 major + minor.
struct Chips {
  const char* arch;  // name of their machine code in a build: "90a"
  int32_t first, last;

  constexpr bool contain(int32_t capability) const {
    return capability >= first && capability <= last;
  }
};

constexpr Chips kFromSm80{"80", 80, 999};

inline const char* name_of(DType t) {
  return t == DType::float32    ? "float32"
         : t == DType::float16  ? "float16"
         : t == DType::bfloat16 ? "bfloat16"
                                : "float8_e4m3fn";
}

// Arguments of a call by name, as text for reasons.
class Described {
 public:
  virtual ~Described() = default;
  virtual std::string value(std::string_view argument) const = 0;
  virtual std::string shape(std::string_view argument) const = 0;
  virtual std::string strides(std::string_view argument) const = 0;
};

// Checks the rules of a row. A launch stops at the first broken rule, and formats nothing:
//   r.check(...) && r.check(...)
// With a description of the call, all broken rules are listed.
class Rules {
 public:
  explicit Rules(const Described* call = nullptr) : call_(call) {}

  // Returns whether to go on. rule: text, or a function that returns it. value: a number, text, a
  // dtype, or a function that formats the value from the description; by default the argument's.
  template <typename Rule, typename Value>
  bool check(bool holds, std::string_view argument, const Rule& rule, const Value& value) {
    if (holds) [[likely]]
      return true;
    broken_ = true;
    if (!call_) return false;
    reasons_.push_back(std::string(argument) + ": " + text(rule) + "; got " + text(value));
    return true;
  }
  template <typename Rule>
  bool check(bool holds, std::string_view argument, const Rule& rule) {
    return check(holds, argument, rule,
                 [&](const Described& call) { return call.value(argument); });
  }

  // Value of a knob that a rule depends on.
  int64_t value_of(Knob k) {
    if (call_) read_.push_back(k);
    return knob(k);
  }
  // Value of an argument of a described call; empty for another call.
  std::string described(std::string_view argument) const {
    return call_ ? call_->value(argument) : "";
  }

  // The row is for other calls than this one, whatever rules it breaks.
  void set_other_calls() { other_calls_ = true; }
  // Another kernel that the row runs for a part of the call.
  void set_rest(std::string_view name) { rest_ = name; }

  bool broken() const { return broken_; }
  bool other_calls() const { return other_calls_; }
  std::string_view rest() const { return rest_; }
  const std::vector<std::string>& reasons() const { return reasons_; }
  const std::vector<Knob>& read() const { return read_; }

 private:
  template <typename Part>
  std::string text(const Part& part) const {
    if constexpr (std::is_same_v<Part, DType>)
      return name_of(part);
    else if constexpr (std::is_integral_v<Part>)
      return std::to_string(part);
    else if constexpr (std::is_invocable_v<Part>)
      return part();
    else if constexpr (std::is_invocable_v<Part, const Described&>)
      return part(*call_);
    else
      return std::string(part);
  }

  const Described* call_;
  bool broken_ = false, other_calls_ = false;
  std::string_view rest_;
  std::vector<std::string> reasons_;
  std::vector<Knob> read_;
};

template <typename Call>
struct Kernel {
  const char* name;  // "csrc/dense/attention/kernel_sm90"
  Chips chips = kFromSm80;
  void (*why_not)(const Call&, Rules&) = nullptr;              // null: takes every call
  const char* (*launch)(const Call&, void* stream) = nullptr;  // null: not in this build
  int64_t (*workspace)(const Call&) = nullptr;                 // bytes; null: none
  std::optional<Knob> on{};                                    // 0 switches the row off
  std::span<const Knob> cuts{};                                // partition its work
};

// In a row: its launch, where the build has CUDA.
#if defined(TOKENMILL_WITH_CUDA)
#define TOKENMILL_IF_CUDA(launch) launch
#else
#define TOKENMILL_IF_CUDA(launch) nullptr
#endif

template <typename Call>
bool takes(const Kernel<Call>& row, const Call& call) {
  Rules rules;
  if (row.why_not) row.why_not(call, rules);
  return !rules.broken();
}

// A question about a call on a chip, which the launch answers instead of running.
class Inquiry {
 public:
  explicit Inquiry(const Described& call) : call_(call) {}

  // Adds a line for each row: name, what else runs, arch, first and last chip, whether the build
  // has it, whether it is for other calls, switch, knobs that cut it, knobs that rules read,
  // reasons. Fields end with \x1f, items of a list with \x1e.
  template <typename Call>
  void answer(std::span<const Kernel<Call>> table, const Call& call) {
    for (const Kernel<Call>& row : table) {
      Rules rules(&call_);
      if (row.why_not) row.why_not(call, rules);
      add(row.name).add(rules.rest()).add(row.chips.arch);
      add(std::to_string(row.chips.first)).add(std::to_string(row.chips.last));
      add(row.launch ? "1" : "0").add(rules.other_calls() ? "1" : "0");
      add(row.on ? knob_name(*row.on) : "");
      for (Knob k : row.cuts) add(knob_name(k), '\x1e');
      add("");
      for (Knob k : rules.read()) add(knob_name(k), '\x1e');
      add("");
      for (const std::string& reason : rules.reasons()) add(reason, '\x1e');
      add("");
      text_ += '\n';
    }
  }
  const std::string& text() const { return text_; }

 private:
  Inquiry& add(std::string_view field, char end = '\x1f') {
    text_.append(field) += end;
    return *this;
  }

  const Described& call_;
  std::string text_;
};

}  // namespace tokenmill
