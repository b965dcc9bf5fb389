#include "ptxvm/shadow.h"

#include <algorithm>

#include "ptxvm/knowledge.h"
#include "ptxvm/reports.h"

namespace ptxvm {
namespace {

constexpr uint32_t kUnit = 64;  // bytes of the register file per entry of Warp::defined

// Shadows of finished blocks, for reuse: a launch needs a few and starts many blocks.
std::vector<std::shared_ptr<SharedShadow>> spare_shadows;

}  // namespace

void Region::refine(uint32_t bytes) {
  uint32_t finer = 0;
  while (finer < 4 && 2u << finer <= bytes) ++finer;
  if (cells.empty()) {
    shift = std::min(shift, finer);
    cells.assign(kBytes >> shift, {});
    if (bytes >= 1u << shift) return;
  }
  std::vector<Cell> divided(kBytes >> finer);
  for (size_t i = 0; i < divided.size(); ++i) divided[i] = cells[i >> (shift - finer)];
  cells = std::move(divided);
  shift = finer;
}

void block_started(Block& block) {
  if (!options.check) return;
  const Kernel& kernel = *block.kernel;
  if (spare_shadows.empty()) {
    block.shadow = std::make_shared<SharedShadow>();
  } else {
    block.shadow = std::move(spare_shadows.back());
    spare_shadows.pop_back();
  }
  SharedShadow& shadow = *block.shadow;
  if (shadow.kernel != &kernel) shadow.regions.clear();
  shadow.kernel = &kernel;
  for (Region& region : shadow.regions) std::fill(region.cells.begin(), region.cells.end(), Cell{});
  shadow.regions.resize((block.shared_bytes + Region::kBytes - 1) / Region::kBytes);
  shadow.unset.assign((block.shared_bytes + 15) / 16, 0xffff);
  shadow.reductions.clear();
  shadow.local_written.assign(size_t{kernel.local_bytes} * block.warps.size() * kLanes, 0);
  shadow.signals.clear();
  shadow.barriers = {};
  shadow.remote.clear();
  shadow.operands = {};
  start_timelines(block);
  for (Warp& warp : block.warps) {
    warp.defined.assign(kernel.file_bytes / kUnit + 1, 0);
    warp.origins.assign(warp.defined.size(), nullptr);
    warp.flights.clear();
    warp.flight_of.assign(kernel.scratch != kNoSlot ? warp.defined.size() : 0, 0);
    warp.undefined = {};
    if (kernel.scratch != kNoSlot) warp.timeline->registers.assign(warp.defined.size(), {});
    for (const auto& constant : kernel.constants) warp.defined[constant.slot / kUnit] = kFullMask;
    for (const auto& special : kernel.specials) warp.defined[special.slot / kUnit] = kFullMask;
  }
}

void reached(Warp& warp, const Instruction& in, int lane, Block& block) {
  if (!warp.timeline || !block.shadow || &block == warp.block) return;
  const Timeline& t = *warp.timeline;
  const Remote now{t.agent, t.near.seen[t.agent], &warp, &in, lane};
  for (Remote& remote : block.shadow->remote)
    if (remote.agent == t.agent) {
      remote = now;
      return;
    }
  block.shadow->remote.push_back(now);
}

namespace {

// True if the warp has waited for the access. Relaxed waits and reads are pending: they order no
// access of the warp, but the warp did not end before them.
bool has_waited(const Warp& warp, const Remote& remote) {
  const Timeline& t = *warp.timeline;
  const auto& pending = t.pending;
  return at(t.near.seen, remote.agent) >= remote.time ||
         std::any_of(pending.begin(), pending.end(), [&](const Published& seen) {
           const Times* own = seen.seen.find(t.cluster);
           return own && at(*own, remote.agent) >= remote.time;
         });
}

}  // namespace

void block_finished(Block& block) {
  if (!block.shadow) return;
  // A block ends with its last warp, so it is enough that one of its warps has waited.
  for (const Remote& remote : block.shadow->remote)
    if (std::none_of(block.warps.begin(), block.warps.end(),
                     [&](const Warp& warp) { return has_waited(warp, remote); }))
      broke_rule(*remote.warp, *remote.in, remote.lane, "access to a block that may have finished",
                 "block " + std::to_string(block.rank) +
                     " of the cluster may finish before this access to its shared memory: it waits "
                     "for nothing that follows it");
  spare_shadows.push_back(std::move(block.shadow));
}

void bulk_landed(Block& target, uint32_t offset, uint32_t bytes, bool reduces, uint32_t segment) {
  if (!target.shadow) return;
  SharedShadow& shadow = *target.shadow;
  ++shadow.writes;
  for (uint32_t at = offset; at < offset + bytes;) {
    Region& region = shadow.regions[at >> Region::kShift];
    Cell* cell = region.at(at, 1u << region.shift);
    const uint32_t end = std::min((at | (Region::kBytes - 1)) + 1, offset + bytes);
    for (; at < end; at += 1u << region.shift, ++cell) {
      const uint32_t unit = at / 16;
      // Reductions are counted at the first cell of each 16 bytes.
      if (reduces && at % 16 == 0 && --shadow.reductions[unit] > 0) {
        const uint32_t skip = 16 >> region.shift;
        cell += skip - 1;
        at += 16 - (1u << region.shift);
        continue;
      }
      cell->wrote = segment;
      cell->write_info &= ~kInFlight;
    }
  }
}

bool was_read_alike(Warp& warp, const Instruction& in, uint64_t b, uint32_t segment) {
  const SharedShadow& shadow = *warp.block->shadow;
  const ReadOperand& operand = warp.block->shadow->operand(b);
  return operand.by == &in && operand.b == b && operand.segment == segment &&
         operand.writes == shadow.writes &&
         std::all_of(operand.writers.begin(), operand.writers.begin() + operand.count,
                     [&](uint32_t id) {
                       return warp.timeline->has_passed(id, kAsyncShared) ||
                              comes_before(warp, id, kAsyncShared);
                     });
}

}  // namespace ptxvm
