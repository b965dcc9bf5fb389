// wgmma: D (64 x N) = A (64 x k) B (k x N) + D for a warpgroup, with 32 bytes of k. Each warp has
// 16 rows of A and D, in the fragment layout of N / 8 mma.m16n8k*: every 8 columns are one mma. A
// product takes effect between its issue and the wait for its group; A in registers is read at the
// issue, since nothing may change it until then.
#include <algorithm>
#include <iterator>
#include <utility>

#include "ptxvm/async.h"
#include "ptxvm/check.h"
#include "ptxvm/control.h"
#include "ptxvm/decode.h"
#include "ptxvm/descriptor.h"
#include "ptxvm/memory_ops.h"
#include "ptxvm/parse.h"
#include "ptxvm/tensor.h"

namespace ptxvm {

struct Product {
  const Instruction* from;
  uint64_t a, b;                  // descriptors
  uint32_t fragments[4][kLanes];  // of A, if it is in registers
  Mask lost[4];                   // lanes of these fragments without a value
  bool accumulates;
  uint32_t group;
};

namespace {

constexpr uint8_t kRegisters = 1, kTransposeA = 2, kTransposeB = 4, kNegateA = 8, kNegateB = 16;
constexpr int kFragmentsA = 4, kFragmentsB = 2;
constexpr uint32_t kSlotBytes = sizeof(uint32_t) * kLanes;

// Slots of an instruction: D, D again as a source, A, B, scale-d. Instruction::target holds the
// number of columns and the type of the operands.
struct Form {
  uint32_t n, kind;
  bool packed;  // D is f16
  explicit Form(const Instruction& in)
      : n(in.target & 0x1ff), kind(in.target >> 16), packed(in.target >> 15 & 1) {}
  int registers() const { return static_cast<int>(packed ? n / 4 : n / 2); }
  int per_block() const { return packed ? 2 : 4; }
};

// Loads core matrices into slots of scratch registers.
class Loader {
 public:
  Loader(Warp& warp, const Product& product) : warp_(warp), in_(*product.from) {}

  // Finds the rows of a core matrix. False if one of them holds no value.
  bool find(const Descriptor& matrix, uint32_t first, uint32_t chunk, const char** rows) {
    uint8_t lost = 0;
    for (uint32_t r = 0; r < 8; ++r) rows[r] = row_at(matrix.row_of_core(first, chunk, r), lost, r);
    return !lost;
  }

  // Returns the rows (of M or N) without a value; all rows of a transposed matrix if one lacks it.
  uint8_t load(const Descriptor& matrix, uint32_t first, uint32_t chunk, uint32_t slot) {
    alignas(16) uint16_t plain[64];
    uint16_t* const out = lanes<uint16_t>(warp_, slot);
    uint16_t* const rows = matrix.transposed() ? plain : out;
    uint8_t lost = 0;
    for (uint32_t r = 0; r < 8; ++r) {
      const uint64_t address = matrix.row_of_core(first, chunk, r);
      std::memcpy(rows + 8 * r, row_at(address, lost, r), 16);
    }
    if (matrix.transposed()) transpose(plain, out);
    return matrix.transposed() && lost ? 0xff : lost;
  }

 private:
  const char* row_at(uint64_t address, uint8_t& lost, uint32_t row) {
    const Block& block = *warp_.block;
    if (address + 16 > block.shared_bytes)  // out of bounds: raises the fault
      return access(warp_, in_, Space::shared, address, 0, 16, Access::read);
    if (!holds_values(block, address, 16)) lost |= static_cast<uint8_t>(1 << row);
    return block.shared + address;
  }

