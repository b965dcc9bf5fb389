#include "ptxvm/clocks.h"

#include <algorithm>
#include <map>

#include "ptxvm/async.h"
#include "ptxvm/knowledge.h"
#include "ptxvm/shadow.h"

namespace ptxvm {
namespace {

constexpr size_t kMostLatest = 12;  // readers of a set that are pruned at each join
constexpr size_t kMostWriters = 5;  // maximum size of a set of writers: the latest are kept
constexpr uint32_t kLastNumber = 1u << 30;
const char* const kNoNumbers = "check=1: too many accesses between barriers in one launch";

// State of the launch.
uint32_t first_segment = 1, first_set = 1;
std::vector<Segment> segments;
// Sets share their older members, lists in `chains`: a cell that n warps read takes O(n).
struct Chain {
  uint32_t member, next;  // next: its position + 1, or 0
  auto operator<=>(const Chain&) const = default;
};
struct Set {
  std::vector<uint32_t> latest;
  uint32_t older;  // as Chain::next
  auto operator<=>(const Set&) const = default;
};
std::vector<Set> sets;
std::vector<Chain> chains;
std::map<Set, uint32_t> numbers;  // numbers of sets
std::map<Chain, uint32_t> chain_numbers;
uint32_t clusters[2], shape[3];  // clusters of the grid in x, y; cluster shape

uint32_t new_segment(const Warp& warp, uint32_t agent, uint32_t time, Segment::Kind kind,
                     bool strong, uint8_t scope) {
  if (segments.size() >= kLastNumber) throw Fault(kNoNumbers);
  segments.push_back({warp.timeline->cluster, agent, time, static_cast<uint16_t>(warp.index),
                      static_cast<uint8_t>(warp.block->rank), kind, strong, scope, 0, 0});
  return first_segment + static_cast<uint32_t>(segments.size()) - 1;
}

uint32_t new_agent(const Warp& warp) { return warp.block->cluster->clocks->agents++; }

bool comes_before(const Timeline& t, const Segment& s, Proxy proxy) {
  // The completion of a bulk operation is a proxy fence to the generic proxy only: in global memory
  // the asynchronous operations of another block need one to theirs.
  const bool of_own_block = s.cluster == t.cluster && s.rank == t.rank;
  const bool same_proxy = s.async() && (proxy == kAsyncShared || of_own_block);
  const int crossed = proxy != kGeneric && !same_proxy ? proxy - 1 : -1;
  const Times* known = crossed < 0 ? &t.near.seen : &t.near.proxied[crossed];
  if (s.cluster != t.cluster)
    known = (crossed < 0 ? t.far.seen : t.far.proxied[crossed]).find(s.cluster);
  const bool is_own = s.cluster == t.cluster && s.agent == t.agent;
  return known && at(*known, s.agent) >= (s.full && !is_own ? s.full : s.time);
}

}  // namespace

void clocks_launched(const uint32_t grid[3], const uint32_t cluster[3]) {
  first_segment += static_cast<uint32_t>(segments.size());
  first_set += static_cast<uint32_t>(sets.size());
  if (first_segment > kLastNumber || first_set > kLastNumber) {
    first_segment = first_set = 1;
    forget_global_shadow();
  }
  shadow_launched();
  segments.clear();
  sets.clear();
  numbers.clear();
  chains.clear();
  chain_numbers.clear();
  forget_flags();
  for (int i = 0; i < 3; ++i) {
    shape[i] = std::max(cluster[i], 1u);
    if (i < 2) clusters[i] = grid[i] / shape[i];
  }
  set_clusters(uint64_t{clusters[0]} * clusters[1] * (grid[2] / shape[2]));
}

void start_timelines(Block& block) {
  Cluster& cluster = *block.cluster;
  const auto warps = static_cast<uint32_t>(block.warps.size());
  if (!cluster.clocks) cluster.clocks = std::make_shared<ClusterClocks>();
  if (block.rank == 0) {
    *cluster.clocks = {};
    const uint32_t blocks = cluster.shape[0] * cluster.shape[1] * cluster.shape[2];
    cluster.clocks->agents = blocks * warps;
  }
  forget_flags(block);
  for (Warp& warp : block.warps) {
    if (!warp.timeline) warp.timeline = std::make_shared<Timeline>();
    Timeline& t = *warp.timeline;
    t = {};
    t.cluster = cluster.number;
    t.rank = static_cast<uint8_t>(block.rank);
    t.agent = block.rank * warps + warp.index;
    t.near.seen.assign(cluster.clocks->agents, 0);
    t.near.seen[t.agent] = 1;
  }
}

uint32_t segment_of(Warp& warp) {
  Timeline& t = *warp.timeline;
  if (t.parts) {
    tick(t);
    t.parts = false;
  }
  if (!t.weak) {
    t.weak = new_segment(warp, t.agent, t.near.seen[t.agent], Segment::Kind::warp, false, 0);
    t.ordered[kGeneric][t.weak % kRemembered] = t.weak;
  }
  return t.weak;
}

uint32_t strong_segment_of(Warp& warp, uint8_t scope) {
  Timeline& t = *warp.timeline;
  uint32_t& id = t.strong[scope];
  if (!id) {
    id = new_segment(warp, t.agent, t.near.seen[t.agent], Segment::Kind::warp, true, scope);
    t.ordered[kGeneric][id % kRemembered] = id;
  }
  return id;
}

const Segment& segment(uint32_t id) { return segments[id - first_segment]; }

bool are_same(uint32_t id, uint32_t other) {
  const Segment &a = segment(id), &b = segment(other);
  return a.cluster == b.cluster && a.agent == b.agent && a.time == b.time;
}

bool is_covered(const Warp& warp, uint32_t id, uint32_t lane, Proxy proxy) {
  Segment s = segment(id);
  if (!s.full || lane == kSeveralLanes) return false;
  s.full = 0;
  return comes_before(*warp.timeline, s, proxy) && (lane == kUnknownLane || s.covered >> lane & 1);
}

void release_part(Timeline& t) {
  if (t.weak && t.touched & ~t.acting && !segments[t.weak - first_segment].full) {
    segments[t.weak - first_segment].full = UINT32_MAX;
    t.partial.push_back(t.weak);
  }
  for (const uint32_t id : t.partial) segments[id - first_segment].covered |= t.acting;
}

void lanes_met(Warp& warp) {
  Timeline& t = *warp.timeline;
  t.parts = t.parts || t.touched;
  t.touched = 0;
  if (t.partial.empty()) return;
  tick(t);
  for (const uint32_t id : t.partial) segments[id - first_segment].full = t.near.seen[t.agent];
  t.partial.clear();
}

bool is_over(uint32_t id) { return id & kSet ? (id & ~kSet) < first_set : id < first_segment; }

namespace {

const Set& set_of(uint32_t number) { return sets[(number & ~kSet) - first_set]; }

}  // namespace

std::vector<uint32_t> members(uint32_t set) {
  const Set& all = set_of(set);
  std::vector<uint32_t> found = all.latest;
  for (uint32_t at = all.older; at; at = chains[at - 1].next)
    found.push_back(chains[at - 1].member);
  return found;
}

uint32_t first_unordered(Warp& warp, uint32_t id, Proxy proxy) {
  if (is_over(id)) return 0;
  const Timeline& t = *warp.timeline;
  if (!(id & kSet)) return comes_before(t, segment(id), proxy) ? 0 : id;
  const Set& all = set_of(id);
  for (const uint32_t member : all.latest)
    if (!comes_before(t, segment(member), proxy)) return member;
  for (uint32_t at = all.older; at; at = chains[at - 1].next)
    if (!comes_before(t, segment(chains[at - 1].member), proxy)) return chains[at - 1].member;
  return 0;
}

bool comes_before(Warp& warp, uint32_t id, Proxy proxy) {
  if (first_unordered(warp, id, proxy)) return false;
  warp.timeline->ordered[proxy][id % kRemembered] = id;
  return true;
}

namespace {

// Number of the set of `kept`, `older` and `id`.
uint32_t number_of(std::vector<uint32_t>& kept, uint32_t id, uint32_t older = 0) {
  if (kept.empty() && !older) return id;
  kept.insert(std::upper_bound(kept.begin(), kept.end(), id), id);
  const auto next = first_set + static_cast<uint32_t>(sets.size());
  const auto [entry, is_new] = numbers.try_emplace(Set{std::move(kept), older}, next | kSet);
  if (is_new) {
    if (sets.size() >= kLastNumber) throw Fault(kNoNumbers);
    sets.push_back(entry->first);
  }
  return entry->second;
}

// The list `next` with one more member.
uint32_t chained(uint32_t member, uint32_t next) {
  const auto [entry, is_new] =
      chain_numbers.try_emplace({member, next}, static_cast<uint32_t>(chains.size()) + 1);
  if (is_new) chains.push_back(entry->first);
  return entry->second;
}

// The older members of a set, or none if all of them happen before the warp's next access.
uint32_t older_needed(const Timeline& t, uint32_t before, Proxy proxy) {
  if (!(before & kSet) || is_over(before)) return 0;
  const uint32_t older = set_of(before).older;
  for (uint32_t at = older; at; at = chains[at - 1].next)
    if (!comes_before(t, segment(chains[at - 1].member), proxy)) return older;
  return 0;
}

// Members of `before` that the predicate keeps and that `own` does not supersede.
template <typename Keeps>
std::vector<uint32_t> those_kept(uint32_t before, const Segment& own, Keeps keeps) {
  std::vector<uint32_t> kept;
  const auto keep = [&](uint32_t id) {
    const Segment& s = segment(id);
    const bool superseded = s.cluster == own.cluster && s.agent == own.agent &&
                            s.strong == own.strong && s.time <= own.time;
    if (!superseded && keeps(s)) kept.push_back(id);
  };
  if (is_over(before)) return kept;
  if (before & kSet)
    for (const uint32_t id : set_of(before).latest) keep(id);
  else
    keep(before);
  return kept;
}

}  // namespace

uint32_t join_readers(Warp& warp, uint32_t before, uint32_t reader, Proxy proxy) {
  Timeline::Joined& known = warp.timeline->joined[before % kRemembered];
  if (known.set == before && known.with == reader) return known.result;
  std::vector<uint32_t> kept = those_kept(before, segment(reader), [&](const Segment& s) {
    return !comes_before(*warp.timeline, s, proxy);
  });
  uint32_t older = older_needed(*warp.timeline, before, proxy);
  if (kept.size() >= kMostLatest) {
    older = chained(kept.front(), older);
    kept.erase(kept.begin());
  }
  known = {before, reader, number_of(kept, reader, older)};
  return known.result;
}

uint32_t join_writers(Warp& warp, uint32_t before, uint32_t writer, Proxy proxy, bool sees) {
  const uint32_t with = writer | (sees ? kSet : 0);
  Timeline::Joined& known = warp.timeline->joined_writes[before % kRemembered];
  if (known.set == before && known.with == with) return known.result;
  std::vector<uint32_t> kept = those_kept(before, segment(writer), [&](const Segment& s) {
    return !s.strong || !(sees || comes_before(*warp.timeline, s, proxy));
  });
  // Several members are weak only if they stored the same.
  if (kept.size() >= kMostWriters) {
    const auto strong =
        std::find_if(kept.begin(), kept.end(), [](uint32_t id) { return segment(id).strong; });
    kept.erase(strong == kept.end() ? kept.begin() : strong);
  }
  known = {before, with, number_of(kept, writer)};
  return known.result;
}

uint32_t product_segment(Warp& warp) {
  // The four warps of a warpgroup count as one reader.
  const Warp& first = warp.block->warps[warp.index / 4 * 4];
  Timeline& lead = *first.timeline;
  const uint32_t time = warp.product_groups + 1;
  if (!lead.product_agent) lead.product_agent = new_agent(warp);
  if (!lead.product_segment || lead.product_time != time) {
    lead.product_time = time;
    lead.product_segment =
        new_segment(first, lead.product_agent, time, Segment::Kind::products, false, 0);
  }
  return lead.product_segment;
}

void products_waited(Warp& warp, uint32_t due) {
  if (!warp.timeline) return;
  const Timeline& lead = *warp.block->warps[warp.index / 4 * 4].timeline;
  if (lead.product_agent) raise(warp.timeline->near.seen, lead.product_agent, due);
}

std::pair<uint32_t, uint32_t> group_segments(Warp& warp, uint32_t group, bool reduces) {
  uint32_t& agent = warp.timeline->bulk_agent;
  if (!agent) {
    agent = new_agent(warp);
    new_agent(warp);
  }
  const uint32_t time = group + 1;
  return {new_segment(warp, agent, time, Segment::Kind::bulk_reads, false, 0),
          new_segment(warp, agent + 1, time, Segment::Kind::bulk_writes, reduces, kGpu)};
}

void groups_waited(Warp& warp, Mask mask, uint32_t keep, bool reads_only) {
  if (!warp.timeline || !warp.timeline->bulk_agent) return;
  const uint32_t agent = warp.timeline->bulk_agent;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const uint32_t groups = warp.bulk_groups[__builtin_ctz(rest)];
    if (groups <= keep) continue;
    raise(warp.timeline->near.seen, agent, groups - keep);
    if (!reads_only) raise(warp.timeline->near.seen, agent + 1, groups - keep);
  }
}

