// Check mode: what happens before what. Every agent of a launch (a warp, or something that works
// beside the warps) has a time; a warp knows of each agent the time up to which its accesses come
// before the warp's next instruction. Releases publish what a warp knows, acquires take it over.
//
// Lanes of a warp are one agent: a fence or an atomic of one lane counts for all of them.
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

// Instruction::order: the scope in the lowest two bits, and what the access or fence is.
constexpr uint8_t kCta = 0, kClusterScope = 1, kGpu = 2, kScopes = 3;  // .sys is .gpu here
constexpr uint8_t kScopeBits = 3, kIsStrong = 4, kAcquires = 8, kReleases = 16, kSequential = 32;
inline uint8_t scope_of(const Instruction& in) { return in.order & kScopeBits; }

// The proxy of an access: generic or, of memory of one kind, the asynchronous one.
enum Proxy : uint8_t { kGeneric, kAsyncShared, kAsyncGlobal };

// Of the agents of one cluster.
struct Known {
  Times seen;  // comes before what the warp does next ...
  // ... with a proxy fence of shared or of global memory between, so before its asynchronous
  // operations there too
  Times proxied[2];
};

// The same of many clusters.
struct Published {
  Far seen, proxied[2];
  bool empty() const { return seen.empty(); }
  bool operator==(const Published&) const = default;
};

// What several releases brought together, in one cluster.
struct Gathered {
  Known near;
  Published far;
  std::array<Published, kScopes> released, read;  // Timeline::met_release, met_read
};

// Accesses of one agent between two of its releases. An asynchronous access belongs to an agent of
// its own, whose time others learn when they wait for it.
struct Segment {
  enum class Kind : uint8_t { warp, bulk, copies, bulk_reads, bulk_writes, products };
  uint32_t cluster, agent, time;
  uint16_t warp;  // that issued it
  uint8_t rank;   // of its block in the cluster
  Kind kind;
  bool strong;
  uint8_t scope;
  bool async() const { return kind != Kind::warp && kind != Kind::copies; }
};

// Segments are numbered through all launches, so that those of earlier ones are known to be over.
// A number with kSet names a set of segments, of those that read or wrote the same bytes.
constexpr uint32_t kSet = 0x80000000u;
constexpr uint32_t kRemembered = 64;

