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

// Documented in python/tokenmill/_knobs.py.
constexpr Entry kEntries[] = {
    {"attention.shares", 4, 1, 64},
    {"block_sparse_attention.shares", 4, 1, 64},
    {"attention_decode.range", 256, 64, 4096},
    {"indexer_topk_select.rows", 1024, 64, 4096},
    {"best_match.words", 65536, 4096, 1 << 20},
    {"cluster_tokens.floats", 65536, 4096, 1 << 20},
    {"best_match.fill", 2, 1, 16},
    {"hip_block_select.fill", 1, 0, 16},
    {"attention.sm90", 1, 0, 1},
    {"attention.sm90_backward", 1, 0, 1},
    {"attention.sm90_section", 32, 0, 1024},
    {"attention.sm90_grid", 0, 0, 2},
    {"attention_decode.sm90", 1, 0, 1},
    {"attention_decode.sm90_tiles", 256, 1, 1 << 30},
    {"block_sparse_attention.sm90", 1, 0, 1},
    {"block_sparse_attention.sm90_backward", 1, 0, 1},
    {"linear_attention.sm90", 1, 0, 1},
};
constexpr int kCount = static_cast<int>(Knob::count);
static_assert(std::size(kEntries) == kCount);

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

int64_t knob(Knob k) { return values().of[static_cast<int>(k)].load(std::memory_order_relaxed); }

TOKENMILL_IMPL(CompositeExplicitAutograd, m) { m.impl("knob", TORCH_BOX(&knob_named)); }

}  // namespace tokenmill
