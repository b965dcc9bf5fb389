// Integer arithmetic: add sub mul mad min max neg abs div rem sad mul24 mad24 dp4a dp2a vabsdiff4
// and the extended-precision forms with CC.CF. Wraps modulo 2^n unless .sat.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "ptxvm/ops_arithmetic.h"

namespace ptxvm {
namespace {

// Unsigned type of the same width, at least as wide as int so that nothing is promoted to int.
template <typename T>
using Unsigned = std::conditional_t<sizeof(T) < 4, uint32_t, std::make_unsigned_t<T>>;

template <typename T>
struct WiderOf;
template <>
struct WiderOf<uint16_t> {
  using type = uint32_t;
};
template <>
struct WiderOf<int16_t> {
  using type = int32_t;
};
template <>
struct WiderOf<uint32_t> {
  using type = uint64_t;
};
template <>
struct WiderOf<int32_t> {
  using type = int64_t;
};
template <>
struct WiderOf<uint64_t> {
  using type = unsigned __int128;
};
template <>
struct WiderOf<int64_t> {
  using type = __int128;
};
template <typename T>
using Wider = typename WiderOf<T>::type;

template <typename T>
T saturate(int64_t x) {
  return static_cast<T>(
      std::clamp<int64_t>(x, std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
}

struct Add {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(static_cast<Unsigned<T>>(a) + static_cast<Unsigned<T>>(b));
  }
};
struct Subtract {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(static_cast<Unsigned<T>>(a) - static_cast<Unsigned<T>>(b));
  }
};
struct AddSaturated {
  static int32_t apply(int32_t a, int32_t b) { return saturate<int32_t>(int64_t{a} + b); }
};
struct SubtractSaturated {
  static int32_t apply(int32_t a, int32_t b) { return saturate<int32_t>(int64_t{a} - b); }
};
struct MultiplyLow {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(static_cast<Unsigned<T>>(a) * static_cast<Unsigned<T>>(b));
  }
};
struct MultiplyHigh {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(static_cast<Wider<T>>(a) * static_cast<Wider<T>>(b) >> (8 * sizeof(T)));
  }
};
struct MultiplyWide {
  template <typename T>
  static Wider<T> apply(T a, T b) {
    return static_cast<Wider<T>>(a) * static_cast<Wider<T>>(b);
  }
};
template <typename Multiply>
struct MultiplyAdd {
  template <typename T, typename C>
  static C apply(T a, T b, C c) {
    return Add::apply<C>(Multiply::apply(a, b), c);
  }
};
struct MultiplyHighAddSaturated {
  static int32_t apply(int32_t a, int32_t b, int32_t c) {
    return saturate<int32_t>(int64_t{MultiplyHigh::apply(a, b)} + c);
  }
};
struct Minimum {
  template <typename T>
  static T apply(T a, T b) {
    return a < b ? a : b;
  }
};
struct Maximum {
  template <typename T>
  static T apply(T a, T b) {
    return a > b ? a : b;
  }
};
struct Negate {
  template <typename T>
  static T apply(T a) {
    return Subtract::apply<T>(0, a);
  }
};
struct Absolute {
  template <typename T>
  static T apply(T a) {
    return a < 0 ? Subtract::apply<T>(0, a) : a;
  }
};
// PTX leaves division by zero undefined: the result is all ones and the remainder the dividend, as
// in the code that ptxas emits for 32 bits.
struct Divide {
  template <typename T>
  static T apply(T a, T b) {
    if (b == 0) return static_cast<T>(~T{0});
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return Subtract::apply<T>(0, a);
    return static_cast<T>(a / b);
  }
};
struct Remainder {
  template <typename T>
  static T apply(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
  }
};
struct SumOfDifferences {
  template <typename T>
  static T apply(T a, T b, T c) {
    return Add::apply<T>(c, a < b ? Subtract::apply<T>(b, a) : Subtract::apply<T>(a, b));
  }
};

