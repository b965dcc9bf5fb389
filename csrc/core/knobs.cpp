#include "core/knobs.h"

#include <array>
#include <atomic>

#include "core/check.h"
#include "core/stable.h"

namespace tokenmill {
namespace {

struct Entry {
  const char* name;
  int64_t standard, minimum, maximum;
};

constexpr Entry kEntries[] = {
#define TOKENMILL_KNOB(knob, ...) {__VA_ARGS__},
    TOKENMILL_KNOBS(TOKENMILL_KNOB)
#undef TOKENMILL_KNOB
};
constexpr int kCount = static_cast<int>(Knob::count);

struct Values {
  std::array<std::atomic<int64_t>, kCount> of;
  Values() {
    for (int i = 0; i < kCount; ++i) of[i] = kEntries[i].standard;
  }
};

Values& values() {
  static Values all;
  return all;
}

// Returns the value of a knob; then sets it, if `set` is given.
int64_t knob_named(std::string name, std::optional<int64_t> set) {
  int i = 0;
  while (i < kCount && name != kEntries[i].name) ++i;
  check(i < kCount, "knob", "name", "must be the name of a knob", name);
  const Entry& entry = kEntries[i];
  const int64_t before = values().of[i].load(std::memory_order_relaxed);
  if (set) {
    check(*set >= entry.minimum && *set <= entry.maximum, "knob", "set",
          Rule("must be ", entry.minimum, " to ", entry.maximum), *set);
    values().of[i].store(*set, std::memory_order_relaxed);
  }
  return before;
}

}  // namespace

const char* knob_name(Knob k) { return kEntries[static_cast<int>(k)].name; }
int64_t knob(Knob k) { return values().of[static_cast<int>(k)].load(std::memory_order_relaxed); }

TOKENMILL_IMPL(CompositeExplicitAutograd, m) { m.impl("knob", TORCH_BOX(&knob_named)); }

}  // namespace tokenmill