// What a warp knows.
struct Timeline {
  uint32_t cluster = 0, agent = 0;
  Known near;     // near.seen[agent] is its own time
  Published far;  // of other clusters; what it has of its own lies in near too
  // What a strong write publishes, by its scope: what was known at the last fence of that scope.
  std::array<Published, kScopes> fences;
  // What strong reads saw, by the scope of the fence that takes it over.
  std::array<Published, kScopes> pending;
  // The same of fence.sc.cluster and fence.sc.gpu, by this warp and those that it met at barriers
  // since: these fences are in one order, so that the strong access may be that of another warp
  // across the barrier. Of .cta scope the barrier itself orders.
  std::array<Published, kScopes> met_release, met_read;
  // What the warp released at a host address, by scope: a later strong write of its own there goes
  // on with it.
  using Releases = std::array<Published, kScopes>;
  std::unordered_map<uint64_t, Releases> released;
  Published last;  // that was taken over
  // Releases that were seen whose scope, or that of the acquire, was too narrow.
  struct Refused {
    Published what;
    uint8_t has, needs;
  };
  std::vector<Refused> refused;
  // Segments of now, 0 where there is none yet: of weak accesses and, by scope, of strong ones.
  uint32_t weak = 0;
  std::array<uint32_t, kScopes> strong{};
  // Segments and sets that come before the next access of a proxy, and what sets of readers and
  // writers become when a segment joins them (that of a writer that sees them with kSet); by number
  // modulo kRemembered.
  std::array<std::array<uint32_t, kRemembered>, 3> ordered{};
  struct Joined {
    uint32_t set, with, result;
  };
  std::array<Joined, kRemembered> joined{}, joined_writes{};
  // Strong writes that strong reads of the warp saw, by place: they come before its next access
  // there.
  struct Saw {
    uint64_t place;
    uint32_t wrote;
  };
  std::array<Saw, kRemembered> saw{};
  uint32_t bulk_agent = 0;  // of bulk groups: their reads; their writes are the next agent
  // Of wgmma, in the first warp of the warpgroup: the segment of the group that issues.
  uint32_t product_agent = 0, product_segment = 0, product_time = 0;
  // Arrivals that follow copies of cp.async, with the number of the copies before them.
  struct Arrival {
    uint32_t agent, time, copies;
    int lane;
  };
  std::vector<Arrival> arrivals;
  // Registers, where a kernel has wgmma (definedness.cpp), by unit of the register file: the number
  // of wgmma.fence executed before anything but wgmma wrote it (from 1 on), and the group from 1 on
  // of the last wgmma that uses it.
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

// The mbarrier at a place: knowledge of its arrivals, of threads of its block and of others.
struct Signal {
  uint32_t agent = 0;   // copies that signal it
  uint32_t phases = 0;  // completed
  std::array<Gathered, 2> gathering, complete;
  std::vector<Timeline::Refused> refused;
};

// Of a cluster; of a launch.
struct ClusterClocks {
  uint32_t agents = 0;
  Gathered gathering, complete;  // barrier.cluster
};
void clocks_launched(const uint32_t grid[3], const uint32_t cluster[3]);
void start_timelines(Block&);

// Segments of a warp's accesses: weak, or strong of a scope.
uint32_t segment_of(Warp&);
uint32_t strong_segment_of(Warp&, uint8_t scope);
const Segment& segment(uint32_t id);
bool are_same(uint32_t id, uint32_t other);  // of one agent at one time
bool is_over(uint32_t id);                   // of an earlier launch, or 0
const std::vector<uint32_t>& members(uint32_t set);
// Whether all that a number names comes before the next access of the warp; remembers it. The
// first segment that does not.
bool comes_before(Warp&, uint32_t id, Proxy);
uint32_t first_unordered(Warp&, uint32_t id, Proxy);
// Readers of `before` that are still needed when `reader` joins them. Writers of `before` when the
// strong `writer` joins them: weak ones, and strong ones unless it sees what they wrote.
uint32_t join_readers(Warp&, uint32_t before, uint32_t reader, Proxy);
uint32_t join_writers(Warp&, uint32_t before, uint32_t writer, Proxy, bool sees);

// Segments of operations beside the warp: wgmma of its warpgroup; a bulk copy that belongs to the
// bulk group `group`, its reads and its writes; one that signals an mbarrier.
uint32_t product_segment(Warp&);
std::pair<uint32_t, uint32_t> group_segments(Warp&, uint32_t group, bool reduces);
uint32_t signal_segment(Warp&, Block& target, uint32_t mbarrier, Segment::Kind, bool reduces);
// The warp has waited for them: products of groups below `due`; all bulk groups of lanes but the
// last `keep`, or only their reads; copies of cp.async that arrived at an mbarrier.
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
// An access to host addresses that acquires, releases or is strong; of vectors, to so many elements
// of so many bytes.
void strong_accessed(Warp&, const Instruction&, const uint64_t* places, Mask, bool reads,
                     bool writes, int elements, uint32_t bytes);
void flag_acquired(Warp&, const Instruction&, uint64_t place);  // the acquire of one of them alone
void forget_flags(uint64_t place, uint32_t bytes);              // a weak write over them
// Whether a strong access gives the program the value that it finds.
bool observes(const Instruction&);

// The scope that holds both.
uint8_t distance(const Warp&, const Segment&);

// In words: "warp 2", "a bulk copy of warp 0 of block (1, 0, 0)"; what would have ordered it before
// an access of the warp.
std::string name_of(const Warp& reader, const Segment&);
std::string name_of_scope(uint8_t);
std::string remedy(const Warp&, const Segment&, Proxy);

}  // namespace ptxvm
