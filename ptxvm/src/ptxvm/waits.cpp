// Where the warps of a block stand and what they wait for, for reports of deadlocks and hangs.
#include <vector>

#include "ptxvm/async.h"
#include "ptxvm/parse.h"
#include "ptxvm/reports.h"
#include "ptxvm/warps.h"

namespace ptxvm {
namespace {

std::string arrivals(uint32_t arrived, uint32_t expected) {
  return ": " + std::to_string(arrived) + " of " + std::to_string(expected) +
         " threads have arrived, " + std::to_string(expected - arrived) + " are missing";
}

// Threads that have not exited.
uint32_t running(const Block& block) { return block.threads - block.exited; }

std::string cluster_arrivals(const Cluster& cluster) {
  uint32_t expected = 0;
  for (const Block* block : cluster.blocks) expected += running(*block);
  return arrivals(cluster.arrived, expected);
}

std::string reason(const Resident& resident, const Warp& warp, const Group& group) {
  const Block& block = resident.block;
  switch (group.wait) {
    case Group::Wait::barrier: {
      const Barrier& barrier = resident.barriers[group.barrier];
      return "waits at barrier " + std::to_string(group.barrier) +
             arrivals(barrier.arrived, barrier.expected ? barrier.expected : running(block));
    }
    case Group::Wait::converge:
      return "waits for other lanes of the warp, of which " + in_hex(warp.live) + " live";
    case Group::Wait::sleep:
      if (group.barrier == kClusterBarrier)
        return "waits at the barrier of the cluster" + cluster_arrivals(*block.cluster);
      if (group.barrier == kWarpgroup) return "waits for wgmma of other warps of the warpgroup";
      if (group.barrier == kRegisters) return "waits for registers of the block";
      return "waits for " + describe_mbarrier(block, group.barrier);
    default:
      return "ready";
  }
}

// The instruction at which the lanes of a group stand.
const Instruction& instruction_of(const Block& block, const Group& group) {
  return block.kernel->code[group.pc - (group.wait == Group::Wait::barrier)];
}

// Lanes of warps that stand at the same line for the same reason.
struct Row {
  std::vector<uint32_t> warps;
  std::string what;

  // "warp 3", "warps 0, 4-7"
  std::string who() const {
    std::string text;
    for (size_t i = 0; i < warps.size();) {
      size_t last = i;
      while (last + 1 < warps.size() && warps[last + 1] == warps[last] + 1) ++last;
      text += (text.empty() ? "" : ", ") + std::to_string(warps[i]);
      if (last > i) text += "-" + std::to_string(warps[last]);
      i = last + 1;
    }
    return (warps.size() > 1 ? "warps " : "warp ") + text;
  }
};

}  // namespace

std::string describe(const Resident& resident) {
  const Block& block = resident.block;
  std::vector<Row> rows;
  const auto add = [&](const Warp& warp, const Group& group) {
    const Instruction& in = instruction_of(block, group);
    const std::string what = "lanes " + in_hex(group.mask) + ", line " + std::to_string(in.line) +
                             source_of(*block.kernel->module, in.line) + ": " + short_text(in) +
                             ": " + reason(resident, warp, group);
    for (Row& row : rows)
      if (row.what == what) return row.warps.push_back(warp.index);
    rows.push_back({{warp.index}, what});
  };
  for (const Warp& warp : block.warps) {
    if (warp.mask) add(warp, {warp.pc, warp.mask});
    for (const Group& group : warp.others) add(warp, group);
  }
  std::string text = place_of(block);
  if (block.exited)
    text += ", where " + std::to_string(block.exited) + " of " + std::to_string(block.threads) +
            " threads have exited";
  text += "\n";
  for (const Row& row : rows) text += "  " + row.who() + ", " + row.what + "\n";
  return text;
}

const Instruction* waiting_instruction(const Block& block) {
  const Instruction* first = nullptr;
  for (const Warp& warp : block.warps)
    for (const Group& group : warp.others) {
      const Instruction* const in = &instruction_of(block, group);
      if (group.wait == Group::Wait::barrier || group.wait == Group::Wait::sleep) return in;
      if (!first) first = in;
    }
  return first;
}

}  // namespace ptxvm