uint32_t signal_segment(Warp& warp, Block& target, uint32_t mbarrier, bool reduces) {
  Signal& signal = target.shadow->signals[mbarrier];
  if (!signal.agent) signal.agent = new_agent(warp);
  return new_segment(warp, signal.agent, signal.phases + 1, Segment::Kind::bulk, reduces,
                     kClusterScope);
}

namespace {

uint32_t copy_agent(Warp& warp, int lane) {
  auto& agents = warp.timeline->copy_agents;
  if (agents.empty())
    for (int i = 0; i < kLanes; ++i) agents.push_back(new_agent(warp));
  return agents[static_cast<size_t>(lane)];
}

}  // namespace

uint32_t copies_segment(Warp& warp, int lane, uint32_t count) {
  return new_segment(warp, copy_agent(warp, lane), count, Segment::Kind::copies, false,
                     kClusterScope);
}

void copies_arrived(Warp& warp, int lane, uint32_t count, uint32_t mbarrier) {
  if (!warp.block->shadow) return;
  const uint32_t agent = copy_agent(warp, lane);
  raise(warp.block->shadow->signals[mbarrier].copies_gathering, agent, count);
  warp.timeline->arrivals.push_back({agent, count, count, lane});
}

void copies_waited(Warp& warp) {
  if (!warp.timeline) return;
  std::erase_if(warp.timeline->arrivals, [&](const Timeline::Arrival& arrival) {
    const bool waits = std::any_of(warp.copies.begin(), warp.copies.end(), [&](const auto& copy) {
      return copy.lane == arrival.lane && static_cast<int32_t>(copy.number - arrival.copies) < 0;
    });
    if (!waits) raise(warp.timeline->near.seen, arrival.agent, arrival.time);
    return !waits;
  });
}