// Bits 47..16 or 31..0 of the product of the low 24 bits.
template <bool High>
struct Multiply24 {
  template <typename T>
  static T apply(T a, T b) {
    const auto low = [](T x) {
      return std::is_signed_v<T> ? int64_t{static_cast<int32_t>(static_cast<uint32_t>(x) << 8) >> 8}
                                 : int64_t{static_cast<uint32_t>(x) & 0xffffff};
    };
    return static_cast<T>(low(a) * low(b) >> (High ? 16 : 0));
  }
};

// Fields of `Bits` bits in a 32-bit register.
template <typename T, int Bits>
int32_t field(T x, int index) {
  const uint32_t raw = static_cast<uint32_t>(x) << (32 - Bits * (index + 1));
  return std::is_signed_v<T> ? static_cast<int32_t>(raw) >> (32 - Bits)
                             : static_cast<int32_t>(raw >> (32 - Bits));
}
struct DotProduct4 {
  template <typename A, typename B>
  static uint32_t apply(A a, B b, uint32_t c) {
    for (int i = 0; i < 4; ++i)
      c += static_cast<uint32_t>(field<A, 8>(a, i)) * static_cast<uint32_t>(field<B, 8>(b, i));
    return c;
  }
};
template <int First>
struct DotProduct2 {
  template <typename A, typename B>
  static uint32_t apply(A a, B b, uint32_t c) {
    for (int i = 0; i < 2; ++i)
      c += static_cast<uint32_t>(field<A, 16>(a, i)) *
           static_cast<uint32_t>(field<B, 8>(b, First + i));
    return c;
  }
};

// CC.CF lives in Warp::carry, one bit per lane.
constexpr uint8_t kCarryIn = 1, kCarryOut = 2;

template <bool Subtraction, typename Product, typename T>
void extended(Warp& warp, const Instruction& in, Mask mask) {
  const T* a = lanes<const T>(warp, in.slots[1]);
  const T* b = lanes<const T>(warp, in.slots[2]);
  Mask carry = 0;
  alignas(64) T values[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    T first = a[i], second = b[i];
    if constexpr (!std::is_void_v<Product>) {
      first = Product::apply(a[i], b[i]);
      second = lanes<const T>(warp, in.slots[3])[i];
    }
    using U = std::make_unsigned_t<T>;
    using Wide = unsigned __int128;
    const Wide x = static_cast<U>(first), y = static_cast<U>(second);
    const Wide incoming = in.flags & kCarryIn ? warp.carry >> i & 1 : 0;
    const Wide result = Subtraction ? x - y - incoming : x + y + incoming;
    values[i] = static_cast<T>(result);
    carry |= static_cast<Mask>(result >> (8 * sizeof(T)) & 1) << i;
  }
  assign(lanes<T>(warp, in.slots[0]), values, mask);
  if (in.flags & kCarryOut) warp.carry = (warp.carry & ~mask) | (carry & mask);
}

template <typename Op>
Handler binary(const std::string& type) {
  return with_integer(type, []<typename T>(T) -> Handler { return map_lanes<Op, T, T, T>; });
}
template <typename Op>
Handler unary_signed(const std::string& type) {
  if (type == "s16") return map_lanes<Op, int16_t, int16_t>;
  if (type == "s32") return map_lanes<Op, int32_t, int32_t>;
  if (type == "s64") return map_lanes<Op, int64_t, int64_t>;
  return nullptr;
}
template <typename Op>
Handler ternary(const std::string& type) {
  return with_integer(type, []<typename T>(T) -> Handler { return map_lanes<Op, T, T, T, T>; });
}
template <bool Subtraction, typename Product>
Handler extended_for(const std::string& type) {
  return with_integer(type, []<typename T>(T) -> Handler {
    if constexpr (sizeof(T) < 4)
      return nullptr;
    else
      return extended<Subtraction, Product, T>;
  });
}

Handler choose_dot(const std::string& name, const std::string& a, const std::string& b, bool high) {
  const auto pick = [&]<typename Op>(Op) -> Handler {
    if (a == "u32" && b == "u32") return map_lanes<Op, uint32_t, uint32_t, uint32_t, uint32_t>;
    if (a == "u32" && b == "s32") return map_lanes<Op, uint32_t, uint32_t, int32_t, uint32_t>;
    if (a == "s32" && b == "u32") return map_lanes<Op, uint32_t, int32_t, uint32_t, uint32_t>;
    if (a == "s32" && b == "s32") return map_lanes<Op, uint32_t, int32_t, int32_t, uint32_t>;
    return nullptr;
  };
  if (name == "dp4a") return pick(DotProduct4{});
  return high ? pick(DotProduct2<2>{}) : pick(DotProduct2<0>{});
}

