// Arithmetic of f16, bf16 and their pairs: add sub mul fma neg abs min max. A result is rounded
// once: f32 holds sums and products of halves well enough for that, a fused product goes through
// rounding to odd.
#include "ptxvm/ops_arithmetic.h"

namespace ptxvm {
namespace {

// A double as f32, rounded to odd: a second rounding to a half is then as good as a single one.
inline float odd_float(double x) {
  const float value = static_cast<float>(x);
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const double error = x - value;
  const bool adjust = error != 0 && !(bits & 1) && (bits & 0x7f800000) != 0x7f800000;
  const bool outward = (error > 0) == (x > 0);
  return std::bit_cast<float>(adjust ? (outward ? bits + 1 : bits - 1) : bits);
}

struct Add {
  static float apply(float a, float b) { return a + b; }
};
struct Subtract {
  static float apply(float a, float b) { return a - b; }
};
struct Multiply {
  static float apply(float a, float b) { return a * b; }
};
struct Fma {
  static float apply(float a, float b, float c) { return odd_float(odd_fma(a, b, c)); }
};

enum class Limit { none, saturate, relu };

template <bool Ftz, typename T>
T maybe_flush(T x) {
  if constexpr (Ftz)
    return flush(x);
  else
    return x;
}

template <typename Op, bool Ftz, Limit limit>
struct Arithmetic {
  template <typename T, typename... More>
  static T apply(T first, More... more) {
    const float exact =
        Op::apply(to_float(maybe_flush<Ftz>(first)), to_float(maybe_flush<Ftz>(more))...);
    T result = maybe_flush<Ftz>(nearest<T>(exact));
    if constexpr (limit == Limit::saturate) {
      const float value = to_float(result);
      result = value > 0 ? (value < 1 ? result : nearest<T>(1.0f)) : T{0};
    }
    if constexpr (limit == Limit::relu)
      result = is_nan(result) ? T{kNaN16} : (result.bits & 0x8000) ? T{0} : result;
    return result;
  }
};

template <bool Ftz>
struct Negate {
  template <typename T>
  static T apply(T a) {
    return {static_cast<uint16_t>(maybe_flush<Ftz>(a).bits ^ 0x8000)};
  }
};
template <bool Ftz>
struct Absolute {
  template <typename T>
  static T apply(T a) {
    return {static_cast<uint16_t>(maybe_flush<Ftz>(a).bits & 0x7fff)};
  }
};

// -0 < +0; a NaN loses against a number, or wins with .NaN.
template <bool Max, bool Nan, bool Ftz, bool Magnitude>
struct Extreme {
  template <typename T>
  static T apply(T a, T b) {
    a = maybe_flush<Ftz>(a);
    b = maybe_flush<Ftz>(b);
    const uint32_t sign_of_both = (a.bits ^ b.bits) & 0x8000u;
    if constexpr (Magnitude) a.bits &= 0x7fff, b.bits &= 0x7fff;
    // Order of signed magnitudes as integers, -0 below +0.
    const auto key = [](T x) { return x.bits & 0x8000 ? -1 - (x.bits & 0x7fff) : x.bits & 0x7fff; };
    uint32_t result = (Max ? key(a) > key(b) : key(a) < key(b)) ? a.bits : b.bits;
    result = is_nan(b) ? a.bits : is_nan(a) ? b.bits : result;
    if constexpr (Magnitude) result |= sign_of_both;
    const bool invalid = Nan ? is_nan(a) || is_nan(b) : is_nan(a) && is_nan(b);
    return {static_cast<uint16_t>(invalid ? kNaN16 : result)};
  }
};

// Op on both halves of 32-bit registers.
template <typename Op, typename T>
struct Pair {
  template <typename... S>
  static uint32_t apply(S... operands) {
    const T low = Op::apply(T{static_cast<uint16_t>(operands)}...);
    const T high = Op::apply(T{static_cast<uint16_t>(operands >> 16)}...);
    return low.bits | static_cast<uint32_t>(high.bits) << 16;
  }
};

template <typename Op, int Operands>
Handler by_type(const std::string& type) {
  const auto pick = [&]<typename T, typename V>() -> Handler {
    using O = std::conditional_t<std::is_same_v<T, V>, Op, Pair<Op, T>>;
    if constexpr (Operands == 1) return map_lanes<O, V, V>;
    if constexpr (Operands == 2) return map_lanes<O, V, V, V>;
    if constexpr (Operands == 3) return map_lanes<O, V, V, V, V>;
  };
  if (type == "f16") return pick.template operator()<Half, Half>();
  if (type == "f16x2") return pick.template operator()<Half, uint32_t>();
  if (type == "bf16") return pick.template operator()<BFloat, BFloat>();
  return pick.template operator()<BFloat, uint32_t>();
}

template <typename Op, int Operands>
Handler choose_arithmetic(const std::string& type, bool ftz, Limit limit) {
  if (type[0] == 'b') {  // bf16 has neither .ftz nor .sat
    if (ftz || limit == Limit::saturate) return nullptr;
    return limit == Limit::relu ? by_type<Arithmetic<Op, false, Limit::relu>, Operands>(type)
                                : by_type<Arithmetic<Op, false, Limit::none>, Operands>(type);
  }
  const auto pick = [&]<bool Ftz>() -> Handler {
    if (limit == Limit::relu) return by_type<Arithmetic<Op, Ftz, Limit::relu>, Operands>(type);
    if (limit == Limit::saturate)
      return by_type<Arithmetic<Op, Ftz, Limit::saturate>, Operands>(type);
    return by_type<Arithmetic<Op, Ftz, Limit::none>, Operands>(type);
  };
  return ftz ? pick.template operator()<true>() : pick.template operator()<false>();
}

template <bool Max>
Handler choose_extreme(const std::string& type, bool nan, bool ftz, bool magnitude) {
  const auto pick = [&]<bool N, bool F>() -> Handler {
    return magnitude ? by_type<Extreme<Max, N, F, true>, 2>(type)
                     : by_type<Extreme<Max, N, F, false>, 2>(type);
  };
  if (nan)
    return ftz ? pick.template operator()<true, true>() : pick.template operator()<true, false>();
  return ftz ? pick.template operator()<false, true>() : pick.template operator()<false, false>();
}

}  // namespace

void decode_half(Decoder& decoder, const Statement& statement, Instruction& in) {
  const std::string& name = statement.opcode[0];
  Modifiers modifiers(decoder, statement);
  const std::string type = modifiers.take_type();
  const bool ftz = modifiers.take("ftz");
  if (ftz && type[0] == 'b') decoder.fail("modifier .ftz is not supported here");
  size_t operands = 3;
  if (name == "min" || name == "max") {
    const bool nan = modifiers.take("NaN"), magnitude = modifiers.take("xorsign");
    if (magnitude && !modifiers.take("abs")) decoder.fail(".xorsign needs .abs");
    in.run = name == "max" ? choose_extreme<true>(type, nan, ftz, magnitude)
                           : choose_extreme<false>(type, nan, ftz, magnitude);
  } else if (name == "neg" || name == "abs") {
    operands = 2;
    in.run = name == "neg"
                 ? (ftz ? by_type<Negate<true>, 1>(type) : by_type<Negate<false>, 1>(type))
                 : (ftz ? by_type<Absolute<true>, 1>(type) : by_type<Absolute<false>, 1>(type));
  } else {
    const bool rounded = modifiers.take("rn");
    Limit limit = modifiers.take("sat") ? Limit::saturate : Limit::none;
    if (name == "add") in.run = choose_arithmetic<Add, 2>(type, ftz, limit);
    if (name == "sub") in.run = choose_arithmetic<Subtract, 2>(type, ftz, limit);
    if (name == "mul") in.run = choose_arithmetic<Multiply, 2>(type, ftz, limit);
    if (name == "fma") {
      if (!rounded) decoder.fail("needs .rn");
      if (limit == Limit::none && modifiers.take("relu")) limit = Limit::relu;
      operands = 4;
      in.run = choose_arithmetic<Fma, 3>(type, ftz, limit);
    }
  }
  modifiers.finish();
  if (!in.run) decoder.fail("type ." + type + " is not supported here");
  read_operands(decoder, statement, operands, bits_of_type(type));
}

}  // namespace ptxvm
