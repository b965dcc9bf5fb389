#include "ptxvm/warps.h"

#include <algorithm>
#include <cstdio>

#include "ptxvm/async.h"
#include "ptxvm/check.h"
#include "ptxvm/clocks.h"
#include "ptxvm/parse.h"
#include "ptxvm/reports.h"
#include "ptxvm/special.h"
#include "ptxvm/store_buffer.h"

namespace ptxvm {
namespace {

int count(Mask mask) { return __builtin_popcount(mask); }

uint32_t uniform(Warp& warp, const Instruction& instruction, int slot, Mask mask,
                 const char* what) {
  const uint32_t* values = lanes<uint32_t>(warp, instruction.slots[slot]);
  const uint32_t first = values[__builtin_ctz(mask)];
  for (int lane = 0; lane < kLanes; ++lane)
    if ((mask >> lane & 1) && values[lane] != first)
      fault(warp, instruction, lane,
            std::string(what) + " differs within the warp: " + std::to_string(values[lane]) +
                " and " + std::to_string(first));
  return first;
}

class Runner {
 public:
  Runner(Resident& resident, Warp& warp, Kernel& kernel)
      : resident_(resident), warp_(warp), kernel_(kernel), code_(kernel.code.data()) {}

  template <bool kCheck, bool kCount, bool kWeak>
  uint64_t run(uint64_t fuel);

 private:
  void add_group(uint32_t pc, Mask mask);
  bool pick();
  uint32_t limit_from(uint32_t pc) const;
  void exit_lanes(Mask mask);
  template <bool kCheck>
  void converge(const Instruction&, Mask active);
  void arrive(const Instruction&, Mask active);
  template <bool kCheck, bool kCount>
  void await(const Instruction&, Mask active);
  Mask gather(const Instruction&, Mask lanes_here, Mask needed, uint32_t value);
  void enter_barrier(const Instruction&, Mask mask);
  void complete(Barrier&, uint32_t number);
  void complete_if_all_arrived();

