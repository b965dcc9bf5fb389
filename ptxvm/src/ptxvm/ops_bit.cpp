// Logic, shifts and bit fields: and or xor not cnot lop3 shl shr shf bfe bfi bfind brev clz popc
// fns szext bmsk prmt.
#include <algorithm>
#include <type_traits>

#include "ptxvm/ops_arithmetic.h"
#include "ptxvm/parse.h"

namespace ptxvm {
namespace {

struct And {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(a & b);
  }
};
struct Or {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(a | b);
  }
};
struct Xor {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(a ^ b);
  }
};
struct Not {
  template <typename T>
  static T apply(T a) {
    return static_cast<T>(~a);
  }
};
struct LogicalNot {
  template <typename T>
  static T apply(T a) {
    return a == 0;
  }
};

// Shift amounts are 32 bits, clamped to the width.
struct ShiftLeft {
  template <typename T>
  static T apply(T a, uint32_t n) {
    constexpr uint32_t bits = 8 * sizeof(T);
    return n < bits ? static_cast<T>(static_cast<uint64_t>(a) << (n & 63)) : T{0};
  }
};
struct ShiftRight {
  template <typename T>
  static T apply(T a, uint32_t n) {
    constexpr uint32_t last = 8 * sizeof(T) - 1;
    if constexpr (std::is_signed_v<T>) return static_cast<T>(a >> std::min(n, last));
    return n <= last ? static_cast<T>(a >> (n & last)) : T{0};
  }
};

template <bool Left, bool Wrap>
struct FunnelShift {
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t c) {
    const uint32_t n = Wrap ? c & 31 : std::min(c, 32u);
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    return static_cast<uint32_t>(Left ? both << n >> 32 : both >> n);
  }
};

// Bits above the field are filled with the sign: the last bit of the field within the operand.
struct ExtractField {
  template <typename T>
  static T apply(T a, uint32_t b, uint32_t c) {
    using U = std::make_unsigned_t<T>;
    constexpr uint32_t bits = 8 * sizeof(T);
    const uint32_t position = b & 0xff, length = c & 0xff;
    const U value = static_cast<U>(a);
    const U shifted = position < bits ? value >> (position & (bits - 1)) : U{0};
    const U kept = length < bits ? (U{1} << (length & (bits - 1))) - 1 : ~U{0};
    if constexpr (!std::is_signed_v<T>) return shifted & kept;
    if (length == 0) return 0;
    const bool negative = value >> std::min(position + length - 1, bits - 1) & 1;
    const uint32_t there = position < bits ? std::min(length, bits - position) : 0;
    const U held = there < bits ? (U{1} << there) - 1 : ~U{0};
    return static_cast<T>((shifted & held) | (negative ? ~held : U{0}));
  }
};
struct InsertField {
  template <typename T>
  static T apply(T a, T b, uint32_t c, uint32_t d) {
    constexpr uint32_t bits = 8 * sizeof(T);
    const uint32_t position = c & 0xff, length = d & 0xff;
    const T field = length < bits ? (T{1} << (length & (bits - 1))) - 1 : ~T{0};
    const T kept = position < bits ? field << (position & (bits - 1)) : T{0};
    return (b & ~kept) | (a << (position & (bits - 1)) & kept);
  }
};

template <bool ShiftAmount>
struct FindLeading {
  template <typename T>
  static uint32_t apply(T a) {
    using U = std::make_unsigned_t<T>;
    const U value = static_cast<U>(std::is_signed_v<T> && a < 0 ? ~a : a);
    if (value == 0) return 0xffffffff;
    const uint32_t zeros = static_cast<uint32_t>(std::countl_zero(value));
    return ShiftAmount ? zeros : 8 * sizeof(T) - 1 - zeros;
  }
};
struct CountZeros {
  template <typename T>
  static uint32_t apply(T a) {
    return static_cast<uint32_t>(std::countl_zero(a));
  }
};
struct CountOnes {
  template <typename T>
  static uint32_t apply(T a) {
    return static_cast<uint32_t>(std::popcount(a));
  }
};
struct Reverse {
  template <typename T>
  static T apply(T a) {
    constexpr T pairs = static_cast<T>(0x5555555555555555),
                fours = static_cast<T>(0x3333333333333333),
                bytes = static_cast<T>(0x0f0f0f0f0f0f0f0f);
    a = (a >> 1 & pairs) | (a & pairs) << 1;
    a = (a >> 2 & fours) | (a & fours) << 2;
    a = (a >> 4 & bytes) | (a & bytes) << 4;
    if constexpr (sizeof(T) == 4) return __builtin_bswap32(a);
    return static_cast<T>(__builtin_bswap64(a));
  }
};

