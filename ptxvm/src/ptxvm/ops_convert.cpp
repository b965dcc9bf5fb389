// cvt between integers and floating-point types. A general handler reads type, rounding and limits
// from the instruction; the pairs used in hot loops have specialised handlers.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "ptxvm/ops_arithmetic.h"

namespace ptxvm {
namespace {

// Instruction::flags of a conversion.
constexpr uint8_t kFtz = 1, kSaturate = 2, kRelu = 4, kFinite = 8, kToInteger = 16;

// Register widths in bits: destination in Instruction::width, source in Instruction::target.

template <typename T>
constexpr bool is_float = std::is_same_v<T, float> || std::is_same_v<T, double> ||
                          std::is_same_v<T, Half> || std::is_same_v<T, BFloat>;

// x rounded to an integer in floating point; NaN and infinity are unchanged.
double to_integral(double x, Rounding rounding) {
  switch (rounding) {
    case Rounding::zero:
      return std::trunc(x);
    case Rounding::down:
      return std::floor(x);
    case Rounding::up:
      return std::ceil(x);
    default:
      return std::nearbyint(x);
  }
}

// Clamps to the range of D. NaN becomes 0, or the top bit if f64 or a 64-bit integer is involved.
template <typename D, typename S>
D float_to_integer(S x, const Instruction& in) {
  if constexpr (std::is_same_v<S, float>)
    if (in.flags & kFtz) x = flush(x);
  const double value = to_integral(to_double(x), static_cast<Rounding>(in.variant));
  if (value != value) {
    constexpr bool wide = std::is_same_v<S, double> || sizeof(D) == 8;
    return wide ? static_cast<D>(uint64_t{1} << (8 * sizeof(D) - 1)) : D{0};
  }
  using Limits = std::numeric_limits<D>;
  // 64-bit limits round up to a power of two, which is itself out of range.
  if (value >= static_cast<double>(Limits::max())) return Limits::max();
  if (value <= static_cast<double>(Limits::min())) return Limits::min();
  return static_cast<D>(value);
}

template <typename D>
D from_double(double x, Rounding rounding) {
  if constexpr (std::is_same_v<D, double>)
    return x;
  else
    return from_bits<D>(narrow<D>(x, rounding));
}

template <typename D>
D limited(D x, const Instruction& in) {
  const double value = to_double(x);
  if (in.flags & kSaturate)
    return value > 0 ? (value < 1 ? x : from_double<D>(1, Rounding::nearest)) : D{};
  if ((in.flags & kRelu) && std::signbit(value) && value == value) return D{};
  if constexpr (!std::is_same_v<D, double>)
    if ((in.flags & kFinite) && std::isinf(value))
      return from_bits<D>((value < 0 ? Format<D>::sign : 0) | (Format<D>::infinity - 1));
  return x;
}

template <typename D, typename S>
D float_to_float(S x, const Instruction& in) {
  if constexpr (std::is_same_v<S, float>)
    if (in.flags & kFtz) x = flush(x);
  const Rounding rounding = static_cast<Rounding>(in.variant);
  double value = to_double(x);
  if (in.flags & kToInteger) value = to_integral(value, rounding);
  D result = from_double<D>(value, rounding);
  if constexpr (std::is_same_v<D, float>)
    if (in.flags & kFtz) result = flush(result);
  return limited(result, in);
}

template <typename D, typename S>
D integer_to_float(S x, const Instruction& in) {
  using Wide = std::conditional_t<std::is_signed_v<S>, int64_t, uint64_t>;
  const Rounding rounding = static_cast<Rounding>(in.variant);
  if constexpr (std::is_same_v<D, double>) {
    // Exact below 2^53; otherwise the two halves are added with a single, directed rounding.
    if (sizeof(S) < 8 || rounding == Rounding::nearest) return limited(static_cast<double>(x), in);
    RoundingScope scope(rounding);
    volatile double high =
        static_cast<double>(static_cast<std::conditional_t<std::is_signed_v<S>, int32_t, uint32_t>>(
            static_cast<Wide>(x) >> 32)) *
        0x1p32;
    volatile double low = static_cast<uint32_t>(x);
    volatile double sum = high + low;
    return limited(static_cast<double>(sum), in);
  } else {
    return limited(from_double<D>(odd_double(static_cast<Wide>(x)), rounding), in);
  }
}

template <typename D, typename S>
D integer_to_integer(S x, const Instruction& in) {
  if (in.flags & kSaturate) {
    using Limits = std::numeric_limits<D>;
    if (std::cmp_greater(x, Limits::max())) return Limits::max();
    if (std::cmp_less(x, Limits::min())) return Limits::min();
  }
  return static_cast<D>(x);
}

template <typename D>
void store_extended(Warp& warp, const Instruction& in, const D* values, Mask mask) {
  const auto write = [&]<typename R>(R) {
    alignas(64) R wide[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      if constexpr (std::is_integral_v<D>)
        wide[i] = static_cast<R>(values[i]);
      else if constexpr (sizeof(D) == 2)
        wide[i] = static_cast<R>(values[i].bits);
      else if constexpr (sizeof(D) == 4)
        wide[i] = static_cast<R>(std::bit_cast<uint32_t>(values[i]));
      else
        wide[i] = static_cast<R>(std::bit_cast<uint64_t>(values[i]));
    }
    assign(lanes<R>(warp, in.slots[0]), wide, mask);
  };
  // Signed results are sign-extended, so that a wider register holds the same number.
  if (in.width == 8) write(uint8_t{});
  if (in.width == 16) write(uint16_t{});
  if (in.width == 32) write(uint32_t{});
  if (in.width == 64) write(uint64_t{});
}

template <typename D, typename S>
void convert(Warp& warp, const Instruction& in, Mask mask) {
  alignas(64) S operands[kLanes];
  alignas(64) D values[kLanes];
  load_lanes(warp, in.slots[1], static_cast<int>(in.target), operands);
  for (int i = 0; i < kLanes; ++i) {
    if constexpr (is_float<D> && is_float<S>)
      values[i] = float_to_float<D>(operands[i], in);
    else if constexpr (is_float<D>)
      values[i] = integer_to_float<D>(operands[i], in);
    else if constexpr (is_float<S>)
      values[i] = float_to_integer<D>(operands[i], in);
    else
      values[i] = integer_to_integer<D>(operands[i], in);
  }
  store_extended(warp, in, values, mask);
}

// Plain casts between registers of the types' own widths: no limits, round to nearest.
template <typename D, typename S>
struct Cast {
  static D apply(S x) {
    if constexpr (std::is_same_v<S, Half> || std::is_same_v<S, BFloat>)
      return to_float(x);
    else if constexpr (std::is_same_v<D, Half> || std::is_same_v<D, BFloat>)
      return nearest<D>(x);
    else
      return static_cast<D>(x);
  }
};

template <typename F>
Handler with_type(const std::string& type, F f) {
  if (type == "u8") return f(uint8_t{});
  if (type == "s8") return f(int8_t{});
  if (type == "f16") return f(Half{});
  if (type == "bf16") return f(BFloat{});
  if (type == "f32") return f(float{});
  if (type == "f64") return f(double{});
  return type[0] == 'b' ? nullptr : with_integer(type, f);
}

// Specialised handlers, without limits, for the pairs common in loops.
template <typename D, typename S>
constexpr bool has_cast =
    (std::is_integral_v<D> && std::is_integral_v<S> && sizeof(D) >= 4 && sizeof(S) >= 4) ||
    (std::is_same_v<D, float> && std::is_integral_v<S> && sizeof(S) == 4) ||
    (std::is_same_v<D, float> && is_float<S> && sizeof(S) == 2) ||
    (is_float<D> && sizeof(D) == 2 && std::is_same_v<S, float>);

// f32 to f32, common in expf and floorf.
struct ToUnit {
  static float apply(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t most = choose<uint32_t>(bits > 0x3f800000, 0x3f800000, bits);
    return std::bit_cast<float>(choose<uint32_t>((bits >> 31) | (bits > 0x7f800000), 0, most));
  }
};
template <Rounding rounding>
struct ToIntegral {
  static float apply(float x) {
    if constexpr (rounding == Rounding::nearest) return canonical(__builtin_nearbyintf(x));
    if constexpr (rounding == Rounding::zero) return canonical(__builtin_truncf(x));
    if constexpr (rounding == Rounding::down) return canonical(__builtin_floorf(x));
    return canonical(__builtin_ceilf(x));
  }
};
Handler choose_float_to_float(const Instruction& in) {
  if (in.flags == kSaturate && in.variant == 0) return map_lanes<ToUnit, float, float>;
  if (in.flags != kToInteger) return nullptr;
  switch (static_cast<Rounding>(in.variant)) {
    case Rounding::nearest:
      return map_lanes<ToIntegral<Rounding::nearest>, float, float>;
    case Rounding::zero:
      return map_lanes<ToIntegral<Rounding::zero>, float, float>;
    case Rounding::down:
      return map_lanes<ToIntegral<Rounding::down>, float, float>;
    default:
      return map_lanes<ToIntegral<Rounding::up>, float, float>;
  }
}

Handler choose_convert(const std::string& result, const std::string& type, bool plain) {
  return with_type(result, [&]<typename D>(D) -> Handler {
    return with_type(type, [&]<typename S>(S) -> Handler {
      if constexpr (has_cast<D, S>)
        if (plain) return map_lanes<Cast<D, S>, D, S>;
      return convert<D, S>;
    });
  });
}

bool is_float_type(const std::string& type) { return type.find('f') != std::string::npos; }

// cvt.{rn,rz}{.relu}{.satfinite}.{f16x2,bf16x2}.f32 d, a, b: a goes to the upper half.
template <typename T, bool Plain>
void convert_pair(Warp& warp, const Instruction& in, Mask mask) {
  const float *high = lanes<const float>(warp, in.slots[1]),
              *low = lanes<const float>(warp, in.slots[2]);
  alignas(64) uint32_t values[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    if constexpr (Plain)
      values[i] = nearest<T>(low[i]).bits | static_cast<uint32_t>(nearest<T>(high[i]).bits) << 16;
    else
      values[i] = float_to_float<T>(low[i], in).bits |
                  static_cast<uint32_t>(float_to_float<T>(high[i], in).bits) << 16;
  }
  assign(lanes<uint32_t>(warp, in.slots[0]), values, mask);
}

// tf32 is f32 with 10 bits of fraction.
void convert_tf32(Warp& warp, const Instruction& in, Mask mask) {
  const uint32_t* source = lanes<const uint32_t>(warp, in.slots[1]);
  const Rounding rounding = static_cast<Rounding>(in.variant);
  alignas(64) uint32_t values[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t x = source[i], magnitude = x & 0x7fffffff;
    const uint32_t add = rounding == Rounding::away      ? 0x1000
                         : rounding == Rounding::nearest ? 0xfff + (x >> 13 & 1)
                                                         : 0;
    uint32_t value = (magnitude + (magnitude < 0x7f800000 ? add : 0)) & 0xffffe000;
    if ((in.flags & kFinite) && value >= 0x7f800000) value = 0x7f7fe000;
    value |= x & 0x80000000;
    if ((in.flags & kRelu) && (x >> 31)) value = 0;
    values[i] = magnitude > 0x7f800000 ? kNaN32 : value;
  }
  assign(lanes<uint32_t>(warp, in.slots[0]), values, mask);
}

// cvt.pack.sat: a and b clamped to T; with c, the packed pair is shifted in from below.
template <typename T, bool Shift>
void convert_pack(Warp& warp, const Instruction& in, Mask mask) {
  const int32_t *a = lanes<const int32_t>(warp, in.slots[1]),
                *b = lanes<const int32_t>(warp, in.slots[2]);
  constexpr int bits = 8 * sizeof(T);
  const auto clamp = [](int32_t x) {
    return static_cast<uint32_t>(std::clamp<int32_t>(x, std::numeric_limits<T>::min(),
                                                     std::numeric_limits<T>::max())) &
           ((1u << bits) - 1);
  };
  alignas(64) uint32_t values[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    values[i] = clamp(a[i]) << bits | clamp(b[i]);
    if constexpr (Shift) values[i] |= lanes<const uint32_t>(warp, in.slots[3])[i] << (2 * bits);
  }
  assign(lanes<uint32_t>(warp, in.slots[0]), values, mask);
}

void decode_pack(Decoder& decoder, const Statement& statement, Instruction& in,
                 Modifiers& modifiers) {
  if (!modifiers.take("sat")) decoder.fail("cvt.pack needs .sat");
  const bool shift = modifiers.take("b32");
  const std::string type = modifiers.take_type(), result = modifiers.take_type();
  modifiers.finish();
  if (type == "s32" && !shift && result == "u16") in.run = convert_pack<uint16_t, false>;
  if (type == "s32" && !shift && result == "s16") in.run = convert_pack<int16_t, false>;
  if (type == "s32" && shift && result == "u8") in.run = convert_pack<uint8_t, true>;
  if (type == "s32" && shift && result == "s8") in.run = convert_pack<int8_t, true>;
  if (!in.run) decoder.fail("types ." + result + "." + type + " are not supported here");
  read_operands(decoder, statement, shift ? 4 : 3, 32);
}

void take_limits(Modifiers& modifiers, Instruction& in) {
  if (modifiers.take("relu")) in.flags |= kRelu;
  if (modifiers.take("satfinite")) in.flags |= kFinite;
}

void decode_special(Decoder& decoder, const Statement& statement, Instruction& in,
                    Modifiers& modifiers, const std::string& result, const std::string& type) {
  if (type != "f32") decoder.fail("types ." + result + "." + type + " are not supported here");
  if (result == "tf32" && modifiers.take("rna")) {
    in.variant = static_cast<uint8_t>(Rounding::away);
  } else {
    bool found = false;
    const Rounding rounding = modifiers.take_rounding(&found);
    if (!found || rounding > Rounding::zero) decoder.fail("needs a rounding: .rn or .rz");
    in.variant = static_cast<uint8_t>(rounding);
  }
  take_limits(modifiers, in);
  modifiers.finish();
  const bool plain = in.flags == 0 && in.variant == 0;
  if (result == "tf32") in.run = convert_tf32;
  if (result == "f16x2") in.run = plain ? convert_pair<Half, true> : convert_pair<Half, false>;
  if (result == "bf16x2") in.run = plain ? convert_pair<BFloat, true> : convert_pair<BFloat, false>;
  read_operands(decoder, statement, result == "tf32" ? 2 : 3, 32);
}

// Allowed rounding modifiers: none, of a float, to an integer.
void take_cvt_rounding(Decoder& decoder, Modifiers& modifiers, Instruction& in,
                       const std::string& result, const std::string& type) {
  static constexpr const char* names[] = {"rni", "rzi", "rmi", "rpi"};
  const bool from_float = is_float_type(type), to_float_type = is_float_type(result);
  bool to_integer = false, rounded = false;
  for (int i = 0; i < 4; ++i) {
    if (!modifiers.take(names[i])) continue;
    to_integer = true;
    in.variant = static_cast<uint8_t>(i);
  }
  if (!to_integer) in.variant = static_cast<uint8_t>(modifiers.take_rounding(&rounded));
  if (to_integer && (!from_float || (to_float_type && result != type)))
    decoder.fail("rounding to an integer is not possible between these types");
  if (from_float && !to_float_type && !to_integer)
    decoder.fail("needs a rounding: .rni, .rzi, .rmi or .rpi");
  const bool lossy = from_float && to_float_type &&
                     (bits_of_type(result) < bits_of_type(type) ||
                      (bits_of_type(result) == 16 && bits_of_type(type) == 16 && result != type));
  if (to_float_type && !rounded && (lossy || !from_float))
    decoder.fail("needs a rounding: .rn, .rz, .rm or .rp");
  if (to_integer && to_float_type) in.flags |= kToInteger;
}

void decode_cvt(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  if (modifiers.take("pack")) return decode_pack(decoder, statement, in, modifiers);
  const std::string type = modifiers.take_type(), result = modifiers.take_type();
  if (result == "tf32" || result == "f16x2" || result == "bf16x2")
    return decode_special(decoder, statement, in, modifiers, result, type);
  take_cvt_rounding(decoder, modifiers, in, result, type);
  if ((type == "f32" || result == "f32") && modifiers.take("ftz")) in.flags |= kFtz;
  // Conversions of floats to integers always clamp.
  if (modifiers.take("sat") && (is_float_type(result) || !is_float_type(type)))
    in.flags |= kSaturate;
  if (bits_of_type(result) == 16 && is_float_type(result)) take_limits(modifiers, in);
  modifiers.finish();
  expect_operands(decoder, statement, 2);
  const auto register_bits = [&](const std::string& operand, const std::string& of) {
    const int declared = decoder.width(operand), bits = bits_of_type(of);
    if (declared && declared < bits)
      decoder.fail("register " + operand + " is narrower than type ." + of);
    return declared ? declared : bits;
  };
  const int result_bits = register_bits(statement.operands[0], result);
  const int source_bits = register_bits(statement.operands[1], type);
  in.width = static_cast<uint8_t>(result_bits);
  in.target = static_cast<uint32_t>(source_bits);
  const bool plain = in.flags == 0 && in.variant == 0 && result_bits == bits_of_type(result) &&
                     source_bits == bits_of_type(type);
  if (result == "f32" && type == "f32" && result_bits == 32 && source_bits == 32)
    in.run = choose_float_to_float(in);
  if (!in.run) in.run = choose_convert(result, type, plain);
  if (!in.run) decoder.fail("types ." + result + "." + type + " are not supported here");
  decoder.write(statement.operands[0], result_bits);
  decoder.read(statement.operands[1], source_bits);
}

}  // namespace

void add_convert(OpcodeTable& table) { table["cvt"] = decode_cvt; }

}  // namespace ptxvm
