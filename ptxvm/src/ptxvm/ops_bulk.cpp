// cp.async.bulk and cp.reduce.async.bulk of contiguous bytes, and bulk groups.
#include <algorithm>
#include <utility>

#include "ptxvm/bulk.h"
#include "ptxvm/memory_ops.h"
#include "ptxvm/parse.h"

namespace ptxvm {
namespace {

using Combine = Transfer::Combine;
using Element = Transfer::Element;

constexpr uint32_t kUnit = 16;  // bytes; alignment of addresses and sizes

const char* const kCombines[] = {"copy", "add", "min", "max", "inc", "dec", "and", "or", "xor"};

template <typename T>
T value_at(Warp& warp, const Instruction& in, BulkSlot slot, int lane) {
  return lanes<const T>(warp, in.slots[slot])[lane];
}

void run_bulk(Warp& warp, const Instruction& in, Mask mask) {
  alignas(64) uint64_t near[kLanes], far[kLanes];
  const Bulk kind = static_cast<Bulk>(in.variant);
  if (kind != Bulk::prefetch)
    lane_addresses(warp, in.slots[kNear], in.offset, in.flags & kNearWide, near);
  lane_addresses(warp, in.slots[kFar], in.offset2, in.flags & kFarWide, far);
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    const uint32_t bytes = value_at<uint32_t>(warp, in, kSize, lane);
    if (bytes % kUnit)
      fault(warp, in, lane,
            "size of a bulk copy: must be a multiple of 16; got " + std::to_string(bytes));
    if (kind == Bulk::prefetch || bytes == 0) continue;
    Transfer transfer;
    transfer.from = &in;
    transfer.lane = lane;
    transfer.bytes = bytes;
    transfer.combine = combine_of(in);
    transfer.element = static_cast<Element>(in.width & 15);
    if (kind == Bulk::send) {  // kNear is the destination, kFar the source in the own block
      const SharedPlace to = shared_place(warp, in, lane, near[lane], bytes, kUnit, Whose::other,
                                          "destination of a bulk copy");
      const SharedPlace from = shared_place(warp, in, lane, far[lane], bytes, kUnit, Whose::own,
                                            "source of a bulk copy");
      transfer.pieces = {
          {to.offset, reinterpret_cast<uint64_t>(from.block->shared + from.offset), bytes}};
      add_targets(warp, in, lane, to, transfer);
      count_bulk(0, 2 * bytes);
    } else {
      const bool loads = kind == Bulk::load;
      const SharedPlace place =
          shared_place(warp, in, lane, near[lane], bytes, kUnit, near_block(in),
                       loads ? "destination of a bulk copy" : "source of a bulk copy");
      require_global(warp, in, lane, far[lane], bytes, kUnit,
                     loads                               ? Access::read
                     : transfer.combine == Combine::copy ? Access::write
                                                         : Access::atomic);
      const auto shared = reinterpret_cast<uint64_t>(place.block->shared + place.offset);
      if (loads) {
        transfer.pieces = {{place.offset, far[lane], bytes}};
        add_targets(warp, in, lane, place, transfer);
      } else {
        transfer.pieces = {{far[lane], shared, bytes}};
        transfer.to_global = true;
        transfer.group = warp.bulk_groups[lane];
      }
      count_bulk(bytes,
                 bytes * static_cast<uint32_t>(std::max<size_t>(transfer.targets.size(), 1)));
    }
    start_transfer(warp, std::move(transfer));
  }
}

void commit_bulk(Warp& warp, const Instruction&, Mask mask) {
  for (int i = 0; i < kLanes; ++i) warp.bulk_groups[i] += mask >> i & 1;
  land_some(warp);
}

void wait_bulk(Warp& warp, const Instruction& in, Mask mask) {
  finish_groups(warp, mask, static_cast<uint32_t>(in.offset), in.variant);
  groups_waited(warp, mask, static_cast<uint32_t>(in.offset), in.variant);
}

// Element type of a reduction.
Element element_of(Decoder& decoder, const Statement& statement, const BulkForm& form) {
  static constexpr std::pair<const char*, Element> kTypes[] = {
      {"b32", Element::u32}, {"b64", Element::u64}, {"u32", Element::u32}, {"s32", Element::s32},
      {"u64", Element::u64}, {"s64", Element::s64}, {"f16", Element::f16}, {"bf16", Element::bf16},
      {"f32", Element::f32}, {"f64", Element::f64}};
  const std::string& type = statement.opcode.back();
  const Combine how = form.combine;
  const bool half = type == "f16" || type == "bf16";
  if (statement.has("noftz") != (half && how == Combine::add))
    decoder.fail(".noftz belongs to .add of f16 and bf16, and to nothing else");
  const auto where = form.kind == Bulk::store ? Reduced::global : Reduced::shared;
  for (const auto& [name, element] : kTypes)
    if (type == name && (type[0] == 'b' && !half) == (how >= Combine::bit_and) &&
        reduces(how, element, where))
      return element;
  decoder.fail("no such reduction for type ." + type);
}

void decode_groups(Decoder& decoder, const Statement& statement, Instruction& in) {
  const auto& parts = statement.opcode;
  const bool commits = parts[3] == "commit_group";
  const bool reads = parts.size() == 5 && parts[4] == "read" && !commits;
  uint64_t groups = 0;
  if ((parts.size() != 4 && !reads) || statement.operands.size() != (commits ? 0u : 1u) ||
      (!commits && !parse_literal(statement.operands[0], 32, groups)))
    decoder.fail("malformed");
  in.offset = static_cast<int64_t>(groups);
  in.variant = reads;
  in.run = commits ? commit_bulk : wait_bulk;
}

}  // namespace