void decode_dot(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  const std::string b = modifiers.take_type(), a = modifiers.take_type();
  const std::string& name = statement.opcode[0];
  const bool high = name == "dp2a" && modifiers.take("hi");
  if (name == "dp2a" && !high && !modifiers.take("lo")) decoder.fail("dp2a needs .lo or .hi");
  modifiers.finish();
  in.run = choose_dot(name, a, b, high);
  if (!in.run) decoder.fail("types ." + a + "." + b + " are not supported here");
  read_operands(decoder, statement, 4, 32);
}

// All result halves of mul and mad.
Handler choose_product(const std::string& name, const std::string& type, const std::string& part,
                       bool saturated) {
  const bool add = name == "mad";
  if (saturated)
    return add && part == "hi" && type == "s32"
               ? Handler{map_lanes<MultiplyHighAddSaturated, int32_t, int32_t, int32_t, int32_t>}
               : nullptr;
  if (part == "lo")
    return add ? ternary<MultiplyAdd<MultiplyLow>>(type) : binary<MultiplyLow>(type);
  if (part == "hi")
    return add ? ternary<MultiplyAdd<MultiplyHigh>>(type) : binary<MultiplyHigh>(type);
  return with_integer(type, [&]<typename T>(T) -> Handler {
    if constexpr (sizeof(T) == 8) {
      return nullptr;
    } else {
      using W = Wider<T>;
      return add ? Handler{map_lanes<MultiplyAdd<MultiplyWide>, W, T, T, W>}
                 : Handler{map_lanes<MultiplyWide, W, T, T>};
    }
  });
}

void decode_product(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  const std::string type = modifiers.take_type();
  const std::string part = modifiers.take("lo")     ? "lo"
                           : modifiers.take("hi")   ? "hi"
                           : modifiers.take("wide") ? "wide"
                                                    : "";
  if (part.empty()) decoder.fail("needs .lo, .hi or .wide");
  const std::string& name = statement.opcode[0];
  const bool extended = modifiers.take("cc") || name == "madc";
  if (extended) {
    in.flags = (name == "madc" ? kCarryIn : 0) | (statement.has("cc") ? kCarryOut : 0);
    if (name == "mul") decoder.fail("modifier .cc is not supported here");
    if (part == "lo") in.run = extended_for<false, MultiplyLow>(type);
    if (part == "hi") in.run = extended_for<false, MultiplyHigh>(type);
  } else {
    in.run = choose_product(name, type, part, modifiers.take("sat"));
  }
  modifiers.finish();
  if (!in.run) decoder.fail("type ." + type + " is not supported here");
  const int bits = bits_of_type(type), wide = part == "wide" ? 2 * bits : bits;
  expect_operands(decoder, statement, name == "mul" ? 3 : 4);
  decoder.write(statement.operands[0], wide);
  decoder.read(statement.operands[1], bits);
  decoder.read(statement.operands[2], bits);
  if (name != "mul") decoder.read(statement.operands[3], wide);
}

void decode_24_bits(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  const std::string type = modifiers.take_type();
  const bool high = modifiers.take("hi");
  if (!high && !modifiers.take("lo")) decoder.fail("needs .lo or .hi");
  modifiers.finish();
  const bool add = statement.opcode[0] == "mad24";
  const auto pick = [&]<typename T>(T) -> Handler {
    if (add)
      return high ? Handler{map_lanes<MultiplyAdd<Multiply24<true>>, T, T, T, T>}
                  : Handler{map_lanes<MultiplyAdd<Multiply24<false>>, T, T, T, T>};
    return high ? Handler{map_lanes<Multiply24<true>, T, T, T>}
                : Handler{map_lanes<Multiply24<false>, T, T, T>};
  };
  if (type == "u32") in.run = pick(uint32_t{});
  if (type == "s32") in.run = pick(int32_t{});
  if (!in.run) decoder.fail("type ." + type + " is not supported here");
  read_operands(decoder, statement, add ? 4 : 3, 32);
}