// The offset-th set bit from base, upwards or downwards.
struct FindNth {
  static uint32_t apply(uint32_t mask, uint32_t base, int32_t offset) {
    if (offset == 0) return base < 32 && (mask >> base & 1) ? base : 0xffffffff;
    int64_t left = std::abs(int64_t{offset}) - 1;
    for (int64_t at = base; at >= 0 && at < 32; at += offset > 0 ? 1 : -1)
      if ((mask >> at & 1) && left-- == 0) return static_cast<uint32_t>(at);
    return 0xffffffff;
  }
};

template <bool Wrap, bool Signed>
struct ExtendFrom {
  static uint32_t apply(uint32_t a, uint32_t b) {
    if (!Wrap && b >= 32) return a;
    const uint32_t n = b & 31, outside = ~uint32_t{0} << n;
    const bool negative = Signed && n != 0 && (a >> (n - 1) & 1);
    return (a & ~outside) | (negative ? outside : 0);
  }
};
template <bool Wrap>
struct FieldMask {
  static uint32_t apply(uint32_t a, uint32_t b) {
    const uint32_t position = Wrap ? a & 31 : std::min(a, 32u);
    const uint32_t length = Wrap ? b & 31 : std::min(b, 32u);
    return static_cast<uint32_t>(((uint64_t{1} << length) - 1) << position);
  }
};

struct Permute {
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t c) {
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    uint32_t result = 0;
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t control = c >> (4 * i);
      const uint32_t byte = static_cast<uint32_t>(both >> (8 * (control & 7))) & 0xff;
      const uint32_t sign = 0xff & (0 - (byte >> 7));
      result |= (control & 8 ? sign : byte) << (8 * i);
    }
    return result;
  }
};

// A special mode equals the general one with a selector chosen by c[1:0].
struct PermuteMode {
  const char* name;
  uint32_t selectors[4];
};
constexpr PermuteMode kPermuteModes[] = {
    {"f4e", {0x3210, 0x4321, 0x5432, 0x6543}}, {"b4e", {0x5670, 0x6701, 0x7012, 0x0123}},
    {"rc8", {0x0000, 0x1111, 0x2222, 0x3333}}, {"ecl", {0x3210, 0x3211, 0x3222, 0x3333}},
    {"ecr", {0x0000, 0x1110, 0x2210, 0x3210}}, {"rc16", {0x1010, 0x3232, 0x1010, 0x3232}},
};
void permute_mode(Warp& warp, const Instruction& in, Mask mask) {
  const uint32_t *a = lanes<const uint32_t>(warp, in.slots[1]),
                 *b = lanes<const uint32_t>(warp, in.slots[2]),
                 *c = lanes<const uint32_t>(warp, in.slots[3]);
  alignas(64) uint32_t values[kLanes];
  for (int i = 0; i < kLanes; ++i)
    values[i] = Permute::apply(a[i], b[i], kPermuteModes[in.variant].selectors[c[i] & 3]);
  assign(lanes<uint32_t>(warp, in.slots[0]), values, mask);
}

// in.variant is the function's truth table: bit 4a + 2b + c. Slots: d, p, a, b, c, table, q.
void logic3(Warp& warp, const Instruction& in, Mask mask) {
  const uint32_t *a = lanes<const uint32_t>(warp, in.slots[2]),
                 *b = lanes<const uint32_t>(warp, in.slots[3]),
                 *c = lanes<const uint32_t>(warp, in.slots[4]);
  uint32_t table[8];
  for (int i = 0; i < 8; ++i) table[i] = 0 - (in.variant >> i & 1u);
  alignas(64) uint32_t values[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const auto choose = [](uint32_t where, uint32_t one, uint32_t zero) {
      return (where & one) | (~where & zero);
    };
    values[i] = choose(
        a[i], choose(b[i], choose(c[i], table[7], table[6]), choose(c[i], table[5], table[4])),
        choose(b[i], choose(c[i], table[3], table[2]), choose(c[i], table[1], table[0])));
  }
  if (in.slots[1] != kNoSlot) {
    Mask nonzero = 0;
    for (int i = 0; i < kLanes; ++i) nonzero |= static_cast<Mask>(values[i] != 0) << i;
    const Mask q = read_predicate(warp, in.slots[5], in.flags & 2);
    assign_predicate(warp, in.slots[1], in.flags & 1 ? nonzero & q : nonzero | q, mask);
  }
  if (in.slots[0] != kNoSlot) assign(lanes<uint32_t>(warp, in.slots[0]), values, mask);
}

