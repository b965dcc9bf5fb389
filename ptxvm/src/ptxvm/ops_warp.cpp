// Warp-level instructions: shfl vote match redux elect activemask nanosleep. The scheduler runs a
// .sync instruction once, for all live lanes of its member mask (Control::converge).
#include <algorithm>
#include <type_traits>

#include "ptxvm/ops_arithmetic.h"

namespace ptxvm {
namespace {

enum class Shuffle : uint8_t { idx, bfly, up, down };

void check_member(Warp& warp, const Instruction& in, Mask mask) {
  const uint32_t* members = lanes<const uint32_t>(warp, in.member);
  alignas(64) int32_t outside[kLanes];
  for (int i = 0; i < kLanes; ++i) outside[i] = static_cast<int32_t>(members[i] >> i & 1) - 1;
  const Mask wrong = pack_mask(outside) & mask;
  if (wrong == 0) return;
  const int lane = std::countr_zero(wrong);
  fault(warp, in, lane, "the lane is not in its own member mask " + std::to_string(members[lane]));
}

// Slots: d, p, a, b, c, members.
template <Shuffle mode>
void shuffle(Warp& warp, const Instruction& in, Mask mask) {
  check_member(warp, in, mask);
  const uint32_t *a = lanes<const uint32_t>(warp, in.slots[2]),
                 *b = lanes<const uint32_t>(warp, in.slots[3]),
                 *c = lanes<const uint32_t>(warp, in.slots[4]);
  alignas(64) int32_t from[kLanes], inside[kLanes];
  for (int32_t lane = 0; lane < kLanes; ++lane) {
    const int32_t offset = b[lane] & 31, clamp = c[lane] & 31, segment = c[lane] >> 8 & 31;
    const int32_t first = lane & segment, last = first | (clamp & ~segment);
    const int32_t source = mode == Shuffle::up     ? lane - offset
                           : mode == Shuffle::down ? lane + offset
                           : mode == Shuffle::bfly ? lane ^ offset
                                                   : first | (offset & ~segment);
    inside[lane] = (mode == Shuffle::up ? source >= last : source <= last) ? -1 : 0;
    from[lane] = (source & inside[lane]) | (lane & ~inside[lane]);
  }
  if (options.check)
    for (Mask left = mask; left; left &= left - 1) {
      const int lane = std::countr_zero(left);
      if (!(mask >> from[lane] & 1))
        fault(warp, in, lane,
              "reads the register of lane " + std::to_string(from[lane]) +
                  ", which does not take part");
    }
  alignas(64) uint32_t values[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) values[lane] = a[from[lane] & 31];
  if (in.slots[0] != kNoSlot) assign(lanes<uint32_t>(warp, in.slots[0]), values, mask);
  if (in.slots[1] != kNoSlot) assign_predicate(warp, in.slots[1], pack_mask(inside), mask);
}

enum class Vote : uint8_t { all, any, uni, ballot };

// Slots: d, a, members.
void vote(Warp& warp, const Instruction& in, Mask mask) {
  check_member(warp, in, mask);
  const Mask holds = read_predicate(warp, in.slots[1], in.flags & 1) & mask;
  bool result = false;
  switch (static_cast<Vote>(in.variant)) {
    case Vote::all:
      result = holds == mask;
      break;
    case Vote::any:
      result = holds != 0;
      break;
    case Vote::uni:
      result = holds == 0 || holds == mask;
      break;
    case Vote::ballot:
      return broadcast<uint32_t>(warp, in.slots[0], holds, mask);
  }
  assign_predicate(warp, in.slots[0], result ? kFullMask : 0, mask);
}

// Slots: d, p, a, members.
template <typename T>
void match_any(Warp& warp, const Instruction& in, Mask mask) {
  check_member(warp, in, mask);
  const T* a = lanes<const T>(warp, in.slots[2]);
  alignas(64) uint32_t values[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    values[i] = 0;
    for (int k = 0; k < kLanes; ++k) values[i] |= static_cast<uint32_t>(a[k] == a[i]) << k;
    values[i] &= mask;
  }
  if (in.slots[0] != kNoSlot) assign(lanes<uint32_t>(warp, in.slots[0]), values, mask);
}
template <typename T>
void match_all(Warp& warp, const Instruction& in, Mask mask) {
  check_member(warp, in, mask);
  const T* a = lanes<const T>(warp, in.slots[2]);
  bool same = true;
  for (Mask left = mask; left; left &= left - 1)
    same = same && a[std::countr_zero(left)] == a[std::countr_zero(mask)];
  broadcast<uint32_t>(warp, in.slots[0], same ? mask : 0, mask);
  assign_predicate(warp, in.slots[1], same ? kFullMask : 0, mask);
}

struct Sum {
  static uint32_t apply(uint32_t a, uint32_t b) { return a + b; }
};
struct Conjunction {
  static uint32_t apply(uint32_t a, uint32_t b) { return a & b; }
};
struct Disjunction {
  static uint32_t apply(uint32_t a, uint32_t b) { return a | b; }
};
struct Exclusive {
  static uint32_t apply(uint32_t a, uint32_t b) { return a ^ b; }
};
template <typename T>
struct Least {
  static T apply(T a, T b) { return std::min(a, b); }
};
template <typename T>
struct Greatest {
  static T apply(T a, T b) { return std::max(a, b); }
};

// Slots: d, a, members.
template <typename Op, typename T>
void reduce(Warp& warp, const Instruction& in, Mask mask) {
  check_member(warp, in, mask);
  const T* a = lanes<const T>(warp, in.slots[1]);
  T result = a[std::countr_zero(mask)];
  for (Mask left = mask & (mask - 1); left; left &= left - 1)
    result = Op::apply(result, a[std::countr_zero(left)]);
  broadcast<T>(warp, in.slots[0], result, mask);
}

// Slots: d, p, members.
void elect(Warp& warp, const Instruction& in, Mask mask) {
  check_member(warp, in, mask);
  const int leader = std::countr_zero(mask);
  broadcast<uint32_t>(warp, in.slots[0], static_cast<uint32_t>(leader), mask);
  assign_predicate(warp, in.slots[1], Mask{1} << leader, mask);
}

void active_mask(Warp& warp, const Instruction& in, Mask mask) {
  broadcast<uint32_t>(warp, in.slots[0], mask, mask);
}

void do_nothing(Warp&, const Instruction&, Mask) {}

void need_sync(Decoder& decoder, Modifiers& modifiers) {
  if (!modifiers.take("sync")) decoder.fail("needs .sync: the form without it left with sm_70");
}

// The member mask, the last operand; its position among the slots is stored.
void read_members(Decoder& decoder, const Statement& statement, Instruction& in,
                  uint32_t position) {
  decoder.read(statement.operands.back(), 32);
  in.member = position;
  in.control = Control::converge;
}

// Destinations d|p; either may be "_", and p may be absent.
void write_pair(Decoder& decoder, const Statement& statement) {
  const auto [d, p] = split_pair(statement.operands[0]);
  decoder.write(d, 32);
  decoder.write(p, 1);
}

void decode_shfl(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  need_sync(decoder, modifiers);
  if (!modifiers.take("b32")) decoder.fail("needs .b32");
  if (modifiers.take("idx")) in.run = shuffle<Shuffle::idx>;
  if (modifiers.take("bfly")) in.run = shuffle<Shuffle::bfly>;
  if (modifiers.take("up")) in.run = shuffle<Shuffle::up>;
  if (modifiers.take("down")) in.run = shuffle<Shuffle::down>;
  modifiers.finish();
  if (!in.run) decoder.fail("needs .idx, .bfly, .up or .down");
  expect_operands(decoder, statement, 5);
  write_pair(decoder, statement);
  for (size_t i = 1; i < 4; ++i) decoder.read(statement.operands[i], 32);
  read_members(decoder, statement, in, 5);
}

void decode_vote(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  need_sync(decoder, modifiers);
  const std::string type = modifiers.take_type();
  static constexpr const char* names[] = {"all", "any", "uni", "ballot"};
  for (uint8_t i = 0; i < 4; ++i) {
    if (!modifiers.take(names[i])) continue;
    in.variant = i;
    if (type == (i == 3 ? "b32" : "pred")) in.run = vote;
  }
  modifiers.finish();
  if (!in.run) decoder.fail("needs .all, .any or .uni with .pred, or .ballot with .b32");
  expect_operands(decoder, statement, 3);
  decoder.write(statement.operands[0], type == "b32" ? 32 : 1);
  if (read_predicate_operand(decoder, statement.operands[1])) in.flags = 1;
  read_members(decoder, statement, in, 2);
}

void decode_match(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  need_sync(decoder, modifiers);
  const std::string type = modifiers.take_type();
  const bool any = modifiers.take("any");
  if (!any && !modifiers.take("all")) decoder.fail("needs .any or .all");
  modifiers.finish();
  if (type == "b32") in.run = any ? match_any<uint32_t> : match_all<uint32_t>;
  if (type == "b64") in.run = any ? match_any<uint64_t> : match_all<uint64_t>;
  if (!in.run) decoder.fail("type ." + type + " is not supported here");
  expect_operands(decoder, statement, 3);
  write_pair(decoder, statement);
  decoder.read(statement.operands[1], bits_of_type(type));
  read_members(decoder, statement, in, 3);
}

void decode_redux(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  need_sync(decoder, modifiers);
  const std::string type = modifiers.take_type(), op = modifiers.take_first("operation");
  modifiers.finish();
  const bool number = type == "u32" || type == "s32";
  if (number && op == "add") in.run = reduce<Sum, uint32_t>;
  if (type == "u32" && op == "min") in.run = reduce<Least<uint32_t>, uint32_t>;
  if (type == "u32" && op == "max") in.run = reduce<Greatest<uint32_t>, uint32_t>;
  if (type == "s32" && op == "min") in.run = reduce<Least<int32_t>, int32_t>;
  if (type == "s32" && op == "max") in.run = reduce<Greatest<int32_t>, int32_t>;
  if (type == "b32" && op == "and") in.run = reduce<Conjunction, uint32_t>;
  if (type == "b32" && op == "or") in.run = reduce<Disjunction, uint32_t>;
  if (type == "b32" && op == "xor") in.run = reduce<Exclusive, uint32_t>;
  if (!in.run) decoder.fail("operation ." + op + "." + type + " is not supported here");
  expect_operands(decoder, statement, 3);
  decoder.write(statement.operands[0], 32);
  decoder.read(statement.operands[1], 32);
  read_members(decoder, statement, in, 2);
}

void decode_elect(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  need_sync(decoder, modifiers);
  modifiers.finish();
  in.run = elect;
  expect_operands(decoder, statement, 2);
  write_pair(decoder, statement);
  read_members(decoder, statement, in, 2);
}

void decode_activemask(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  if (modifiers.take_type() != "b32") decoder.fail("needs .b32");
  modifiers.finish();
  in.run = active_mask;
  expect_operands(decoder, statement, 1);
  decoder.write(statement.operands[0], 32);
}

void decode_nanosleep(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  if (modifiers.take_type() != "u32") decoder.fail("needs .u32");
  modifiers.finish();
  in.run = do_nothing;
  expect_operands(decoder, statement, 1);
  decoder.read(statement.operands[0], 32);
}

}  // namespace

void add_warp(OpcodeTable& table) {
  table["shfl"] = decode_shfl;
  table["vote"] = decode_vote;
  table["match"] = decode_match;
  table["redux"] = decode_redux;
  table["elect"] = decode_elect;
  table["activemask"] = decode_activemask;
  table.emplace("nanosleep", decode_nanosleep);
}

}  // namespace ptxvm