// vabsdiff4: absolute differences of the bytes of a and b, whose signedness is in the flags; with
// .add, their sum plus c.
template <bool sums>
void differences(Warp& warp, const Instruction& in, Mask mask) {
  const auto *a = lanes<const uint32_t>(warp, in.slots[1]),
             *b = lanes<const uint32_t>(warp, in.slots[2]),
             *c = lanes<const uint32_t>(warp, in.slots[3]);
  const auto byte = [](uint32_t word, int j, bool is_signed) {
    const auto bits = static_cast<uint8_t>(word >> (8 * j));
    return is_signed ? static_cast<int8_t>(bits) : bits;
  };
  alignas(64) uint32_t values[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    values[i] = sums ? c[i] : 0;
    for (int j = 0; j < 4; ++j) {
      const int difference = byte(a[i], j, in.flags & 1) - byte(b[i], j, in.flags & 2);
      const auto size = static_cast<uint32_t>(difference < 0 ? -difference : difference);
      values[i] += sums ? size : (size & 255) << (8 * j);
    }
  }
  assign(lanes<uint32_t>(warp, in.slots[0]), values, mask);
}

}  // namespace

void decode_integer(Decoder& decoder, const Statement& statement, Instruction& in) {
  const std::string& name = statement.opcode[0];
  if (name == "dp4a" || name == "dp2a") return decode_dot(decoder, statement, in);
  if (name == "mul" || name == "mad" || name == "madc")
    return decode_product(decoder, statement, in);
  if (name == "mul24" || name == "mad24") return decode_24_bits(decoder, statement, in);
  Modifiers modifiers(decoder, statement);
  const std::string type = modifiers.take_type();
  size_t operands = 3;
  if (name == "add" || name == "sub" || name == "addc" || name == "subc") {
    const bool subtract = name[0] == 's', carry_in = name.size() == 4;
    const bool carry_out = modifiers.take("cc");
    if (carry_in || carry_out) {
      in.flags = (carry_in ? kCarryIn : 0) | (carry_out ? kCarryOut : 0);
      in.run = subtract ? extended_for<true, void>(type) : extended_for<false, void>(type);
    } else if (modifiers.take("sat")) {
      if (type == "s32")
        in.run = subtract ? Handler{map_lanes<SubtractSaturated, int32_t, int32_t, int32_t>}
                          : Handler{map_lanes<AddSaturated, int32_t, int32_t, int32_t>};
    } else {
      in.run = subtract ? binary<Subtract>(type) : binary<Add>(type);
    }
  } else if (name == "min") {
    in.run = binary<Minimum>(type);
  } else if (name == "max") {
    in.run = binary<Maximum>(type);
  } else if (name == "div") {
    in.run = binary<Divide>(type);
  } else if (name == "rem") {
    in.run = binary<Remainder>(type);
  } else if (name == "sad") {
    operands = 4;
    in.run = ternary<SumOfDifferences>(type);
  } else if (name == "neg" || name == "abs") {
    operands = 2;
    in.run = name == "neg" ? unary_signed<Negate>(type) : unary_signed<Absolute>(type);
  }
  modifiers.finish();
  if (!in.run || type[0] == 'b') decoder.fail("type ." + type + " is not supported here");
  read_operands(decoder, statement, operands, bits_of_type(type));
}

void decode_video(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  const bool sums = modifiers.take("add");
  for (int i = 0; i < 3; ++i) {
    const std::string type = modifiers.take_first("type");
    if (type != "u32" && type != "s32") decoder.fail("type ." + type + " is not supported here");
    if (i > 0) in.flags |= static_cast<uint8_t>((type == "s32") << (i - 1));
  }
  modifiers.finish();
  in.run = sums ? differences<true> : differences<false>;
  read_operands(decoder, statement, 4, 32);
}

}  // namespace ptxvm
