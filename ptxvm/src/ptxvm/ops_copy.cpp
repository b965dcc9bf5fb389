// cp.async. By default a copy takes effect only at the wait that completes it, the latest moment
// that PTX allows: a kernel that reads too early sees the old contents. Options::async selects
// other moments.
#include <algorithm>

#include "ptxvm/async.h"
#include "ptxvm/memory_ops.h"
#include "ptxvm/parse.h"

namespace ptxvm {
namespace {

constexpr uint8_t kIgnoreSource = 8, kIgnoreNegated = 16, kSourceSize = 32, kSourceWide = 64;

void move(const Warp& warp, AsyncCopy& copy) {
  if (copy.landed) return;
  char* to = warp.block->shared + copy.destination;
  std::memcpy(to, reinterpret_cast<const void*>(copy.source), copy.source_bytes);
  std::memset(to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  copy.landed = true;
}

void move_some(Warp& warp) {
  if (options.async != Options::Async::seeded) return;
  for (AsyncCopy& copy : warp.copies)
    if (warp.block->cluster->random.below(4) == 0) move(warp, copy);
}

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

// Slots: destination, source, then source size or the ignore-src predicate.
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
  // Bounds are checked at the issue, so that a fault names the copy and not the wait. Partial
  // sources are whole bytes of an aligned access.
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
                         warp.copies_issued,
                         from[i],
                         &in,
                         warp.copy_groups[i],
                         in.width,
                         static_cast<uint8_t>(sizes[i]),
                         static_cast<uint8_t>(i),
                         false};
    if (warp.block->shadow) copy_issued(warp, in, copy);
    warp.copies.push_back(copy);
    if (options.async == Options::Async::earliest) move(warp, warp.copies.back());
  }
  ++warp.copies_issued;
  move_some(warp);
}

void commit_copies(Warp& warp, const Instruction&, Mask mask) {
  move_some(warp);
  for (int i = 0; i < kLanes; ++i) warp.copy_groups[i] += mask >> i & 1;
}

// segment: see copy_landed.
template <typename Choose>
void land_chosen(Warp& warp, uint32_t segment, Choose choose) {
  auto kept = warp.copies.begin();
  for (AsyncCopy& copy : warp.copies) {
    if (!choose(copy)) {
      *kept++ = copy;
      continue;
    }
    move(warp, copy);
    if (warp.block->shadow) copy_landed(warp, copy, segment);
  }
  warp.copies.erase(kept, warp.copies.end());
}

// Completes the copies of the lanes in the mask except their last `offset` groups.
void wait_copies(Warp& warp, const Instruction& in, Mask mask) {
  const uint64_t keep = static_cast<uint64_t>(in.offset);
  land_chosen(warp, 0, [&](const AsyncCopy& copy) {
    return mask >> copy.lane & 1 && copy.group + keep < warp.copy_groups[copy.lane];
  });
  copies_waited(warp);
}

void wait_all_copies(Warp& warp, const Instruction& in, Mask mask) {
  commit_copies(warp, in, mask);
  wait_copies(warp, in, mask);
}

void decode_cp(Decoder& decoder, const Statement& statement, Instruction& in) {
  const auto& parts = statement.opcode;
  const auto& operands = statement.operands;
  const bool reduces = parts.size() > 4 && parts[1] == "reduce";
  if (parts.size() < 3 || (parts[1] != "async" && !reduces))
    decoder.fail("only cp.async and cp.reduce.async are known of cp");
  if (parts[2 + reduces] == "bulk") return decode_bulk(decoder, statement, in);
  if (reduces) decoder.fail("unknown form of cp.reduce");
  if (parts[2] == "mbarrier") return decode_copy_arrive(decoder, statement, in);
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

}  // namespace

void land_copies(Warp& warp, int lane, uint32_t end) {
  const auto is_tracked = [&](const AsyncCopy& copy) {
    return copy.lane == lane && static_cast<int32_t>(copy.number - end) < 0;
  };
  if (std::none_of(warp.copies.begin(), warp.copies.end(), is_tracked)) return;
  land_chosen(warp, warp.timeline ? copies_segment(warp, lane, end) : 0, is_tracked);
}

void add_copies(OpcodeTable& table) { table["cp"] = decode_cp; }

}  // namespace ptxvm
