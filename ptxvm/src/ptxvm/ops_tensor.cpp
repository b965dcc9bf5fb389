// mma with 16 x 8 accumulators and 8-, 16- and 32-bit operands; tiles.cpp has the other forms.
#include <algorithm>
#include <string_view>

#include "ptxvm/decode.h"
#include "ptxvm/elements.h"
#include "ptxvm/tensor.h"
#include "ptxvm/tiles.h"

namespace ptxvm {

namespace {

constexpr int kRows = 16, kColumns = 8;

// Slots of an instruction in operand order.
template <int k, int per>
struct Slots {
  static constexpr int a_count = kRows * k / per / kLanes, b_count = k * kColumns / per / kLanes;
  const uint32_t *d, *a, *b, *c;
  Slots(const uint32_t* slots, int c_count)
      : d(slots), a(d + c_count), b(a + a_count), c(b + b_count) {}
};

// Columns of B are contiguous.
template <typename A, typename B, int k, typename V>
void read_operands(Warp& warp, const Slots<k, A::per>& slots, V (*a)[k], V (*b)[k]) {
  for (int s = 0; s < slots.a_count; ++s)
    for (int lane = 0; lane < kLanes; ++lane)
      for (int j = 0; j < A::per; ++j) {
        const Place place = place_in_a(lane, s, j, A::per);
        a[place.row][place.column] = A::get(lanes<uint32_t>(warp, slots.a[s])[lane], j);
      }
  for (int s = 0; s < slots.b_count; ++s)
    for (int lane = 0; lane < kLanes; ++lane)
      for (int j = 0; j < B::per; ++j) {
        const Place place = place_in_b(lane, s, j, B::per);
        b[place.column][place.row] = B::get(lanes<uint32_t>(warp, slots.b[s])[lane], j);
      }
}

void require_full(Warp& warp, const Instruction& in, Mask mask) {
  if (mask != kFullMask)
    fault(warp, in, __builtin_ctz(~mask), "mma without all 32 lanes of the warp");
}

// f32 accumulators, one per register.
struct Single {
  static constexpr int count = 4;
  static float get(Warp& warp, const uint32_t* slots, int lane, int index) {
    return lanes<float>(warp, slots[index])[lane];
  }
  static void set(Warp& warp, const uint32_t* slots, int lane, int index, float value) {
    lanes<float>(warp, slots[index])[lane] = value;
  }
};
// f16 accumulators, two per register; the sum is rounded once.
struct Packed {
  static constexpr int count = 2;
  static float get(Warp& warp, const uint32_t* slots, int lane, int index) {
    return to_float(lanes<Half>(warp, slots[index / 2])[2 * lane + index % 2]);
  }
  static void set(Warp& warp, const uint32_t* slots, int lane, int index, float value) {
    lanes<Half>(warp, slots[index / 2])[2 * lane + index % 2] = half_from(value);
  }
};

template <typename T, int k, typename Accumulators, typename B = T>
void multiply(Warp& warp, const Instruction& in, Mask mask) {
  require_full(warp, in, mask);
  if constexpr (k == 8 * T::per && T::per < 4 && std::is_same_v<Accumulators, Single>)
    if (!options.hardware_mma && multiply_fast<T::type>(warp, in.slots)) return;
  const Slots<k, T::per> slots(in.slots, Accumulators::count);
  const bool of_wgmma = options.hardware_mma && std::string_view(in.text).starts_with("wgmma");
  const Adder adder = options.hardware_mma ? adder_of(T::type, of_wgmma) : Adder{};
  float a[kRows][k], b[kColumns][k], d[kLanes][4];
  read_operands<T, B>(warp, slots, a, b);
  for (int lane = 0; lane < kLanes; ++lane)
    for (int index = 0; index < 4; ++index) {
      const Place place = place_in_c(lane, index);
      const float c = Accumulators::get(warp, slots.c, lane, index);
      const float *row = a[place.row], *column = b[place.column];
      d[lane][index] = options.hardware_mma ? hardware_sum(row, column, k, adder, c, T::least,
                                                           B::least, Accumulators::count == 2)
                                            : ordered_sum(row, column, k, c);
    }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int index = 0; index < 4; ++index)
      Accumulators::set(warp, slots.d, lane, index, d[lane][index]);
}

template <typename A, typename B, int k, bool saturates>
void multiply_int8(Warp& warp, const Instruction& in, Mask mask) {
  require_full(warp, in, mask);
  const Slots<k, 4> slots(in.slots, 4);
  int32_t a[kRows][k], b[kColumns][k], d[kLanes][4];
  read_operands<A, B>(warp, slots, a, b);
  for (int lane = 0; lane < kLanes; ++lane)
    for (int index = 0; index < 4; ++index) {
      const Place place = place_in_c(lane, index);
      int64_t sum = lanes<int32_t>(warp, slots.c[index])[lane];
      for (int i = 0; i < k; ++i) sum += a[place.row][i] * b[place.column][i];
      if (saturates) sum = std::clamp<int64_t>(sum, INT32_MIN, INT32_MAX);
      d[lane][index] = static_cast<int32_t>(sum);
    }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int index = 0; index < 4; ++index)
      lanes<int32_t>(warp, slots.d[index])[lane] = d[lane][index];
}