  Resident& resident_;
  Warp& warp_;
  Kernel& kernel_;
  const Instruction* code_;
};

void Runner::add_group(uint32_t pc, Mask mask) {
  for (Group& group : warp_.others)
    if (group.wait == Group::Wait::none && group.pc == pc) {
      group.mask |= mask;
      return;
    }
  warp_.others.push_back({pc, mask});
}

// Selects a ready group to run: the lowest above warp.pc, else the lowest. False if none is ready.
bool Runner::pick() {
  const auto rank = [&](const Group& group) { return std::pair(group.pc <= warp_.pc, group.pc); };
  const Group* best = nullptr;
  for (const Group& group : warp_.others)
    if (group.wait == Group::Wait::none && (!best || rank(group) < rank(*best))) best = &group;
  warp_.mask = 0;
  warp_.stint = 0;
  if (!best) return false;
  warp_.pc = best->pc;
  std::erase_if(warp_.others, [&](const Group& group) {
    if (group.wait != Group::Wait::none || group.pc != warp_.pc) return false;
    warp_.mask |= group.mask;
    return true;
  });
  return true;
}

// The lowest program counter, from pc on, at which other lanes are ready.
uint32_t Runner::limit_from(uint32_t pc) const {
  uint32_t limit = UINT32_MAX;
  for (const Group& group : warp_.others)
    if (group.wait == Group::Wait::none && group.pc >= pc) limit = std::min(limit, group.pc);
  return limit;
}

constexpr uint32_t kLowest = UINT32_MAX;  // as warp.pc: pick the lowest program counter

template <bool kCheck, bool kCount, bool kWeak>
uint64_t Runner::run(uint64_t fuel) {
  if (!warp_.mask && !pick()) return 0;
  uint32_t pc = warp_.pc, limit = limit_from(pc);
  Mask mask = warp_.mask;
  // budget: instructions that the running group may issue; left: those that the warp may issue
  // after that. A stint ends after options.fuel instructions wherever turns end, so that a warp's
  // execution depends only on its own path.
  uint64_t budget = 0, left = fuel;
  const auto take_budget = [&] {
    budget = std::min<uint64_t>(left, options.fuel - warp_.stint);
    left -= budget;
    warp_.stint += budget;
  };
  const auto load = [&] {
    pc = warp_.pc;
    mask = warp_.mask;
    limit = limit_from(pc);
  };
  const auto switch_group = [&] {
    left += budget;
    budget = 0;
    warp_.mask = 0;
    if (!pick()) return false;
    take_budget();
    load();
    return true;
  };
  take_budget();
  for (;;) {
    if (pc >= limit) [[unlikely]] {
      add_group(pc, mask);
      warp_.pc = kLowest;
      switch_group();
    }
    if (budget == 0) [[unlikely]] {
      warp_.pc = pc;
      warp_.mask = mask;
      if (warp_.stint == options.fuel) {
        add_group(pc, mask);
        switch_group();
      } else {
        take_budget();
      }
      if (budget == 0) break;
    }
    --budget;
    const Instruction& instruction = code_[pc];
    Mask active = mask;
    if (instruction.guard != kNoSlot) {
      if constexpr (kCheck) check_guard(warp_, instruction, mask);
      const Mask guard = predicate(warp_, instruction.guard);
      active &= instruction.guard_negated ? ~guard : guard;
    }
    if constexpr (kCount) {
      ++kernel_.issued[pc];
      kernel_.active[pc] += static_cast<uint64_t>(count(active));
    }
    if constexpr (kWeak)
      if (instruction.order & (kFlushes | kShares))
        instruction.order& kFlushes ? flush_stores(warp_) : share_stores(warp_);
    // Converging lanes are checked together, once all have arrived.
    if constexpr (kCheck)
      if (instruction.control != Control::converge) check_registers(warp_, instruction, active);
    if (instruction.control == Control::none) [[likely]] {
      ++pc;
      if (!active) continue;
      instruction.run(warp_, instruction, active);
      if constexpr (kCheck) define_registers(warp_, instruction, active);
      continue;
    }
    if (!active) {
      ++pc;
      continue;
    }
    if (instruction.control == Control::branch) {
      const uint32_t target = instruction.target;
      if (active == mask) {
        // A jump forward over ready lanes keeps the limit, so that these catch up.
        if (target <= pc && !warp_.others.empty()) limit = limit_from(target);
        pc = target;
      } else {
        const Mask rest = mask & ~active;
        const bool forward = target > pc + 1;
        add_group(forward ? target : pc + 1, forward ? active : rest);
        mask = forward ? rest : active;
        pc = forward ? pc + 1 : target;
        limit = limit_from(pc);
      }
      continue;
    }
    if (instruction.control == Control::converge) {
      const Mask needed = instruction.member == kNoSlot
                              ? kFullMask
                              : lanes<Mask>(warp_, instruction.member)[__builtin_ctz(active)];
      if ((needed & warp_.live) == active) [[likely]] {
        if constexpr (kCheck) check_registers(warp_, instruction, active);
        instruction.run(warp_, instruction, active);
        if constexpr (kCheck) define_registers(warp_, instruction, active);
        ++pc;
        continue;
      }
    }
    warp_.pc = pc;
    warp_.mask = mask;
    switch (instruction.control) {
      case Control::indirect: {
        const auto& table = kernel_.tables[instruction.target];
        const auto* index = lanes<uint32_t>(warp_, instruction.slots[0]);
        for (int lane = 0; lane < kLanes; ++lane) {
          if (!(active >> lane & 1)) continue;
          if (index[lane] >= table.size())
            fault(warp_, instruction, lane,
                  "index " + std::to_string(index[lane]) + " into a table of " +
                      std::to_string(table.size()) + " targets");
          add_group(table[index[lane]], Mask{1} << lane);
        }
        if (mask & ~active) add_group(pc + 1, mask & ~active);
        warp_.mask = 0;
        break;
      }
      case Control::exit:
        exit_lanes(active);
        break;
      case Control::converge:
        converge<kCheck>(instruction, active);
        break;
      case Control::await:
        await<kCheck, kCount>(instruction, active);
        break;
      default:
        arrive(instruction, active);
    }
    if (warp_.mask) {
      load();
    } else {
      warp_.pc = kLowest;
      if (!switch_group()) break;
    }
  }
  return fuel - left;
}

void Runner::exit_lanes(Mask mask) {
  warp_.live &= ~mask;
  warp_.mask &= ~mask;
  ++warp_.pc;
  resident_.block.exited += static_cast<uint32_t>(count(mask));
  // Groups that wait for exited lanes check again.
  for (Group& group : warp_.others)
    if (group.wait == Group::Wait::converge) group.wait = Group::Wait::none;
  if (!warp_.live) {
    --resident_.unfinished;
    wake(resident_.block, kWarpgroup);
    require_alike(warp_);
  }
  happened(resident_.block);
  complete_if_all_arrived();
  leave_cluster_barrier(warp_, mask);
}

// Lanes that wait at this instruction for the same set join `here`; once all needed lanes have
// arrived, they run together and the waiting groups are released. Else returns 0, and `here` waits.
Mask Runner::gather(const Instruction& instruction, Mask here, Mask needed, uint32_t value) {
  const bool anywhere = instruction.flags & kConvergesAnywhere;
  const auto joins = [&](const Group& group) -> Mask {
    if (group.wait != Group::Wait::converge) return 0;
    const Instruction& other = code_[group.pc];
    if (group.pc != warp_.pc &&
        !(anywhere && other.control == Control::converge && other.run == instruction.run))
      return 0;
    if (other.member == kNoSlot) return group.mask;
    Mask same = 0;
    const Mask* members = lanes<Mask>(warp_, other.member);
    for (int lane = 0; lane < kLanes; ++lane)
      if ((group.mask >> lane & 1) && members[lane] == value) same |= Mask{1} << lane;
    return same;
  };
  Mask together = here;
  for (const Group& group : warp_.others) together |= joins(group);
  if ((together & needed) != needed) {
    warp_.mask &= ~here;
    warp_.others.push_back({warp_.pc, here, Group::Wait::converge});
    return 0;
  }
  std::vector<Group> released;
  for (Group& group : warp_.others)
    if (const Mask joined = joins(group)) {
      group.mask &= ~joined;
      if (group.pc == warp_.pc)
        warp_.mask |= joined;
      else
        released.push_back({group.pc + 1, joined});
    }
  std::erase_if(warp_.others, [](const Group& group) { return !group.mask; });
  for (const Group& group : released) add_group(group.pc, group.mask);
  return together;
}

template <bool kCheck>
void Runner::converge(const Instruction& instruction, Mask active) {
  const Mask* members =
      instruction.member == kNoSlot ? nullptr : lanes<Mask>(warp_, instruction.member);
  for (Mask rest = active; rest;) {
    const int first = __builtin_ctz(rest);
    const Mask value = members ? members[first] : kFullMask;
    Mask here = 0;
    for (int lane = first; lane < kLanes; ++lane)
      if ((rest >> lane & 1) && (!members || members[lane] == value)) here |= Mask{1} << lane;
    rest &= ~here;
    if (here & ~value)
      fault(warp_, instruction, __builtin_ctz(here & ~value),
            "the lane is not in its own member mask " + in_hex(value));
    const Mask together = gather(instruction, here, value & warp_.live, value);
    if (!together) continue;
    const Mask run = instruction.flags & kConvergesAnywhere ? here : together;
    if constexpr (kCheck) check_registers(warp_, instruction, run);
    instruction.run(warp_, instruction, run);
    if constexpr (kCheck) define_registers(warp_, instruction, run);
  }
  ++warp_.pc;
}

void Runner::arrive(const Instruction& instruction, Mask active) {
  if (instruction.flags & kAligned) {
    for (const Group& group : warp_.others) {
      const Instruction& other = code_[group.pc];
      if (group.wait == Group::Wait::converge && group.pc != warp_.pc &&
          other.control == Control::barrier)
        fault(warp_, instruction, __builtin_ctz(active),
              "barrier divergence: lanes " + in_hex(active) + " are here, lanes " +
                  in_hex(group.mask) + " at line " + std::to_string(other.line) + ": " +
                  other.text);
    }
    active = gather(instruction, active, warp_.live, kFullMask);
  }
  if (active) enter_barrier(instruction, active);
  ++warp_.pc;
}

// Sleeping lanes return to the instruction; it is counted once it lets them pass.
template <bool kCheck, bool kCount>
void Runner::await(const Instruction& instruction, Mask active) {
  const uint32_t pc = warp_.pc;
  if (instruction.flags & kAwaitsAligned) {
    active = gather(instruction, active, warp_.live, kFullMask);
    if (!active) {
      ++warp_.pc;
      return;
    }
  }
  warp_.asleep = 0;
  instruction.run(warp_, instruction, active);
  const Mask passed = active & ~warp_.asleep;
  if constexpr (kCheck) define_registers(warp_, instruction, passed);
  if constexpr (kCount) {
    kernel_.issued[pc] -= passed == 0;
    kernel_.active[pc] -= static_cast<uint64_t>(count(warp_.asleep));
  }
  if (warp_.asleep) {
    warp_.others.push_back({pc, warp_.asleep, Group::Wait::sleep, warp_.asleep_for});
    warp_.mask &= ~warp_.asleep;
  }
  ++warp_.pc;
}

void Runner::enter_barrier(const Instruction& instruction, Mask mask) {
  const uint32_t number = uniform(warp_, instruction, instruction.writes, mask, "barrier number");
  const int lane = __builtin_ctz(mask);
  if (number >= kBarriers)
    fault(warp_, instruction, lane, "barrier " + std::to_string(number) + " of 0 to 15");
  const bool counted = instruction.slots[instruction.writes + 1] != kNoSlot;
  const uint32_t expected =
      counted ? uniform(warp_, instruction, instruction.writes + 1, mask, "thread count") : 0;
  if (counted && (expected == 0 || expected % kLanes != 0))
    fault(warp_, instruction, lane,
          "thread count " + std::to_string(expected) + " is no multiple of 32");
  Barrier& barrier = resident_.barriers[number];
  if (barrier.in_use && barrier.expected != expected)
    fault(warp_, instruction, lane,
          "thread count " + std::to_string(expected) + " where others arrived at barrier " +
              std::to_string(number) + " with " + std::to_string(barrier.expected));
  barrier.in_use = true;
  barrier.expected = expected;
  // With an explicit count, an aligned barrier counts whole warps, however many of their lanes
  // live.
  const bool whole = counted && (instruction.flags & kAligned);
  barrier.arrived += static_cast<uint32_t>(whole ? kLanes : count(mask));
  if (counted && barrier.arrived > expected)
    fault(warp_, instruction, lane,
          std::to_string(barrier.arrived) + " threads at barrier " + std::to_string(number) +
              ", which expects " + std::to_string(expected));
  barrier_entered(warp_, number);
  const auto kind = static_cast<Barrier::Kind>(instruction.variant);
  if (kind != Barrier::sync && kind != Barrier::arrive) {
    const Mask value = predicate(warp_, instruction.slots[instruction.writes + 2]);
    const Mask negated = instruction.flags & kNegated ? ~value : value;
    barrier.true_predicates += static_cast<uint32_t>(count(negated & mask));
    barrier.predicates += static_cast<uint32_t>(count(mask));
  }
  if (kind != Barrier::arrive) {
    warp_.others.push_back({warp_.pc + 1, mask, Group::Wait::barrier, number});
    warp_.mask &= ~mask;
  }
  if (counted) {
    if (barrier.arrived == expected) complete(barrier, number);
  } else {
    complete_if_all_arrived();
  }
}

void Runner::complete_if_all_arrived() {
  const uint32_t running = resident_.block.threads - resident_.block.exited;
  for (uint32_t number = 0; number < kBarriers; ++number) {
    Barrier& barrier = resident_.barriers[number];
    if (barrier.in_use && barrier.expected == 0 && barrier.arrived >= running)
      complete(barrier, number);
  }
}

void Runner::complete(Barrier& barrier, uint32_t number) {
  for (Warp& warp : resident_.block.warps)
    for (Group& group : warp.others) {
      if (group.wait != Group::Wait::barrier || group.barrier != number) continue;
      group.wait = Group::Wait::none;
      barrier_passed(warp, number);
      const Instruction& instruction = code_[group.pc - 1];
      if (instruction.writes == 0 || instruction.slots[0] == kNoSlot) continue;
      if (instruction.variant == Barrier::sum) {
        uint32_t values[kLanes];
        std::fill_n(values, kLanes, barrier.true_predicates);
        assign(lanes<uint32_t>(warp, instruction.slots[0]), values, group.mask);
      } else {
        const bool holds = instruction.variant == Barrier::all
                               ? barrier.true_predicates == barrier.predicates
                               : barrier.true_predicates > 0;
        Mask& result = predicate(warp, instruction.slots[0]);
        result = holds ? result | group.mask : result & ~group.mask;
      }
      if (options.check) define_registers(warp, instruction, group.mask);
    }
  barrier = {};
  happened(resident_.block);
  barrier_emptied(resident_.block, number);
}

}  // namespace

uint64_t run_warp(Resident& resident, Warp& warp, Kernel& kernel, uint64_t fuel) {
  Runner runner(resident, warp, kernel);
  const auto run = [&]<bool check, bool count>() {
    return is_weak() ? runner.run<check, count, true>(fuel) : runner.run<check, count, false>(fuel);
  };
  if (options.check)
    return options.count ? run.operator()<true, true>() : run.operator()<true, false>();
  return options.count ? run.operator()<false, true>() : run.operator()<false, false>();
}

}  // namespace ptxvm
