// tensormap: changes fields of a tensor map in memory, and copies a map to global memory.
#include <algorithm>

#include "ptxvm/control.h"
#include "ptxvm/memory_ops.h"
#include "ptxvm/parse.h"
#include "ptxvm/tensor_map.h"

namespace ptxvm {
namespace {

constexpr uint32_t kPart = 64, kBytes = 8 * kTensorMapWords;  // of a map
constexpr const char* kFields[] = {
    "global_address", "rank",     "box_dim",           "global_dim",   "global_stride",
    "element_stride", "elemtype", "interleave_layout", "swizzle_mode", "swizzle_atomicity",
    "fill_mode"};
constexpr int kFirstOfDimension = 2, kFirstImmediate = 6;
// Instruction::variant is the Space, target the field, offset2 its dimension.
constexpr int kAddress = 0, kValue = 1;  // slots

void run_replace(Warp& warp, const Instruction& in, Mask mask) {
  alignas(64) uint64_t addresses[kLanes];
  lane_addresses(warp, in.slots[kAddress], in.offset, in.flags & kWide, addresses);
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    uint64_t words[kTensorMapWords];
    char* parts[kBytes / kPart];
    for (uint32_t i = 0; i < kBytes / kPart; ++i) {
      parts[i] =
          access(warp, in, space_of(in), addresses[lane] + i * kPart, lane, kPart, Access::write);
      std::memcpy(words + i * kPart / 8, parts[i], kPart);
    }
    const uint64_t value = in.width == 64 ? lanes<const uint64_t>(warp, in.slots[kValue])[lane]
                                          : lanes<const uint32_t>(warp, in.slots[kValue])[lane];
    const std::string why =
        replace_field(words, kFields[in.target], static_cast<int>(in.offset2), value);
    if (!why.empty()) fault(warp, in, lane, why);
    for (uint32_t i = 0; i < kBytes / kPart; ++i)
      std::memcpy(parts[i], words + i * kPart / 8, kPart);
  }
}

void decode_replace(Decoder& decoder, const Statement& statement, Instruction& in) {
  const auto& parts = statement.opcode;
  const auto& operands = statement.operands;
  const bool has_space = parts.size() == 7;
  if ((parts.size() != 6 && !has_space) || parts[2] != "tile" || parts[parts.size() - 2] != "b1024")
    decoder.fail("unknown form of tensormap.replace");
  const auto* const field = std::find(std::begin(kFields), std::end(kFields), parts[3]);
  const int number = static_cast<int>(field - std::begin(kFields));
  const bool has_dimension = number >= kFirstOfDimension && number < kFirstImmediate;
  const bool wide = parts[3] == "global_address" || parts[3] == "global_stride";
  uint64_t dimension = 0, immediate = 0;
  if (field == std::end(kFields) || parts.back() != (wide ? "b64" : "b32") ||
      (has_space && parts[4] != "global" && parts[4] != "shared::cta") ||
      operands.size() != (has_dimension ? 3u : 2u) ||
      (has_dimension && (!parse_literal(operands[1], 32, dimension) || dimension >= kMaxRank)) ||
      (number >= kFirstImmediate && !parse_literal(operands.back(), 32, immediate)))
    decoder.fail("unknown form of tensormap.replace");
  const Address address = decoder.read_address(operands[0]);
  decoder.read(operands.back(), wide ? 64 : 32);
  in.offset = address.offset;
  in.flags = address.wide ? kWide : 0;
  in.variant = static_cast<uint8_t>(!has_space             ? Space::generic
                                    : parts[4] == "global" ? Space::global
                                                           : Space::shared);
  in.target = static_cast<uint32_t>(number);
  in.offset2 = static_cast<int64_t>(dimension);
  in.width = wide ? 64 : 32;
  in.run = run_replace;
}

// The warp copies one map. A copy is a strong write, as the read of a map is a strong read.
void run_copy(Warp& warp, const Instruction& in, Mask mask) {
  alignas(64) uint64_t to[kLanes], from[kLanes];
  lane_addresses(warp, in.slots[0], in.offset, true, to);
  lane_addresses(warp, in.slots[1], in.offset2, in.flags & kWide, from);
  const int lane = __builtin_ctz(mask);
  for (uint32_t i = 0; i < kBytes; i += kPart)
    std::memcpy(access(warp, in, Space::global, to[lane] + i, lane, kPart, Access::strong_write),
                access(warp, in, Space::shared, from[lane] + i, lane, kPart, Access::read), kPart);
  fence_executed(warp, in);
}

void decode_copy(Decoder& decoder, const Statement& statement, Instruction& in) {
  const auto& parts = statement.opcode;
  const std::vector<std::string> form = {"tensormap",
                                         "cp_fenceproxy",
                                         "global",
                                         "shared::cta",
                                         "tensormap::generic",
                                         "release",
                                         parts.size() > 6 ? parts[6] : "",
                                         "sync",
                                         "aligned"};
  uint64_t bytes = 0;
  if (parts != form || statement.operands.size() != 3 ||
      !parse_literal(statement.operands[2], 32, bytes) || bytes != kBytes)
    decoder.fail("unknown form of tensormap.cp_fenceproxy");
  const Address to = decoder.read_address(statement.operands[0]);
  const Address from = decoder.read_address(statement.operands[1]);
  if (!to.wide) decoder.fail("a 32-bit address of global memory");
  in.offset = to.offset;
  in.offset2 = from.offset;
  in.flags = kAwaitsAligned | (from.wide ? kWide : 0);
  in.order = kReleases | scope_named(parts[6]);
  in.run = run_copy;
  in.control = Control::await;
}

}  // namespace

void decode_tensormap(Decoder& decoder, const Statement& statement, Instruction& in) {
  statement.has("replace") ? decode_replace(decoder, statement, in)
                           : decode_copy(decoder, statement, in);
}

}  // namespace ptxvm
