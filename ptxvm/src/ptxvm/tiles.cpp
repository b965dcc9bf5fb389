// Fragments, and tile products without vectorised code: f64, 4 bits, 1 bit, m8n8*, sparse A,
// accumulators of two types.
#include "ptxvm/tiles.h"

#include <algorithm>
#include <bit>

#include "ptxvm/elements.h"

namespace ptxvm {
namespace {

constexpr int kRows = 32, kDepth = 128;  // the largest tiles: rows, and elements per row

struct Name {
  const char* name;
  Type type;
  int bits;
};
constexpr Name kNames[] = {
    {"f16", Type::f16, 16},  {"bf16", Type::bf16, 16}, {"tf32", Type::tf32, 32},
    {"f32", Type::f32, 32},  {"f64", Type::f64, 64},   {"e4m3", Type::e4m3, 8},
    {"e5m2", Type::e5m2, 8}, {"s8", Type::s8, 8},      {"u8", Type::u8, 8},
    {"s4", Type::s4, 4},     {"u4", Type::u4, 4},      {"b1", Type::b1, 32},
    {"s32", Type::s32, 32}};

double element(Type type, uint64_t bits, int j) {
  const auto word = static_cast<uint32_t>(bits);
  const uint32_t nibble = word >> (4 * j % 32) & 15;
  switch (type) {
    case Type::f16:
      return F16::get(word, j);
    case Type::bf16:
      return BF16::get(word, j);
    case Type::tf32:
      return TF32::get(word, j);
    case Type::f32:
      return std::bit_cast<float>(word);
    case Type::f64:
      return std::bit_cast<double>(bits);
    case Type::e4m3:
      return E4M3::get(word, j);
    case Type::e5m2:
      return E5M2::get(word, j);
    case Type::s8:
      return Int8<int8_t>::get(word, j);
    case Type::u8:
      return Int8<uint8_t>::get(word, j);
    case Type::s4:
      return static_cast<int>(nibble ^ 8) - 8;
    case Type::u4:
      return nibble;
    case Type::b1:
      return word;
    case Type::s32:
      return static_cast<int32_t>(word);
  }
  return 0;
}

// Reads the matrix of an operand, in row-major order.
void read(Warp& warp, const Fragment& fragment, const uint32_t* slots, double* matrix, int pitch) {
  for (int r = 0; r < fragment.registers; ++r)
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint64_t bits = fragment.type == Type::f64 ? lanes<uint64_t>(warp, slots[r])[lane]
                                                       : lanes<uint32_t>(warp, slots[r])[lane];
      for (int j = 0; j < fragment.per(); ++j) {
        const Place place = fragment.place(lane, r, j);
        matrix[place.row * pitch + place.column] = element(fragment.type, bits, j);
      }
    }
}

// Metadata of a sparse A. Four bits select two of four elements (of 4-bit types: two of four pairs
// of elements); for tf32, one of two. For 16-bit elements and tf32 a lane has four times four bits
// for each of two rows, for other types eight times four bits for one row.
class Metadata {
 public:
  Metadata(Warp& warp, const Instruction& in, const Tile& tile, uint32_t slot)
      : warp_(warp), in_(in), tile_(tile), values_(lanes<uint32_t>(warp, slot)) {}

  // Column of A of the i-th stored element of a row.
  int column(int row, int i) const {
    const bool single = tile_.a.type == Type::tf32, pairs = bits_of(tile_.a.type) == 4;
    const int chunk = single ? i : pairs ? i / 4 : i / 2;
    const uint32_t bits = chunk_of(row, chunk);
    if (single) {
      if (bits != 14 && bits != 4) refuse(row, chunk, "must be 0b1110 or 0b0100");
      return 2 * chunk + (bits == 14);
    }
    const int first = bits & 3, second = bits >> 2;
    if (first == second) refuse(row, chunk, "names one element twice");
    if (tile_.ordered && first > second) refuse(row, chunk, "is not in ascending order");
    const int place = (pairs ? i / 2 : i) % 2 ? second : first;
    return pairs ? 8 * chunk + 2 * place + i % 2 : 4 * chunk + place;
  }