template <typename A, typename B>
Handler pick_int8(int k, bool saturates) {
  if (k == 16) return saturates ? multiply_int8<A, B, 16, true> : multiply_int8<A, B, 16, false>;
  if (k == 32) return saturates ? multiply_int8<A, B, 32, true> : multiply_int8<A, B, 32, false>;
  return nullptr;
}

template <typename A, typename B>
Handler pick_float8(int k, bool packed) {
  if (k == 16) return packed ? multiply<A, 16, Packed, B> : multiply<A, 16, Single, B>;
  if (k == 32) return packed ? multiply<A, 32, Packed, B> : multiply<A, 32, Single, B>;
  return nullptr;
}

struct Shape {
  int k, bits;
  std::string d, a, b, c;
  bool saturates;
};

Handler pick(const Shape& s) {
  const auto types = [&](const char* d, const char* a) {
    return s.d == d && s.c == d && s.a == a && s.b == a;
  };
  using S8 = Int8<int8_t>;
  using U8 = Int8<uint8_t>;
  if (s.bits == 8 && (s.a[0] == 'e' || s.b[0] == 'e')) {
    const bool a_wide = s.a == "e5m2", b_wide = s.b == "e5m2", packed = s.d == "f16";
    if (s.a[0] != s.b[0] || s.saturates || s.c != s.d || (s.d != "f16" && s.d != "f32"))
      return nullptr;
    if (a_wide)
      return b_wide ? pick_float8<E5M2, E5M2>(s.k, packed) : pick_float8<E5M2, E4M3>(s.k, packed);
    return b_wide ? pick_float8<E4M3, E5M2>(s.k, packed) : pick_float8<E4M3, E4M3>(s.k, packed);
  }
  if (s.d == "s32" && s.c == "s32" && s.bits == 8) {
    const bool a_signed = s.a == "s8", b_signed = s.b == "s8";
    if (a_signed)
      return b_signed ? pick_int8<S8, S8>(s.k, s.saturates) : pick_int8<S8, U8>(s.k, s.saturates);
    return b_signed ? pick_int8<U8, S8>(s.k, s.saturates) : pick_int8<U8, U8>(s.k, s.saturates);
  }
  if (s.saturates) return nullptr;
  if (types("f32", "f16") && s.k == 16) return multiply<F16, 16, Single>;
  if (types("f32", "f16") && s.k == 8) return multiply<F16, 8, Single>;
  if (types("f16", "f16") && s.k == 16) return multiply<F16, 16, Packed>;
  if (types("f16", "f16") && s.k == 8) return multiply<F16, 8, Packed>;
  if (types("f32", "bf16") && s.k == 16) return multiply<BF16, 16, Single>;
  if (types("f32", "bf16") && s.k == 8) return multiply<BF16, 8, Single>;
  if (types("f32", "tf32") && s.k == 8) return multiply<TF32, 8, Single>;
  if (types("f32", "tf32") && s.k == 4) return multiply<TF32, 4, Single>;
  return nullptr;
}

