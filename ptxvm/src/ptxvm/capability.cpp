// Forms that require compute capability above 8.0, among those that the machine knows: ptxas
// rejects them for older devices.
#include <algorithm>
#include <initializer_list>
#include <string_view>

#include "ptxvm/decode_state.h"
#include "ptxvm/device.h"

namespace ptxvm {
namespace {

bool is_in(std::string_view word, std::initializer_list<std::string_view> words) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

bool has_any(const Statement& statement, std::initializer_list<const char*> words) {
  return std::any_of(words.begin(), words.end(), [&](const char* w) { return statement.has(w); });
}

bool names_cluster(const std::string& operand) {
  return operand.starts_with("%cluster") || operand.starts_with("%ncluster") ||
         operand == "%is_explicit_cluster";
}

int capability_of(const Statement& s) {
  const std::string& base = s.opcode[0];
  const bool brain = has_any(s, {"bf16", "bf16x2"});
  const bool memory = is_in(base, {"ld", "st", "atom", "red", "fence"});
  if (is_in(base, {"elect", "stmatrix", "mapa", "getctarank", "griddepcontrol", "tensormap"}) ||
      (memory && has_any(s, {"cluster", "shared::cluster", "async", "mbarrier_init",
                             "tensormap::generic"})) ||
      (is_in(base, {"mbarrier", "barrier"}) && has_any(s, {"cluster", "shared::cluster"})) ||
      (base == "cp" && s.has("bulk")) || (base == "prefetch" && s.has("tensormap")))
    return 90;
  if (base == "mma" && has_any(s, {"e4m3", "e5m2"})) return 89;
  if (base == "mma" && s.has("f64") && !s.has("m8n8k4")) return 90;
  if (base == "mbarrier" && has_any(s, {"try_wait", "expect_tx", "complete_tx"})) return 90;
  // An arrival with a count that may complete the phase.
  if (base == "mbarrier" && has_any(s, {"arrive", "arrive_drop"}) && !s.has("noComplete") &&
      s.operands.size() > 2)
    return 90;
  if (std::any_of(s.operands.begin(), s.operands.end(), names_cluster)) return 90;
  if (is_in(base, {"atom", "red"}) && (brain || has_any(s, {"v2", "v4", "v8"}))) return 90;
  if (brain && is_in(base, {"add", "sub", "mul", "set", "setp", "ex2", "tanh"})) return 90;
  if (is_in(base, {"add", "min", "max"}) && has_any(s, {"u16x2", "s16x2"})) return 90;
  if (s.has("xorsign")) return 86;
  if (base != "cvt") return 80;
  if (has_any(s, {"e4m3x2", "e5m2x2"})) return 89;
  if (s.has("tf32")) return s.has("rna") ? 80 : 90;
  return brain && !s.has("f32") ? 90 : 80;
}

}  // namespace

void check_capability(const Decoder& decoder, const Statement& statement) {
  const std::string& base = statement.opcode[0];
  if ((is_in(base, {"wgmma", "setmaxnreg"}) || (base == "tensormap" && statement.has("replace"))) &&
      !device().specific)
    decoder.fail(std::string("this form needs sm_90a; this is ") + device().name);
  const int needed = capability_of(statement), given = device().major * 10 + device().minor;
  if (given < needed)
    decoder.fail("this form needs sm_" + std::to_string(needed) + " or a newer device; this is " +
                 device().name);
}

}  // namespace ptxvm