 private:
  int lane_of(int row, int chunk) const {
    const int part = in_two_rows() ? chunk / 4 : 2 * (chunk / 8) + row / 8;
    return row % 8 * 4 + tile_.selector * tile_.in_four_lanes() + part;
  }
  bool in_two_rows() const { return bits_of(tile_.a.type) >= 16; }
  uint32_t chunk_of(int row, int chunk) const {
    const int shift = in_two_rows() ? 4 * (chunk % 4) + 16 * (row / 8) : 4 * (chunk % 8);
    return values_[lane_of(row, chunk)] >> shift & 15;
  }
  [[noreturn]] void refuse(int row, int chunk, const std::string& why) const {
    const bool single = tile_.a.type == Type::tf32, pairs = bits_of(tile_.a.type) == 4;
    const int width = single ? 2 : pairs ? 8 : 4, first = chunk * width;
    fault(warp_, in_, lane_of(row, chunk),
          "metadata of row " + std::to_string(row) + ", columns " + std::to_string(first) + " to " +
              std::to_string(first + width - 1) + " of A: " + std::to_string(chunk_of(row, chunk)) +
              " " + why);
  }

  Warp& warp_;
  const Instruction& in_;
  const Tile& tile_;
  const uint32_t* values_;
};

// Not inlined, so that no product moves out of its rounding scope.
[[gnu::noinline]] double sum_of_doubles(const double* a, const double* b, int k, double c) {
  for (int i = 0; i < k; ++i) c = std::fma(a[i], b[i], c);
  return canonical(c);
}

float sum_of_floats(const Tile& tile, const double* a, const double* b, double c) {
  float x[kDepth], y[kDepth];
  for (int i = 0; i < tile.k; ++i) {
    x[i] = static_cast<float>(a[i]);
    y[i] = static_cast<float>(b[i]);
  }
  const auto start = static_cast<float>(c);
  if (!options.hardware_mma) return ordered_sum(x, y, tile.k, start);
  const auto least = [](Type type) {
    return type == Type::f16 || type == Type::e5m2 ? -14 : type == Type::e4m3 ? -6 : -126;
  };
  const Operand operand = tile.a.type == Type::f16    ? Operand::f16
                          : tile.a.type == Type::bf16 ? Operand::bf16
                          : tile.a.type == Type::tf32 ? Operand::tf32
                                                      : Operand::f8;
  return hardware_sum(x, y, tile.k, adder_of(operand, false), start, least(tile.a.type),
                      least(tile.b.type), tile.d.type == Type::f16);
}

int32_t sum_of_integers(const Tile& tile, const double* a, const double* b, double c) {
  auto sum = static_cast<int64_t>(c);
  for (int i = 0; i < tile.k; ++i) {
    if (tile.a.type == Type::b1) {
      const auto x = static_cast<uint32_t>(a[i]), y = static_cast<uint32_t>(b[i]);
      sum += std::popcount(tile.ands ? x & y : x ^ y);
    } else {
      sum += static_cast<int64_t>(a[i]) * static_cast<int64_t>(b[i]);
    }
  }
  if (tile.saturates) sum = std::clamp<int64_t>(sum, INT32_MIN, INT32_MAX);
  return static_cast<int32_t>(sum);
}

uint64_t bits_of_sum(const Tile& tile, const double* a, const double* b, double c) {
  switch (tile.d.type) {
    case Type::f64: {
      const RoundingScope scope(tile.rounding);
      return std::bit_cast<uint64_t>(sum_of_doubles(a, b, tile.k, c));
    }
    case Type::s32:
      return static_cast<uint32_t>(sum_of_integers(tile, a, b, c));
    case Type::f16:
      return half_from(sum_of_floats(tile, a, b, c)).bits;
    default:
      return std::bit_cast<uint32_t>(sum_of_floats(tile, a, b, c));
  }
}

// Calls marks(place) for each element of each lane without a value.
template <typename Mark>
void mark(const Fragment& fragment, const Mask*& missing, Mark marks) {
  for (int r = 0; r < fragment.registers; ++r, ++missing)
    for (Mask rest = *missing; rest; rest &= rest - 1)
      for (int j = 0; j < fragment.per(); ++j) marks(fragment.place(__builtin_ctz(rest), r, j));
}

}  // namespace

bool find_type(const std::string& name, Type& type) {
  for (const Name& known : kNames)
    if (name == known.name) {
      type = known.type;
      return true;
    }
  return false;
}

int bits_of(Type type) { return kNames[static_cast<int>(type)].bits; }

