// cp.async and ldmatrix. A copy takes effect only at the wait that completes it, which is the
// latest moment that PTX allows: a kernel that reads too early reads what was there before.
#include <algorithm>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "ptxvm/memory_ops.h"
#include "ptxvm/parse.h"

namespace ptxvm {
namespace {

constexpr uint8_t kIgnoreSource = 8, kIgnoreNegated = 16, kSourceSize = 32, kSourceWide = 64;

uint64_t shared_offset(uint64_t address) { return address & ~kWindowMask; }

[[noreturn]] void report_copy(Warp& warp, const Instruction& in, Mask mask, const uint64_t* to,
                              const uint64_t* from, const uint32_t* sizes) {
  const std::string width = std::to_string(in.width);
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    if (sizes[i] > in.width)
      fault(warp, in, i,
            "cp.async with a source size of " + std::to_string(sizes[i]) +
                " bytes, more than the " + width + " of the copy");
    if (sizes[i] && from[i] & (in.width - 1u))
      fault(warp, in, i,
            "cp.async from a misaligned global address, which must be a multiple of " + width +
                " bytes");
    access(warp, in, Space::shared, to[i], i, in.width, Access::write);
  }
  fault(warp, in, __builtin_ctz(mask), "cp.async broke a rule");
}

// Slots: destination, source, then source size or the predicate that says to ignore the source.
void issue_copy(Warp& warp, const Instruction& in, Mask mask) {
  alignas(64) uint64_t to[kLanes], from[kLanes];
  alignas(64) uint32_t sizes[kLanes];
  lane_addresses(warp, in.slots[0], in.offset, in.flags & kWide, to);
  lane_addresses(warp, in.slots[1], in.offset2, in.flags & kSourceWide, from);
  std::fill_n(sizes, kLanes, in.width);
  if (in.flags & kSourceSize) std::copy_n(lanes<const uint32_t>(warp, in.slots[2]), kLanes, sizes);
  if (in.flags & kIgnoreSource) {
    const Mask value = predicate(warp, in.slots[2]);
    const Mask ignored = in.flags & kIgnoreNegated ? ~value : value;
    for (int i = 0; i < kLanes; ++i) sizes[i] = ignored >> i & 1 ? 0 : in.width;
  }
  Mask reading = 0, whole = 0;
  uint64_t wrong = 0;
  const uint64_t low_bits = in.width - 1u, limit = warp.block->shared_bytes;
  for (int i = 0; i < kLanes; ++i) {
    reading |= Mask{sizes[i] != 0} << i;
    whole |= Mask{sizes[i] == in.width} << i;
  }
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t offset = shared_offset(to[i]);
    const uint64_t breaks = (offset & low_bits) | uint64_t{offset + in.width > limit} |
                            uint64_t{sizes[i] > in.width} | (sizes[i] ? from[i] & low_bits : 0);
    wrong |= mask >> i & 1 ? breaks : 0;
  }
  reading &= mask;
  if (options.count) {
    count_request(warp, in, Space::shared, to, mask, in.width, Traffic::copy);
    count_request(warp, in, Space::global, from, reading, in.width, Traffic::copy);
  }
  if (wrong) report_copy(warp, in, mask, to, from, sizes);
  // Bounds are checked now, so that a fault names the copy and not the wait. Partial sources are
  // whole bytes of an aligned access.
  for (Mask rest = reading & ~whole; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    for (uint32_t b = 0; b < sizes[i]; ++b)
      access(warp, in, Space::global, from[i] + b, i, 1, Access::read);
  }
  if (mask & whole) {
    alignas(64) uint64_t host[kLanes];
    std::copy_n(from, kLanes, host);
    resolve(warp, in, Space::global, host, mask & whole, in.width, Access::read);
  }
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    const AsyncCopy copy{static_cast<uint32_t>(shared_offset(to[i])),
                         from[i],
                         in.width,
                         static_cast<uint8_t>(sizes[i]),
                         static_cast<uint8_t>(i),
                         warp.copy_groups[i],
                         &in};
    if (warp.block->shadow) copy_issued(warp, in, copy);
    warp.copies.push_back(copy);
  }
}

void commit_copies(Warp& warp, const Instruction&, Mask mask) {
  for (int i = 0; i < kLanes; ++i) warp.copy_groups[i] += mask >> i & 1;
}

