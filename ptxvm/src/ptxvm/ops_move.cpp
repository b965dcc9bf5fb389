// mov, with packing and unpacking of vectors, and cvta.
#include "ptxvm/ops_arithmetic.h"

namespace ptxvm {
namespace {

struct Copy {
  template <typename T>
  static T apply(T a) {
    return a;
  }
};

void move_predicate(Warp& warp, const Instruction& in, Mask mask) {
  assign_predicate(warp, in.slots[0], read_predicate(warp, in.slots[1], in.flags & 1), mask);
}

// Packs elements of E, the first one lowest, in a register of W.
template <typename W, typename E>
void pack(Warp& warp, const Instruction& in, Mask mask) {
  constexpr int count = sizeof(W) / sizeof(E), bits = 8 * sizeof(E);
  const E* elements[count];
  for (int k = 0; k < count; ++k) elements[k] = lanes<const E>(warp, in.slots[1 + k]);
  alignas(64) W values[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    W value = 0;
    for (int k = 0; k < count; ++k)
      value = static_cast<W>(value | static_cast<W>(elements[k][i]) << (k * bits));
    values[i] = value;
  }
  assign(lanes<W>(warp, in.slots[0]), values, mask);
}

template <typename W, typename E>
void unpack(Warp& warp, const Instruction& in, Mask mask) {
  constexpr int count = sizeof(W) / sizeof(E), bits = 8 * sizeof(E);
  const W* source = lanes<const W>(warp, in.slots[count]);
  alignas(64) E values[count][kLanes];
  for (int k = 0; k < count; ++k)
    for (int i = 0; i < kLanes; ++i) values[k][i] = static_cast<E>(source[i] >> (k * bits));
  for (int k = 0; k < count; ++k) assign(lanes<E>(warp, in.slots[k]), values[k], mask);
}

template <bool Packing>
Handler choose_vector(int bits, size_t count) {
  const auto pick = [&]<typename W, typename E>() -> Handler {
    return Packing ? pack<W, E> : unpack<W, E>;
  };
  if (bits == 16 && count == 2) return pick.template operator()<uint16_t, uint8_t>();
  if (bits == 32 && count == 2) return pick.template operator()<uint32_t, uint16_t>();
  if (bits == 32 && count == 4) return pick.template operator()<uint32_t, uint8_t>();
  if (bits == 64 && count == 2) return pick.template operator()<uint64_t, uint32_t>();
  if (bits == 64 && count == 4) return pick.template operator()<uint64_t, uint16_t>();
  return nullptr;
}

void decode_mov(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  const std::string type = modifiers.take_type();
  modifiers.finish();
  expect_operands(decoder, statement, 2);
  const std::string &to = statement.operands[0], &from = statement.operands[1];
  const int bits = bits_of_type(type);
  if (type == "pred") {
    in.run = move_predicate;
    decoder.write(to, 1);
    if (read_predicate_operand(decoder, from)) in.flags = 1;
    return;
  }
  const bool unpacking = to[0] == '{', packing = from[0] == '{';
  if (unpacking && packing) decoder.fail("one side must be a scalar");
  if (unpacking || packing) {
    const std::vector<std::string> elements = Decoder::elements(unpacking ? to : from);
    in.run = unpacking ? choose_vector<false>(bits, elements.size())
                       : choose_vector<true>(bits, elements.size());
    if (!in.run || type[0] != 'b')
      decoder.fail(std::to_string(elements.size()) + " elements of type ." + type +
                   " are not supported here");
    const int element_bits = bits / static_cast<int>(elements.size());
    for (const std::string& element : elements) {
      const int declared = decoder.width(element);
      if (declared && declared != element_bits)
        decoder.fail("element " + element + " has " + std::to_string(declared) + " bits, not " +
                     std::to_string(element_bits));
    }
    if (packing) {
      decoder.write(to, bits);
      for (const std::string& element : elements) decoder.read(element, element_bits);
    } else {
      for (const std::string& element : elements) decoder.write(element, element_bits);
      decoder.read(from, bits);
    }
    return;
  }
  if (bits != 8)
    in.run = with_bits(bits, []<typename T>(T) -> Handler { return map_lanes<Copy, T, T>; });
  if (!in.run) decoder.fail("type ." + type + " is not supported here");
  read_operands(decoder, statement, 2, bits);
}

// Converts between a window and the plain addresses of a space; in.offset is the window.
void to_generic(Warp& warp, const Instruction& in, Mask mask) {
  const uint64_t* source = lanes<const uint64_t>(warp, in.slots[1]);
  alignas(64) uint64_t values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = source[i] | static_cast<uint64_t>(in.offset);
  assign(lanes<uint64_t>(warp, in.slots[0]), values, mask);
}
void from_generic(Warp& warp, const Instruction& in, Mask mask) {
  const uint64_t* source = lanes<const uint64_t>(warp, in.slots[1]);
  alignas(64) uint64_t values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = source[i] & ~static_cast<uint64_t>(in.offset);
  assign(lanes<uint64_t>(warp, in.slots[0]), values, mask);
}

void decode_cvta(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  const std::string type = modifiers.take_type();
  if (type != "u64") decoder.fail("addresses have 64 bits; type ." + type + " is not supported");
  const bool to_space = modifiers.take("to");
  const std::string space = modifiers.take_first("space");
  modifiers.finish();
  in.run = to_space ? from_generic : to_generic;
  if (space == "shared" || space == "shared::cta" || space == "shared::cluster")
    in.offset = kSharedWindow;
  else if (space == "local")
    in.offset = kLocalWindow;
  else if (space == "param" || space == "param::entry")
    in.offset = kParamWindow;
  else if (space == "global" || space == "const")
    in.run = map_lanes<Copy, uint64_t, uint64_t>;
  else
    decoder.fail("space ." + space + " is not supported here");
  read_operands(decoder, statement, 2, 64);
}

}  // namespace

void add_move(OpcodeTable& table) {
  table["mov"] = decode_mov;
  table["cvta"] = decode_cvta;
}

}  // namespace ptxvm
