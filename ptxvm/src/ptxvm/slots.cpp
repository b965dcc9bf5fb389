// Register allocation in the register file. Registers with disjoint live ranges share a slot, which
// keeps the file of a large kernel in the cache. Liveness is per lane: instructions write only the
// lanes of their mask, so lanes at other instructions are not disturbed. This holds only among
// values of one width: other widths place the lanes differently in the slot (a predicate is one
// word, a 16-bit register two bytes per lane), so different widths never share. A register that may
// be read before it is written lives from the first instruction on and shares no earlier slot:
// check mode detects that nothing was written there.
#include <algorithm>
#include <array>
#include <queue>

#include "ptxvm/decode_state.h"

namespace ptxvm {
namespace {

constexpr uint32_t kUnit = 64;  // bytes; one cache line, and the unit of Warp::defined

uint32_t slot_bytes(int bits) {
  const uint32_t bytes = bits == 1 ? sizeof(Mask) : static_cast<uint32_t>(bits / 8) * kLanes;
  return (bytes + kUnit - 1) / kUnit * kUnit;
}

struct Range {
  uint32_t begin = UINT32_MAX, end = 0;
  void add(uint32_t at) {
    begin = std::min(begin, at);
    end = std::max(end, at);
  }
};

class Liveness {
 public:
  explicit Liveness(const Decoder::State& state)
      : state_(state), code_(state.kernel.code), words_((state.values.size() + 63) / 64) {
    find_blocks();
    propagate();
  }

  std::vector<Range> ranges() const {
    std::vector<Range> ranges(state_.values.size());
    for (uint32_t i = 0; i < code_.size(); ++i)
      visit(i, [&](uint32_t value, bool) { ranges[value].add(i); });
    for (const BasicBlock& block : blocks_)
      for (uint32_t value = 0; value < ranges.size(); ++value) {
        if (block.live_in[value / 64] >> value % 64 & 1) ranges[value].add(block.begin);
        if (block.live_out[value / 64] >> value % 64 & 1) ranges[value].add(block.end - 1);
      }
    return ranges;
  }

 private:
  using Set = std::vector<uint64_t>;
  struct BasicBlock {
    uint32_t begin, end;
    Set used, defined, live_in, live_out;
    std::vector<uint32_t> successors;
  };

  // Visits each value of an instruction, with a flag for writes.
  template <typename Visit>
  void visit(uint32_t at, Visit call) const {
    const Instruction& instruction = code_[at];
    const auto first = reinterpret_cast<size_t>(instruction.slots);
    const int count = instruction.writes + instruction.reads;
    if (instruction.guard != kNoSlot) call(instruction.guard, false);
    for (int i = count - 1; i >= 0; --i) {  // sources before destinations
      const uint32_t value = state_.kernel.slots[first + i];
      if (value != kNoSlot) call(value, i < instruction.writes);
    }
  }

  std::vector<uint32_t> targets(const Instruction& instruction) const {
    if (instruction.control == Control::branch) return {instruction.target};
    if (instruction.control == Control::indirect) return state_.kernel.tables[instruction.target];
    return {};
  }

  static bool ends_block(const Instruction& instruction) {
    return instruction.control == Control::branch || instruction.control == Control::indirect ||
           instruction.control == Control::exit;
  }

  void find_blocks() {
    std::vector<bool> leader(code_.size() + 1, false);
    leader[0] = true;
    for (uint32_t i = 0; i < code_.size(); ++i) {
      if (ends_block(code_[i])) leader[i + 1] = true;
      for (const uint32_t target : targets(code_[i])) leader[target] = true;
    }
    std::vector<uint32_t> block_of(code_.size());
    for (uint32_t i = 0; i < code_.size(); ++i) {
      if (leader[i])
        blocks_.push_back({i, i, Set(words_), Set(words_), Set(words_), Set(words_), {}});
      blocks_.back().end = i + 1;
      block_of[i] = static_cast<uint32_t>(blocks_.size() - 1);
    }
    for (BasicBlock& block : blocks_) {
      const Instruction& last = code_[block.end - 1];
      for (const uint32_t target : targets(last)) block.successors.push_back(block_of[target]);
      const bool falls = !ends_block(last) || last.guard != kNoSlot;
      if (falls && block.end < code_.size()) block.successors.push_back(block_of[block.end]);
      for (uint32_t i = block.begin; i < block.end; ++i)
        visit(i, [&](uint32_t value, bool written) {
          uint64_t& defined = block.defined[value / 64];
          const uint64_t bit = uint64_t{1} << value % 64;
          if (!written && !(defined & bit)) block.used[value / 64] |= bit;
          // Under a guard the old value may stay live.
          if (written && code_[i].guard == kNoSlot) defined |= bit;
        });
    }
  }

