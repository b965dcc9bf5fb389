// mbarrier: a 64-bit object in shared memory that counts arrivals and transaction bytes of
// asynchronous copies. A phase is complete when both counts are 0; then the next one begins.
//
// Bit layout, which PTX leaves opaque: pending arrivals (20), arrivals per phase (20), pending
// transaction bytes (21, signed), phase parity (1), and 2 bits that mark an mbarrier.
#include <cstdio>

#include "ptxvm/async.h"
#include "ptxvm/memory_ops.h"
#include "ptxvm/reports.h"

namespace ptxvm {
namespace {

constexpr uint32_t kMost = (1u << 20) - 1;  // arrivals, bytes
constexpr uint64_t kValid = uint64_t{2} << 62;

struct State {
  uint32_t pending, expected;
  int32_t bytes;
  uint32_t parity;

  static bool is_valid(uint64_t bits) { return bits >> 62 == kValid >> 62; }
  static State of(uint64_t bits) {
    return {static_cast<uint32_t>(bits & kMost), static_cast<uint32_t>(bits >> 20 & kMost),
            static_cast<int32_t>(static_cast<uint32_t>(bits >> 40 & 0x1fffff) << 11) >> 11,
            static_cast<uint32_t>(bits >> 61 & 1)};
  }
  uint64_t bits() const {
    return kValid | uint64_t{parity} << 61 |
           (uint64_t{static_cast<uint32_t>(bytes)} & 0x1fffff) << 40 | uint64_t{expected} << 20 |
           pending;
  }
};

std::string words(const State& state) {
  return "phase of parity " + std::to_string(state.parity) + " lacks " +
         std::to_string(state.pending) + " of " + std::to_string(state.expected) +
         " arrivals and " + std::to_string(state.bytes) + " bytes";
}

// The mbarrier operand of one lane.
class Object {
 public:
  Object(Warp& warp, const Instruction& in, int lane, Block& block, uint32_t offset)
      : warp_(warp), in_(in), lane_(lane), block_(block), offset_(offset) {
    uint64_t bits;
    std::memcpy(&bits, block.shared + offset, sizeof bits);
    if (!State::is_valid(bits)) fail("no mbarrier (mbarrier.init)");
    state_ = State::of(bits);
  }

  const State& state() const { return state_; }

  void expect(int64_t bytes) {
    const int64_t sum = state_.bytes + bytes;
    if (sum > int64_t{kMost} || sum < -int64_t{kMost})
      fail(std::to_string(sum) + " pending bytes, which must be from -1048575 to 1048575");
    state_.bytes = static_cast<int32_t>(sum);
  }
  void add_pending(uint32_t count) {
    if (state_.pending + uint64_t{count} > kMost) fail("more than 1048575 pending arrivals");
    state_.pending += count;
  }
  void drop(uint32_t count) {
    if (count > state_.expected) fail("arrive_drop of more than all arrivals");
    state_.expected -= count;
  }
  void arrive(uint32_t count, bool completes) {
    if (count == 0 || count > state_.pending)
      fail("arrival of " + std::to_string(count) + " at an mbarrier that lacks " +
           std::to_string(state_.pending));
    state_.pending -= count;
    if (!completes && state_.pending == 0 && state_.bytes == 0)
      fail("a .noComplete arrival that completes the phase");
  }
  // Ends the operation, and the phase if it is complete.
  void store() {
    const bool complete = state_.pending == 0 && state_.bytes == 0;
    if (complete) {
      state_.pending = state_.expected;
      state_.parity ^= 1;
    }
    const uint64_t bits = state_.bits();
    std::memcpy(block_.shared + offset_, &bits, sizeof bits);
    if (complete) {
      mbarrier_completed(block_, offset_);
      wake(block_, offset_);
    }
    happened(block_);
  }
  [[noreturn]] void fail(const std::string& what) const {
    char place[32];
    std::snprintf(place, sizeof place, "shared address 0x%x", offset_);
    fault(warp_, in_, lane_,
          std::string(place) +
              (&block_ == warp_.block ? "" : " of block " + std::to_string(block_.rank)) + ": " +
              what);
  }

