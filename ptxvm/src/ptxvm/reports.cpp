#include "ptxvm/reports.h"

#include <algorithm>
#include <cstdio>
#include <vector>

#include "ptxvm/counters.h"
#include "ptxvm/log.h"
#include "ptxvm/parse.h"

namespace ptxvm {
namespace {

constexpr size_t kShownElements = 4;  // of a vector of registers

struct Findings {
  std::vector<Finding> list;
  ~Findings() {
    if (options.quiet) return;
    for (const Finding& finding : list)
      std::fprintf(stderr, "ptxvm: %llu x %s\n", static_cast<unsigned long long>(finding.count),
                   finding.report.c_str());
  }
} findings;

// True for an instruction that may order accesses before it and after it, or where lanes part.
bool divides(const Instruction& in) {
  if (in.control != Control::none && in.control != Control::converge) return true;
  const std::string_view opcode = opcode_of(in);
  for (const char* start : {"bar", "fence", "membar", "mbarrier.", "cp.async.wait",
                            "cp.async.bulk.wait", "wgmma.wait", "griddepcontrol"})
    if (opcode.starts_with(start)) return true;
  return false;
}

uint32_t part_of(const Kernel& kernel, const Instruction& in) {
  const auto& code = kernel.code;
  const auto index = static_cast<size_t>(&in - code.data());
  // The last target of a branch at or before the instruction.
  size_t first = 0;
  for (const Instruction& each : code)
    if (each.control == Control::branch && each.target <= index)
      first = std::max<size_t>(first, each.target);
  for (const auto& table : kernel.tables)
    for (const uint32_t target : table)
      if (target <= index) first = std::max<size_t>(first, target);
  size_t at = index;
  while (at > first && !divides(code[at - 1])) --at;
  return code[at].line;
}

Position position_of(const Kernel& kernel, const Instruction* in) {
  if (!in) return {};
  const auto [file, line] = source_position(*kernel.module, in->line);
  return {in->line, part_of(kernel, *in), file, line};
}

}  // namespace

std::string Position::members() const {
  return "\"line\": " + std::to_string(line) + ", \"part\": " + std::to_string(part) +
         ", \"file\": " + quoted(file) + ", \"source_line\": " + std::to_string(source_line);
}

std::string Finding::json() const {
  return "{\"kernel\": " + quoted(kernel) + ", \"name\": " + quoted(name) + ", " + at.members() +
         ", \"rule\": " + quoted(rule) + ", \"report\": " + quoted(report) +
         ", \"cause\": " + (cause.line ? "{" + cause.members() + "}" : "null") +
         ", \"count\": " + std::to_string(count) + "}";
}

std::string place_of(const Block& block) {
  return "block (" + std::to_string(block.x) + ", " + std::to_string(block.y) + ", " +
         std::to_string(block.z) + ")";
}

std::string at_line(const Warp& warp, const Instruction& in) {
  return " line " + std::to_string(in.line) + source_of(*warp.block->kernel->module, in.line) +
         ": " + std::string(opcode_of(in));
}

std::string in_hex(Mask mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

std::string short_text(const Instruction& in) {
  std::string text = in.text;
  for (size_t open = text.find('{'); open != std::string::npos; open = text.find('{', open + 1)) {
    const size_t close = text.find('}', open);
    if (close == std::string::npos) break;
    const auto elements = split_list(text.substr(open + 1, close - open - 1));
    if (elements.size() <= kShownElements) continue;
    text.replace(open, close - open + 1,
                 "{" + elements.front() + ", ..., " + elements.back() + "}");
  }
  return text;
}

std::string shared_symbol(const Kernel& kernel, uint32_t offset) {
  for (const SharedVariable& variable : kernel.shared_variables) {
    const bool dynamic = variable.bytes == 0;
    if (offset < variable.offset || (!dynamic && offset >= variable.offset + variable.bytes))
      continue;
    std::string name = demangled(variable.name);
    if (name.starts_with(kernel.title + "::")) name.erase(0, kernel.title.size() + 2);
    char from[16] = "";
    if (offset > variable.offset)
      std::snprintf(from, sizeof from, "+0x%x", offset - variable.offset);
    return name + from;
  }
  return {};
}

Finding finding_of(const Kernel& kernel, const Instruction* at, const std::string& rule,
                   const std::string& report) {
  return {kernel.name, kernel.title, rule, report, position_of(kernel, at), {}};
}

Finding finding_at(const Warp& warp, const Instruction& in, int lane, const std::string& rule,
                   const std::string& what) {
  const Kernel& kernel = *warp.block->kernel;
  return finding_of(
      kernel, &in, rule,
      kernel.title + ", line " + std::to_string(in.line) + source_of(*kernel.module, in.line) +
          ": " + short_text(in) + ": " + what + " (" + place_of(*warp.block) + ", thread " +
          std::to_string(warp.index * kLanes + static_cast<uint32_t>(lane)) + ", warp " +
          std::to_string(warp.index) + ", lane " + std::to_string(lane) + ")");
}

void fault(Warp& warp, const Instruction& instruction, int lane, const std::string& what) {
  throw KernelFault(finding_at(warp, instruction, lane, "fault", what));
}

void broke_rule(Warp& warp, const Instruction& instruction, int lane, const std::string& rule,
                const std::string& what, const Instruction* cause) {
  const Kernel& kernel = *warp.block->kernel;
  const uint32_t from = cause ? cause->line : 0;
  const auto known =
      std::find_if(findings.list.begin(), findings.list.end(), [&](const Finding& finding) {
        return finding.at.line == instruction.line && finding.cause.line == from &&
               finding.rule == rule && finding.kernel == kernel.name;
      });
  if (options.go_on && known != findings.list.end()) {
    ++known->count;
    return;
  }
  Finding finding = finding_at(warp, instruction, lane, rule, what);
  finding.cause = position_of(kernel, cause);
  if (!options.go_on) throw KernelFault(finding);
  if (!options.quiet) std::fprintf(stderr, "ptxvm: %s\n", finding.report.c_str());
  log_event("{\"broken\": " + finding.json() + "}");
  findings.list.push_back(std::move(finding));
}

void note(Warp& warp, const Instruction& instruction, int lane, const std::string& rule,
          const std::string& what) {
  if (options.go_on) broke_rule(warp, instruction, lane, "note: " + rule, what);
}

std::string take_reports() {
  std::string json = "[";
  for (const Finding& finding : findings.list)
    json += (json.size() > 1 ? ", " : "") + finding.json();
  findings.list.clear();
  return json + "]";
}

}  // namespace ptxvm
