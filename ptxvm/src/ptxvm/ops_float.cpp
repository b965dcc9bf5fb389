// Arithmetic of f32 and f64: add sub mul fma mad min max neg abs copysign testp div.
#include <algorithm>

#include "ptxvm/ops_approximate.h"
#include "ptxvm/ops_arithmetic.h"

namespace ptxvm {
namespace {

struct Add {
  template <typename T>
  static T apply(T a, T b) {
    return a + b;
  }
};
struct Subtract {
  template <typename T>
  static T apply(T a, T b) {
    return a - b;
  }
};
struct Multiply {
  template <typename T>
  static T apply(T a, T b) {
    return a * b;
  }
};
struct Fma {
  static float apply(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static double apply(double a, double b, double c) { return __builtin_fma(a, b, c); }
};
struct Divide {
  template <typename T>
  static T apply(T a, T b) {
    return a / b;
  }
};
struct Reciprocal {
  template <typename T>
  static T apply(T a) {
    return T{1} / a;
  }
};
struct SquareRoot {
  static float apply(float a) { return __builtin_sqrtf(a); }
  static double apply(double a) { return __builtin_sqrt(a); }
};

// f64 keeps the payload of its first NaN operand; an invalid operation gives a negative NaN.
template <typename... T>
double first_nan(double result, T... operands) {
  if (result == result) return result;
  uint64_t bits = kNaN64;
  bool found = false;
  ((bits =
        !found && is_nan(operands) ? std::bit_cast<uint64_t>(operands) | uint64_t{1} << 51 : bits,
    found = found || is_nan(operands)),
   ...);
  return std::bit_cast<double>(bits);
}

template <typename Op, bool Ftz, bool Saturate>
struct Arithmetic {
  template <typename... T>
  static float apply(T... operands)
    requires(std::is_same_v<T, float> && ...)
  {
    float result;
    if constexpr (Ftz)
      result = flush(Op::apply(flush(operands)...));
    else
      result = Op::apply(operands...);
    if constexpr (Saturate) return result > 0 ? (result < 1 ? result : 1.0f) : 0.0f;
    return canonical(result);
  }
  template <typename... T>
  static double apply(T... operands)
    requires(std::is_same_v<T, double> && ...)
  {
    return first_nan(Op::apply(operands...), operands...);
  }
};

// The operation with the directed rounding in in.variant.
template <typename Op, typename T, typename... S>
void directed(Warp& warp, const Instruction& in, Mask mask) {
  RoundingScope scope(static_cast<Rounding>(in.variant));
  map_lanes<Op, T, S...>(warp, in, mask);
}

template <typename Op, typename... S>
Handler choose_rounded(const std::string& type, Rounding rounding, bool ftz, bool saturate) {
  if (type == "f64") {
    if (ftz || saturate) return nullptr;
    using A = Arithmetic<Op, false, false>;
    return rounding == Rounding::nearest
               ? Handler{map_lanes<A, double, std::conditional_t<true, double, S>...>}
               : Handler{directed<A, double, std::conditional_t<true, double, S>...>};
  }
  const auto pick = [&]<typename A>(A) -> Handler {
    return rounding == Rounding::nearest ? Handler{map_lanes<A, float, S...>}
                                         : Handler{directed<A, float, S...>};
  };
  if (ftz && saturate) return pick(Arithmetic<Op, true, true>{});
  if (ftz) return pick(Arithmetic<Op, true, false>{});
  if (saturate) return pick(Arithmetic<Op, false, true>{});
  return pick(Arithmetic<Op, false, false>{});
}

template <bool Ftz>
float maybe_flush(float x) {
  return Ftz ? flush(x) : x;
}

// -0 < +0. With one NaN operand the number is returned, or NaN with .NaN.
template <bool Max, bool Nan, bool Ftz, bool Magnitude>
struct Extreme {
  template <typename T>
  static T apply(T a, T b) {
    using U = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    constexpr U sign = U{1} << (8 * sizeof(T) - 1);
    if constexpr (Ftz) a = flush(a), b = flush(b);
    U x = std::bit_cast<U>(a), y = std::bit_cast<U>(b);
    const U sign_of_both = Magnitude ? (x ^ y) & sign : 0;
    if constexpr (Magnitude) x &= ~sign, y &= ~sign;
    const U p = x & ~sign, q = y & ~sign;
    const bool nan_a = p > Format<T>::infinity, nan_b = q > Format<T>::infinity;
    // Order of sign-magnitude numbers as integers, -0 below +0.
    using I = std::make_signed_t<U>;
    const I i = static_cast<I>(x ^ (static_cast<U>(static_cast<I>(x) >> (8 * sizeof(T) - 1)) >> 1));
    const I j = static_cast<I>(y ^ (static_cast<U>(static_cast<I>(y) >> (8 * sizeof(T) - 1)) >> 1));
    U result = choose(Max ? i > j : i < j, x, y);
    result = choose(nan_b, x, choose(nan_a, y, result)) | sign_of_both;
    return std::bit_cast<T>(
        choose(Nan ? nan_a | nan_b : nan_a & nan_b, static_cast<U>(Format<T>::nan), result));
  }
};

template <bool Max>
Handler choose_extreme(const std::string& type, bool nan, bool ftz, bool magnitude) {
  if (type == "f64")
    return nan || ftz || magnitude
               ? nullptr
               : Handler{map_lanes<Extreme<Max, false, false, false>, double, double, double>};
  const auto pick = [&]<bool N, bool F>() -> Handler {
    return magnitude ? Handler{map_lanes<Extreme<Max, N, F, true>, float, float, float>}
                     : Handler{map_lanes<Extreme<Max, N, F, false>, float, float, float>};
  };
  if (nan)
    return ftz ? pick.template operator()<true, true>() : pick.template operator()<true, false>();
  return ftz ? pick.template operator()<false, true>() : pick.template operator()<false, false>();
}

// Sign operations keep the payload of a NaN.
template <bool Ftz>
struct Negate {
  static float apply(float a) {
    return std::bit_cast<float>(std::bit_cast<uint32_t>(maybe_flush<Ftz>(a)) ^ 0x80000000u);
  }
  static double apply(double a) {
    return std::bit_cast<double>(std::bit_cast<uint64_t>(a) ^ uint64_t{1} << 63);
  }
};
template <bool Ftz>
struct Absolute {
  static float apply(float a) {
    return std::bit_cast<float>(std::bit_cast<uint32_t>(maybe_flush<Ftz>(a)) & 0x7fffffffu);
  }
  static double apply(double a) {
    return std::bit_cast<double>(std::bit_cast<uint64_t>(a) & ~(uint64_t{1} << 63));
  }
};
struct CopySign {
  static uint32_t apply(uint32_t a, uint32_t b) { return (a & 0x80000000u) | (b & 0x7fffffffu); }
  static uint64_t apply(uint64_t a, uint64_t b) {
    return (a & uint64_t{1} << 63) | (b & ~(uint64_t{1} << 63));
  }
};

template <template <bool> typename Op>
Handler choose_sign(const std::string& type, bool ftz) {
  if (type == "f64") return ftz ? nullptr : Handler{map_lanes<Op<false>, double, double>};
  return ftz ? Handler{map_lanes<Op<true>, float, float>}
             : Handler{map_lanes<Op<false>, float, float>};
}

enum class Property : uint8_t { finite, infinite, number, notanumber, normal, subnormal };

template <typename U, U Infinity, U Least>
void test_property(Warp& warp, const Instruction& in, Mask mask) {
  const U* bits = lanes<const U>(warp, in.slots[1]);
  Mask result = 0;
  for (int i = 0; i < kLanes; ++i) {
    const U magnitude = bits[i] & (static_cast<U>(~U{0}) >> 1);
    bool holds = false;
    switch (static_cast<Property>(in.variant)) {
      case Property::finite:
        holds = magnitude < Infinity;
        break;
      case Property::infinite:
        holds = magnitude == Infinity;
        break;
      case Property::number:
        holds = magnitude <= Infinity;
        break;
      case Property::notanumber:
        holds = magnitude > Infinity;
        break;
      case Property::normal:
        holds = magnitude == 0 || (magnitude >= Least && magnitude < Infinity);
        break;
      case Property::subnormal:
        holds = magnitude != 0 && magnitude < Least;
        break;
    }
    result |= static_cast<Mask>(holds) << i;
  }
  assign_predicate(warp, in.slots[0], result, mask);
}

void decode_testp(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  const std::string type = modifiers.take_type();
  static constexpr const char* names[] = {"finite",     "infinite", "number",
                                          "notanumber", "normal",   "subnormal"};
  const std::string name = modifiers.take_first("property");
  const auto found = std::find(std::begin(names), std::end(names), name);
  if (found == std::end(names)) decoder.fail("property ." + name + " is not known");
  modifiers.finish();
  in.variant = static_cast<uint8_t>(found - std::begin(names));
  in.run = type == "f32" ? Handler{test_property<uint32_t, 0x7f800000, 0x00800000>}
                         : Handler{test_property<uint64_t, 0x7ff0000000000000, 0x0010000000000000>};
  expect_operands(decoder, statement, 2);
  decoder.write(statement.operands[0], 1);
  decoder.read(statement.operands[1], bits_of_type(type));
}

}  // namespace

Handler rounded_reciprocal(const std::string& type, Rounding rounding, bool ftz) {
  return choose_rounded<Reciprocal, float>(type, rounding, ftz, false);
}
Handler rounded_square_root(const std::string& type, Rounding rounding, bool ftz) {
  return choose_rounded<SquareRoot, float>(type, rounding, ftz, false);
}

void decode_float(Decoder& decoder, const Statement& statement, Instruction& in) {
  const std::string& name = statement.opcode[0];
  if (name == "testp") return decode_testp(decoder, statement, in);
  Modifiers modifiers(decoder, statement);
  const std::string type = modifiers.take_type();
  const bool ftz = modifiers.take("ftz");
  size_t operands = 3;
  if (name == "min" || name == "max") {
    const bool nan = modifiers.take("NaN"), magnitude = modifiers.take("xorsign");
    if (magnitude && !modifiers.take("abs")) decoder.fail(".xorsign needs .abs");
    in.run = name == "max" ? choose_extreme<true>(type, nan, ftz, magnitude)
                           : choose_extreme<false>(type, nan, ftz, magnitude);
  } else if (name == "neg" || name == "abs") {
    operands = 2;
    in.run = name == "neg" ? choose_sign<Negate>(type, ftz) : choose_sign<Absolute>(type, ftz);
  } else if (name == "copysign") {
    in.run = type == "f64" ? Handler{map_lanes<CopySign, uint64_t, uint64_t, uint64_t>}
                           : Handler{map_lanes<CopySign, uint32_t, uint32_t, uint32_t>};
    if (ftz) decoder.fail("modifier .ftz is not supported here");
  } else if (name == "div" && (modifiers.take("approx") || modifiers.take("full"))) {
    if (type == "f32") in.run = approximate_division(statement.has("full"), ftz);
  } else {
    bool found = false;
    const Rounding rounding = modifiers.take_rounding(&found);
    in.variant = static_cast<uint8_t>(rounding);
    const bool saturate = name != "div" && modifiers.take("sat");
    if (name == "add") in.run = choose_rounded<Add, float, float>(type, rounding, ftz, saturate);
    if (name == "sub")
      in.run = choose_rounded<Subtract, float, float>(type, rounding, ftz, saturate);
    if (name == "mul")
      in.run = choose_rounded<Multiply, float, float>(type, rounding, ftz, saturate);
    if (name == "div") in.run = choose_rounded<Divide, float, float>(type, rounding, ftz, saturate);
    if (name == "fma" || name == "mad") {
      operands = 4;
      in.run = choose_rounded<Fma, float, float, float>(type, rounding, ftz, saturate);
    }
    if (!found && (name == "fma" || name == "mad" || name == "div"))
      decoder.fail("needs a rounding: .rn, .rz, .rm or .rp");
  }
  modifiers.finish();
  if (!in.run) decoder.fail("type ." + type + " is not supported here");
  read_operands(decoder, statement, operands, bits_of_type(type));
}

}  // namespace ptxvm