uint8_t distance(const Warp& warp, uint32_t cluster, uint8_t rank) {
  if (cluster != warp.timeline->cluster) return kGpu;
  return rank == warp.block->rank ? kCta : kClusterScope;
}
uint8_t distance(const Warp& warp, const Segment& s) { return distance(warp, s.cluster, s.rank); }

std::string name_of_scope(uint8_t scope) {
  static const char* const kNames[] = {".cta", ".cluster", ".gpu"};
  return kNames[scope];
}

std::string name_of(const Warp& reader, const Segment& s) {
  static const char* const kBefore[] = {"",
                                        "a bulk copy of ",
                                        "cp.async of ",
                                        "a bulk copy of ",
                                        "a bulk copy of ",
                                        "wgmma of the warpgroup of "};
  std::string text = kBefore[static_cast<int>(s.kind)] + ("warp " + std::to_string(s.warp));
  if (distance(reader, s.cluster, s.rank) == kCta) return text;
  const uint32_t x = s.cluster % clusters[0] * shape[0] + s.rank % shape[0];
  const uint32_t y =
      s.cluster / clusters[0] % clusters[1] * shape[1] + s.rank / shape[0] % shape[1];
  const uint32_t z =
      s.cluster / clusters[0] / clusters[1] * shape[2] + s.rank / shape[0] / shape[1];
  return text + " of block (" + std::to_string(x) + ", " + std::to_string(y) + ", " +
         std::to_string(z) + ")";
}

