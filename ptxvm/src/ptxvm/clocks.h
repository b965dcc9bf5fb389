// Check mode: the happens-before relation, as vector clocks. Every agent of a launch (a warp, or an
// asynchronous operation) has a time; a warp knows for each agent the time up to which its accesses
// happen before the warp's next instruction. Releases publish what a warp knows, acquires merge it.
//
// Lanes of a warp are one agent between the points where they meet: .sync instructions and
// barriers. What a lane acquires counts for all of them; what it releases does not include accesses
// of other lanes since the last such point.
#pragma once
#include <array>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ptxvm/far.h"
#include "ptxvm/machine.h"

namespace ptxvm {

// Instruction::order: the scope in the lowest two bits, then the kind of access or fence.
constexpr uint8_t kCta = 0, kClusterScope = 1, kGpu = 2, kScopes = 3;  // .sys is treated as .gpu
constexpr uint8_t kScopeBits = 3, kIsStrong = 4, kAcquires = 8, kReleases = 16, kSequential = 32;
// ld.global.nc, which is not strong: the memory does not change during the launch.
constexpr uint8_t kReadOnly = kSequential;
inline bool is_read_only(const Instruction& in) {
  return (in.order & (kIsStrong | kReadOnly)) == kReadOnly;
}
inline uint8_t scope_of(const Instruction& in) { return in.order & kScopeBits; }

// The proxy of an access: generic, or the async proxy on shared or on global memory.
enum Proxy : uint8_t { kGeneric, kAsyncShared, kAsyncGlobal };

// Vector clock over the agents of one cluster.
struct Known {
  Times seen;  // happens before the warp's next instruction
  // ordered by a proxy fence of shared or of global memory as well, so before its asynchronous
  // operations there
  Times proxied[2];
};

// Vector clock over the agents of many clusters.
struct Published {
  Far seen, proxied[2];
  bool empty() const { return seen.empty(); }
  bool operator==(const Published&) const = default;
};

// Merged knowledge of several releases, in one cluster.
struct Gathered {
  Known near;
  Published far;
  std::array<Published, kScopes> released, read;  // Timeline::met_release, met_read
};

// Accesses of one agent between two of its releases. An asynchronous access belongs to an agent of
// its own, whose time other agents learn when they wait for it.
struct Segment {
  enum class Kind : uint8_t { warp, bulk, copies, bulk_reads, bulk_writes, products };
  uint32_t cluster, agent, time;
  uint16_t warp;  // issuing warp
  uint8_t rank;   // rank of its block in the cluster
  Kind kind;
  bool strong;
  uint8_t scope;
  // If some lanes only have released it: these, and the time at which all have (0: by all at once).
  Mask covered = 0;
  uint32_t full = 0;
  bool async() const { return kind != Kind::warp && kind != Kind::copies; }
};

// Segments are numbered through all launches, so that segments of earlier launches are known to be
// over. A number with kSet names a set of segments that read or wrote the same bytes.
constexpr uint32_t kSet = 0x80000000u;
constexpr uint32_t kRemembered = 64;

// Knowledge of one warp.
struct Timeline {
  uint32_t cluster = 0, agent = 0;
  uint8_t rank = 0;  // of its block in the cluster
  Known near;        // near.seen[agent] is its own time
  Published far;     // other clusters; entries for its own cluster are in near too
  // Knowledge at the last fence of each scope: a strong write of that scope publishes it.
  std::array<Published, kScopes> fences;
  // Releases seen by strong reads, by the scope of the fence that acquires them.
  std::array<Published, kScopes> pending;
  // fences and pending for fence.sc.cluster and fence.sc.gpu, of this warp and of the warps that it
  // has met at barriers since: these fences are totally ordered, so that the strong access may be
  // made by another warp across the barrier. At .cta scope the barrier itself orders.
  std::array<Published, kScopes> met_release, met_read;
  // Releases of the warp at a host address, by scope: a later strong write of its own there
  // continues that release sequence.
  using Releases = std::array<Published, kScopes>;
  std::unordered_map<uint64_t, Releases> released;
  Published last;  // the last release that was acquired
  // Releases that were seen but whose scope, or the acquire's scope, was too narrow.
  struct Refused {
    Published what;
    uint8_t has, needs;
  };
  std::vector<Refused> refused;
  // Current segments, 0 if there is none yet: weak accesses and, by scope, strong ones.
  uint32_t weak = 0;
  std::array<uint32_t, kScopes> strong{};
  Mask acting = 0;     // lanes that run the instruction
  Mask touched = 0;    // lanes that accessed shared or wrote global memory since the lanes met
  bool parts = false;  // the lanes have met: the next access begins a segment
  std::vector<uint32_t> partial;  // segments that some lanes only have released
  // Caches, indexed by number modulo kRemembered. ordered: segments and sets that happen before the
  // next access of a proxy. joined, joined_writes: the set of readers or writers that results when
  // a segment joins a set (a writer that observes the set has kSet in `with`).
  std::array<std::array<uint32_t, kRemembered>, 3> ordered{};
  struct Joined {
    uint32_t set, with, result;
  };
  std::array<Joined, kRemembered> joined{}, joined_writes{};
  // Strong writes that strong reads of the warp saw, by place: they happen before its next access
  // there.
  struct Saw {
    uint64_t place;
    uint32_t wrote;
  };
  std::array<Saw, kRemembered> saw{};
  uint32_t bulk_agent = 0;  // agent of the reads of bulk groups; their writes are the next agent
  // wgmma, in the first warp of the warpgroup: the segment of the group being issued.
  uint32_t product_agent = 0, product_segment = 0, product_time = 0;
  // Pending cp.async.mbarrier.arrive, with the number of copies that precede it.
  struct Arrival {
    uint32_t agent, time, copies;
    int lane;
  };
  std::vector<Arrival> arrivals;
  // By lane: the agent of its cp.async copies that arrive at an mbarrier; its time is the number of
  // copies. Empty before the first one.
  std::vector<uint32_t> copy_agents;
  // Register state in kernels with wgmma (definedness.cpp), per unit of the register file. fence:
  // number, from 1, of wgmma.fence executed before the last write by anything but wgmma. group:
  // number, from 1, of the group of the last wgmma that uses it.
  struct Register {
    uint32_t fence = 0, group = 0;
    const Instruction *written_by = nullptr, *used_by = nullptr;
  };
  std::vector<Register> registers;
  uint32_t register_fences = 1, products_waited_for = 0;

