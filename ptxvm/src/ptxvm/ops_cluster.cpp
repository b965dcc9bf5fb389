// Clusters: addresses of distributed shared memory and barrier.cluster; also the sm_90 instructions
// of whole warps: setmaxnreg, griddepcontrol.
#include <algorithm>

#include "ptxvm/async.h"
#include "ptxvm/check.h"
#include "ptxvm/control.h"
#include "ptxvm/device.h"
#include "ptxvm/ops_arithmetic.h"
#include "ptxvm/parse.h"
#include "ptxvm/warps.h"

namespace ptxvm {
namespace {

constexpr uint64_t kOffsetMask = (uint64_t{1} << kRankShift) - 1;

// Slots: d, address, rank.
template <typename T>
void run_mapa(Warp& warp, const Instruction& in, Mask mask) {
  const T* addresses = lanes<const T>(warp, in.slots[1]);
  const uint32_t* ranks = lanes<const uint32_t>(warp, in.slots[2]);
  const size_t blocks = warp.block->cluster->blocks.size();
  for (int i = 0; i < kLanes; ++i) {
    if (!(mask >> i & 1)) continue;
    if (ranks[i] >= blocks)
      fault(warp, in, i,
            "block " + std::to_string(ranks[i]) + " of a cluster of " + std::to_string(blocks));
    const T window = static_cast<T>(addresses[i] & (sizeof(T) == 8 ? kWindowMask : 0));
    lanes<T>(warp, in.slots[0])[i] = window | static_cast<T>(addresses[i] & kOffsetMask) |
                                     static_cast<T>(static_cast<T>(ranks[i] + 1) << kRankShift);
  }
}

template <typename T>
void run_rank(Warp& warp, const Instruction& in, Mask mask) {
  const T* addresses = lanes<const T>(warp, in.slots[1]);
  for (int i = 0; i < kLanes; ++i) {
    if (!(mask >> i & 1)) continue;
    const auto named = static_cast<uint32_t>(addresses[i] >> kRankShift & kRankMask);
    lanes<uint32_t>(warp, in.slots[0])[i] = named ? named - 1 : warp.block->rank;
  }
}

void decode_mapa(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  const std::string type = modifiers.take_type();
  const bool shared = modifiers.take("shared::cluster"), ranks = statement.opcode[0] != "mapa";
  modifiers.finish();
  if (type != "u32" && type != "u64") decoder.fail("type ." + type + " is not supported here");
  if (!shared && type == "u32") decoder.fail("a generic address has 64 bits");
  const int bits = bits_of_type(type);
  expect_operands(decoder, statement, ranks ? 2 : 3);
  decoder.write(statement.operands[0], ranks ? 32 : bits);
  decoder.read(statement.operands[1], bits);
  if (!ranks) decoder.read(statement.operands[2], 32);
  if (ranks)
    in.run = bits == 32 ? run_rank<uint32_t> : run_rank<uint64_t>;
  else
    in.run = bits == 32 ? run_mapa<uint32_t> : run_mapa<uint64_t>;
}

void run_cluster_arrive(Warp& warp, const Instruction& in, Mask mask) {
  Cluster& cluster = *warp.block->cluster;
  if (const Mask twice = mask & warp.cluster_arrived)
    fault(warp, in, __builtin_ctz(twice), "a second arrival without barrier.cluster.wait");
  warp.cluster_arrived |= mask;
  warp.cluster_phase = (warp.cluster_phase & ~mask) | (cluster.phase & 1 ? mask : 0);
  cluster.arrived += static_cast<uint32_t>(__builtin_popcount(mask));
  cluster_arrived(warp, in);
  complete_cluster_barrier(*warp.block);
}

// Lanes whose last arrival, if any, is in the current phase.
Mask in_this_phase(const Warp& warp) {
  const Mask now = warp.block->cluster->phase & 1 ? kFullMask : 0;
  return ~(warp.cluster_phase ^ now);
}

void run_cluster_wait(Warp& warp, const Instruction& in, Mask mask) {
  if (const Mask none = mask & ~warp.cluster_arrived)
    fault(warp, in, __builtin_ctz(none), "barrier.cluster.wait without an arrival");
  const Mask waiting = mask & in_this_phase(warp);
  warp.asleep = waiting;
  warp.asleep_for = kClusterBarrier;
  warp.cluster_arrived &= ~(mask & ~waiting);
  if (waiting != mask) cluster_passed(warp);
}

// The registers of a block are a pool shared by its warps.
uint32_t registers_left(const Block& block) {
  const auto warps = static_cast<uint32_t>(block.warps.size());
  uint32_t used = 0;
  for (const Warp& warp : block.warps) used += warp.registers;
  const uint32_t all = registers_at_start(*block.kernel, warps) * warps;
  return all - std::min(used, all);
}

void run_registers(Warp& warp, const Instruction& in, Mask mask) {
  const auto asked = static_cast<uint32_t>(in.offset);
  const bool more = in.variant;
  const int lane = __builtin_ctz(mask);
  const std::string both =
      std::to_string(asked) + " registers where the warp has " + std::to_string(warp.registers);
  if (more ? asked < warp.registers : asked > warp.registers)
    fault(warp, in, lane, (more ? "setmaxnreg.inc to " : "setmaxnreg.dec to ") + both);
  if (more && asked - warp.registers > registers_left(*warp.block)) {
    warp.asleep = mask;
    warp.asleep_for = kRegisters;
    return;
  }
  do_alike(warp, in, asked, 0);
  warp.registers = asked;
  happened(*warp.block);
  if (!more) wake(*warp.block, kRegisters);
}

void decode_registers(Decoder& decoder, const Statement& statement, Instruction& in) {
  const auto& parts = statement.opcode;
  uint64_t count = 0;
  if (parts.size() != 5 || (parts[1] != "inc" && parts[1] != "dec") || parts[2] != "sync" ||
      parts[3] != "aligned" || parts[4] != "u32" || statement.operands.size() != 1 ||
      !parse_literal(statement.operands[0], 32, count))
    decoder.fail("unknown form of setmaxnreg");
  if (count < 24 || count > 256 || count % 8 != 0)
    decoder.fail("the number of registers must be a multiple of 8 from 24 to 256");
  in.offset = static_cast<int64_t>(count);
  in.variant = parts[1] == "inc";
  in.run = run_registers;
  in.control = Control::await;
  in.flags = kAwaitsAligned;
}

// griddepcontrol is a no-op: one grid runs at a time, so all prerequisite grids have finished.
void do_nothing(Warp&, const Instruction&, Mask) {}

void decode_dependents(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  if (!modifiers.take("launch_dependents") && !modifiers.take("wait"))
    decoder.fail("needs .launch_dependents or .wait");
  modifiers.finish();
  expect_operands(decoder, statement, 0);
  in.run = do_nothing;
}

}  // namespace

uint32_t registers_at_start(const Kernel& kernel, uint32_t warps) {
  if (kernel.registers) return (kernel.registers + 7) / 8 * 8;
  // The compiler knows the bound on threads, of which a launch may use fewer.
  const uint32_t most = std::max(warps, (kernel.max_threads + kLanes - 1) / kLanes);
  const uint32_t all = kRegistersPerMultiprocessor / kLanes / kernel.min_blocks / most;
  return std::min(all / 8 * 8, 256u);
}

void leave_cluster_barrier(Warp& warp, Mask exiting) {
  const Mask counted = exiting & warp.cluster_arrived & in_this_phase(warp);
  warp.block->cluster->arrived -= static_cast<uint32_t>(__builtin_popcount(counted));
  warp.cluster_arrived &= ~exiting;
  complete_cluster_barrier(*warp.block);
}

void complete_cluster_barrier(Block& block) {
  Cluster& cluster = *block.cluster;
  if (!cluster.arrived) return;
  uint32_t running = 0;
  for (const Block* each : cluster.blocks) running += each->threads - each->exited;
  if (cluster.arrived < running) return;
  cluster.arrived = 0;
  ++cluster.phase;
  cluster_completed(cluster);
  for (Block* each : cluster.blocks) wake(*each, kClusterBarrier);
  happened(block);
}

// barrier.cluster.arrive{.release, .relaxed}{.aligned}, barrier.cluster.wait{.acquire}{.aligned}
void decode_cluster_barrier(Decoder& decoder, const Statement& statement, Instruction& in) {
  Modifiers modifiers(decoder, statement);
  modifiers.take("cluster");
  const bool waits = modifiers.take("wait");
  if (!waits && !modifiers.take("arrive")) decoder.fail("needs .arrive or .wait");
  if (waits)
    modifiers.take("acquire");
  else if (modifiers.take("release") || !modifiers.take("relaxed"))
    in.order = kReleases;
  const bool aligned = modifiers.take("aligned");
  modifiers.finish();
  expect_operands(decoder, statement, 0);
  in.run = waits ? run_cluster_wait : run_cluster_arrive;
  in.control = Control::await;
  in.flags = aligned ? kAwaitsAligned : 0;
}

void add_cluster(OpcodeTable& table) {
  table["mapa"] = table["getctarank"] = decode_mapa;
  table["setmaxnreg"] = decode_registers;
  table["griddepcontrol"] = decode_dependents;
}

}  // namespace ptxvm