  Warp& warp_;
  const Instruction& in_;
};

void negate(Warp& warp, uint32_t slot, uint32_t kind) {
  static constexpr uint32_t kSigns[] = {0x80008000, 0x80008000, 0x80000000, 0x80808080};
  uint32_t* values = lanes<uint32_t>(warp, slot);
  for (int i = 0; i < kLanes; ++i) values[i] ^= kSigns[std::min(kind, 3u)];
}

// Lanes of D's fragments that depend on rows of a half of A, and on columns of B, by the parity of
// the column (tensor.h).
Mask lanes_of_rows(uint8_t rows) {
  Mask mask = 0;
  for (int r = 0; r < 8; ++r)
    if (rows >> r & 1) mask |= Mask{0xf} << 4 * r;
  return mask;
}
Mask lanes_of_columns(uint8_t columns, int parity) {
  Mask mask = 0;
  for (int c = parity; c < 8; c += 2)
    if (columns >> c & 1) mask |= Mask{0x11111111} << c / 2;
  return mask;
}

// B of the last landed product, for the other warps that land it at the same moment.
struct SharedPanel {
  const Instruction* from = nullptr;
  uint64_t b = 0;
  Panel panel;
};

// Vectorised path for f32 accumulators. False if it does not apply, or if A or B lacks a value.
bool land_panel(Warp& warp, const Product& product, SharedPanel& shared) {
  const Instruction& in = *product.from;
  const Form form(in);
  if (options.hardware_mma || form.kind > 2 || form.packed) return false;
  const auto type = static_cast<Operand>(form.kind);
  const uint32_t scratch = warp.block->kernel->scratch;
  Loader loader(warp, product);
  if (shared.from != &in || shared.b != product.b) {
    const Descriptor matrix(product.b, in.flags & kTransposeB);
    shared.from = nullptr;
    for (uint32_t n = 0; n < form.n; n += 8)
      for (uint32_t i = 0; i < kFragmentsB; ++i) {
        const char* rows[8];
        if (!loader.find(matrix, n, i, rows) ||
            !widen_core(type, rows, matrix.transposed(), in.flags & kNegateB, n, i, shared.panel))
          return false;
      }
    shared.from = &in;
    shared.b = product.b;
  }
  const uint32_t* fragments[kFragmentsA];
  for (uint32_t i = 0; i < kFragmentsA; ++i) {
    const uint32_t slot = scratch + i * kSlotBytes;
    if (in.flags & kRegisters) {
      if (product.lost[i]) return false;
      std::memcpy(lanes<uint32_t>(warp, slot), product.fragments[i], kSlotBytes);
    } else if (loader.load(Descriptor(product.a, in.flags & kTransposeA),
                           warp.index % 4 * 16 + i % 2 * 8, i / 2, slot)) {
      return false;
    }
    if (in.flags & kNegateA) negate(warp, slot, form.kind);
    fragments[i] = lanes<uint32_t>(warp, slot);
  }
  if (!multiply_panel(type, warp, in.slots, fragments, shared.panel, form.n, product.accumulates))
    return false;
  static constexpr Mask kNoneLost[128] = {};
  accumulators_landed(warp, in, form.registers(), product.accumulates, kNoneLost);
  return true;
}

void land(Warp& warp, const Product& product, SharedPanel& shared) {
  if (land_panel(warp, product, shared)) return;
  const Instruction& in = *product.from;
  const Form form(in);
  const uint32_t scratch = warp.block->kernel->scratch;
  const uint32_t a = scratch, b = a + kFragmentsA * kSlotBytes, zero = b + kFragmentsB * kSlotBytes;
  Loader loader(warp, product);
  Mask lost_rows[2] = {};
  for (uint32_t i = 0; i < kFragmentsA; ++i) {
    if (in.flags & kRegisters) {
      std::memcpy(lanes<uint32_t>(warp, a + i * kSlotBytes), product.fragments[i], kSlotBytes);
      for (int r = 0; r < 8; ++r)
        if (product.lost[i] >> 4 * r & 0xf) lost_rows[i % 2] |= Mask{0xf} << 4 * r;
    } else {
      const Descriptor matrix(product.a, in.flags & kTransposeA);
      const uint32_t row = warp.index % 4 * 16 + i % 2 * 8;
      lost_rows[i % 2] |= lanes_of_rows(loader.load(matrix, row, i / 2, a + i * kSlotBytes));
    }
    if (in.flags & kNegateA) negate(warp, a + i * kSlotBytes, form.kind);
  }
  std::memset(lanes<uint32_t>(warp, zero), 0, kSlotBytes);
  const Descriptor matrix(product.b, in.flags & kTransposeB);
  std::vector<Mask> lost(static_cast<size_t>(form.registers()), 0);
  for (uint32_t n = 0; n < form.n; n += 8) {
    uint8_t lost_columns = 0;
    for (uint32_t i = 0; i < kFragmentsB; ++i) {
      lost_columns |= loader.load(matrix, n, i, b + i * kSlotBytes);
      if (in.flags & kNegateB) negate(warp, b + i * kSlotBytes, form.kind);
    }
    const int count = form.per_block(), first = static_cast<int>(n / 8) * count;
    uint32_t slots[14];
    uint32_t* next = slots;
    for (int i = 0; i < count; ++i) *next++ = in.slots[first + i];
    for (uint32_t i = 0; i < kFragmentsA; ++i) *next++ = a + i * kSlotBytes;
    for (uint32_t i = 0; i < kFragmentsB; ++i) *next++ = b + i * kSlotBytes;
    for (int i = 0; i < count; ++i) *next++ = product.accumulates ? in.slots[first + i] : zero;
    Instruction block = in;
    block.slots = slots;
    wgmma_block(form.kind, form.packed)(warp, block, kFullMask);
    for (int i = 0; i < count; ++i) {
      Mask& mask = lost[static_cast<size_t>(first + i)];
      mask = lost_rows[form.packed ? i : i / 2];
      for (int parity = 0; parity < 2; ++parity)
        if (form.packed || parity == i % 2) mask |= lanes_of_columns(lost_columns, parity);
    }
  }
  accumulators_landed(warp, in, form.registers(), product.accumulates, lost.data());
}

void land_first(Warp& warp, SharedPanel& shared) {
  const auto product = warp.products.front();
  warp.products.erase(warp.products.begin());
  land(warp, *product, shared);
}

void land_first(Warp& warp) {
  SharedPanel shared;
  land_first(warp, shared);
}

void land_some_products(Warp& warp) {
  if (options.async != Options::Async::seeded) return;
  while (!warp.products.empty() && warp.block->cluster->random.below(2)) land_first(warp);
  land_some(warp);
}

void require_full(Warp& warp, const Instruction& in, Mask mask) {
  if (mask != kFullMask)
    fault(warp, in, __builtin_ctz(~mask), "wgmma without all 32 lanes of the warp");
  if (warp.index / 4 * 4 + 4 > warp.block->warps.size())
    fault(warp, in, 0, "wgmma by a warpgroup of fewer than four warps");
}

uint64_t uniform(Warp& warp, const Instruction& in, uint32_t slot) {
  const uint64_t* values = lanes<const uint64_t>(warp, slot);
  for (int i = 1; i < kLanes; ++i)
    if (values[i] != values[0]) fault(warp, in, i, "the descriptor differs within the warp");
  return values[0];
}

// Check mode: rows of core matrices are read from the issue on. b: the descriptor, for B only.
void watch_matrix(Warp& warp, const Instruction& in, const Descriptor& matrix, uint32_t first,
                  uint32_t rows, uint32_t segment, const uint64_t* b) {
  uint64_t offsets[2 * 256];
  uint32_t count = 0;
  for (uint32_t row = 0; row < rows; ++row)
    for (uint32_t chunk = 0; chunk < 2; ++chunk) {
      const uint64_t offset = matrix.row_of_core(first + row / 8 * 8, chunk, row % 8);
      if (offset + 16 <= warp.block->shared_bytes) offsets[count++] = offset;
    }
  operand_read(warp, in, offsets, count, segment, b);
}

void watch_operands(Warp& warp, const Instruction& in, const Product& product) {
  const uint32_t segment = product_segment(warp);
  if (!(in.flags & kRegisters))
    watch_matrix(warp, in, Descriptor(product.a, in.flags & kTransposeA), warp.index % 4 * 16, 16,
                 segment, nullptr);
  if (was_read_alike(warp, in, product.b, segment)) return;
  watch_matrix(warp, in, Descriptor(product.b, in.flags & kTransposeB), 0, Form(in).n, segment,
               &product.b);
}

void run_product(Warp& warp, const Instruction& in, Mask mask) {
  require_full(warp, in, mask);
  const Form form(in);
  const uint32_t* const sources = in.slots + 2 * form.registers();
  const auto product = std::make_shared<Product>();
  product->from = &in;
  product->group = warp.product_groups;
  const int count = in.flags & kRegisters ? kFragmentsA : 1;
  if (in.flags & kRegisters) {
    for (int i = 0; i < kFragmentsA; ++i)
      std::memcpy(product->fragments[i], lanes<uint32_t>(warp, sources[i]), kSlotBytes);
    missing_values(warp, sources, kFragmentsA, product->lost);
  } else {
    product->a = uniform(warp, in, sources[0]);
  }
  product->b = uniform(warp, in, sources[count]);
  for (const uint64_t bits : {in.flags & kRegisters ? 0 : product->a, product->b})
    if (Descriptor(bits, false).has_offset())
      fault(warp, in, 0, "a matrix descriptor with a base offset is not supported");
  const Mask scale = predicate(warp, sources[count + 1]);
  if (scale != 0 && scale != kFullMask)
    fault(warp, in, __builtin_ctz(~scale), "scale-d differs within the warp");
  product->accumulates = scale != 0;
  do_alike(warp, in,
           (in.flags & kRegisters ? 0 : product->a) ^ uint64_t{product->accumulates} << 63,
           product->b);
  if (options.count)
    count_operands(in.flags & kRegisters ? 0 : 16 * 32, warp.index % 4 ? 0 : form.n * 32);
  if (warp.timeline) watch_operands(warp, in, *product);
  product_registers(warp, in, in.slots, form.registers());
  if (in.flags & kRegisters) product_registers(warp, in, sources, kFragmentsA);
  accumulators_issued(warp, in, form.registers());
  warp.products.push_back(product);
  if (options.async == Options::Async::earliest) land_first(warp);
  land_some_products(warp);
}

void run_fence(Warp& warp, const Instruction& in, Mask mask) {
  require_full(warp, in, mask);
  product_fence(warp);
  land_some_products(warp);
}

void run_commit(Warp& warp, const Instruction& in, Mask mask) {
  require_full(warp, in, mask);
  ++warp.product_groups;
  wake(*warp.block, kWarpgroup);
  happened(*warp.block);
  land_some_products(warp);
}

void run_wait(Warp& warp, const Instruction& in, Mask mask) {
  require_full(warp, in, mask);
  const uint64_t keep = static_cast<uint64_t>(in.offset);
  const uint64_t due = warp.product_groups - std::min<uint64_t>(keep, warp.product_groups);
  // A product belongs to the whole warpgroup: once a warp knows that it is complete, the others
  // have read their operands too, and one warp may free the memory for all.
  auto& warps = warp.block->warps;
  const size_t first = warp.index / 4 * 4, end = std::min<size_t>(first + 4, warps.size());
  for (size_t i = first; i < end; ++i)
    if (warps[i].live && warps[i].product_groups < due) {
      warp.asleep = mask;
      warp.asleep_for = kWarpgroup;
      return;
    }
  for (bool any = true; any;) {
    any = false;
    SharedPanel shared;  // next product of each warp
    for (size_t i = first; i < end; ++i)
      if (!warps[i].products.empty() && warps[i].products.front()->group < due) {
        land_first(warps[i], shared);
        any = true;
      }
  }
  accumulators_waited(warp, keep);
  products_waited(warp, static_cast<uint32_t>(due));
}

// Form::kind for the types of A and B, -1 if there is none.
int kind_of(const std::string& a, const std::string& b) {
  static const std::pair<const char*, const char*> kTypes[] = {
      {"f16", "f16"},   {"bf16", "bf16"}, {"tf32", "tf32"}, {"e4m3", "e4m3"},
      {"e4m3", "e5m2"}, {"e5m2", "e4m3"}, {"e5m2", "e5m2"}, {"s8", "s8"},
      {"s8", "u8"},     {"u8", "s8"},     {"u8", "u8"}};
  static_assert(std::size(kTypes) == kFirstInteger + kIntegers);
  for (size_t kind = 0; kind < std::size(kTypes); ++kind)
    if (a == kTypes[kind].first && b == kTypes[kind].second) return static_cast<int>(kind);
  return -1;
}

bool is_one(Decoder& decoder, const std::string& text, const char* one, const char* other) {
  if (text != one && text != other)
    decoder.fail(std::string("an immediate must be ") + one + " or " + other + "; got " + text);
  return text == other;
}

// A vector operand with exactly `count` registers.
std::vector<std::string> registers_of(Decoder& decoder, const std::string& operand, int count,
                                      const std::string& what) {
  auto names = Decoder::elements(operand);
  if (names.size() != static_cast<size_t>(count))
    decoder.fail(what + " needs " + std::to_string(count) + " registers");
  if (std::find(names.begin(), names.end(), "_") != names.end())
    decoder.fail(what + " needs a register, not '_'");
  return names;
}

void decode_product(Decoder& decoder, const Statement& statement, Instruction& in) {
  const auto& parts = statement.opcode;
  const auto& operands = statement.operands;
  const bool saturates = parts.size() == 9 && parts[5] == "satfinite";
  uint64_t n = 0;
  const std::string shape = parts.size() > 4 ? parts[4] : "";
  const size_t k_at = shape.find('k');
  if (parts.size() != 8u + saturates || parts[2] != "sync" || parts[3] != "aligned" ||
      shape.rfind("m64n", 0) != 0 || k_at == std::string::npos ||
      !parse_literal(shape.substr(4, k_at - 4), 32, n))
    decoder.fail("unknown form of wgmma");
  const std::string &d = parts[parts.size() - 3], &a = parts[parts.size() - 2], &b = parts.back();
  const int kind = kind_of(a, b);
  if (kind < 0) decoder.fail("no wgmma of these types");
  const bool integer = kind >= kFirstInteger, half = kind < 2, packed = d == "f16";
  const int k = half ? 16 : kind == 2 ? 8 : 32;
  const bool types = integer ? d == "s32" : d == "f32" || (packed && kind != 1 && kind != 2);
  if (!types || (saturates && !integer)) decoder.fail("no wgmma of these types");
  if (n < 8 || n > 256 || n % 8 || (integer && n > 32 && n % 16) ||
      shape.substr(k_at) != "k" + std::to_string(k))
    decoder.fail("no wgmma of this shape");
  in.target = static_cast<uint32_t>(n) | (packed ? 1u << 15 : 0) |
              static_cast<uint32_t>(saturates ? kind + kIntegers : kind) << 16;
  const bool registers = operands.size() > 1 && operands[1][0] == '{';
  const size_t expected = 4 + (integer ? 0 : 2) + (half ? 2 - registers : 0);
  if (operands.size() != expected) decoder.fail("wrong number of operands");
  const auto accumulators = registers_of(decoder, operands[0], Form(in).registers(), "D");
  for (const auto& name : accumulators) decoder.write(name, 32);
  for (const auto& name : accumulators) decoder.read(name, 32);
  if (registers) {
    for (const auto& name : registers_of(decoder, operands[1], kFragmentsA, "A"))
      decoder.read(name, 32);
    in.flags |= kRegisters;
  } else {
    decoder.read(operands[1], 64);
  }
  decoder.read(operands[2], 64);
  decoder.read(operands[3], 1);
  if (operands[3][0] == '!') decoder.fail("scale-d must not be negated");
  if (!integer) {
    if (is_one(decoder, operands[4], "1", "-1")) in.flags |= kNegateA;
    if (is_one(decoder, operands[5], "1", "-1")) in.flags |= kNegateB;
  }
  if (half) {
    if (!registers && is_one(decoder, operands[6], "0", "1")) in.flags |= kTransposeA;
    if (is_one(decoder, operands.back(), "0", "1")) in.flags |= kTransposeB;
  }
  decoder.kernel().scratch = 0;  // placed by slots.cpp
  in.run = run_product;
}

void decode_wgmma(Decoder& decoder, const Statement& statement, Instruction& in) {
  const auto& parts = statement.opcode;
  in.control = Control::converge;
  if (parts.size() > 1 && parts[1] == "mma_async") return decode_product(decoder, statement, in);
  const bool waits = parts.size() > 1 && parts[1] == "wait_group";
  uint64_t groups = 0;
  if (parts.size() != 4 || parts[2] != "sync" || parts[3] != "aligned" ||
      (parts[1] != "fence" && parts[1] != "commit_group" && !waits) ||
      statement.operands.size() != waits ||
      (waits && !parse_literal(statement.operands[0], 32, groups)))
    decoder.fail("unknown form of wgmma");
  in.offset = static_cast<int64_t>(groups);
  in.run = waits ? run_wait : parts[1] == "fence" ? run_fence : run_commit;
  if (waits) {
    in.control = Control::await;
    in.flags = kAwaitsAligned;
  }
}

}  // namespace

void do_alike(Warp& warp, const Instruction& in, uint64_t a, uint64_t b) {
  auto& warps = warp.block->warps;
  const size_t first = warp.index / 4 * 4;
  Warp& lead = warps[first];
  const size_t at = warp.alike_done++ - lead.alike_by_all;
  if (at == lead.alike.size()) lead.alike.push_back({&in, a, b, 0});
  Warp::Alike& other = lead.alike[at];
  if (other.by != &in)
    fault(warp, in, 0,
          "the warps of a warpgroup differ: another executed line " +
              std::to_string(other.by->line) + ": " + other.by->text);
  if (other.a != a || other.b != b)
    fault(warp, in, 0, "the warps of a warpgroup differ in a descriptor or scale-d");
  if (++other.warps < std::min<size_t>(4, warps.size() - first)) return;
  lead.alike.pop_front();
  ++lead.alike_by_all;
}

void require_alike(Warp& exited) {
  auto& warps = exited.block->warps;
  const size_t first = exited.index / 4 * 4, end = std::min(first + 4, warps.size());
  if (warps[first].alike.empty()) return;
  for (size_t i = first; i < end; ++i)
    if (warps[i].live) return;
  const Warp::Alike& left = warps[first].alike.front();
  fault(exited, *left.by, 0,
        "executed by " + std::to_string(left.warps) + " of the " + std::to_string(end - first) +
            " warps of the warpgroup");
}

void add_wgmma(OpcodeTable& table) { table["wgmma"] = decode_wgmma; }

}  // namespace ptxvm
