// Forms of mma that tiles.cpp executes: f64, 4 bits, 1 bit, m8n8*, sparse A.
#include <algorithm>
#include <initializer_list>

#include "ptxvm/parse.h"
#include "ptxvm/tiles.h"

namespace ptxvm {
namespace {

struct Form {
  const char* shape;
  std::initializer_list<Type> types;  // types of A and B
  bool sparse;
};

const Form kForms[] = {
    {"m8n8k4", {Type::f16}, false},
    {"m8n8k4", {Type::f64}, false},
    {"m16n8k4", {Type::f64}, false},
    {"m16n8k8", {Type::f64}, false},
    {"m16n8k16", {Type::f64}, false},
    {"m8n8k16", {Type::s8, Type::u8}, false},
    {"m8n8k32", {Type::s4, Type::u4}, false},
    {"m16n8k32", {Type::s4, Type::u4}, false},
    {"m16n8k64", {Type::s4, Type::u4}, false},
    {"m8n8k128", {Type::b1}, false},
    {"m16n8k128", {Type::b1}, false},
    {"m16n8k256", {Type::b1}, false},
    {"m16n8k16", {Type::f16}, true},
    {"m16n8k16", {Type::bf16}, true},
    {"m16n8k32", {Type::f16}, true},
    {"m16n8k32", {Type::bf16}, true},
    {"m16n8k8", {Type::tf32}, true},
    {"m16n8k16", {Type::tf32}, true},
    {"m16n8k32", {Type::s8, Type::u8}, true},
    {"m16n8k64", {Type::s8, Type::u8}, true},
    {"m16n8k64", {Type::s4, Type::u4}, true},
    {"m16n8k128", {Type::s4, Type::u4}, true},
    {"m16n8k64", {Type::e4m3, Type::e5m2}, true},
};

bool is_integer(Type type) { return type >= Type::s8; }

bool takes(const Form& form, Type type) {
  return std::find(form.types.begin(), form.types.end(), type) != form.types.end();
}

// Parses "sync", "aligned", shape, layouts, modifiers and types in order.
class Words {
 public:
  explicit Words(const Statement& statement) : parts_(statement.opcode) {}
  bool take(const char* word) {
    const bool found = at_ < parts_.size() && parts_[at_] == word;
    at_ += found;
    return found;
  }
  std::string next() { return at_ < parts_.size() ? parts_[at_++] : std::string(); }
  bool done() const { return at_ == parts_.size(); }

