// Check mode: which lanes of which registers hold a value. Arithmetic on values that were never set
// is harmless as long as nothing depends on it (compilers compute ahead and select afterwards,
// tiles have unused rows), so undefinedness propagates. Values that decide control flow, addresses
// or results in memory must be defined.
#include <algorithm>
#include <cstring>
#include <string>

#include "ptxvm/check.h"
#include "ptxvm/clocks.h"
#include "ptxvm/counters.h"
#include "ptxvm/decode.h"
#include "ptxvm/reports.h"
#include "ptxvm/tiles.h"

namespace ptxvm {
namespace {

constexpr uint32_t kUnit = 64;  // bytes of the register file per entry of Warp::defined

Mask& defined(Warp& warp, uint32_t slot) { return warp.defined[slot / kUnit]; }

Mask missing(Warp& warp, uint32_t slot) {
  return slot == kNoSlot ? 0 : ~warp.defined[slot / kUnit];
}

bool is_in(std::string_view word, std::initializer_list<std::string_view> words) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

// The running instruction, and the definedness of its operands.
struct Step {
  Warp& warp;
  const Instruction& instruction;
  Mask mask;
  std::string_view opcode, base;

  uint32_t source(int i) const { return instruction.slots[instruction.writes + i]; }
  Mask missing_in(int i) const { return missing(warp, source(i)); }
  // Union over all sources, lane by lane.
  Mask missing_in_any() const {
    Mask any = 0;
    for (int i = 0; i < instruction.reads; ++i) any |= missing_in(i);
    return any;
  }

  // Reports lanes that need a value in the slot and have none.
  void require(uint32_t slot, const std::string& what) const {
    const Mask lost = mask & missing(warp, slot);
    if (!lost) return;
    const Instruction* origin = warp.origins[slot / kUnit];
    const std::string rule =
        std::string("depends on an uninitialised ") + (origin ? "value" : "register");
    broke_rule(warp, instruction, __builtin_ctz(lost), rule,
               rule + ": " + what +
                   (origin ? ", which has none since" + at_line(warp, *origin) : std::string()),
               origin);
  }
  void require_sources(int from, int to) const {
    for (int i = from; i < to; ++i)
      if (source(i) != kNoSlot) require(source(i), "source " + std::to_string(i + 1));
  }
};

bool stores_to_global(const Step& step) {
  if (step.opcode.find(".shared") != std::string_view::npos ||
      step.opcode.find(".local") != std::string_view::npos ||
      step.opcode.find(".param") != std::string_view::npos)
    return false;
  if (step.opcode.find(".global") != std::string_view::npos) return true;
  const uint64_t* addresses = lanes<const uint64_t>(step.warp, step.source(0));
  for (Mask rest = step.mask; rest; rest &= rest - 1) {
    const uint64_t address = addresses[__builtin_ctz(rest)] + step.instruction.offset;
    if (!(address & kWindowMask)) return true;
  }
  return false;
}

// A value of A reaches a row of D, a value of B a column, a value of C its own element (tensor.h).
void spread_matrices(const Step& step, Mask* values) {
  const int d = step.instruction.writes, b_count = (step.instruction.reads - d) / 3,
            a_count = 2 * b_count;
  const auto add = [&](Mask lanes_of_d, int row_half, int parity) {  // -1: both
    for (int i = 0; i < d; ++i) {
      const int half = d == 4 ? i / 2 : i;
      if (row_half >= 0 && half != row_half) continue;
      if (parity >= 0 && d == 4 && i % 2 != parity) continue;
      values[i] |= lanes_of_d;
    }
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const Mask quad = Mask{0xf} << (lane & ~3), column = Mask{0x11111111} << (lane / 8);
    for (int i = 0; i < a_count; ++i)
      if (step.missing_in(i) >> lane & 1) add(quad, i % 2, -1);
    for (int i = 0; i < b_count; ++i)
      if (step.missing_in(a_count + i) >> lane & 1) add(column, -1, lane / 4 % 2);
  }
  for (int i = 0; i < d; ++i) values[i] |= step.missing_in(a_count + b_count + i);
}

void spread_tile(const Step& step, const Tile& tile, Mask* values) {
  Mask lost[32];
  for (int i = 0; i < step.instruction.reads; ++i) lost[i] = step.missing_in(i);
  spread_tile(tile, lost, values);
}

// wmma: loads require address and stride, stores to global memory require values.
void follow_wmma(const Step& step, Mask* values) {
  const Instruction& in = step.instruction;
  if (const Tile* tile = wmma_of(step.warp, in)) return spread_tile(step, *tile, values);
  if (in.writes) return step.require_sources(0, in.reads);
  step.require_sources(0, 1);
  step.require_sources(in.reads - 1, in.reads);
  if (stores_to_global(step)) step.require_sources(1, in.reads - 1);
  for (int i = 1; i < in.reads - 1; ++i) values[i - 1] = step.missing_in(i);
}

// Shuffles definedness in the same way as the values.
void spread_shuffle(const Step& step, Mask* values) {
  const Instruction& in = step.instruction;
  step.require_sources(1, in.reads);
  if (in.slots[0] == kNoSlot) return;
  uint32_t* source = lanes<uint32_t>(step.warp, step.source(0));
  uint32_t* destination = lanes<uint32_t>(step.warp, in.slots[0]);
  uint32_t old_source[kLanes], old_destination[kLanes];
  const Mask old_predicate = in.slots[1] == kNoSlot ? 0 : predicate(step.warp, in.slots[1]);
  std::copy_n(source, kLanes, old_source);
  std::copy_n(destination, kLanes, old_destination);
  const Mask none = step.missing_in(0);
  for (int i = 0; i < kLanes; ++i) source[i] = none >> i & 1;
  in.run(step.warp, in, step.mask);
  for (int i = 0; i < kLanes; ++i) values[0] |= (destination[i] & 1) << i;
  std::copy_n(old_destination, kLanes, destination);
  std::copy_n(old_source, kLanes, source);
  if (in.slots[1] != kNoSlot) predicate(step.warp, in.slots[1]) = old_predicate;
}

// Bits of the sources and results of the instructions that settled() handles.
int bits_of_source(const Step& step, int i) {
  const bool selects = is_in(step.base, {"selp", "setp"}) && i == 2;
  return selects ? 1 : bits_of_type(std::string(step.opcode.substr(step.opcode.rfind('.') + 1)));
}
int bits_of_result(const Step& step) { return step.base == "setp" ? 1 : bits_of_source(step, 0); }

// The lanes of a slot, as bytes or, for a predicate, as bits.
struct Lanes {
  Warp& warp;
  uint32_t slot;
  int bits;