 private:
  Warp& warp_;
  const Instruction& in_;
  int lane_;
  Block& block_;
  uint32_t offset_;
  State state_;
};

// Position of a lane's mbarrier: its block, and the offset there.
struct Place {
  Block& block;
  uint32_t offset;
};
Place place_of(Warp& warp, const Instruction& in, int lane, uint64_t address) {
  uint64_t offset = address & ~kWindowMask;
  Block& block = block_of(warp, in, lane, offset);
  return {block, static_cast<uint32_t>(offset)};
}

// The mbarrier at a lane's address.
Object find(Warp& warp, const Instruction& in, int lane, uint64_t address) {
  const uint64_t rank = address >> kRankShift & kRankMask;
  if (rank && space_of(in) != Space::cluster)
    fault(warp, in, lane,
          "an mbarrier of block " + std::to_string(rank - 1) +
              " of the cluster needs .shared::cluster");
  access(warp, in, space_of(in), address, lane, 8, Access::atomic);
  const Place place = place_of(warp, in, lane, address);
  return {warp, in, lane, place.block, place.offset};
}

template <typename Act>
void for_lanes(Warp& warp, const Instruction& in, Mask mask, Act act) {
  alignas(64) uint64_t addresses[kLanes];
  lane_addresses(warp, in.slots[in.writes], in.offset, in.flags & kWide, addresses);
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    act(lane, addresses[lane]);
  }
}

uint32_t operand(Warp& warp, const Instruction& in, int index, int lane, uint32_t missing) {
  const uint32_t slot = in.slots[in.writes + index];
  return slot == kNoSlot ? missing : lanes<const uint32_t>(warp, slot)[lane];
}

// Slots: address, count.
void run_init(Warp& warp, const Instruction& in, Mask mask) {
  for_lanes(warp, in, mask, [&](int lane, uint64_t address) {
    const uint32_t count = operand(warp, in, 1, lane, 0);
    if (count == 0 || count > kMost)
      fault(warp, in, lane,
            "count of an mbarrier: must be from 1 to 1048575; got " + std::to_string(count));
    const uint64_t bits = State{count, count, 0, 0}.bits();
    std::memcpy(access(warp, in, space_of(in), address, lane, 8, Access::write), &bits,
                sizeof bits);
  });
}

void run_inval(Warp& warp, const Instruction& in, Mask mask) {
  for_lanes(warp, in, mask, [&](int lane, uint64_t address) {
    find(warp, in, lane, address);
    std::memset(access(warp, in, space_of(in), address, lane, 8, Access::write), 0xff, 8);
  });
}

constexpr uint8_t kExpects = 8, kNoComplete = 16, kDrops = 32, kArrives = 64;

// Slots: [state,] address, count, bytes. expect_tx takes effect before the arrival.
void run_arrive(Warp& warp, const Instruction& in, Mask mask) {
  for_lanes(warp, in, mask, [&](int lane, uint64_t address) {
    Object object = find(warp, in, lane, address);
    const uint64_t before = object.state().bits();
    const uint32_t count = operand(warp, in, 1, lane, 1);
    if (in.flags & kExpects) object.expect(operand(warp, in, 2, lane, 0));
    if (in.flags & kDrops) object.drop(count);
    if (in.flags & kArrives) {
      const Place place = place_of(warp, in, lane, address);
      object.arrive(count, !(in.flags & kNoComplete));
      mbarrier_arrived(warp, in, lane, place.block, place.offset);
    }
    object.store();
    if (in.writes && in.slots[0] != kNoSlot) lanes<uint64_t>(warp, in.slots[0])[lane] = before;
  });
  land_some(warp);
}

// Slots: address, bytes.
void run_complete(Warp& warp, const Instruction& in, Mask mask) {
  for_lanes(warp, in, mask, [&](int lane, uint64_t address) {
    Object object = find(warp, in, lane, address);
    object.expect(-int64_t{operand(warp, in, 1, lane, 0)});
    object.store();
  });
}

// Slots: result, address, parity or state. Waits for the end of the phase that these name.
template <bool parity, bool sleeps>
void run_wait(Warp& warp, const Instruction& in, Mask mask) {
  land_some(warp);
  Mask done = 0;
  uint32_t offsets[kLanes];
  for_lanes(warp, in, mask, [&](int lane, uint64_t address) {
    const Object object = find(warp, in, lane, address);
    uint32_t phase;
    if constexpr (parity) {
      phase = lanes<const uint32_t>(warp, in.slots[2])[lane];
      if (phase > 1) object.fail("parity: must be 0 or 1; got " + std::to_string(phase));
    } else {
      const uint64_t bits = lanes<const uint64_t>(warp, in.slots[2])[lane];
      if (!State::is_valid(bits)) object.fail("the state is none of an mbarrier");
      phase = State::of(bits).parity;
    }
    offsets[lane] = static_cast<uint32_t>(address & ((1u << kRankShift) - 1));
    if (object.state().parity == phase) return;
    done |= Mask{1} << lane;
    if (done == (Mask{1} << lane) || offsets[lane] != offsets[__builtin_ctz(done)])
      mbarrier_passed(warp, in, *warp.block, offsets[lane]);
  });
  if (const Mask waiting = mask & ~done) {
    if constexpr (sleeps) {
      // Lanes that wait for another mbarrier than the first one continue without waiting.
      const uint32_t what = offsets[__builtin_ctz(waiting)];
      Mask same = 0;
      for (int i = 0; i < kLanes; ++i)
        if (waiting >> i & 1 && offsets[i] == what) same |= Mask{1} << i;
      // seeded: the time limit may expire at once, so that the first try_wait of a pipeline fails.
      const bool gives_up =
          options.async == Options::Async::seeded && warp.block->cluster->random.below(4) == 0;
      if (!gives_up) sleep_unless_timed_out(warp, same, what);
    } else if (++warp.polls % 32 == 0) {
      land_oldest(*warp.block->cluster);
    }
  }
  warp.timed_out &= ~mask;  // the time limit applies to this wait, not to the next
  Mask& holds = predicate(warp, in.slots[0]);
  holds = (holds & ~mask) | done;
}

// Slots: count, state.
void run_pending(Warp& warp, const Instruction& in, Mask mask) {
  for (int i = 0; i < kLanes; ++i) {
    if (!(mask >> i & 1)) continue;
    const uint64_t bits = lanes<const uint64_t>(warp, in.slots[1])[i];
    if (!State::is_valid(bits)) fault(warp, in, i, "the state is none of an mbarrier");
    lanes<uint32_t>(warp, in.slots[0])[i] = State::of(bits).pending;
  }
}

// cp.async.mbarrier.arrive: the lane's arrival follows its copies. Without .noinc the pending count
// is incremented for it.
void run_copy_arrive(Warp& warp, const Instruction& in, Mask mask) {
  for_lanes(warp, in, mask, [&](int lane, uint64_t address) {
    Object object = find(warp, in, lane, address);
    if (in.flags & kArrives) object.add_pending(1);
    object.store();
    const Place place = place_of(warp, in, lane, address);
    Transfer arrival;
    arrival.from = &in;
    arrival.lane = lane;
    arrival.arrives = true;
    arrival.group = warp.copies_issued;
    arrival.targets.push_back({&place.block, place.offset});
    start_transfer(warp, std::move(arrival));
  });
}

void need(Decoder& decoder, bool holds) {
  if (!holds) decoder.fail("unknown form of mbarrier");
}

// Sets space and flags of the address; remote addresses are allowed only if `remote`.
void read_object(Decoder& decoder, const std::string& operand, Words words, bool remote,
                 Instruction& in) {
  if (words.space == Space::generic) words.space = Space::shared;
  need(decoder, words.space == Space::shared || (remote && words.space == Space::cluster));
  read_memory_operand(decoder, operand, words, in);
  in.flags &= kWide;
  // Accesses to the object itself are strong, at a scope that includes every thread that may make
  // them.
  in.order &= static_cast<uint8_t>(~kIsStrong);
}

// mbarrier.pending_count.b64 count, state.
void decode_pending(Decoder& decoder, const Statement& statement, Instruction& in) {
  need(decoder, statement.opcode.size() == 3 && statement.opcode[2] == "b64" &&
                    statement.operands.size() == 2);
  decoder.write(statement.operands[0], 32);
  decoder.read(statement.operands[1], 64);
  in.run = run_pending;
}

void decode_wait(Decoder& decoder, const Statement& statement, const Words& words,
                 Instruction& in) {
  const auto& operands = statement.operands;
  const bool sleeps = statement.opcode[1] == "try_wait", parity = statement.has("parity");
  need(decoder, operands.size() == 3 || (sleeps && operands.size() == 4));
  decoder.write(operands[0], 1);
  read_object(decoder, operands[1], words, false, in);
  decoder.read(operands[2], parity ? 32 : 64);
  if (operands.size() == 4) decoder.read(operands[3], 32);  // time limit, a hint
  if (!statement.has("relaxed")) in.order |= kAcquires;
  in.run = sleeps ? (parity ? run_wait<true, true> : run_wait<false, true>)
                  : (parity ? run_wait<true, false> : run_wait<false, false>);
  if (sleeps) in.control = Control::await;
}

// arrive, arrive_drop, expect_tx.
void decode_arrive(Decoder& decoder, const Statement& statement, const Words& words,
                   Instruction& in) {
  const auto& operands = statement.operands;
  const bool only_expects = statement.opcode[1] == "expect_tx",
             drops = statement.has("arrive_drop");
  const bool expects = statement.has("expect_tx"), incomplete = statement.has("noComplete");
  need(decoder, !(expects && incomplete) && !(incomplete && words.space == Space::cluster));
  // The state may be omitted only if the mbarrier may be remote.
  const bool has_state = !only_expects && !operands.empty() && operands[0][0] != '[';
  const size_t values = operands.size() - has_state;
  need(decoder, operands.size() > has_state);
  if (has_state) decoder.write(operands[0], 64);
  need(decoder, !has_state || words.space != Space::cluster || operands[0] == "_");
  read_object(decoder, operands[has_state], words, true, in);
  if (expects) {
    need(decoder, values == 2);
    decoder.skip();
    decoder.read(operands.back(), 32);
  } else {
    need(decoder, values == 2 || (values == 1 && !incomplete));
    values == 2 ? decoder.read(operands.back(), 32) : decoder.skip();
    decoder.skip();
  }
  if (!only_expects && !statement.has("relaxed")) in.order |= kReleases;
  in.flags |= (expects ? kExpects : 0) | (incomplete ? kNoComplete : 0) | (drops ? kDrops : 0) |
              (only_expects ? 0 : kArrives);
  in.run = run_arrive;
}

void decode_mbarrier(Decoder& decoder, const Statement& statement, Instruction& in) {
  const auto& parts = statement.opcode;
  const auto& operands = statement.operands;
  need(decoder, parts.size() >= 3 && parts.back() == "b64");
  const std::string& op = parts[1];
  if (op == "pending_count") return decode_pending(decoder, statement, in);
  const Words words = read_words(decoder, statement,
                                 {"init", "inval", "arrive", "arrive_drop", "expect_tx",
                                  "complete_tx", "noComplete", "test_wait", "try_wait", "parity"});
  const bool waits = op == "test_wait" || op == "try_wait";
  const bool arrives = op == "arrive" || op == "arrive_drop";
  for (size_t i = 2; i < parts.size(); ++i)
    need(decoder, parts[i] == "b64" || parts[i] == "cta" || parts[i] == "cluster" ||
                      parts[i] == "release" || parts[i] == "acquire" || parts[i] == "relaxed" ||
                      (waits && parts[i] == "parity") ||
                      (arrives && (parts[i] == "noComplete" || parts[i] == "expect_tx")) ||
                      parts[i].rfind("shared", 0) == 0);
  if (op == "init" || op == "inval") {
    need(decoder, operands.size() == (op == "init" ? 2u : 1u));
    read_object(decoder, operands[0], words, false, in);
    if (op == "init") decoder.read(operands[1], 32);
    in.run = op == "init" ? run_init : run_inval;
  } else if (op == "complete_tx") {
    need(decoder, operands.size() == 2);
    read_object(decoder, operands[0], words, true, in);
    decoder.read(operands[1], 32);
    in.run = run_complete;
  } else if (waits) {
    decode_wait(decoder, statement, words, in);
  } else {
    need(decoder, arrives || op == "expect_tx");
    decode_arrive(decoder, statement, words, in);
  }
}

}  // namespace

