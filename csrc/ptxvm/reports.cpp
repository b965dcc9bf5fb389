#include "ptxvm/reports.h"

#include <algorithm>
#include <cstdio>
#include <vector>

namespace ptxvm {
namespace {

struct Entry {
  std::string kernel;
  uint32_t line;
  std::string rule, report;
  uint64_t count;
};

struct Entries {
  std::vector<Entry> list;
  ~Entries() {
    for (const Entry& entry : list)
      std::fprintf(stderr, "ptxvm: %llu x %s\n", static_cast<unsigned long long>(entry.count),
                   entry.report.c_str());
  }
} entries;

}  // namespace

void broke_rule(Warp& warp, const Instruction& instruction, int lane, const std::string& rule,
                const std::string& what) {
  if (!options.go_on) fault(warp, instruction, lane, what);
  const std::string& kernel = warp.block->kernel->name;
  auto& list = entries.list;
  const auto known = std::find_if(list.begin(), list.end(), [&](const Entry& entry) {
    return entry.kernel == kernel && entry.line == instruction.line && entry.rule == rule;
  });
  if (known != list.end()) {
    ++known->count;
    return;
  }
  list.push_back({kernel, instruction.line, rule, report_of(warp, instruction, lane, what), 1});
  std::fprintf(stderr, "ptxvm: %s\n", list.back().report.c_str());
}

std::string take_reports() {
  std::string text;
  for (const Entry& entry : entries.list)
    text += std::to_string(entry.count) + "\t" + entry.report + "\n";
  entries.list.clear();
  return text;
}

}  // namespace ptxvm
