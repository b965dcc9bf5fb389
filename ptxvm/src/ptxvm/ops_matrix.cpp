// ldmatrix, stmatrix, movmatrix.
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "ptxvm/memory_ops.h"

namespace ptxvm {

void transpose(const uint16_t* from, uint16_t* to) {
#if defined(__SSE2__)
  __m128i rows[8], pairs[8], quads[8];
  for (int i = 0; i < 8; ++i)
    rows[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8 * i));
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = _mm_unpacklo_epi16(rows[2 * i], rows[2 * i + 1]);
    pairs[2 * i + 1] = _mm_unpackhi_epi16(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) {
      quads[4 * i + 2 * j] = _mm_unpacklo_epi32(pairs[4 * i + j], pairs[4 * i + 2 + j]);
      quads[4 * i + 2 * j + 1] = _mm_unpackhi_epi32(pairs[4 * i + j], pairs[4 * i + 2 + j]);
    }
  for (int i = 0; i < 4; ++i) {
    auto* out = reinterpret_cast<__m128i*>(to + 16 * i);
    _mm_storeu_si128(out, _mm_unpacklo_epi64(quads[i], quads[4 + i]));
    _mm_storeu_si128(out + 1, _mm_unpackhi_epi64(quads[i], quads[4 + i]));
  }
#else
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) to[8 * i + j] = from[8 * j + i];
#endif
}