bool reduces(Combine how, Element element, Reduced where) {
  const auto is = [&](std::initializer_list<Element> list) {
    return std::find(list.begin(), list.end(), element) != list.end();
  };
  const bool far = where != Reduced::shared;
  switch (how) {
    case Combine::copy:
      return true;
    case Combine::add:
      return is({Element::u32, Element::s32, Element::u64}) ||
             (far && is({Element::f16, Element::bf16, Element::f32})) ||
             (where == Reduced::global && element == Element::f64);
    case Combine::min:
    case Combine::max:
      return is({Element::u32, Element::s32}) ||
             (far && is({Element::u64, Element::s64, Element::f16, Element::bf16}));
    case Combine::inc:
    case Combine::dec:
      return element == Element::u32;
    default:
      return is({Element::u32, Element::s32}) || (far && is({Element::u64, Element::s64}));
  }
}

BulkForm read_bulk_words(Decoder& decoder, const Statement& statement,
                         std::initializer_list<const char*> own) {
  BulkForm form;
  std::vector<std::string> spaces;
  bool signals = false, groups = false, prefetches = false;
  for (size_t i = 1; i < statement.opcode.size(); ++i) {
    const std::string& word = statement.opcode[i];
    const auto* const combine = std::find(std::begin(kCombines) + 1, std::end(kCombines), word);
    if (word == "global" || word.rfind("shared::", 0) == 0) {
      spaces.push_back(word);
    } else if (word == "mbarrier::complete_tx::bytes") {
      signals = true;
    } else if (word == "bulk_group") {
      groups = true;
    } else if (word == "multicast::cluster") {
      form.multicast = true;
    } else if (word == "L2::cache_hint") {
      form.policy = true;
    } else if (word == "prefetch") {
      prefetches = true;
    } else if (combine != std::end(kCombines) && statement.has("reduce")) {
      form.combine = static_cast<Combine>(combine - kCombines);
    } else if (std::find(own.begin(), own.end(), word) == own.end() && word != "async" &&
               word != "bulk" && word != "reduce" && !(word == "L2" && prefetches)) {
      decoder.fail("unknown modifier ." + word);
    }
  }
  const bool to_shared = !spaces.empty() && spaces[0].rfind("shared::", 0) == 0;
  if (prefetches && spaces == std::vector<std::string>{"global"}) {
    form.kind = Bulk::prefetch;
    signals = groups = false;
  } else if (spaces.size() == 2 && to_shared && spaces[1] == "global" && signals && !groups) {
    form.kind = Bulk::load;
  } else if (spaces.size() == 2 && spaces[0] == "shared::cluster" && spaces[1] == "shared::cta" &&
             signals && !groups) {
    form.kind = Bulk::send;
  } else if (spaces.size() == 2 && spaces[0] == "global" && spaces[1] == "shared::cta" && groups &&
             !signals) {
    form.kind = Bulk::store;
  } else {
    decoder.fail("unknown form of a bulk copy");
  }
  form.near_own = form.kind == Bulk::store || (to_shared && spaces[0] == "shared::cta");
  if (statement.has("reduce") != (form.combine != Combine::copy))
    decoder.fail("a reduction has one operation");
  const bool reduces = form.combine != Combine::copy;
  if (reduces && form.kind != Bulk::store && form.kind != Bulk::send)
    decoder.fail("a reduction goes from shared memory to global or shared memory");
  if (form.multicast && (form.kind != Bulk::load || spaces[0] != "shared::cluster"))
    decoder.fail(".multicast belongs to copies from global to shared::cluster memory");
  return form;
}