  char* begin() const { return lanes<char>(warp, slot); }
  size_t bytes() const { return bits == 1 ? sizeof(Mask) : static_cast<size_t>(bits / 8) * kLanes; }
  std::string copy() const { return {begin(), bytes()}; }
  void restore(const std::string& values) const {
    std::memcpy(begin(), values.data(), values.size());
  }
  void fill(Mask mask, bool ones) const {
    if (bits == 1) {
      Mask& value = predicate(warp, slot);
      value = ones ? value | mask : value & ~mask;
      return;
    }
    const size_t size = static_cast<size_t>(bits / 8);
    for (int i = 0; i < kLanes; ++i)
      if (mask >> i & 1) std::memset(begin() + size * i, ones ? 0xff : 0, size);
  }
  Mask differs(const std::string& values) const {
    if (bits == 1) {
      Mask other;
      std::memcpy(&other, values.data(), sizeof other);
      return other ^ predicate(warp, slot);
    }
    const size_t size = static_cast<size_t>(bits / 8);
    Mask mask = 0;
    for (int i = 0; i < kLanes; ++i)
      mask |= Mask{std::memcmp(begin() + size * i, values.data() + size * i, size) != 0} << i;
    return mask;
  }
};

// Lanes with equal results for all 0 and all 1 in each source that lacks a value.
Mask same_for_all(const Step& step, std::initializer_list<int> sources) {
  const Instruction& in = step.instruction;
  std::vector<Lanes> missing_values, results;
  std::vector<std::string> saved, saved_results, first;
  for (const int i : sources) {
    if (i >= in.reads || step.source(i) == kNoSlot || !(step.mask & step.missing_in(i))) continue;
    const bool again = std::any_of(missing_values.begin(), missing_values.end(),
                                   [&](const Lanes& l) { return l.slot == step.source(i); });
    if (!again) missing_values.push_back({step.warp, step.source(i), bits_of_source(step, i)});
  }
  for (int i = 0; i < in.writes; ++i)
    if (in.slots[i] != kNoSlot) results.push_back({step.warp, in.slots[i], bits_of_result(step)});
  for (const Lanes& l : missing_values) saved.push_back(l.copy());
  for (const Lanes& l : results) saved_results.push_back(l.copy());
  Mask same = kFullMask;
  for (uint32_t trial = 0; trial < 1u << missing_values.size(); ++trial) {
    // A result may share the slot of a source.
    for (size_t i = 0; i < results.size(); ++i) results[i].restore(saved_results[i]);
    for (size_t i = 0; i < saved.size(); ++i) missing_values[i].restore(saved[i]);
    for (size_t i = 0; i < missing_values.size(); ++i)
      missing_values[i].fill(missing(step.warp, missing_values[i].slot), trial >> i & 1);
    in.run(step.warp, in, step.mask);
    for (size_t i = 0; i < results.size(); ++i) {
      if (trial == 0) first.push_back(results[i].copy());
      same &= ~results[i].differs(first[i]);
    }
  }
  for (size_t i = 0; i < results.size(); ++i) results[i].restore(saved_results[i]);
  for (size_t i = 0; i < saved.size(); ++i) missing_values[i].restore(saved[i]);
  return same;
}

// Lanes whose result does not depend on undefined operands. Bitwise functions and predicates are
// evaluated for all 0 and all 1; a comparison with an undefined operand may come out either way.
Mask settled(const Step& step) {
  if (is_in(step.base, {"and", "or", "xor", "selp"})) return same_for_all(step, {0, 1, 2});
  if (step.base == "lop3")
    return step.instruction.slots[1] == kNoSlot ? same_for_all(step, {0, 1, 2}) : 0;
  if (step.base != "setp" || step.source(2) == kNoSlot) return 0;
  const bool negated = std::strchr(step.instruction.text, '!');
  const Mask joined = predicate(step.warp, step.source(2)) ^ (negated ? kFullMask : 0);
  const Mask decides = step.opcode.find(".and.") != std::string_view::npos  ? ~joined
                       : step.opcode.find(".or.") != std::string_view::npos ? joined
                                                                            : 0;
  const Mask compared = ~(step.missing_in(0) | step.missing_in(1));
  return (compared & same_for_all(step, {2})) | (~compared & decides & ~step.missing_in(2));
}

void follow(const Step& step, Mask* values) {
  const Instruction& in = step.instruction;
  if (step.base == "st") {
    step.require_sources(0, 1);
    if (stores_to_global(step)) step.require_sources(1, in.reads);
    for (int i = 1; i < in.reads && i <= 8; ++i) values[i - 1] = step.missing_in(i);
    return;
  }
  if (step.base == "stmatrix") {
    step.require_sources(0, 1);
    for (int i = 1; i < in.reads; ++i) values[i - 1] = step.missing_in(i);
    return;
  }
  if (step.base == "wgmma") {  // descriptors and scale-d; accumulators_landed handles the rest
    const bool has_registers = in.reads == in.writes + 6;
    step.require_sources(has_registers ? in.reads - 2 : in.writes, in.reads);
    return;
  }
  if (in.control == Control::branch || in.control == Control::exit) return;
  if (in.control == Control::barrier || in.control == Control::indirect ||
      is_in(step.base, {"ld", "ldu", "ldmatrix", "atom", "red", "cp", "vote", "match", "redux",
                        "nanosleep", "isspacep", "mbarrier"})) {
    step.require_sources(0, in.reads);
    return;
  }
  if (step.base == "wmma") return follow_wmma(step, values);
  if (step.base == "mma") {
    const Tile* const tile = tile_of(step.warp, in);
    return tile ? spread_tile(step, *tile, values) : spread_matrices(step, values);
  }
  if (step.base == "shfl") return spread_shuffle(step, values);
  if (step.base == "movmatrix") {
    values[0] = kFullMask;
    return;
  }
  std::fill_n(values, in.writes, step.missing_in_any() & ~settled(step));
}

}  // namespace

void check_guard(Warp& warp, const Instruction& instruction, Mask mask) {
  if (warp.defined.empty() || !(mask & missing(warp, instruction.guard))) return;
  Step{warp, instruction, mask, {}, {}}.require(instruction.guard, "the guard");
}

void check_registers(Warp& warp, const Instruction& instruction, Mask mask) {
  if (warp.defined.empty()) return;
  warp.timeline->acting = mask;
  if (instruction.control == Control::converge) lanes_met(warp);
  Mask lost = 0;
  const uint32_t* sources = instruction.slots + instruction.writes;
  const bool crosses_lanes = instruction.control == Control::converge;
  for (int i = 0; i < instruction.reads; ++i) lost |= missing(warp, sources[i]);
  warp.undefined.by = nullptr;
  if (!(lost & (crosses_lanes ? kFullMask : mask)) || !mask) return;
  const std::string_view opcode = opcode_of(instruction);
  const Step step{warp, instruction, mask, opcode, opcode.substr(0, opcode.find('.'))};
  Undefined undefined{&instruction, &instruction};
  for (int i = instruction.reads - 1; i >= 0; --i)
    if (mask & missing(warp, sources[i]))
      undefined.origin =
          warp.origins[sources[i] / kUnit] ? warp.origins[sources[i] / kUnit] : &instruction;
  follow(step, undefined.values);
  warp.undefined = undefined;
}

void missing_values(Warp& warp, const uint32_t* slots, int count, Mask* lost) {
  for (int i = 0; i < count; ++i) lost[i] = warp.defined.empty() ? 0 : missing(warp, slots[i]);
}

void accumulators_issued(Warp& warp, const Instruction& instruction, int count) {
  if (warp.defined.empty()) return;
  for (int i = 0; i < count; ++i) {
    const uint32_t slot = instruction.slots[i];
    if (slot == kNoSlot) continue;
    uint32_t& place = warp.flight_of[slot / kUnit];
    if (!place) {
      warp.flights.push_back({slot, defined(warp, slot), 0});
      place = static_cast<uint32_t>(warp.flights.size());
    }
    warp.flights[place - 1].group = warp.product_groups;
    defined(warp, slot) = 0;
    warp.origins[slot / kUnit] = &instruction;
  }
}

void accumulators_landed(Warp& warp, const Instruction& instruction, int count, bool accumulates,
                         const Mask* lost) {
  if (warp.defined.empty()) return;
  for (int i = 0; i < count; ++i) {
    const uint32_t slot = instruction.slots[i];
    const uint32_t place = slot == kNoSlot ? 0 : warp.flight_of[slot / kUnit];
    if (!place) continue;
    Mask& settled = warp.flights[place - 1].settled;
    settled = (accumulates ? settled : kFullMask) & ~lost[i];
  }
}

void accumulators_waited(Warp& warp, uint64_t keep) {
  if (warp.timeline && warp.product_groups > keep)
    warp.timeline->products_waited_for = warp.product_groups - static_cast<uint32_t>(keep);
  uint32_t kept = 0;
  for (const Warp::Flight flight : warp.flights) {
    uint32_t& place = warp.flight_of[flight.slot / kUnit];
    if (flight.group + keep >= warp.product_groups) {
      warp.flights[kept++] = flight;
      place = kept;
    } else {
      defined(warp, flight.slot) = flight.settled;
      place = 0;
    }
  }
  warp.flights.resize(kept);
}

void product_registers(Warp& warp, const Instruction& in, const uint32_t* slots, int count) {
  if (!warp.timeline) return;
  Timeline& t = *warp.timeline;
  for (int i = 0; i < count; ++i) {
    Timeline::Register& used = t.registers[slots[i] / kUnit];
    if (used.fence == t.register_fences)
      broke_rule(warp, in, 0, "wgmma.fence",
                 "a register of it was written at" + at_line(warp, *used.written_by) +
                     ", and no wgmma.fence lies between them",
                 used.written_by);
    used.group = warp.product_groups + 1;
    used.used_by = &in;
  }
}

void product_fence(Warp& warp) {
  if (warp.timeline) ++warp.timeline->register_fences;
}

namespace {

void write_registers(Warp& warp, Timeline& t, const Instruction& in, Mask mask) {
  for (int i = 0; i < in.writes; ++i) {
    if (in.slots[i] == kNoSlot) continue;
    Timeline::Register& written = t.registers[in.slots[i] / kUnit];
    written.fence = t.register_fences;
    written.written_by = &in;
    if (written.group > t.products_waited_for)
      broke_rule(warp, in, __builtin_ctz(mask), "register of wgmma",
                 "write to a register of wgmma at" + at_line(warp, *written.used_by) +
                     ", before its wgmma.wait_group",
                 written.used_by);
  }
}

}  // namespace

void define_registers(Warp& warp, const Instruction& instruction, Mask mask) {
  if (warp.defined.empty()) return;
  if (instruction.writes && !warp.flights.empty() && instruction.slots[0] != kNoSlot &&
      warp.flight_of[instruction.slots[0] / kUnit] && opcode_of(instruction).starts_with("wgmma")) {
    warp.undefined.by = nullptr;
    return;
  }
  if (warp.timeline && !warp.timeline->registers.empty())
    write_registers(warp, *warp.timeline, instruction, mask);
  const bool all = warp.undefined.by != &instruction;
  for (int i = 0; i < instruction.writes; ++i) {
    const uint32_t slot = instruction.slots[i];
    if (slot == kNoSlot) continue;
    const Mask lost = all ? 0 : mask & (warp.undefined.values[i] | warp.undefined.loaded);
    defined(warp, slot) = (defined(warp, slot) | mask) & ~lost;
    if (lost) warp.origins[slot / kUnit] = warp.undefined.origin;
  }
  warp.undefined.by = nullptr;
}

}  // namespace ptxvm