int operand_bits(const std::string& type) {
  if (type == "f16" || type == "bf16") return 16;
  if (type == "tf32") return 32;
  return type == "s8" || type == "u8" || type == "e4m3" || type == "e5m2" ? 8 : 0;
}

// k of "m16n8k16", 0 for other shapes.
int depth_of(const std::string& shape) {
  for (const int k : {4, 8, 16, 32})
    if (shape == "m16n8k" + std::to_string(k)) return k;
  return 0;
}

void decode_mma(Decoder& decoder, const Statement& statement, Instruction& in) {
  const auto& parts = statement.opcode;
  if (decode_tile(decoder, statement, in)) return;
  const bool saturates = parts.size() == 11 && parts[6] == "satfinite";
  if (parts.size() != 10u + saturates || parts[1] != "sync" || parts[2] != "aligned" ||
      !depth_of(parts[3]) || parts[4] != "row" || parts[5] != "col")
    decoder.fail("unknown form of mma");
  const size_t n = parts.size();
  const Shape shape{depth_of(parts[3]), operand_bits(parts[n - 3]),
                    parts[n - 4],       parts[n - 3],
                    parts[n - 2],       parts[n - 1],
                    saturates};
  in.run = operand_bits(shape.b) == shape.bits && shape.bits ? pick(shape) : nullptr;
  if (!in.run) decoder.fail("no mma of this shape and these types");
  const int accumulators = shape.d == "f16" ? 2 : 4;
  const int counts[4] = {accumulators, kRows * shape.k * shape.bits / 32 / kLanes,
                         kColumns * shape.k * shape.bits / 32 / kLanes, accumulators};
  if (statement.operands.size() != 4) decoder.fail("wrong number of operands");
  for (int i = 0; i < 4; ++i) {
    const auto registers = Decoder::elements(statement.operands[i]);
    if (registers.size() != static_cast<size_t>(counts[i]))
      decoder.fail("operand " + std::to_string(i + 1) + " needs " + std::to_string(counts[i]) +
                   " registers");
    for (const std::string& name : registers)
      i == 0 ? decoder.write(name, 32) : decoder.read(name, 32);
  }
  in.control = Control::converge;
}

}  // namespace

Handler find_mma(int k, const std::string& d, const std::string& a, const std::string& b,
                 const std::string& c, bool saturates) {
  const int bits = operand_bits(b);
  return bits && bits == operand_bits(a) ? pick({k, bits, d, a, b, c, saturates}) : nullptr;
}

Handler wgmma_block(uint32_t kind, bool packed) {
  using S8 = Int8<int8_t>;
  using U8 = Int8<uint8_t>;
  static constexpr Handler kSingle[] = {
      multiply<F16, 16, Single>,        multiply<BF16, 16, Single>,
      multiply<TF32, 8, Single>,        multiply<E4M3, 32, Single>,
      multiply<E4M3, 32, Single, E5M2>, multiply<E5M2, 32, Single, E4M3>,
      multiply<E5M2, 32, Single>,       multiply_int8<S8, S8, 32, false>,
      multiply_int8<S8, U8, 32, false>, multiply_int8<U8, S8, 32, false>,
      multiply_int8<U8, U8, 32, false>, multiply_int8<S8, S8, 32, true>,
      multiply_int8<S8, U8, 32, true>,  multiply_int8<U8, S8, 32, true>,
      multiply_int8<U8, U8, 32, true>};
  static constexpr Handler kPacked[] = {multiply<F16, 16, Packed>,
                                        nullptr,
                                        nullptr,
                                        multiply<E4M3, 32, Packed>,
                                        multiply<E4M3, 32, Packed, E5M2>,
                                        multiply<E5M2, 32, Packed, E4M3>,
                                        multiply<E5M2, 32, Packed>};
  return packed ? kPacked[kind] : kSingle[kind];
}

void add_tensor(OpcodeTable& table) { table["mma"] = decode_mma; }

}  // namespace ptxvm