std::string remedy(const Warp& warp, const Segment& s, Proxy proxy) {
  const Timeline& t = *warp.timeline;
  for (const Timeline::Refused& refused : t.refused)
    if (holds(refused.what, s))
      return "a release and acquire of " + name_of_scope(refused.has) +
             " scope does not order them: " + name_of_scope(refused.needs) + " is needed";
  if (proxy != kGeneric && comes_before(t, s, kGeneric)) {
    const bool other = comes_before(t, s, proxy == kAsyncShared ? kAsyncGlobal : kAsyncShared);
    return other ? "fence.proxy.async between them is not of this memory"
                 : "fence.proxy.async is missing between them";
  }
  switch (s.kind) {
    case Segment::Kind::bulk:
    case Segment::Kind::copies:
      return "no wait for the mbarrier that it signals lies between them";
    case Segment::Kind::bulk_reads:
      return "no cp.async.bulk.wait_group.read, and a barrier after it, lies between them";
    case Segment::Kind::bulk_writes:
      return "no cp.async.bulk.wait_group, and a barrier after it, lies between them";
    case Segment::Kind::products:
      return "no wgmma.wait_group, and a barrier after it, lies between them";
    default:
      break;
  }
  switch (distance(warp, s.cluster, s.rank)) {
    case kCta:
      return "no barrier, mbarrier, or release and acquire lies between them";
    case kClusterScope:
      return "no barrier.cluster, mbarrier, or release and acquire of .cluster scope lies between "
             "them";
    default:
      return "no release and acquire of .gpu scope lies between them";
  }
}

}  // namespace ptxvm