void land(Warp& warp, const AsyncCopy& copy) {
  char* to = warp.block->shared + copy.destination;
  std::memcpy(to, reinterpret_cast<const void*>(copy.source), copy.source_bytes);
  std::memset(to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  if (warp.block->shadow) copy_landed(warp, copy);
}

// Completes the copies of the lanes in mask but those of their last `offset` groups.
void wait_copies(Warp& warp, const Instruction& in, Mask mask) {
  const uint64_t keep = static_cast<uint64_t>(in.offset);
  auto kept = warp.copies.begin();
  for (const AsyncCopy& copy : warp.copies) {
    const bool done = mask >> copy.lane & 1 && copy.group + keep < warp.copy_groups[copy.lane];
    if (done)
      land(warp, copy);
    else
      *kept++ = copy;
  }
  warp.copies.erase(kept, warp.copies.end());
}

void wait_all_copies(Warp& warp, const Instruction& in, Mask mask) {
  commit_copies(warp, in, mask);
  wait_copies(warp, in, mask);
}

void decode_cp(Decoder& decoder, const Statement& statement, Instruction& in) {
  const auto& parts = statement.opcode;
  const auto& operands = statement.operands;
  if (parts.size() < 3 || parts[1] != "async") decoder.fail("only cp.async is known of cp");
  if (parts[2] == "commit_group" || parts[2] == "wait_all" || parts[2] == "wait_group") {
    const bool counted = parts[2] == "wait_group";
    if (parts.size() != 3 || operands.size() != counted) decoder.fail("malformed");
    uint64_t groups = 0;
    if (counted && !parse_literal(operands[0], 32, groups)) decoder.fail("no number of groups");
    in.offset = static_cast<int64_t>(groups);
    in.run = counted ? wait_copies : parts[2] == "wait_all" ? wait_all_copies : commit_copies;
    return;
  }
  if (parts[2] != "ca" && parts[2] != "cg") decoder.fail("unknown form of cp.async");
  const Words words = read_words(decoder, statement, {"async", "shared", "shared::cta"});
  if (words.space != Space::global || !(statement.has("shared") || statement.has("shared::cta")))
    decoder.fail("cp.async copies from global to shared memory");
  if (operands.size() < 3u + words.cache_hint || operands.size() > 4u + words.cache_hint)
    decoder.fail("wrong number of operands");
  uint64_t bytes = 0;
  if (!parse_literal(operands[2], 32, bytes)) decoder.fail("the size of a copy is no number");
  if (bytes != 16 && (parts[2] == "cg" || (bytes != 4 && bytes != 8)))
    decoder.fail("cp.async copies 16 bytes, and .ca also 4 or 8");
  in.width = static_cast<uint8_t>(bytes);
  const Address to = decoder.read_address(operands[0]);
  const Address from = decoder.read_address(operands[1]);
  if (!from.wide) decoder.fail("a 32-bit address of global memory");
  in.offset = to.offset;
  in.offset2 = from.offset;
  in.flags = (to.wide ? kWide : 0) | (from.wide ? kSourceWide : 0);
  if (operands.size() == 4u + words.cache_hint) {
    std::string last = operands[3];
    const bool negated = last[0] == '!';
    if (negated) last.erase(0, 1);
    const bool is_predicate = decoder.width(last) == 1;
    in.flags |= is_predicate ? kIgnoreSource : kSourceSize;
    if (negated) in.flags |= kIgnoreNegated;
    if (negated && !is_predicate) decoder.fail("'!' before a size");
    decoder.read(last, is_predicate ? 1 : 32);
  }
  if (words.cache_hint) decoder.read(operands.back(), 64);
  in.run = issue_copy;
}

// An 8 x 8 matrix of 16-bit elements, row after row.
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

// From the lanes whose rows hold no value to those that get elements of these rows.
template <int count, bool transposes>
void spread_rows(Undefined& undefined) {
  for (int i = 0; i < 8 * count; ++i) {
    if (!(undefined.loaded >> i & 1)) continue;
    const int row = i % 8;
    undefined.values[i / 8] |= transposes ? Mask{0x11111111} << (row / 2) : Mask{0xf} << (4 * row);
  }
  undefined.loaded = 0;
}

// Lane 8j + r holds the address of row r of matrix j; row r goes to lanes 4r to 4r + 3 of register
// j, two elements each, of the matrix or of its transpose.
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

void add_copies(OpcodeTable& table) {
  table["cp"] = decode_cp;
  table["ldmatrix"] = decode_ldmatrix;
  table["movmatrix"] = decode_movmatrix;
}

}  // namespace ptxvm