  bool has_passed(uint32_t id, Proxy proxy = kGeneric) const {
    return ordered[proxy][id % kRemembered] == id;
  }
};

// The mbarrier at a place: knowledge of its arrivals, by threads of its block and of other blocks.
struct Signal {
  uint32_t agent = 0;   // agent of the copies that signal it
  uint32_t phases = 0;  // number of completed phases
  std::array<Gathered, 2> gathering, complete;
  Times copies_gathering, copies_complete;  // cp.async copies that arrived in this and past phases
  std::vector<Timeline::Refused> refused;
};

// Clocks of a cluster. Below: start of a launch, start of a block.
struct ClusterClocks {
  uint32_t agents = 0;
  Gathered gathering, complete;  // barrier.cluster
};
void clocks_launched(const uint32_t grid[3], const uint32_t cluster[3]);
void start_timelines(Block&);

// Current segment of a warp's accesses: weak, or strong with a scope.
uint32_t segment_of(Warp&);
uint32_t strong_segment_of(Warp&, uint8_t scope);
const Segment& segment(uint32_t id);
bool are_same(uint32_t id, uint32_t other);  // same agent at the same time
// A segment that is not known to come before: true if this lane's part of it does.
constexpr uint32_t kSeveralLanes = 32, kUnknownLane = 33;
bool is_covered(const Warp&, uint32_t id, uint32_t lane, Proxy);
void lanes_met(Warp&);
bool is_over(uint32_t id);                    // belongs to an earlier launch, or is 0
std::vector<uint32_t> members(uint32_t set);  // the latest ones first
// comes_before: everything that a number names happens before the next access of the warp; the
// result is cached. first_unordered: the first segment that does not.
bool comes_before(Warp&, uint32_t id, Proxy);
uint32_t first_unordered(Warp&, uint32_t id, Proxy);
// join_readers: members of `before` that are still needed when `reader` joins them. join_writers:
// the same for a strong `writer`: weak writers stay, and strong ones unless it observes what they
// wrote.
uint32_t join_readers(Warp&, uint32_t before, uint32_t reader, Proxy);
uint32_t join_writers(Warp&, uint32_t before, uint32_t writer, Proxy, bool sees);

// Segments of asynchronous operations: wgmma of the warpgroup; a bulk copy that belongs to the bulk
// group `group`, its reads and its writes; one that signals an mbarrier.
uint32_t product_segment(Warp&);
std::pair<uint32_t, uint32_t> group_segments(Warp&, uint32_t group, bool reduces);
uint32_t signal_segment(Warp&, Block& target, uint32_t mbarrier, bool reduces);
// The first `count` cp.async copies of a lane; they have arrived at an mbarrier of its block.
uint32_t copies_segment(Warp&, int lane, uint32_t count);
void copies_arrived(Warp&, int lane, uint32_t count, uint32_t mbarrier);
// The warp has waited: for wgmma groups below `due`; for all bulk groups of lanes except the last
// `keep`, or only for their reads; for cp.async copies that arrived at an mbarrier.
void products_waited(Warp&, uint32_t due);
void groups_waited(Warp&, Mask, uint32_t keep, bool reads_only);
void copies_waited(Warp&);

// Synchronisation. No-ops unless checking.
void barrier_entered(Warp&, uint32_t number);
void barrier_passed(Warp&, uint32_t number);
void barrier_emptied(Block&, uint32_t number);
void cluster_arrived(Warp&, const Instruction&);
void cluster_completed(Cluster&);
void cluster_passed(Warp&);
void mbarrier_arrived(Warp&, const Instruction&, int lane, Block&, uint32_t offset);
void mbarrier_completed(Block&, uint32_t offset);
void mbarrier_passed(Warp&, const Instruction&, Block&, uint32_t offset);
void fence_executed(Warp&, const Instruction&);
void proxy_fence_executed(Warp&, bool shared, bool global);
// A strong, acquiring or releasing access to host addresses; a vector access covers `elements`
// elements of `bytes` bytes.
void strong_accessed(Warp&, const Instruction&, const uint64_t* places, Mask, bool reads,
                     bool writes, int elements, uint32_t bytes);
void flag_acquired(Warp&, const Instruction&, uint64_t place);  // acquire of one element only
void forget_flags(uint64_t place, uint32_t bytes);              // a weak write over flags
// True if the access returns the value that it finds to the program.
bool observes(const Instruction&);

// Narrowest scope that includes both.
uint8_t distance(const Warp&, const Segment&);

// In words: "warp 2", "a bulk copy of warp 0 of block (1, 0, 0)"; the synchronisation that would
// have ordered it before an access of the warp.
std::string name_of(const Warp& reader, const Segment&);
std::string name_of_scope(uint8_t);
std::string remedy(const Warp&, const Segment&, Proxy);

}  // namespace ptxvm