namespace {

// Maps lanes whose rows hold no value to the lanes that receive elements of these rows.
template <int count, bool transposes>
void spread_rows(Undefined& undefined) {
  for (int i = 0; i < 8 * count; ++i) {
    if (!(undefined.loaded >> i & 1)) continue;
    const int row = i % 8;
    undefined.values[i / 8] |= transposes ? Mask{0x11111111} << (row / 2) : Mask{0xf} << (4 * row);
  }
  undefined.loaded = 0;
}

// ldmatrix: lane 8j + r holds the address of row r of matrix j; row r goes to lanes 4r to 4r + 3 of
// register j, two elements each, of the matrix or of its transpose.
template <int count, bool transposes>
void load_matrices(Warp& warp, const Instruction& in, Mask mask) {
  if (mask != kFullMask)
    fault(warp, in, __builtin_ctz(~mask), "ldmatrix without all 32 lanes of the warp");
  alignas(64) uint64_t addresses[kLanes];
  lane_addresses(warp, in.slots[count], in.offset, in.flags & kWide, addresses);
  constexpr Mask rows = kFullMask >> (kLanes - 8 * count);
  if (options.count) count_request(warp, in, Space::shared, addresses, rows, 16, Traffic::matrix);
  resolve(warp, in, space_of(in), addresses, rows, 16, Access::read);
  if (warp.undefined.by == &in) spread_rows<count, transposes>(warp.undefined);
  alignas(64) uint16_t values[count][64];
  for (int j = 0; j < count; ++j) {
    alignas(64) uint16_t matrix[64];
    uint16_t* plain = transposes ? matrix : values[j];
    for (int r = 0; r < 8; ++r)
      std::memcpy(plain + 8 * r, reinterpret_cast<const void*>(addresses[8 * j + r]), 16);
    if (transposes) transpose(matrix, values[j]);
  }
  for (int j = 0; j < count; ++j)
    if (in.slots[j] != kNoSlot)
      std::memcpy(lanes<uint32_t>(warp, in.slots[j]), values[j], sizeof values[j]);
}

void decode_ldmatrix(Decoder& decoder, const Statement& statement, Instruction& in) {
  const Words words =
      read_words(decoder, statement, {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans"});
  const int count = statement.has("x4") ? 4 : statement.has("x2") ? 2 : 1;
  if (words.type != "b16" || !statement.has("m8n8") || !statement.has("sync") ||
      !statement.has("aligned") || (words.space != Space::shared && words.space != Space::generic))
    decoder.fail("unknown form of ldmatrix");
  if (statement.operands.size() != 2) decoder.fail("wrong number of operands");
  const auto values = Decoder::elements(statement.operands[0]);
  if (values.size() != static_cast<size_t>(count))
    decoder.fail("the vector of registers does not have the size of the opcode");
  for (const std::string& value : values) decoder.write(value, 32);
  read_memory_operand(decoder, statement.operands[1], words, in);
  in.control = Control::converge;
  const bool transposes = statement.has("trans");
  in.run = count == 4   ? (transposes ? load_matrices<4, true> : load_matrices<4, false>)
           : count == 2 ? (transposes ? load_matrices<2, true> : load_matrices<2, false>)
                        : (transposes ? load_matrices<1, true> : load_matrices<1, false>);
}

// stmatrix: lane 8j + r holds the address of row r of matrix j; lanes 4r to 4r + 3 hold two of its
// elements each in register j. With .trans the register holds the transpose.
template <int count, bool transposes>
void store_matrices(Warp& warp, const Instruction& in, Mask mask) {
  if (mask != kFullMask)
    fault(warp, in, __builtin_ctz(~mask), "stmatrix without all 32 lanes of the warp");
  alignas(64) uint64_t addresses[kLanes];
  lane_addresses(warp, in.slots[0], in.offset, in.flags & kWide, addresses);
  constexpr Mask rows = kFullMask >> (kLanes - 8 * count);
  if (options.count) count_request(warp, in, Space::shared, addresses, rows, 16, Traffic::matrix);
  // A row with an undefined element is undefined.
  Undefined undefined = warp.undefined;
  if (undefined.by == &in) {
    for (int j = 0; j < count; ++j) {
      Mask lost = undefined.values[j], of_rows = 0;
      for (int lane = 0; lane < kLanes; ++lane)
        if (lost >> lane & 1) of_rows |= transposes ? Mask{3} << lane % 4 * 2 : Mask{1} << lane / 4;
      warp.undefined.values[j] = of_rows << 8 * j;
    }
    for (int j = 1; j < count; ++j) warp.undefined.values[0] |= warp.undefined.values[j];
  }
  resolve(warp, in, space_of(in), addresses, rows, 16, Access::write);
  for (int j = 0; j < count; ++j) {
    alignas(64) uint16_t matrix[64];
    const auto* plain = lanes<const uint16_t>(warp, in.slots[1 + j]);
    if (transposes) transpose(plain, matrix);
    const uint16_t* from = transposes ? matrix : plain;
    for (int r = 0; r < 8; ++r)
      std::memcpy(reinterpret_cast<void*>(addresses[8 * j + r]), from + 8 * r, 16);
  }
}

void decode_stmatrix(Decoder& decoder, const Statement& statement, Instruction& in) {
  const Words words =
      read_words(decoder, statement, {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans"});
  const int count = statement.has("x4") ? 4 : statement.has("x2") ? 2 : 1;
  if (words.type != "b16" || !statement.has("m8n8") || !statement.has("sync") ||
      !statement.has("aligned") || (words.space != Space::shared && words.space != Space::generic))
    decoder.fail("unknown form of stmatrix");
  if (statement.operands.size() != 2) decoder.fail("wrong number of operands");
  const auto values = Decoder::elements(statement.operands[1]);
  if (values.size() != static_cast<size_t>(count))
    decoder.fail("the vector of registers does not have the size of the opcode");
  read_memory_operand(decoder, statement.operands[0], words, in);
  for (const std::string& value : values) decoder.read(value, 32);
  in.width = 16;
  in.control = Control::converge;
  const bool transposes = statement.has("trans");
  in.run = count == 4   ? (transposes ? store_matrices<4, true> : store_matrices<4, false>)
           : count == 2 ? (transposes ? store_matrices<2, true> : store_matrices<2, false>)
                        : (transposes ? store_matrices<1, true> : store_matrices<1, false>);
}

void move_matrix(Warp& warp, const Instruction& in, Mask mask) {
  if (mask != kFullMask)
    fault(warp, in, __builtin_ctz(~mask), "movmatrix without all 32 lanes of the warp");
  alignas(64) uint16_t values[64];
  transpose(lanes<const uint16_t>(warp, in.slots[1]), values);
  std::memcpy(lanes<uint16_t>(warp, in.slots[0]), values, sizeof values);
}

void decode_movmatrix(Decoder& decoder, const Statement& statement, Instruction& in) {
  if (statement.opcode !=
          std::vector<std::string>{"movmatrix", "sync", "aligned", "m8n8", "trans", "b16"} ||
      statement.operands.size() != 2)
    decoder.fail("unknown form of movmatrix");
  decoder.write(statement.operands[0], 32);
  decoder.read(statement.operands[1], 32);
  in.control = Control::converge;
  in.run = move_matrix;
}

}  // namespace

void add_matrices(OpcodeTable& table) {
  table["ldmatrix"] = decode_ldmatrix;
  table["stmatrix"] = decode_stmatrix;
  table["movmatrix"] = decode_movmatrix;
}

}  // namespace ptxvm