 private:
  const std::vector<std::string>& parts_;
  size_t at_ = 1;
};

int pieces(int elements, const Fragment& fragment) { return elements / kLanes / fragment.per(); }

bool may_accumulate(const Tile& tile, bool quads) {
  const Type d = tile.d.type, c = tile.c.type;
  if (tile.a.type == Type::f64) return d == Type::f64 && c == Type::f64;
  if (is_integer(tile.a.type)) return d == Type::s32 && c == Type::s32;
  if (tile.a.type == Type::f16 && c == Type::f16)
    return d == Type::f16 || (quads && d == Type::f32);
  return d == Type::f32 && c == Type::f32;
}

// f16 m8n8k4: quad-pairs of eight lanes; A and B may have any layout.
void lay_out_quads(Tile& tile, bool a_rows, bool b_rows) {
  using Role = Fragment::Role;
  tile.a.role = a_rows ? Role::quad_rows : Role::quad_columns;
  tile.b.role = b_rows ? Role::quad_columns : Role::quad_rows;
  tile.b.transposed = true;
  tile.a.registers = tile.b.registers = 2;
  for (Fragment* f : {&tile.c, &tile.d}) {
    f->role = f->type == Type::f16 ? Role::quad_half : Role::quad_single;
    f->registers = f->type == Type::f16 ? 4 : 8;
  }
}

}  // namespace

void read_registers(Decoder& decoder, const std::string& operand, const Fragment& fragment,
                    bool writes) {
  const auto names = Decoder::elements(operand);
  if (names.size() != static_cast<size_t>(fragment.registers))
    decoder.fail("operand " + operand + " needs " + std::to_string(fragment.registers) +
                 " registers");
  const int bits = fragment.type == Type::f64 ? 64 : 32;
  for (const std::string& name : names)
    writes ? decoder.write(name, bits) : decoder.read(name, bits);
}

Tile make_tile(int m, int n, int k, Type d, Type a, Type b, Type c) {
  Tile tile;
  tile.k = a == Type::b1 ? k / 32 : k;
  tile.a = {Fragment::Role::a, a};
  tile.b = {Fragment::Role::b, b};
  tile.c = {Fragment::Role::c, c};
  tile.d = {Fragment::Role::c, d};
  tile.a.registers = tile.a.unit = pieces(m * tile.k, tile.a);
  tile.b.registers = tile.b.unit = pieces(n * tile.k, tile.b);
  tile.c.registers = tile.c.unit = pieces(m * n, tile.c);
  tile.d.registers = tile.d.unit = pieces(m * n, tile.d);
  return tile;
}

bool parse_shape(const std::string& shape, int& m, int& n, int& k) {
  const size_t n_at = shape.find('n'), k_at = shape.find('k');
  uint64_t sizes[3];
  if (shape.empty() || shape[0] != 'm' || k_at == std::string::npos || n_at > k_at ||
      !parse_literal(shape.substr(1, n_at - 1), 32, sizes[0]) ||
      !parse_literal(shape.substr(n_at + 1, k_at - n_at - 1), 32, sizes[1]) ||
      !parse_literal(shape.substr(k_at + 1), 32, sizes[2]))
    return false;
  m = static_cast<int>(sizes[0]);
  n = static_cast<int>(sizes[1]);
  k = static_cast<int>(sizes[2]);
  return true;
}

bool take_rounding(const std::string& word, Rounding& rounding) {
  static constexpr std::pair<const char*, Rounding> kWords[] = {{"rn", Rounding::nearest},
                                                                {"rz", Rounding::zero},
                                                                {"rm", Rounding::down},
                                                                {"rp", Rounding::up}};
  for (const auto& [name, value] : kWords)
    if (word == name) {
      rounding = value;
      return true;
    }
  return false;
}

bool decode_tile(Decoder& decoder, const Statement& statement, Instruction& in) {
  const auto& operands = statement.operands;
  Words words(statement);
  const bool ordered = words.take("sp::ordered_metadata"), sparse = ordered || words.take("sp");
  if (!words.take("sync") || !words.take("aligned")) return false;
  const std::string shape = words.next(), a_layout = words.next(), b_layout = words.next();
  std::string word = words.next();
  Tile tile;
  const bool saturates = word == "satfinite", rounds = take_rounding(word, tile.rounding);
  const Rounding rounding = tile.rounding;
  if (saturates || rounds) word = words.next();
  Type types[4];  // D, A, B, C
  for (Type& type : types) {
    if (!find_type(word, type)) return false;
    word = words.next();
  }
  const bool ands = word == "and", bitwise = ands || word == "xor";
  if (bitwise && !words.take("popc")) return false;
  if ((!bitwise && !word.empty()) || !words.done()) return false;
  const auto form = std::find_if(std::begin(kForms), std::end(kForms), [&](const Form& f) {
    return shape == f.shape && f.sparse == sparse && takes(f, types[1]) && takes(f, types[2]);
  });
  int m = 0, n = 0, k = 0;
  if (form == std::end(kForms) || !parse_shape(shape, m, n, k)) return false;
  tile = make_tile(m, n, sparse ? k / 2 : k, types[0], types[1], types[2], types[3]);
  // B has as many rows as A has columns, even if A is sparse.
  if (sparse) tile.b.registers = tile.b.unit = pieces(n * k, tile.b);
  const bool quads = shape == "m8n8k4" && types[1] == Type::f16;
  const bool rows = a_layout == "row", columns = b_layout == "col";
  if ((!rows && a_layout != "col") || (!columns && b_layout != "row")) return false;
  if (!quads && !(rows && columns)) return false;
  if (quads) lay_out_quads(tile, rows, !columns);
  for (Fragment* f : {&tile.a, &tile.b, &tile.c, &tile.d}) f->unit = f->registers;
  if (!may_accumulate(tile, quads) || bitwise != (types[1] == Type::b1) ||
      (rounds && types[1] != Type::f64) || (saturates && (!is_integer(types[1]) || bitwise)))
    return false;
  tile.rounding = rounding;
  tile.saturates = saturates;
  tile.ands = ands;
  tile.sparse = sparse;
  tile.ordered = ordered;
  if (operands.size() != (sparse ? 6u : 4u)) decoder.fail("wrong number of operands");
  read_registers(decoder, operands[0], tile.d, true);
  read_registers(decoder, operands[1], tile.a, false);
  read_registers(decoder, operands[2], tile.b, false);
  read_registers(decoder, operands[3], tile.c, false);
  if (sparse) {
    decoder.read(operands[4], 32);
    const int given = tile.in_four_lanes();
    uint64_t selector = 0;
    if (!parse_literal(operands[5], 32, selector) || selector >= 4u / static_cast<unsigned>(given))
      decoder.fail("sparsity selector: must be from 0 to " + std::to_string(4 / given - 1) +
                   "; got " + operands[5]);
    tile.selector = static_cast<int>(selector);
  }
  in.target = add_tile(decoder.kernel(), tile);
  in.run = multiply_tile;
  in.control = Control::converge;
  return true;
}

}  // namespace ptxvm