// in.flags: bit i negates source i.
template <typename Op, int Sources>
void predicate_logic(Warp& warp, const Instruction& in, Mask mask) {
  const Mask a = read_predicate(warp, in.slots[1], in.flags & 1);
  if constexpr (Sources == 1) {
    assign_predicate(warp, in.slots[0], Op::apply(a), mask);
  } else {
    const Mask b = read_predicate(warp, in.slots[2], in.flags & 2);
    assign_predicate(warp, in.slots[0], Op::apply(a, b), mask);
  }
}

template <typename Op, int Sources>
void decode_logic(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  const std::string type = modifiers.take_type();
  modifiers.finish();
  if (type == "pred" && !std::is_same_v<Op, LogicalNot>) {
    in.run = predicate_logic<Op, Sources>;
    expect_operands(decoder, statement, Sources + 1);
    decoder.write(statement.operands[0], 1);
    for (int i = 0; i < Sources; ++i)
      if (read_predicate_operand(decoder, statement.operands[static_cast<size_t>(i) + 1]))
        in.flags |= static_cast<uint8_t>(1 << i);
    return;
  }
  if (type[0] == 'b')
    in.run = with_integer(type, []<typename T>(T) -> Handler {
      if constexpr (Sources == 1)
        return map_lanes<Op, T, T>;
      else
        return map_lanes<Op, T, T, T>;
    });
  if (!in.run) decoder.fail("type ." + type + " is not supported here");
  read_operands(decoder, statement, Sources + 1, bits_of_type(type));
}

uint32_t table_of(Decoder& decoder, const std::string& operand) {
  uint64_t value = 0;
  if (!parse_count(operand, 255, value))
    decoder.fail("the table must be a number from 0 to 255, got '" + operand + "'");
  return static_cast<uint32_t>(value);
}

void decode_lop3(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  if (modifiers.take_type() != "b32") decoder.fail("lop3 needs .b32");
  const bool both = modifiers.take("and"), either = modifiers.take("or");
  modifiers.finish();
  const bool test = both || either;
  expect_operands(decoder, statement, test ? 6 : 5);
  const auto [d, p] = split_pair(statement.operands[0]);
  decoder.write(d, 32);
  decoder.write(p, 1);
  for (size_t i = 1; i < 4; ++i) decoder.read(statement.operands[i], 32);
  in.variant = static_cast<uint8_t>(table_of(decoder, statement.operands[4]));
  in.flags = both ? 1 : 0;
  if (test && read_predicate_operand(decoder, statement.operands[5])) in.flags |= 2;
  in.run = logic3;
}

void decode_shift(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  const std::string type = modifiers.take_type();
  modifiers.finish();
  const bool left = statement.opcode[0] == "shl";
  in.run = with_integer(type, [&]<typename T>(T) -> Handler {
    return left ? Handler{map_lanes<ShiftLeft, T, T, uint32_t>}
                : Handler{map_lanes<ShiftRight, T, T, uint32_t>};
  });
  if (!in.run || (left && type[0] != 'b')) decoder.fail("type ." + type + " is not supported here");
  expect_operands(decoder, statement, 3);
  decoder.write(statement.operands[0], bits_of_type(type));
  decoder.read(statement.operands[1], bits_of_type(type));
  decoder.read(statement.operands[2], 32);
}

// Opcodes whose operands have their own widths: destination, then sources.
void finish_fields(Decoder& decoder, const Statement& statement, const Instruction& in,
                   const std::string& type, std::initializer_list<int> bits) {
  if (!in.run) decoder.fail("type ." + type + " is not supported here");
  expect_operands(decoder, statement, bits.size());
  size_t i = 0;
  for (const int width : bits) {
    if (i == 0)
      decoder.write(statement.operands[i], width);
    else
      decoder.read(statement.operands[i], width);
    ++i;
  }
}

// b32 and b64, or the integer types of these widths.
template <typename F>
Handler with_bit_word(const std::string& type, F f) {
  if (type == "b32") return f(uint32_t{});
  if (type == "b64") return f(uint64_t{});
  return nullptr;
}
template <typename F>
Handler with_integer_word(const std::string& type, F f) {
  if (type == "u32") return f(uint32_t{});
  if (type == "s32") return f(int32_t{});
  if (type == "u64") return f(uint64_t{});
  if (type == "s64") return f(int64_t{});
  return nullptr;
}