void decode_copy_arrive(Decoder& decoder, const Statement& statement, Instruction& in) {
  const auto& parts = statement.opcode;  // cp.async.mbarrier.arrive{.noinc}{.space}.b64
  if (parts.size() < 5 || parts[3] != "arrive" || parts.back() != "b64" ||
      statement.operands.size() != 1)
    decoder.fail("unknown form of cp.async.mbarrier");
  const Words words = read_words(decoder, statement, {"async", "mbarrier", "arrive", "noinc"});
  read_object(decoder, statement.operands[0], words, false, in);
  if (!statement.has("noinc")) in.flags |= kArrives;
  in.run = run_copy_arrive;
}

void complete_bytes(Warp& warp, const Instruction& in, int lane, Block& block, uint32_t offset,
                    uint32_t bytes) {
  Object object(warp, in, lane, block, offset);
  object.expect(-int64_t{bytes});
  object.store();
}

void arrive_at(Warp& warp, const Instruction& in, int lane, Block& block, uint32_t offset) {
  Object object(warp, in, lane, block, offset);
  object.arrive(1, true);
  object.store();
}

std::string describe_mbarrier(const Block& block, uint32_t offset) {
  char place[48];
  std::snprintf(place, sizeof place, "the mbarrier at shared address 0x%x", offset);
  uint64_t bits;
  std::memcpy(&bits, block.shared + offset, sizeof bits);
  const std::string name = shared_symbol(*block.kernel, offset);
  return place + (name.empty() ? name : " (" + name + ")") + ": " +
         (State::is_valid(bits) ? words(State::of(bits)) : std::string("it is none now"));
}

void add_mbarrier(OpcodeTable& table) { table["mbarrier"] = decode_mbarrier; }

}  // namespace ptxvm
