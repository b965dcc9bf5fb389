// Special registers: names, widths, and their values for the lanes of a warp.
#include "ptxvm/special.h"

#include <iterator>

#include "ptxvm/async.h"
#include "ptxvm/decode_state.h"
#include "ptxvm/device.h"

namespace ptxvm {
namespace {

enum Index {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  nwarpid,
  smid,
  nsmid,
  gridid,
  lanemask_eq,
  lanemask_lt,
  lanemask_le,
  lanemask_gt,
  lanemask_ge,
  dynamic_smem_size,
  total_smem_size,
  clock32,
  clock_hi,
  clock64,
  globaltimer,
  globaltimer_lo,
  globaltimer_hi,
  clusterid_x,
  clusterid_y,
  clusterid_z,
  nclusterid_x,
  nclusterid_y,
  nclusterid_z,
  cluster_ctaid_x,
  cluster_ctaid_y,
  cluster_ctaid_z,
  cluster_nctaid_x,
  cluster_nctaid_y,
  cluster_nctaid_z,
  cluster_ctarank,
  cluster_nctarank,
  is_explicit_cluster,
  envreg0,
  envreg1,
  envreg2
};

struct Entry {
  const char* name;
  int bits;
};

// Ordered as Index.
constexpr Entry kEntries[] = {{"%tid.x", 32},
                              {"%tid.y", 32},
                              {"%tid.z", 32},
                              {"%ntid.x", 32},
                              {"%ntid.y", 32},
                              {"%ntid.z", 32},
                              {"%ctaid.x", 32},
                              {"%ctaid.y", 32},
                              {"%ctaid.z", 32},
                              {"%nctaid.x", 32},
                              {"%nctaid.y", 32},
                              {"%nctaid.z", 32},
                              {"%laneid", 32},
                              {"%warpid", 32},
                              {"%nwarpid", 32},
                              {"%smid", 32},
                              {"%nsmid", 32},
                              {"%gridid", 64},
                              {"%lanemask_eq", 32},
                              {"%lanemask_lt", 32},
                              {"%lanemask_le", 32},
                              {"%lanemask_gt", 32},
                              {"%lanemask_ge", 32},
                              {"%dynamic_smem_size", 32},
                              {"%total_smem_size", 32},
                              {"%clock", 32},
                              {"%clock_hi", 32},
                              {"%clock64", 64},
                              {"%globaltimer", 64},
                              {"%globaltimer_lo", 32},
                              {"%globaltimer_hi", 32},
                              {"%clusterid.x", 32},
                              {"%clusterid.y", 32},
                              {"%clusterid.z", 32},
                              {"%nclusterid.x", 32},
                              {"%nclusterid.y", 32},
                              {"%nclusterid.z", 32},
                              {"%cluster_ctaid.x", 32},
                              {"%cluster_ctaid.y", 32},
                              {"%cluster_ctaid.z", 32},
                              {"%cluster_nctaid.x", 32},
                              {"%cluster_nctaid.y", 32},
                              {"%cluster_nctaid.z", 32},
                              {"%cluster_ctarank", 32},
                              {"%cluster_nctarank", 32},
                              {"%is_explicit_cluster", 1},
                              {"%envreg0", 32},
                              {"%envreg1", 32},
                              {"%envreg2", 32}};
static_assert(std::size(kEntries) == envreg2 + 1);

uint64_t value_of(int index, const Warp& warp, uint32_t lane, uint64_t time) {
  const Block& block = *warp.block;
  const uint32_t* cluster = block.cluster->shape;
  const uint32_t thread = warp.index * kLanes + lane;
  const uint32_t bit = 1u << lane;
  switch (index) {
    case tid_x:
      return thread % block.shape[0];
    case tid_y:
      return thread / block.shape[0] % block.shape[1];
    case tid_z:
      return thread / block.shape[0] / block.shape[1];
    case ntid_x:
      return block.shape[0];
    case ntid_y:
      return block.shape[1];
    case ntid_z:
      return block.shape[2];
    case ctaid_x:
      return block.x;
    case ctaid_y:
      return block.y;
    case ctaid_z:
      return block.z;
    case nctaid_x:
      return block.grid[0];
    case nctaid_y:
      return block.grid[1];
    case nctaid_z:
      return block.grid[2];
    case laneid:
      return lane;
    case warpid:
      return warp.index;
    case nwarpid:
      return block.warps.size();
    case smid:
      return (block.x + uint64_t{block.grid[0]} * (block.y + uint64_t{block.grid[1]} * block.z)) %
             multiprocessors();
    case nsmid:
      return multiprocessors();
    case lanemask_eq:
      return bit;
    case lanemask_lt:
      return bit - 1;
    case lanemask_le:
      return bit | (bit - 1);
    case lanemask_gt:
      return ~(bit | (bit - 1));
    case lanemask_ge:
      return ~(bit - 1);
    case dynamic_smem_size:
      return block.shared_bytes - block.kernel->dynamic_offset;
    case total_smem_size:
      return block.shared_bytes;
    case clock32:
    case clock64:
    case globaltimer:
    case globaltimer_lo:
      return time;
    case clock_hi:
    case globaltimer_hi:
      return time >> 32;
    case clusterid_x:
      return block.x / cluster[0];
    case clusterid_y:
      return block.y / cluster[1];
    case clusterid_z:
      return block.z / cluster[2];
    case nclusterid_x:
      return block.grid[0] / cluster[0];
    case nclusterid_y:
      return block.grid[1] / cluster[1];
    case nclusterid_z:
      return block.grid[2] / cluster[2];
    case cluster_ctaid_x:
      return block.x % cluster[0];
    case cluster_ctaid_y:
      return block.y % cluster[1];
    case cluster_ctaid_z:
      return block.z % cluster[2];
    case cluster_nctaid_x:
      return cluster[0];
    case cluster_nctaid_y:
      return cluster[1];
    case cluster_nctaid_z:
      return cluster[2];
    case cluster_ctarank:
      return block.rank;
    case cluster_nctarank:
      return cluster[0] * cluster[1] * cluster[2];
    case is_explicit_cluster:
      return cluster[0] * cluster[1] * cluster[2] > 1;
    case envreg1:
      return reinterpret_cast<uint64_t>(block.workspace) >> 32;
    case envreg2:
      return reinterpret_cast<uint64_t>(block.workspace);
    default:
      return 0;
  }
}

void fill(Warp& warp, const Kernel::Special& special, uint64_t time) {
  if (special.bits == 1) {
    predicate(warp, special.slot) = value_of(special.index, warp, 0, time) ? kFullMask : 0;
    return;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint64_t value = value_of(special.index, warp, static_cast<uint32_t>(lane), time);
    if (special.bits == 16)
      lanes<uint16_t>(warp, special.slot)[lane] = static_cast<uint16_t>(value);
    else if (special.bits == 32)
      lanes<uint32_t>(warp, special.slot)[lane] = static_cast<uint32_t>(value);
    else
      lanes<uint64_t>(warp, special.slot)[lane] = value;
  }
}

bool is_clock(int index) { return index >= clock32 && index <= globaltimer_hi; }

}  // namespace

bool find_special(const std::string& name, int& index, int& bits) {
  if (name.empty() || name[0] != '%') return false;
  for (size_t i = 0; i < std::size(kEntries); ++i)
    if (name == kEntries[i].name) {
      index = static_cast<int>(i);
      bits = kEntries[i].bits;
      return true;
    }
  return false;
}

void set_specials(Warp& warp) {
  for (const Kernel::Special& special : warp.block->kernel->specials) fill(warp, special, 0);
}

void set_clocks(Warp& warp, uint64_t time) {
  for (const Kernel::Special& special : warp.block->kernel->specials)
    if (is_clock(special.index)) fill(warp, special, time);
}

}  // namespace ptxvm