void decode_field(Decoder& decoder, const Statement& statement, Instruction& in) {
  const std::string& name = statement.opcode[0];
  Modifiers modifiers(decoder, statement);
  const std::string type = modifiers.take_type();
  const int bits = bits_of_type(type);
  if (name == "bfe") {
    in.run = with_integer_word(type, []<typename T>(T) -> Handler {
      return map_lanes<ExtractField, T, T, uint32_t, uint32_t>;
    });
    finish_fields(decoder, statement, in, type, {bits, bits, 32, 32});
  } else if (name == "bfi") {
    in.run = with_bit_word(type, []<typename T>(T) -> Handler {
      return map_lanes<InsertField, T, T, T, uint32_t, uint32_t>;
    });
    finish_fields(decoder, statement, in, type, {bits, bits, bits, 32, 32});
  } else if (name == "bfind") {
    const bool amount = modifiers.take("shiftamt");
    in.run = with_integer_word(type, [&]<typename T>(T) -> Handler {
      return amount ? Handler{map_lanes<FindLeading<true>, uint32_t, T>}
                    : Handler{map_lanes<FindLeading<false>, uint32_t, T>};
    });
    finish_fields(decoder, statement, in, type, {32, bits});
  } else if (name == "brev") {
    in.run = with_bit_word(type, []<typename T>(T) -> Handler { return map_lanes<Reverse, T, T>; });
    finish_fields(decoder, statement, in, type, {bits, bits});
  } else {
    in.run = with_bit_word(type, [&]<typename T>(T) -> Handler {
      return name == "clz" ? Handler{map_lanes<CountZeros, uint32_t, T>}
                           : Handler{map_lanes<CountOnes, uint32_t, T>};
    });
    finish_fields(decoder, statement, in, type, {32, bits});
  }
  modifiers.finish();
}

// shf, szext, bmsk and fns: 32 bits throughout, .clamp or .wrap.
void decode_word(Decoder& decoder, const Statement& statement, Instruction& in) {
  const std::string& name = statement.opcode[0];
  Modifiers modifiers(decoder, statement);
  const std::string type = modifiers.take_type();
  using W = uint32_t;
  if (name == "fns") {
    if (type == "b32") in.run = map_lanes<FindNth, W, W, W, int32_t>;
    finish_fields(decoder, statement, in, type, {32, 32, 32, 32});
    return modifiers.finish();
  }
  const bool wrap = modifiers.take("wrap");
  if (!wrap && !modifiers.take("clamp")) decoder.fail("needs .clamp or .wrap");
  if (name == "shf") {
    const bool left = modifiers.take("l");
    if (!left && !modifiers.take("r")) decoder.fail("shf needs .l or .r");
    if (type == "b32")
      in.run = left ? (wrap ? Handler{map_lanes<FunnelShift<true, true>, W, W, W, W>}
                            : Handler{map_lanes<FunnelShift<true, false>, W, W, W, W>})
                    : (wrap ? Handler{map_lanes<FunnelShift<false, true>, W, W, W, W>}
                            : Handler{map_lanes<FunnelShift<false, false>, W, W, W, W>});
    finish_fields(decoder, statement, in, type, {32, 32, 32, 32});
  } else {
    if (name == "szext" && type == "u32")
      in.run = wrap ? Handler{map_lanes<ExtendFrom<true, false>, W, W, W>}
                    : Handler{map_lanes<ExtendFrom<false, false>, W, W, W>};
    if (name == "szext" && type == "s32")
      in.run = wrap ? Handler{map_lanes<ExtendFrom<true, true>, W, W, W>}
                    : Handler{map_lanes<ExtendFrom<false, true>, W, W, W>};
    if (name == "bmsk" && type == "b32")
      in.run = wrap ? Handler{map_lanes<FieldMask<true>, W, W, W>}
                    : Handler{map_lanes<FieldMask<false>, W, W, W>};
    finish_fields(decoder, statement, in, type, {32, 32, 32});
  }
  modifiers.finish();
}

void decode_prmt(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  if (!modifiers.take("b32")) decoder.fail("prmt needs .b32");
  in.run = map_lanes<Permute, uint32_t, uint32_t, uint32_t, uint32_t>;
  for (size_t i = 0; i < std::size(kPermuteModes); ++i) {
    if (!modifiers.take(kPermuteModes[i].name)) continue;
    in.variant = static_cast<uint8_t>(i);
    in.run = permute_mode;
  }
  modifiers.finish();
  read_operands(decoder, statement, 4, 32);
}

}  // namespace

void add_bit_operations(OpcodeTable& table) {
  table["and"] = decode_logic<And, 2>;
  table["or"] = decode_logic<Or, 2>;
  table["xor"] = decode_logic<Xor, 2>;
  table["not"] = decode_logic<Not, 1>;
  table["cnot"] = decode_logic<LogicalNot, 1>;
  table["lop3"] = decode_lop3;
  table["shl"] = table["shr"] = decode_shift;
  for (const char* name : {"bfe", "bfi", "bfind", "brev", "clz", "popc"})
    table[name] = decode_field;
  for (const char* name : {"shf", "szext", "bmsk", "fns"}) table[name] = decode_word;
  table["prmt"] = decode_prmt;
}

}  // namespace ptxvm