Place Fragment::place(int lane, int index, int j) const {
  const int slot = index % unit, block = index / unit % blocks;
  const int n = slot * per() + j;
  // f16 m8n8k4: the diagonal block, and the row in it.
  const int quad = lane % 16 / 4 * 8, below = lane / 16 * 4;
  Place place{};
  switch (role) {
    case Role::a:
      place = place_in_a(lane, slot, j, per());
      break;
    case Role::b:
      place = place_in_b(lane, slot, j, per());
      break;
    case Role::c:
      place = place_in_c(lane, n);
      break;
    case Role::quad_rows:
      place = {quad + lane % 4 + below, n};
      break;
    case Role::quad_columns:
      place = {quad + n + below, lane % 4};
      break;
    case Role::quad_half:
      place = {quad + lane % 4 + below, quad + n};
      break;
    case Role::quad_single:
      place = {quad + (lane & 1) + (n & 2) + below, quad + (n & 4) + (lane & 2) + (n & 1)};
  }
  place.row += rows * block;
  place.column += columns * block;
  return transposed ? Place{place.column, place.row} : place;
}

void multiply_tile(Warp& warp, const Instruction& in, Mask mask) {
  if (mask != kFullMask)
    fault(warp, in, __builtin_ctz(~mask), "mma without all 32 lanes of the warp");
  const Tile& tile = *warp.block->kernel->tiles[in.target];
  const uint32_t* const a_slots = in.slots + tile.d.registers;
  const uint32_t* const b_slots = a_slots + tile.a.registers;
  const uint32_t* const c_slots = b_slots + tile.b.registers;
  double a[kRows][kDepth], b[kDepth][kRows], c[kRows][kRows];
  read(warp, tile.a, a_slots, a[0], kDepth);
  read(warp, tile.b, b_slots, b[0], kRows);
  read(warp, tile.c, c_slots, c[0], kRows);
  int columns[kRows][kDepth];  // columns of A, if it is sparse
  if (tile.sparse) {
    const Metadata metadata(warp, in, tile, c_slots[tile.c.registers]);
    for (int row = 0; row < 16; ++row)
      for (int i = 0; i < tile.k; ++i) columns[row][i] = metadata.column(row, i);
  }
  uint64_t results[8][kLanes] = {};
  for (int r = 0; r < tile.d.registers; ++r)
    for (int lane = 0; lane < kLanes; ++lane)
      for (int j = 0; j < tile.d.per(); ++j) {
        const Place place = tile.d.place(lane, r, j);
        double column[kDepth];
        for (int i = 0; i < tile.k; ++i)
          column[i] = b[tile.sparse ? columns[place.row][i] : i][place.column];
        results[r][lane] |= bits_of_sum(tile, a[place.row], column, c[place.row][place.column])
                            << bits_of(tile.d.type) * j;
      }
  for (int r = 0; r < tile.d.registers; ++r)
    for (int lane = 0; lane < kLanes; ++lane) {
      if (tile.d.type == Type::f64)
        lanes<uint64_t>(warp, in.slots[r])[lane] = results[r][lane];
      else
        lanes<uint32_t>(warp, in.slots[r])[lane] = static_cast<uint32_t>(results[r][lane]);
    }
}

uint32_t add_tile(Kernel& kernel, const Tile& tile) {
  kernel.tiles.push_back(std::make_shared<const Tile>(tile));
  return static_cast<uint32_t>(kernel.tiles.size() - 1);
}

const Tile* tile_of(const Warp& warp, const Instruction& in) {
  return in.run == multiply_tile ? warp.block->kernel->tiles[in.target].get() : nullptr;
}

void spread_tile(const Tile& tile, const Mask* missing, Mask* values) {
  bool lost_rows[kRows] = {}, lost_columns[kRows] = {}, lost[kRows][kRows] = {};
  mark(tile.a, missing, [&](Place place) { lost_rows[place.row] = true; });
  mark(tile.b, missing, [&](Place place) { lost_columns[place.column] = true; });
  mark(tile.c, missing, [&](Place place) { lost[place.row][place.column] = true; });
  // The selector names the lanes of each four that hold metadata; values of other lanes are
  // ignored.
  const int given = tile.in_four_lanes();
  const Mask asked = 0x11111111u * (((1u << given) - 1) << tile.selector * given);
  const bool all = tile.sparse && *missing & asked;
  for (int r = 0; r < tile.d.registers; ++r)
    for (int lane = 0; lane < kLanes; ++lane)
      for (int j = 0; j < tile.d.per(); ++j) {
        const Place place = tile.d.place(lane, r, j);
        if (all || lost_rows[place.row] || lost_columns[place.column] ||
            lost[place.row][place.column])
          values[r] |= Mask{1} << lane;
      }
}

}  // namespace ptxvm
