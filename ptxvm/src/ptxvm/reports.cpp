#include "ptxvm/reports.h"

#include <algorithm>
#include <cstdio>
#include <vector>

#include "ptxvm/log.h"

namespace ptxvm {
namespace {

struct Entry {
  std::string kernel;
  uint32_t line;
  std::string rule, report;
  uint64_t count;

  std::string members() const {  // of an object of JSON
    return "\"kernel\": " + quoted(kernel) + ", \"line\": " + std::to_string(line) +
           ", \"rule\": " + quoted(rule) + ", \"report\": " + quoted(report);
  }
};

struct Entries {
  std::vector<Entry> list;
  ~Entries() {
    if (options.quiet) return;
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
  if (!options.quiet) std::fprintf(stderr, "ptxvm: %s\n", list.back().report.c_str());
  log_event("{\"broken\": {" + list.back().members() + "}}");
}

void note(Warp& warp, const Instruction& instruction, int lane, const std::string& rule,
          const std::string& what) {
  if (options.go_on) broke_rule(warp, instruction, lane, "note: " + rule, what);
}

std::string take_reports() {
  std::string json = "[";
  for (const Entry& entry : entries.list)
    json += (json.size() > 1 ? ", {" : "{") + entry.members() +
            ", \"count\": " + std::to_string(entry.count) + "}";
  entries.list.clear();
  return json + "]";
}

}  // namespace ptxvm
