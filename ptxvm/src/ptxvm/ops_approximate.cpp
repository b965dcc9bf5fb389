// rcp sqrt rsqrt ex2 lg2 sin cos tanh and the approximate divisions. Error bounds: PTX ISA 9.0,
// sections 9.7.3 and 9.7.4. Options::approximate moves results by their bound; a correct kernel
// tolerates that.
#include "ptxvm/ops_approximate.h"

#include <algorithm>

#include "ptxvm/approximate.h"
#include "ptxvm/ops_arithmetic.h"

namespace ptxvm {
namespace {

// Fraction of a bound that is used: the rest covers the error of `value` itself.
constexpr double kInside = 1 - 0x1p-10;

// Distance between neighbouring values of T around v; the smaller one at a power of two.
template <typename T>
double spacing(double v) {
  const int exponent = v == 0 ? Format<T>::least : std::ilogb(v * kInside);
  return std::ldexp(1.0, std::max(exponent, Format<T>::least) - Format<T>::fraction);
}

// value(x): in double; bound<T>(x, v): maximum distance of a result from v = value(x); limit:
// maximum of any result.
struct Exp2 {
  static constexpr double limit = std::numeric_limits<double>::infinity();
  static double value(double x) { return exp2_of(x); }
  template <typename T>
  static double bound(double, double v) {
    if constexpr (std::is_same_v<T, Half>) return v * 0x1.12p-10;  // 2^-9.9
    if constexpr (std::is_same_v<T, BFloat>) return v * 0x1p-7;
    return 2 * spacing<float>(v);
  }
};
struct Log2 {
  static constexpr double limit = std::numeric_limits<double>::infinity();
  static double value(double x) { return log2_of(x); }
  template <typename T>
  static double bound(double x, double v) {
    return x > 0.5 && x < 2 ? 0x1p-22 : std::abs(v) * 0x1p-22;
  }
};
struct Sine {
  static constexpr double limit = 1;
  static double value(double x) { return sine_of(x, 0); }
  template <typename T>
  static double bound(double x, double) {
    return std::abs(x) <= 4 * kHalfPi ? 0x1.6ap-21 : 0x1.3ap-15;  // 2^-20.5, 2^-14.7
  }
};
struct Cosine {
  static constexpr double limit = 1;
  static double value(double x) { return sine_of(x, 1); }
  template <typename T>
  static double bound(double x, double v) {
    return Sine::bound<T>(x, v);
  }
};
struct HyperbolicTangent {
  static constexpr double limit = 1;
  static double value(double x) { return tanh_of(x); }
  template <typename T>
  static double bound(double, double v) {
    if constexpr (std::is_same_v<T, Half>) return 0x1.02p-11;  // 2^-10.987
    if constexpr (std::is_same_v<T, BFloat>) return 0x1p-8;
    return std::abs(v) * 0x1p-11;
  }
};
struct Reciprocal {
  static constexpr double limit = std::numeric_limits<double>::infinity();
  static double value(double x) { return 1 / x; }
  template <typename T>
  static double bound(double, double v) {
    return spacing<float>(v);
  }
};
struct SquareRoot {
  static constexpr double limit = std::numeric_limits<double>::infinity();
  static double value(double x) { return std::sqrt(x); }
  template <typename T>
  static double bound(double, double v) {
    return v * 0x1p-23;
  }
};
struct ReciprocalSquareRoot {
  static constexpr double limit = std::numeric_limits<double>::infinity();
  static double value(double x) { return 1 / std::sqrt(x); }
  template <typename T>
  static double bound(double, double v) {
    return v * 0x1.12p-23;  // 2^-22.9
  }
};

template <typename T>
T from_double(double v) {
  if constexpr (std::is_same_v<T, float>)
    return canonical(static_cast<float>(v));
  else
    return nearest<T>(static_cast<float>(v));
}

// v moved up or down by its bound, and rounded so as to stay within it. Values that the ISA's
// tables give exactly do not move: at 0 and infinity, and the results 0, infinity and NaN.
template <typename Function, typename T>
T moved(double x, double v, int direction) {
  if (x == 0 || !std::isfinite(x) || v == 0 || !std::isfinite(v)) return from_double<T>(v);
  double target = v + direction * kInside * Function::template bound<T>(x, v);
  target = std::clamp(target, -Function::limit, Function::limit);
  const T result = from_bits<T>(narrow<T>(target, direction > 0 ? Rounding::down : Rounding::up));
  // Among subnormal results the bound may be smaller than their distance.
  const T best = from_double<T>(v);
  return target * v > 0 && direction * (to_double(result) - to_double(best)) > 0 ? result : best;
}

template <bool Ftz, typename T>
T maybe_flush(T x) {
  if constexpr (Ftz)
    return flush(x);
  else
    return x;
}

template <typename Function, typename T, bool Ftz>
void evaluate(const T* operands, T* values) {
  if (options.approximate != 0) {
    for (int i = 0; i < kLanes; ++i) {
      const double x = to_double(maybe_flush<Ftz>(operands[i]));
      values[i] = maybe_flush<Ftz>(moved<Function, T>(x, Function::value(x), options.approximate));
    }
    return;
  }
  for (int i = 0; i < kLanes; ++i)
    values[i] =
        maybe_flush<Ftz>(from_double<T>(Function::value(to_double(maybe_flush<Ftz>(operands[i])))));
}

template <typename Function, typename T, bool Ftz>
void approximate(Warp& warp, const Instruction& in, Mask mask) {
  alignas(64) T operands[kLanes], values[kLanes];
  std::memcpy(operands, lanes<const T>(warp, in.slots[1]), sizeof(operands));
  evaluate<Function, T, Ftz>(operands, values);
  assign(lanes<T>(warp, in.slots[0]), values, mask);
}

// Both halves of a 32-bit register.
template <typename Function, typename T, bool Ftz>
void approximate_pair(Warp& warp, const Instruction& in, Mask mask) {
  const uint32_t* source = lanes<const uint32_t>(warp, in.slots[1]);
  alignas(64) T operands[2][kLanes], values[2][kLanes];
  for (int i = 0; i < kLanes; ++i) {
    operands[0][i].bits = static_cast<uint16_t>(source[i]);
    operands[1][i].bits = static_cast<uint16_t>(source[i] >> 16);
  }
  for (int half = 0; half < 2; ++half) evaluate<Function, T, Ftz>(operands[half], values[half]);
  alignas(64) uint32_t packed[kLanes];
  for (int i = 0; i < kLanes; ++i)
    packed[i] = values[0][i].bits | static_cast<uint32_t>(values[1][i].bits) << 16;
  assign(lanes<uint32_t>(warp, in.slots[0]), packed, mask);
}

// a * (1 / b); a subnormal reciprocal counts as 0, as the ISA specifies for |b| > 2^126.
template <bool Full, bool Ftz>
void divide(Warp& warp, const Instruction& in, Mask mask) {
  const float* a = lanes<const float>(warp, in.slots[1]);
  const float* b = lanes<const float>(warp, in.slots[2]);
  alignas(64) float values[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const float x = maybe_flush<Ftz>(a[i]), y = maybe_flush<Ftz>(b[i]);
    const float quotient = Full ? x / y : x * flush(1 / y);
    values[i] = maybe_flush<Ftz>(canonical(quotient));
  }
  if (options.approximate != 0) {
    for (int i = 0; i < kLanes; ++i) {
      const float x = maybe_flush<Ftz>(a[i]), y = maybe_flush<Ftz>(b[i]);
      const double exact = static_cast<double>(x) / y;
      if (values[i] == 0 || !std::isfinite(values[i]) || !std::isfinite(y)) continue;
      const double target = exact + options.approximate * kInside * 2 * spacing<float>(exact);
      values[i] = maybe_flush<Ftz>(from_bits<float>(
          narrow<float>(target, options.approximate > 0 ? Rounding::down : Rounding::up)));
    }
  }
  assign(lanes<float>(warp, in.slots[0]), values, mask);
}

// rcp and rsqrt.approx.ftz.f64 read and write only the upper word.
template <bool Root>
struct UpperWord {
  static uint64_t apply(uint64_t a) {
    constexpr uint64_t upper = 0xffffffff00000000, infinity = 0x7ff0000000000000;
    const auto flushed = [](uint64_t x) { return (x & infinity) ? x : x & uint64_t{1} << 63; };
    const double x = std::bit_cast<double>(flushed(a & upper));
    const double value = Root ? 1 / std::sqrt(x) : 1 / x;
    if (value != value) return 0x7fffffff00000000;
    return flushed(std::bit_cast<uint64_t>(value) & upper);
  }
};
struct ReciprocalRoot64 {
  static double apply(double a) { return canonical(1 / std::sqrt(a)); }
};

template <typename Function>
Handler choose_function(const std::string& type, bool ftz) {
  if (type == "f32")
    return ftz ? approximate<Function, float, true> : approximate<Function, float, false>;
  constexpr bool halves =
      std::is_same_v<Function, Exp2> || std::is_same_v<Function, HyperbolicTangent>;
  if constexpr (halves) {
    if (type == "f16" && !ftz) return approximate<Function, Half, false>;
    if (type == "f16x2" && !ftz) return approximate_pair<Function, Half, false>;
    if (type == "bf16")
      return ftz ? approximate<Function, BFloat, true> : approximate<Function, BFloat, false>;
    if (type == "bf16x2")
      return ftz ? approximate_pair<Function, BFloat, true>
                 : approximate_pair<Function, BFloat, false>;
  }
  return nullptr;
}

Handler choose_approximate(const std::string& name, const std::string& type, bool ftz) {
  if (name == "ex2" && type[0] == 'b' && !ftz) return nullptr;
  if (name == "ex2") return choose_function<Exp2>(type, ftz);
  if (name == "lg2") return choose_function<Log2>(type, ftz);
  if (name == "sin") return choose_function<Sine>(type, ftz);
  if (name == "cos") return choose_function<Cosine>(type, ftz);
  if (name == "tanh") return ftz ? nullptr : choose_function<HyperbolicTangent>(type, false);
  if (type == "f64") {
    if (name == "rcp" && ftz) return map_lanes<UpperWord<false>, uint64_t, uint64_t>;
    if (name == "rsqrt" && ftz) return map_lanes<UpperWord<true>, uint64_t, uint64_t>;
    if (name == "rsqrt") return map_lanes<ReciprocalRoot64, double, double>;
    return nullptr;
  }
  if (name == "rcp") return choose_function<Reciprocal>(type, ftz);
  if (name == "sqrt") return choose_function<SquareRoot>(type, ftz);
  return choose_function<ReciprocalSquareRoot>(type, ftz);
}

void decode_function(Decoder& decoder, const Statement& statement, Instruction& in) {
  const std::string& name = statement.opcode[0];
  Modifiers modifiers(decoder, statement);
  const std::string type = modifiers.take_type();
  const bool ftz = modifiers.take("ftz");
  if (modifiers.take("approx")) {
    in.run = choose_approximate(name, type, ftz);
  } else if ((name == "rcp" || name == "sqrt") && (type == "f32" || type == "f64")) {
    bool found = false;
    const Rounding rounding = modifiers.take_rounding(&found);
    if (!found) decoder.fail("needs .approx or a rounding: .rn, .rz, .rm or .rp");
    in.variant = static_cast<uint8_t>(rounding);
    in.run = name == "rcp" ? rounded_reciprocal(type, rounding, ftz)
                           : rounded_square_root(type, rounding, ftz);
  } else {
    decoder.fail("needs .approx");
  }
  modifiers.finish();
  if (!in.run) decoder.fail("type ." + type + " is not supported here");
  read_operands(decoder, statement, 2, bits_of_type(type));
}

}  // namespace

Handler approximate_division(bool full, bool ftz) {
  if (full) return ftz ? divide<true, true> : divide<true, false>;
  return ftz ? divide<false, true> : divide<false, false>;
}

void add_approximate(OpcodeTable& table) {
  for (const char* name : {"rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh"})
    table[name] = decode_function;
}

}  // namespace ptxvm