SharedPlace shared_place(Warp& warp, const Instruction& in, int lane, uint64_t address,
                         uint32_t bytes, uint32_t alignment, Whose whose, const char* what) {
  uint64_t offset = address & ~kWindowMask;
  const uint64_t named = offset;
  Block& block = block_of(warp, in, lane, offset);
  if (whose != Whose::any && (whose == Whose::own) != (&block == warp.block))
    fault(warp, in, lane,
          std::string(what) + ": in block " + std::to_string(block.rank) +
              " of the cluster; must be in " +
              (whose == Whose::own ? "the own block (.shared::cta)" : "another block"));
  if (offset % alignment)
    fault(warp, in, lane,
          std::string(what) + ": shared address " + std::to_string(offset) +
              " must be a multiple of " + std::to_string(alignment));
  if (named >> (kRankShift + 5) || offset + bytes > block.shared_bytes)
    fault(warp, in, lane,
          std::string(what) + ": " + std::to_string(bytes) + " bytes at shared address " +
              std::to_string(offset) + ": the shared memory of the block has " +
              std::to_string(block.shared_bytes) + " bytes");
  return {&block, static_cast<uint32_t>(offset)};
}

void add_targets(Warp& warp, const Instruction& in, int lane, const SharedPlace& place,
                 Transfer& transfer) {
  alignas(64) uint64_t signals[kLanes];
  lane_addresses(warp, in.slots[kSignal], static_cast<int32_t>(in.target), in.flags & kSignalWide,
                 signals);
  const SharedPlace signal =
      shared_place(warp, in, lane, signals[lane], 8, 8, near_block(in), "mbarrier of a bulk copy");
  if (in.slots[kBlocks] == kNoSlot) {
    if (signal.block != place.block)
      fault(warp, in, lane, "the mbarrier of a bulk copy must be in the block of its destination");
    transfer.targets.push_back({place.block, signal.offset});
    return;
  }
  const auto& blocks = warp.block->cluster->blocks;
  const uint32_t mask = lanes<const uint16_t>(warp, in.slots[kBlocks])[lane];
  if (!mask) fault(warp, in, lane, "multicast to no block (mask 0)");
  if (mask >> blocks.size())
    fault(warp, in, lane,
          "multicast to blocks of mask " + std::to_string(mask) + " in a cluster of " +
              std::to_string(blocks.size()));
  for (uint32_t rank = 0; rank < blocks.size(); ++rank) {
    if (!(mask >> rank & 1)) continue;
    if (blocks[rank]->exited == blocks[rank]->threads)
      fault(warp, in, lane,
            "multicast to block " + std::to_string(rank) + " of the cluster, which has finished");
    transfer.targets.push_back({blocks[rank], signal.offset});
  }
}

void decode_bulk(Decoder& decoder, const Statement& statement, Instruction& in) {
  const auto& parts = statement.opcode;
  const auto& operands = statement.operands;
  if (parts.size() > 3 && (parts[3] == "commit_group" || parts[3] == "wait_group"))
    return decode_groups(decoder, statement, in);
  if (statement.has("tensor")) return decode_bulk_tensor(decoder, statement, in);
  const std::string& type = parts.back();
  const BulkForm form = read_bulk_words(
      decoder, statement, {"noftz", statement.has("reduce") ? type.c_str() : "async"});
  const bool reduces = form.combine != Combine::copy;
  in.width = packed(form.combine,
                    static_cast<int>(reduces ? element_of(decoder, statement, form) : Element::b8));
  in.variant = static_cast<uint8_t>(form.kind);
  in.flags = form.near_own ? kNearOwn : 0;
  in.run = run_bulk;
  const bool prefetches = form.kind == Bulk::prefetch, stores = form.kind == Bulk::store;
  const size_t first = prefetches ? 1 : 2;  // number of addresses
  const bool signals = !prefetches && !stores;
  if (operands.size() != first + 1 + signals + form.multicast + form.policy)
    decoder.fail("wrong number of operands");
  const auto read = [&](const std::string& operand, int64_t& offset, uint8_t wide) {
    const Address address = decoder.read_address(operand);
    offset = address.offset;
    if (address.wide) in.flags |= wide;
    return address.wide;
  };
  // A store has its source kNear as the second operand.
  if (prefetches)
    decoder.skip();
  else
    read(operands[stores ? 1 : 0], in.offset, kNearWide);
  if (!read(operands[prefetches || stores ? 0 : 1], in.offset2, kFarWide) &&
      form.kind != Bulk::send)
    decoder.fail("a 32-bit address of global memory");
  int64_t signal = 0;
  if (signals)
    read(operands[3], signal, kSignalWide);
  else
    decoder.skip();
  in.target = static_cast<uint32_t>(signal);
  decoder.read(operands[first], 32);
  form.multicast ? decoder.read(operands[4], 16) : decoder.skip();
  form.policy ? decoder.read(operands.back(), 64) : decoder.skip();
}

}  // namespace ptxvm
