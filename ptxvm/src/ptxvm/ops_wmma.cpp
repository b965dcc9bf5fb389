// wmma: fragments consist of the fragments of the underlying mma, several m16n8k* side by side or
// m8n8k*; PTX leaves their layout unspecified. An 8 x 32 product is the transpose of a 32 x 8 one.
// f16 operands have eight registers, of which the surplus ones repeat the first.
#include <algorithm>

#include "ptxvm/memory_ops.h"
#include "ptxvm/tiles.h"

namespace ptxvm {

// A product: fragments, and the mma of each block. Slots: D, A, B, C.
struct Wmma {
  Tile whole;
  Handler block = nullptr;
  uint32_t tile = 0;  // for multiply_tile
};

// A load or store. Slots: values first or last, as in the text, then the stride if there is one.
struct WmmaCopy {
  Fragment fragment;
  bool row_major, has_stride;
  int64_t stride;  // in elements, if none is given
};

namespace {

bool is_in(Type type, std::initializer_list<Type> types) {
  return std::find(types.begin(), types.end(), type) != types.end();
}

// Fragments of one shape; D and C differ only in type. False if the shape does not exist.
bool lay_out(const std::string& shape, Type d, Type a, Type b, Type c, Tile& whole) {
  int m = 0, n = 0, k = 0;
  if (!parse_shape(shape, m, n, k)) return false;
  const bool wide = is_in(a, {Type::f16, Type::bf16, Type::s8, Type::u8});
  const bool square = shape == "m16n16k16" || (shape == "m16n16k8" && a == Type::tf32);
  const bool small = (shape == "m8n8k4" && a == Type::f64) ||
                     (shape == "m8n8k128" && a == Type::b1) ||
                     (shape == "m8n8k32" && is_in(a, {Type::s4, Type::u4}));
  const bool tall = shape == "m32n8k16" || shape == "m8n32k16";
  if (a != b || !(small || (square && (wide || k == 8)) || (tall && wide))) return false;
  whole = make_tile(small ? 8 : 16, 8, k, d, a, b, c);
  if (small) return true;
  const int blocks = 2;
  const bool flat = shape == "m8n32k16";
  for (Fragment* f : {&whole.c, &whole.d}) {
    f->blocks = blocks;
    (square ? f->columns : f->rows) = square ? 8 : 16;
  }
  Fragment& split = square ? whole.b : whole.a;  // the operand that differs from block to block
  split.blocks = blocks;
  (square ? split.columns : split.rows) = square ? 8 : 16;
  if (flat) {
    std::swap(whole.a, whole.b);
    for (Fragment* f : {&whole.a, &whole.b, &whole.c, &whole.d}) f->transposed = true;
  }
  for (Fragment* f : {&whole.a, &whole.b, &whole.c, &whole.d}) f->registers = f->unit * f->blocks;
  if (a == Type::f16) whole.a.registers = whole.b.registers = 8;
  return true;
}

void multiply_blocks(Warp& warp, const Instruction& in, Mask mask) {
  const Wmma& product = *warp.block->kernel->products[in.target];
  const Tile& whole = product.whole;
  const uint32_t *d = in.slots, *a = d + whole.d.registers, *b = a + whole.a.registers,
                 *c = b + whole.b.registers;
  // Operands of the mma, which computes the transpose of a flat product.
  const Fragment* first = &whole.a;
  const Fragment* second = &whole.b;
  if (first->transposed) {
    std::swap(first, second);
    std::swap(a, b);
  }
  Instruction one = in;
  one.target = product.tile;
  // D is stored after all blocks have been read: it may share registers with A or B.
  const uint32_t scratch = warp.block->kernel->scratch;
  for (int i = 0; i < whole.d.blocks; ++i) {
    uint32_t slots[32], *next = slots;
    for (int r = 0; r < whole.d.unit; ++r)
      *next++ = whole.d.blocks == 1
                    ? d[r]
                    : scratch + static_cast<uint32_t>((i * whole.d.unit + r) * 4 * kLanes);
    next = std::copy_n(a + (first->blocks > 1 ? i * first->unit : 0), first->unit, next);
    next = std::copy_n(b + (second->blocks > 1 ? i * second->unit : 0), second->unit, next);
    std::copy_n(c + i * whole.c.unit, whole.c.unit, next);
    one.slots = slots;
    product.block(warp, one, mask);
  }
  if (whole.d.blocks == 1) return;
  for (int r = 0; r < whole.d.registers; ++r)
    std::memcpy(lanes<uint32_t>(warp, d[r]),
                lanes<uint32_t>(warp, scratch + static_cast<uint32_t>(r * 4 * kLanes)), 4 * kLanes);
}

// Calls act(register, byte offset in it, bytes, addresses) for pieces of memory that cover the
// fragment.
template <typename Act>
void for_pieces(Warp& warp, const Instruction& in, const WmmaCopy& copy, uint32_t base,
                uint32_t stride_slot, Act act) {
  const Fragment& fragment = copy.fragment;
  alignas(64) uint64_t bases[kLanes];
  lane_addresses(warp, base, in.offset, in.flags & kWide, bases);
  const int bits = bits_of(fragment.type), per = fragment.per();
  const Place one = fragment.place(0, 0, 0), next = fragment.place(0, 0, per > 1 ? 1 : 0);
  const bool whole = per == 1 || (copy.row_major ? next.column != one.column : next.row != one.row);
  const uint32_t bytes = static_cast<uint32_t>(whole ? bits * per / 8 : bits / 8);
  for (int r = 0; r < fragment.unit * fragment.blocks; ++r)
    for (int j = 0; j < (whole ? 1 : per); ++j) {
      alignas(64) uint64_t addresses[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const Place place = fragment.place(lane, r, j);
        const int64_t stride =
            copy.has_stride ? lanes<const int32_t>(warp, stride_slot)[lane] : copy.stride;
        const int64_t major = copy.row_major ? place.row : place.column;
        const int64_t minor = copy.row_major ? place.column : place.row;
        // Elements of b1 are words, but the stride counts bits.
        const int64_t at = fragment.type == Type::b1 ? major * stride + minor * 32
                                                     : (major * stride + minor) * bits;
        addresses[lane] = bases[lane] + static_cast<uint64_t>(at / 8);
      }
      act(r, static_cast<uint32_t>(j * bits / 8), bytes, addresses);
    }
}

void require_full(Warp& warp, const Instruction& in, Mask mask) {
  if (mask != kFullMask)
    fault(warp, in, __builtin_ctz(~mask), "wmma without all 32 lanes of the warp");
}

void load_fragment(Warp& warp, const Instruction& in, Mask mask) {
  require_full(warp, in, mask);
  const WmmaCopy& copy = *warp.block->kernel->copies[in.target];
  const Fragment& fragment = copy.fragment;
  const int distinct = fragment.unit * fragment.blocks;
  const uint32_t size = fragment.type == Type::f64 ? 8 : 4;
  alignas(64) char values[8][8 * kLanes] = {};
  Mask lost[8] = {};
  const Instruction* origin = nullptr;
  for_pieces(warp, in, copy, in.slots[in.writes], in.slots[in.writes + 1],
             [&](int r, uint32_t at, uint32_t bytes, uint64_t* addresses) {
               if (options.count)
                 count_request(warp, in, space_of(in), addresses, mask, bytes, Traffic::load);
               warp.undefined = {};
               resolve(warp, in, space_of(in), addresses, mask, bytes, Access::read);
               if (warp.undefined.by == &in) {
                 lost[r] |= warp.undefined.loaded;
                 origin = warp.undefined.origin;
               }
               for (int lane = 0; lane < kLanes; ++lane)
                 std::memcpy(values[r] + size * static_cast<uint32_t>(lane) + at,
                             reinterpret_cast<const void*>(addresses[lane]), bytes);
             });
  warp.undefined = {};
  if (origin) {
    warp.undefined.by = &in;
    warp.undefined.origin = origin;
  }
  for (int r = 0; r < fragment.registers; ++r) {
    if (origin) warp.undefined.values[r] = lost[r % distinct];
    std::memcpy(lanes<char>(warp, in.slots[r]), values[r % distinct], size * kLanes);
  }
}

void store_fragment(Warp& warp, const Instruction& in, Mask mask) {
  require_full(warp, in, mask);
  const WmmaCopy& copy = *warp.block->kernel->copies[in.target];
  const Fragment& fragment = copy.fragment;
  const uint32_t size = fragment.type == Type::f64 ? 8 : 4;
  const Undefined undefined = warp.undefined;
  for_pieces(warp, in, copy, in.slots[0], in.slots[1 + fragment.registers],
             [&](int r, uint32_t at, uint32_t bytes, uint64_t* addresses) {
               if (options.count)
                 count_request(warp, in, space_of(in), addresses, mask, bytes, Traffic::store);
               // Check mode looks at the first value, whatever its size.
               warp.undefined = undefined;
               std::fill_n(warp.undefined.values, 8, undefined.values[r]);
               resolve(warp, in, space_of(in), addresses, mask, bytes, Access::write);
               const char* values = lanes<const char>(warp, in.slots[1 + r]);
               for (int lane = 0; lane < kLanes; ++lane)
                 std::memcpy(reinterpret_cast<void*>(addresses[lane]),
                             values + size * static_cast<uint32_t>(lane) + at, bytes);
             });
}

void require(Decoder& decoder, bool holds) {
  if (!holds) decoder.fail("unknown form of wmma");
}

// Completes the tile's types from the type of one operand.
bool types_of(const std::string& role, Type type, const std::string& shape, Tile& whole) {
  if (role == "a" || role == "b") {
    const Type sum = type == Type::f64                                  ? Type::f64
                     : is_in(type, {Type::f16, Type::bf16, Type::tf32}) ? Type::f32
                                                                        : Type::s32;
    return lay_out(shape, sum, type, type, sum, whole);
  }
  for (const Type a : {Type::f16, Type::tf32, Type::f64, Type::s8, Type::s4, Type::b1}) {
    const bool fits = type == Type::f64   ? a == Type::f64
                      : type == Type::f16 ? a == Type::f16
                      : type == Type::f32 ? is_in(a, {Type::f16, Type::tf32})
                      : type == Type::s32 ? is_in(a, {Type::s8, Type::s4, Type::b1})
                                          : false;
    if (fits && lay_out(shape, type, a, a, type, whole)) return true;
  }
  return false;
}

// wmma.load.a.sync.aligned.row.m16n16k16{.space}.f16, and stores of d.
void decode_transfer(Decoder& decoder, const Statement& statement, Instruction& in) {
  const auto& parts = statement.opcode;
  const auto& operands = statement.operands;
  const bool loads = parts[1] == "load";
  require(decoder, parts.size() >= 8 && parts[3] == "sync" && parts[4] == "aligned" &&
                       (parts[5] == "row" || parts[5] == "col") &&
                       (operands.size() == 2 || operands.size() == 3));
  const std::string &role = parts[2], &shape = parts[6];
  require(decoder, loads ? role == "a" || role == "b" || role == "c" : role == "d");
  const std::string space = parts.size() == 9 ? parts[7] : "";
  require(decoder,
          parts.size() == 8 || space == "global" || space == "shared" || space == "shared::cta");
  Type type{};
  Tile whole;
  if (!find_type(parts.back(), type) || !types_of(role, type, shape, whole))
    decoder.fail("no wmma of this shape and type");
  WmmaCopy copy{role == "a"   ? whole.a
                : role == "b" ? whole.b
                              : whole.c,
                parts[5] == "row", operands.size() == 3, 0};
  if (is_in(type, {Type::s4, Type::u4, Type::b1}) && copy.row_major != (role == "a"))
    decoder.fail("elements of less than 8 bits need .row for A and .col for B");
  int m = 0, n = 0, k = 0;
  parse_shape(shape, m, n, k);
  const int rows = role == "b" ? k : m, columns = role == "a" ? k : n;
  copy.stride = copy.row_major ? columns : rows;
  Words words;
  words.space = space.empty() ? Space::generic : space == "global" ? Space::global : Space::shared;
  const auto read_stride = [&] {
    copy.has_stride ? decoder.read(operands[2], 32) : decoder.skip();
  };
  if (loads) {
    read_registers(decoder, operands[0], copy.fragment, true);
    read_memory_operand(decoder, operands[1], words, in);
    read_stride();
    in.run = load_fragment;
  } else {
    read_memory_operand(decoder, operands[0], words, in);
    read_registers(decoder, operands[1], copy.fragment, false);
    read_stride();
    in.width = 2;
    in.run = store_fragment;
  }
  in.control = Control::converge;
  auto& copies = decoder.kernel().copies;
  copies.push_back(std::make_shared<const WmmaCopy>(copy));
  in.target = static_cast<uint32_t>(copies.size() - 1);
}

// wmma.mma{.and.popc}.sync.aligned.row.col.m16n16k16{.rn}.f32{.bf16.bf16}.f32{.satfinite}
void decode_product(Decoder& decoder, const Statement& statement, Instruction& in) {
  std::vector<std::string> parts(statement.opcode.begin() + 2, statement.opcode.end());
  const bool bitwise = parts.size() > 2 && (parts[0] == "and" || parts[0] == "xor");
  const bool ands = bitwise && parts[0] == "and";
  if (bitwise) {
    require(decoder, parts[1] == "popc");
    parts.erase(parts.begin(), parts.begin() + 2);
  }
  const bool saturates = parts.back() == "satfinite";
  if (saturates) parts.pop_back();
  Rounding rounding = Rounding::nearest;
  const bool rounds = parts.size() > 5 && take_rounding(parts[5], rounding);
  if (rounds) parts.erase(parts.begin() + 5);
  const bool of_halves = parts.size() == 7;  // f16 forms have two types in the text
  if (of_halves) parts.insert(parts.begin() + 6, {"f16", "f16"});
  const auto is_layout = [](const std::string& word) { return word == "row" || word == "col"; };
  require(decoder, parts.size() == 9 && parts[0] == "sync" && parts[1] == "aligned" &&
                       is_layout(parts[2]) && is_layout(parts[3]) &&
                       statement.operands.size() == 4);
  Type d{}, a{}, b{}, c{};
  Wmma product;
  const bool known = find_type(parts[5], d) && find_type(parts[6], a) && find_type(parts[7], b) &&
                     find_type(parts[8], c) && lay_out(parts[4], d, a, b, c, product.whole);
  const Type sum = a == Type::f64                                  ? Type::f64
                   : is_in(a, {Type::f16, Type::bf16, Type::tf32}) ? Type::f32
                                                                   : Type::s32;
  const auto accumulates = [&](Type t) { return t == sum || (a == Type::f16 && t == Type::f16); };
  if (!known || of_halves != (a == Type::f16) || !accumulates(d) || !accumulates(c) ||
      bitwise != (a == Type::b1) || (rounds && a != Type::f64) ||
      (saturates && (sum != Type::s32 || bitwise)))
    decoder.fail("no wmma of this shape and these types");
  if (bits_of(a) == 4 || bitwise) require(decoder, parts[2] == "row" && parts[3] == "col");
  int m = 0, n = 0, k = 0;
  parse_shape(parts[4], m, n, k);
  if (m * n > 64) product.block = find_mma(k, parts[5], parts[6], parts[7], parts[8], saturates);
  if (!product.block) {
    Tile one = make_tile(m * n > 64 ? 16 : 8, 8, k, d, a, b, c);
    one.saturates = saturates;
    one.ands = ands;
    one.rounding = rounding;
    product.tile = add_tile(decoder.kernel(), one);
    product.block = multiply_tile;
  }
  read_registers(decoder, statement.operands[0], product.whole.d, true);
  read_registers(decoder, statement.operands[1], product.whole.a, false);
  read_registers(decoder, statement.operands[2], product.whole.b, false);
  read_registers(decoder, statement.operands[3], product.whole.c, false);
  decoder.kernel().scratch = 0;  // placed by slots.cpp
  auto& products = decoder.kernel().products;
  products.push_back(std::make_shared<const Wmma>(product));
  in.target = static_cast<uint32_t>(products.size() - 1);
  in.run = multiply_blocks;
  in.control = Control::converge;
}

void decode_wmma(Decoder& decoder, const Statement& statement, Instruction& in) {
  const auto& parts = statement.opcode;
  require(decoder, parts.size() > 3);
  if (parts[1] == "load" || parts[1] == "store") return decode_transfer(decoder, statement, in);
  require(decoder, parts[1] == "mma");
  decode_product(decoder, statement, in);
}

}  // namespace

const Tile* wmma_of(const Warp& warp, const Instruction& in) {
  if (in.run != multiply_blocks) return nullptr;
  return &warp.block->kernel->products[in.target]->whole;
}

void add_wmma(OpcodeTable& table) { table["wmma"] = decode_wmma; }

}  // namespace ptxvm