  void propagate() {
    for (bool changed = true; changed;) {
      changed = false;
      for (size_t b = blocks_.size(); b-- > 0;) {
        BasicBlock& block = blocks_[b];
        for (const uint32_t successor : block.successors)
          for (size_t i = 0; i < words_; ++i) block.live_out[i] |= blocks_[successor].live_in[i];
        for (size_t i = 0; i < words_; ++i) {
          const uint64_t live = block.used[i] | (block.live_out[i] & ~block.defined[i]);
          changed |= live != block.live_in[i];
          block.live_in[i] = live;
        }
      }
    }
  }

  const Decoder::State& state_;
  const std::vector<Instruction>& code_;
  const size_t words_;
  std::vector<BasicBlock> blocks_;
};

// wgmma reads and writes its registers after the instruction: their slots are never shared.
std::vector<bool> written_late(const Decoder::State& state) {
  std::vector<bool> late(state.values.size(), false);
  if (state.kernel.scratch == kNoSlot) return late;
  for (const Instruction& instruction : state.kernel.code) {
    if (!std::strstr(instruction.text, "wgmma.mma_async")) continue;
    const uint32_t* slots = state.kernel.slots.data() + reinterpret_cast<size_t>(instruction.slots);
    // Accumulators, as destinations and as sources, are followed by four registers of A or a
    // descriptor.
    const int a = instruction.reads == instruction.writes + 6 ? 4 : 0;
    for (int i = 0; i < instruction.writes; ++i)
      if (slots[i] != kNoSlot) late[slots[i]] = true;
    for (int i = 0; i < a; ++i) late[slots[2 * instruction.writes + i]] = true;
  }
  return late;
}

// Linear scan over the live ranges, with free slots kept per value width.
void share(const Decoder::State& state, std::vector<uint32_t>& slots, uint32_t& top) {
  const std::vector<Range> ranges = Liveness(state).ranges();
  const std::vector<bool> late = written_late(state);
  std::vector<uint32_t> order;
  for (uint32_t value = 0; value < ranges.size(); ++value) {
    if (state.values[value].kind != Value::Kind::variable || ranges[value].begin == UINT32_MAX)
      continue;
    if (!late[value]) {
      order.push_back(value);
    } else {
      slots[value] = top;
      top += slot_bytes(state.values[value].bits);
    }
  }
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
    return std::pair(ranges[a].begin, a) < std::pair(ranges[b].begin, b);
  });
  using Ending = std::pair<uint32_t, uint32_t>;  // end of the range, value
  std::priority_queue<Ending, std::vector<Ending>, std::greater<>> active;
  std::map<int, std::vector<uint32_t>> free_slots;  // by width in bits
  for (const uint32_t value : order) {
    // A source that dies here keeps its slot: handlers may write before they have read everything.
    while (!active.empty() && active.top().first < ranges[value].begin) {
      const uint32_t dead = active.top().second;
      active.pop();
      free_slots[state.values[dead].bits].push_back(slots[dead]);
    }
    const int bits = state.values[value].bits;
    auto& reusable = free_slots[bits];
    if (reusable.empty()) {
      slots[value] = top;
      top += slot_bytes(bits);
    } else {
      slots[value] = reusable.back();
      reusable.pop_back();
    }
    active.push({ranges[value].end, value});
  }
}

}  // namespace

void place_slots(Decoder::State& state) {
  Kernel& kernel = state.kernel;
  std::vector<uint32_t> slots(state.values.size(), 0);
  uint32_t top = 0;
  for (uint32_t value = 0; value < state.values.size(); ++value) {
    const Value& entry = state.values[value];
    if (entry.kind == Value::Kind::variable) continue;
    slots[value] = top;
    top += slot_bytes(entry.bits);
    if (entry.kind == Value::Kind::constant)
      kernel.constants.push_back(
          {slots[value], entry.bits,
           entry.bits_of_constant + (entry.dynamic_shared ? kernel.dynamic_offset : 0)});
    if (entry.kind == Value::Kind::special)
      kernel.specials.push_back(
          {slots[value], static_cast<int>(entry.bits_of_constant), entry.bits});
  }
  share(state, slots, top);
  if (kernel.scratch != kNoSlot) {
    kernel.scratch = top;
    top += kScratchBytes;
  }
  kernel.file_bytes = top;
  for (uint32_t& slot : kernel.slots)
    if (slot != kNoSlot) slot = slots[slot];
  for (Instruction& instruction : kernel.code) {
    instruction.slots = kernel.slots.data() + reinterpret_cast<size_t>(instruction.slots);
    if (instruction.guard != kNoSlot) instruction.guard = slots[instruction.guard];
    if (instruction.member != kNoSlot) instruction.member = slots[instruction.member];
  }
}

}  // namespace ptxvm
