// Arithmetic of f16, bf16 and their pairs: add sub mul fma neg abs min max. A result is rounded
// once: f32 holds sums and products of halves exactly enough; a fused product is rounded to odd
// first.
#include "ptxvm/ops_arithmetic.h"

namespace ptxvm {
namespace {

// Doubles to f32 with rounding to odd: a second rounding to a half then equals a single one.
void odd_floats(const double* x, float* values) {
  alignas(64) int32_t steps[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = static_cast<float>(x[i]);
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t error = std::bit_cast<uint64_t>(x[i] - static_cast<double>(values[i]));
    const uint64_t inward = (error ^ std::bit_cast<uint64_t>(x[i])) >> 63;
    steps[i] = static_cast<int32_t>(choose<uint64_t>((error << 1) != 0, 1 - 2 * inward, 0));
  }
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(values[i]);
    const bool adjust = ((bits & 0x7f800000) != 0x7f800000) & !(bits & 1);
    const uint32_t step = choose<uint32_t>(adjust, static_cast<uint32_t>(steps[i]), 0);
    values[i] = std::bit_cast<float>(bits + step);
  }
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
struct Fma {};  // two steps, see arithmetic

enum class Limit { none, saturate, relu };

template <bool Ftz, typename T>
T maybe_flush(T x) {
  if constexpr (Ftz)
    return flush(x);
  else
    return x;
}

template <typename T, bool Ftz, Limit limit>
uint32_t finish(float exact) {
  T result = maybe_flush<Ftz>(nearest<T>(exact));
  const bool nan = is_nan(result), negative = (result.bits & 0x8000) != 0;
  if constexpr (limit == Limit::saturate) {
    const uint16_t one = nearest<T>(1.0f).bits;
    const uint16_t most = choose<uint16_t>(result.bits > one, one, result.bits);
    result.bits = choose<uint16_t>(nan | negative, 0, most);
  }
  if constexpr (limit == Limit::relu)
    result.bits = choose<uint16_t>(negative & !nan, 0, result.bits);
  return result.bits;
}

// Each step handles one element size, which lets it vectorise: halves to floats, the operation,
// floats to halves. R is the register's type: 32 bits hold a pair.
template <typename Op, typename T, typename R, bool Ftz, Limit limit, size_t... I>
void arithmetic(Warp& warp, const Instruction& in, Mask mask, std::index_sequence<I...>) {
  alignas(64) uint32_t bits[kLanes], packed[kLanes] = {};
  alignas(64) float operands[sizeof...(I)][kLanes], results[kLanes];
  for (int shift = 0; shift < static_cast<int>(8 * sizeof(R)); shift += 16) {
    for (size_t k = 0; k < sizeof...(I); ++k) {
      const R* source = lanes<const R>(warp, in.slots[1 + k]);
      for (int i = 0; i < kLanes; ++i) bits[i] = static_cast<uint32_t>(source[i]) >> shift & 0xffff;
      for (int i = 0; i < kLanes; ++i)
        operands[k][i] = to_float(maybe_flush<Ftz>(T{static_cast<uint16_t>(bits[i])}));
    }
    if constexpr (sizeof...(I) == 3) {
      alignas(64) double wide[kLanes];
      for (int i = 0; i < kLanes; ++i) wide[i] = odd_fma(operands[I][i]...);
      odd_floats(wide, results);
    } else {
      for (int i = 0; i < kLanes; ++i) results[i] = Op::apply(operands[I][i]...);
    }
    for (int i = 0; i < kLanes; ++i) packed[i] |= finish<T, Ftz, limit>(results[i]) << shift;
  }
  alignas(64) R values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = static_cast<R>(packed[i]);
  assign(lanes<R>(warp, in.slots[0]), values, mask);
}
template <typename Op, typename T, typename R, int Operands, bool Ftz, Limit limit>
void arithmetic(Warp& warp, const Instruction& in, Mask mask) {
  arithmetic<Op, T, R, Ftz, limit>(warp, in, mask, std::make_index_sequence<Operands>{});
}

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

// -0 < +0. With one NaN operand the number is returned, or NaN with .NaN.
template <bool Max, bool Nan, bool Ftz, bool Magnitude>
struct Extreme {
  template <typename T>
  [[gnu::always_inline]] static T apply(T a, T b) {
    a = maybe_flush<Ftz>(a);
    b = maybe_flush<Ftz>(b);
    const uint32_t sign_of_both = (a.bits ^ b.bits) & 0x8000u;
    if constexpr (Magnitude) a.bits &= 0x7fff, b.bits &= 0x7fff;
    // Order of sign-magnitude numbers as integers, -0 below +0.
    const auto key = [](T v) {
      const int32_t bits = static_cast<int16_t>(v.bits);
      return bits ^ (bits >> 31 & 0x7fff);
    };
    const uint32_t x = a.bits, y = b.bits;
    uint32_t result = choose(Max ? key(a) > key(b) : key(a) < key(b), x, y);
    result = choose(is_nan(b), x, choose(is_nan(a), y, result));
    if constexpr (Magnitude) result |= sign_of_both;
    const bool invalid = Nan ? is_nan(a) | is_nan(b) : is_nan(a) & is_nan(b);
    return {static_cast<uint16_t>(choose<uint32_t>(invalid, kNaN16, result))};
  }
};

// Op on both halves of 32-bit registers.
template <typename Op, typename T>
struct Pair {
  template <typename... S>
  [[gnu::always_inline]] static uint32_t apply(S... operands) {
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
  };
  if (type == "f16") return pick.template operator()<Half, Half>();
  if (type == "f16x2") return pick.template operator()<Half, uint32_t>();
  if (type == "bf16") return pick.template operator()<BFloat, BFloat>();
  return pick.template operator()<BFloat, uint32_t>();
}

template <typename Op, int Operands, bool Ftz, Limit limit>
Handler arithmetic_by_type(const std::string& type) {
  if (type == "f16") return arithmetic<Op, Half, uint16_t, Operands, Ftz, limit>;
  if (type == "f16x2") return arithmetic<Op, Half, uint32_t, Operands, Ftz, limit>;
  if (Ftz || limit == Limit::saturate) return nullptr;  // bf16 supports neither
  if (type == "bf16") return arithmetic<Op, BFloat, uint16_t, Operands, false, limit>;
  return arithmetic<Op, BFloat, uint32_t, Operands, false, limit>;
}

template <typename Op, int Operands>
Handler choose_arithmetic(const std::string& type, bool ftz, Limit limit) {
  const auto pick = [&]<bool Ftz>() -> Handler {
    if (limit == Limit::relu) return arithmetic_by_type<Op, Operands, Ftz, Limit::relu>(type);
    if (limit == Limit::saturate)
      return arithmetic_by_type<Op, Operands, Ftz, Limit::saturate>(type);
    return arithmetic_by_type<Op, Operands, Ftz, Limit::none>(type);
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
