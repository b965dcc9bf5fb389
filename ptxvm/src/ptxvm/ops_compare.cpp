// Comparison and selection: setp set selp slct.
#include <algorithm>

#include "ptxvm/ops_arithmetic.h"

namespace ptxvm {
namespace {

enum class Compare : uint8_t { eq, ne, lt, le, gt, ge, equ, neu, ltu, leu, gtu, geu, num, nan };
constexpr const char* kCompareNames[] = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                                         "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};

// Boolean operation that combines the comparison with the predicate c.
enum class Join : uint8_t { none, conjunction, disjunction, exclusive };

// flags: c is negated; set returns the number 1 of its type, whose bits are in `target`.
constexpr uint8_t kNegated = 1, kOne = 2;

template <typename T>
T maybe_flush(T x, bool ftz) {
  if constexpr (std::is_same_v<T, double> || std::is_integral_v<T>)
    return x;
  else
    return ftz ? flush(x) : x;
}

template <Compare C, typename T>
struct Test {
  static bool apply(T a, T b) {
    if constexpr (C == Compare::eq) return a == b;
    if constexpr (C == Compare::ne) return a < b || a > b;
    if constexpr (C == Compare::lt) return a < b;
    if constexpr (C == Compare::le) return a <= b;
    if constexpr (C == Compare::gt) return a > b;
    if constexpr (C == Compare::ge) return a >= b;
    if constexpr (C == Compare::equ) return !(a < b || a > b);
    if constexpr (C == Compare::neu) return a != b;
    if constexpr (C == Compare::ltu) return !(a >= b);
    if constexpr (C == Compare::leu) return !(a > b);
    if constexpr (C == Compare::gtu) return !(a <= b);
    if constexpr (C == Compare::geu) return !(a < b);
    if constexpr (C == Compare::num) return a == a && b == b;
    if constexpr (C == Compare::nan) return a != a || b != b;
  }
};
// Halves compare as f32, which holds them exactly.
template <Compare C, typename T, bool Ftz>
struct TestFlushed {
  static bool apply(T a, T b) {
    if constexpr (std::is_integral_v<T> || std::is_same_v<T, double>)
      return Test<C, T>::apply(a, b);
    else
      return Test<C, float>::apply(to_float(maybe_flush(a, Ftz)), to_float(maybe_flush(b, Ftz)));
  }
};

Mask join(Join how, Mask t, Mask c) {
  switch (how) {
    case Join::none:
      return t;
    case Join::conjunction:
      return t & c;
    case Join::disjunction:
      return t | c;
    case Join::exclusive:
      return t ^ c;
  }
  return t;
}

// Slots: p, q, a, b, c. q is the complement of the comparison joined with c.
template <typename Op, typename T>
void set_predicate(Warp& warp, const Instruction& in, Mask mask) {
  const Mask t =
      test_lanes<Op>(lanes<const T>(warp, in.slots[2]), lanes<const T>(warp, in.slots[3]));
  const Join how = static_cast<Join>(in.variant);
  const Mask c = read_predicate(warp, in.slots[4], in.flags & kNegated);
  assign_predicate(warp, in.slots[0], join(how, t, c), mask);
  assign_predicate(warp, in.slots[1], join(how, ~t, c), mask);
}

template <typename T>
void split_halves(Warp& warp, uint32_t slot, T* low, T* high) {
  const uint32_t* source = lanes<const uint32_t>(warp, slot);
  for (int i = 0; i < kLanes; ++i) {
    low[i] = T{static_cast<uint16_t>(source[i])};
    high[i] = T{static_cast<uint16_t>(source[i] >> 16)};
  }
}

// Compares both halves.
template <typename Op, typename T>
std::pair<Mask, Mask> test_pair(Warp& warp, uint32_t first, uint32_t second) {
  alignas(64) T a[2][kLanes], b[2][kLanes];
  split_halves(warp, first, a[0], a[1]);
  split_halves(warp, second, b[0], b[1]);
  return {test_lanes<Op>(a[0], b[0]), test_lanes<Op>(a[1], b[1])};
}

// Slots: p, q, a, b, c; q belongs to the upper halves.
template <typename Op, typename T>
void set_predicate_pair(Warp& warp, const Instruction& in, Mask mask) {
  const auto [low, high] = test_pair<Op, T>(warp, in.slots[2], in.slots[3]);
  const Join how = static_cast<Join>(in.variant);
  const Mask c = read_predicate(warp, in.slots[4], in.flags & kNegated);
  assign_predicate(warp, in.slots[0], join(how, low, c), mask);
  assign_predicate(warp, in.slots[1], join(how, high, c), mask);
}

// set: slots d, a, b, c. in.width bits of all ones or zeros, or 1 and 0 with kOne.
void write_flags(Warp& warp, const Instruction& in, Mask values, Mask mask) {
  const uint32_t one = in.flags & kOne ? in.target : 0xffffffff;
  const auto write = [&]<typename R>(R value) {
    alignas(64) R lanes_of[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes_of[i] = values >> i & 1 ? value : R{0};
    assign(lanes<R>(warp, in.slots[0]), lanes_of, mask);
  };
  if (in.width == 16) write(static_cast<uint16_t>(one));
  if (in.width == 32) write(one);
}
template <typename Op, typename T>
void set_value(Warp& warp, const Instruction& in, Mask mask) {
  const Mask t =
      test_lanes<Op>(lanes<const T>(warp, in.slots[1]), lanes<const T>(warp, in.slots[2]));
  const Mask c = read_predicate(warp, in.slots[3], in.flags & kNegated);
  write_flags(warp, in, join(static_cast<Join>(in.variant), t, c), mask);
}
template <typename Op, typename T>
void set_value_pair(Warp& warp, const Instruction& in, Mask mask) {
  auto [low, high] = test_pair<Op, T>(warp, in.slots[1], in.slots[2]);
  const Mask c = read_predicate(warp, in.slots[3], in.flags & kNegated);
  low = join(static_cast<Join>(in.variant), low, c);
  high = join(static_cast<Join>(in.variant), high, c);
  const uint32_t one = in.flags & kOne ? in.target : 0xffff;
  alignas(64) uint32_t values[kLanes];
  for (int i = 0; i < kLanes; ++i)
    values[i] = (low >> i & 1 ? one : 0) | (high >> i & 1 ? one << 16 : 0);
  assign(lanes<uint32_t>(warp, in.slots[0]), values, mask);
}

// f<Op, T, pair>() for comparison C of a source type.
template <Compare C, typename F>
Handler with_source(const std::string& type, bool ftz, F f) {
  constexpr bool integer = C <= Compare::ge;
  if constexpr (integer) {
    const Handler handler = with_integer(type, [&]<typename T>(T) -> Handler {
      return f.template operator()<TestFlushed<C, T, false>, T, false>();
    });
    if (handler) return handler;
  }
  const auto pick = [&]<typename T, bool Pair>() -> Handler {
    return ftz ? f.template operator()<TestFlushed<C, T, true>, T, Pair>()
               : f.template operator()<TestFlushed<C, T, false>, T, Pair>();
  };
  if (type == "f32") return pick.template operator()<float, false>();
  if (type == "f64") return f.template operator()<TestFlushed<C, double, false>, double, false>();
  if (type == "f16") return pick.template operator()<Half, false>();
  if (type == "f16x2") return pick.template operator()<Half, true>();
  if (type == "bf16") return f.template operator()<TestFlushed<C, BFloat, false>, BFloat, false>();
  if (type == "bf16x2") return f.template operator()<TestFlushed<C, BFloat, false>, BFloat, true>();
  return nullptr;
}

template <typename F, int C = 0>
Handler with_compare(Compare compare, const std::string& type, bool ftz, F f) {
  if constexpr (C <= static_cast<int>(Compare::nan)) {
    if (static_cast<int>(compare) == C) return with_source<static_cast<Compare>(C)>(type, ftz, f);
    return with_compare<F, C + 1>(compare, type, ftz, f);
  }
  return nullptr;
}

Compare take_compare(Decoder& decoder, Modifiers& modifiers, const std::string& type) {
  std::string name = modifiers.take_first("comparison");
  static constexpr const char* unsigned_names[][2] = {
      {"lo", "lt"}, {"ls", "le"}, {"hi", "gt"}, {"hs", "ge"}};
  for (const auto& [from, to] : unsigned_names)
    if (name == from && type[0] == 'u') name = to;
  const auto found = std::find_if(std::begin(kCompareNames), std::end(kCompareNames),
                                  [&](const char* known) { return name == known; });
  if (found == std::end(kCompareNames)) decoder.fail("comparison ." + name + " is not known");
  const Compare compare = static_cast<Compare>(found - std::begin(kCompareNames));
  const bool sized = type[0] == 'b' && type[1] != 'f';
  if (sized && compare > Compare::ne) decoder.fail("type ." + type + " has only .eq and .ne");
  return compare;
}

Join take_join(Modifiers& modifiers) {
  if (modifiers.take("and")) return Join::conjunction;
  if (modifiers.take("or")) return Join::disjunction;
  if (modifiers.take("xor")) return Join::exclusive;
  return Join::none;
}

bool flushable(const std::string& type) {
  return type == "f32" || type == "f16" || type == "f16x2";
}

// Sources a, b and, with a boolean operation, c.
void read_sources(Decoder& decoder, const Statement& statement, Instruction& in,
                  const std::string& type) {
  const bool joined = static_cast<Join>(in.variant) != Join::none;
  expect_operands(decoder, statement, joined ? 4 : 3);
  decoder.read(statement.operands[1], bits_of_type(type));
  decoder.read(statement.operands[2], bits_of_type(type));
  if (!joined)
    decoder.skip();
  else if (read_predicate_operand(decoder, statement.operands[3]))
    in.flags |= kNegated;
}

void decode_setp(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  const std::string type = modifiers.take_type();
  const Compare compare = take_compare(decoder, modifiers, type);
  const bool ftz = flushable(type) && modifiers.take("ftz");
  in.variant = static_cast<uint8_t>(take_join(modifiers));
  modifiers.finish();
  in.run = with_compare(compare, type, ftz, []<typename Op, typename T, bool Pair>() -> Handler {
    if constexpr (Pair) return set_predicate_pair<Op, T>;
    return set_predicate<Op, T>;
  });
  if (!in.run)
    decoder.fail("comparison ." + std::string(kCompareNames[static_cast<int>(compare)]) +
                 " of type ." + type + " is not supported here");
  expect_operands(decoder, statement, in.variant ? 4 : 3);
  const auto [p, q] = split_pair(statement.operands[0]);
  decoder.write(p, 1);
  decoder.write(q, 1);
  read_sources(decoder, statement, in, type);
}

void decode_set(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  const std::string type = modifiers.take_type(), result = modifiers.take_type();
  const Compare compare = take_compare(decoder, modifiers, type);
  const bool ftz = flushable(type) && modifiers.take("ftz");
  in.variant = static_cast<uint8_t>(take_join(modifiers));
  modifiers.finish();
  const bool pair = type == "f16x2" || type == "bf16x2";
  in.width = static_cast<uint8_t>(bits_of_type(result));
  if (result == "f32") in.target = 0x3f800000;
  if (result == "f16" || result == "f16x2") in.target = 0x3c00;
  if (result == "bf16" || result == "bf16x2") in.target = 0x3f80;
  if (in.target) in.flags |= kOne;
  if (pair ? result != type : in.width != 16 && in.width != 32)
    decoder.fail("result type ." + result + " is not supported here");
  in.run = with_compare(compare, type, ftz, []<typename Op, typename T, bool Pair>() -> Handler {
    if constexpr (Pair) return set_value_pair<Op, T>;
    return set_value<Op, T>;
  });
  if (!in.run) decoder.fail("type ." + type + " is not supported here");
  decoder.write(statement.operands[0], in.width);
  read_sources(decoder, statement, in, type);
}

// Slots: d, a, b, p.
template <typename T>
void select(Warp& warp, const Instruction& in, Mask mask) {
  const T *a = lanes<const T>(warp, in.slots[1]), *b = lanes<const T>(warp, in.slots[2]);
  const Mask p = read_predicate(warp, in.slots[3], in.flags & kNegated);
  alignas(64) T values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = p >> i & 1 ? a[i] : b[i];
  assign(lanes<T>(warp, in.slots[0]), values, mask);
}

void decode_selp(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  const std::string type = modifiers.take_type();
  modifiers.finish();
  const int bits = bits_of_type(type);
  if (bits != 8) in.run = with_bits(bits, []<typename T>(T) -> Handler { return select<T>; });
  if (!in.run) decoder.fail("type ." + type + " is not supported here");
  expect_operands(decoder, statement, 4);
  decoder.write(statement.operands[0], bits);
  decoder.read(statement.operands[1], bits);
  decoder.read(statement.operands[2], bits);
  if (read_predicate_operand(decoder, statement.operands[3])) in.flags |= kNegated;
}

template <bool Float, bool Ftz>
struct SelectBySign {
  template <typename T>
  static T apply(T a, T b, uint32_t c) {
    if constexpr (!Float) return static_cast<int32_t>(c) >= 0 ? a : b;
    const float value = std::bit_cast<float>(c);
    return maybe_flush(value, Ftz) >= 0 ? a : b;
  }
};

void decode_slct(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  const std::string type = modifiers.take_type(), result = modifiers.take_type();
  const bool ftz = type == "f32" && modifiers.take("ftz");
  modifiers.finish();
  const int bits = bits_of_type(result);
  const auto pick = [&]<typename Op>(Op) {
    if (bits != 8)
      in.run = with_bits(bits,
                         []<typename T>(T) -> Handler { return map_lanes<Op, T, T, T, uint32_t>; });
  };
  if (type == "s32") pick(SelectBySign<false, false>{});
  if (type == "f32") ftz ? pick(SelectBySign<true, true>{}) : pick(SelectBySign<true, false>{});
  if (!in.run) decoder.fail("types ." + result + "." + type + " are not supported here");
  expect_operands(decoder, statement, 4);
  decoder.write(statement.operands[0], bits);
  decoder.read(statement.operands[1], bits);
  decoder.read(statement.operands[2], bits);
  decoder.read(statement.operands[3], 32);
}

}  // namespace

void add_compare(OpcodeTable& table) {
  table["setp"] = decode_setp;
  table["set"] = decode_set;
  table["selp"] = decode_selp;
  table["slct"] = decode_slct;
}

}  // namespace ptxvm
