// Memory instructions that move no data: fences, prefetches, cache policies, isspacep.
#include <algorithm>

#include "ptxvm/memory_ops.h"
#include "ptxvm/store_buffer.h"

namespace ptxvm {
namespace {

void require(Decoder& decoder, bool holds) {
  if (!holds) decoder.fail("unknown form");
}

bool is_in(const std::string& word, std::initializer_list<const char*> words) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

void nothing(Warp&, const Instruction&, Mask) {}

void run_fence(Warp& warp, const Instruction& in, Mask) {
  fence_executed(warp, in);
  if (!is_weak()) return;
  if (!(in.order & kSequential))
    order_stores(warp);
  else if (scope_of(in) == kCta)
    share_stores(warp);
  else
    flush_stores(warp);
}

template <bool shared, bool global>
void run_proxy_fence(Warp& warp, const Instruction&, Mask) {
  proxy_fence_executed(warp, shared, global);
}

void decode_membar(Decoder& decoder, const Statement& statement, Instruction& in) {
  const auto& parts = statement.opcode;
  require(decoder,
          parts.size() == 2 && is_in(parts[1], {"cta", "gl", "sys"}) && statement.operands.empty());
  in.order = kIsStrong | kAcquires | kReleases | kSequential | scope_named(parts[1]);
  in.run = run_fence;
}

// fence.proxy.tensormap::generic: a fence of the generic proxy, which reads tensor maps here.
void decode_map_fence(Decoder& decoder, const Statement& statement, Instruction& in) {
  const auto& parts = statement.opcode;
  const bool acquires = parts[3] == "acquire";
  require(decoder, is_in(parts[3], {"acquire", "release"}) &&
                       is_in(parts[4], {"cta", "cluster", "gpu", "sys"}) &&
                       statement.operands.size() == (acquires ? 2u : 0u) &&
                       (!acquires || is_in(statement.operands[1], {"128", "0x80"})));
  if (acquires) decoder.read_address(statement.operands[0]);
  in.order = scope_named(parts[4]) | (acquires ? kAcquires : kReleases);
  in.run = run_fence;
}

void decode_fence(Decoder& decoder, const Statement& statement, Instruction& in) {
  const auto& parts = statement.opcode;
  const bool has_order =
      parts.size() == 3 && is_in(parts[1], {"sc", "acq_rel", "acquire", "release"});
  const bool has_scope =
      (parts.size() == 2 || has_order) && is_in(parts.back(), {"cta", "cluster", "gpu", "sys"});
  const bool is_proxy =
      parts.size() == 3 && parts[1] == "proxy" && is_in(parts[2], {"alias", "async"});
  const bool is_async = parts.size() == 4 && parts[1] == "proxy" && parts[2] == "async" &&
                        is_in(parts[3], {"global", "shared::cta", "shared::cluster"});
  const bool is_init = parts.size() == 4 && parts[1] == "mbarrier_init" && parts[2] == "release" &&
                       parts[3] == "cluster";
  if (parts.size() == 5 && parts[1] == "proxy" && parts[2] == "tensormap::generic")
    return decode_map_fence(decoder, statement, in);
  require(decoder, (has_scope || is_proxy || is_async || is_init) && statement.operands.empty());
  if (is_proxy || is_async) {
    in.run = parts[2] != "async"    ? nothing
             : !is_async            ? run_proxy_fence<true, true>
             : parts[3] == "global" ? run_proxy_fence<false, true>
                                    : run_proxy_fence<true, false>;
    return;
  }
  // A fence without .sc or another semantics is .acq_rel. fence.mbarrier_init covers all writes.
  in.order = scope_named(parts.back()) | (is_init || parts[1] == "release" ? 0 : kAcquires) |
             (parts[1] == "acquire" ? 0 : kReleases) | (parts[1] == "sc" ? kSequential : 0);
  in.run = run_fence;
}

// A hint's address may be out of bounds, as on hardware.
void decode_prefetch(Decoder& decoder, const Statement& statement, Instruction& in) {
  const auto& parts = statement.opcode;
  const std::string& level = parts.back();
  const bool is_uniform = parts[0] == "prefetchu";
  if (!is_uniform && level == "tensormap") {
    require(decoder, statement.operands.size() == 1 &&
                         (parts.size() == 2 ||
                          (parts.size() == 3 && is_in(parts[1], {"param", "const", "global"}))));
    decoder.read_address(statement.operands[0]);
    in.run = nothing;
    return;
  }
  require(decoder,
          statement.operands.size() == 1 &&
              (parts.size() == 2 || (parts.size() == 3 && is_in(parts[1], {"global", "local"}))) &&
              (is_uniform ? level == "L1"
                          : is_in(level, {"L1", "L2", "L2::evict_last", "L2::evict_normal"})));
  decoder.read_address(statement.operands[0]);
  in.run = nothing;
}

void decode_line_hint(Decoder& decoder, const Statement& statement, Instruction& in) {
  const auto& parts = statement.opcode;
  const char* level = parts[0] == "discard" ? "L2" : "L2::evict_normal";
  require(decoder, parts.back() == level &&
                       (parts.size() == 2 || (parts.size() == 3 && parts[1] == "global")) &&
                       statement.operands.size() == 2 && statement.operands[1] == "128");
  decoder.read_address(statement.operands[0]);
  in.run = nothing;
}

void run_policy(Warp& warp, const Instruction& in, Mask mask) {
  alignas(64) const uint64_t none[kLanes] = {};
  assign(lanes<uint64_t>(warp, in.slots[0]), none, mask);
}

void decode_policy(Decoder& decoder, const Statement& statement, Instruction& in) {
  const auto& parts = statement.opcode;
  require(decoder, parts.size() >= 4 && parts.back() == "b64" &&
                       is_in(parts[1], {"fractional", "range"}) && !statement.operands.empty());
  for (size_t i = 2; i + 1 < parts.size(); ++i)
    require(decoder, is_in(parts[i], {"global", "L2::evict_first", "L2::evict_last",
                                      "L2::evict_normal", "L2::evict_unchanged"}));
  decoder.write(statement.operands[0], 64);
  in.run = run_policy;
}

void run_isspacep(Warp& warp, const Instruction& in, Mask mask) {
  const uint64_t* addresses = lanes<const uint64_t>(warp, in.slots[1]);
  Mask holds = 0;
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t window = addresses[i] & kWindowMask;
    const Space space = window == kSharedWindow  ? Space::shared
                        : window == kLocalWindow ? Space::local
                        : window == kParamWindow ? Space::param
                                                 : Space::global;
    holds |= Mask{space == space_of(in)} << i;
  }
  Mask& destination = predicate(warp, in.slots[0]);
  destination = (destination & ~mask) | (holds & mask);
}

void decode_isspacep(Decoder& decoder, const Statement& statement, Instruction& in) {
  require(decoder, statement.opcode.size() == 2 && statement.operands.size() == 2);
  const std::string& space = statement.opcode[1];
  require(decoder, is_in(space, {"global", "shared", "shared::cta", "local", "const", "param",
                                 "param::entry", "shared::cluster"}));
  in.variant = static_cast<uint8_t>(space == "global"  ? Space::global
                                    : space == "local" ? Space::local
                                    : space == "const" ? Space::constant
                                    : space[0] == 's'  ? Space::shared
                                                       : Space::param);
  decoder.write(statement.operands[0], 1);
  decoder.read(statement.operands[1], 64);
  in.run = run_isspacep;
}

}  // namespace

void add_hints(OpcodeTable& table) {
  table["membar"] = decode_membar;
  table["fence"] = decode_fence;
  table["prefetch"] = table["prefetchu"] = decode_prefetch;
  table["discard"] = table["applypriority"] = decode_line_hint;
  table["createpolicy"] = decode_policy;
  table["isspacep"] = decode_isspacep;
}

}  // namespace ptxvm
