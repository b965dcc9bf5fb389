// Publishing and acquiring knowledge: barriers, mbarriers, fences, strong accesses.
#include <algorithm>

#include "ptxvm/async.h"
#include "ptxvm/knowledge.h"
#include "ptxvm/shadow.h"

namespace ptxvm {
namespace {

// A memory location that strong accesses touch: the releases that a read of its value acquires.
struct Flag {
  struct Release {
    uint8_t scope;
    uint32_t cluster;
    uint8_t rank;
    bool several;  // released by several blocks
    Published what;
  };
  // wide: the index of a release of .gpu scope. narrow: releases of narrower scopes, which order
  // only the blocks of their own cluster.
  std::vector<Release> releases;
  uint32_t wide = kNone;
  std::unordered_map<uint32_t, std::vector<uint32_t>> narrow;  // by cluster

  static constexpr uint32_t kNone = UINT32_MAX;
  static constexpr size_t kLatest = 16;  // limit of releases that order nothing, kept for reports
};

std::unordered_map<uint64_t, Flag> shared_flags, global_flags;  // by host address

bool is_shared(const Warp& warp, uint64_t place) {
  for (const Block* block : warp.block->cluster->blocks)
    if (place - reinterpret_cast<uint64_t>(block->shared) < block->shared_bytes) return true;
  return false;
}

}  // namespace

void forget_flags() {
  shared_flags.clear();
  global_flags.clear();
}

void forget_flags(const Block& block) {
  if (shared_flags.empty()) return;
  std::erase_if(shared_flags, [&](const auto& entry) {
    return entry.first - reinterpret_cast<uint64_t>(block.shared) < block.shared_bytes;
  });
}

void barrier_entered(Warp& warp, uint32_t number) {
  if (!warp.timeline) return;
  lanes_met(warp);
  gather(warp.block->shadow->barriers[number], *warp.timeline);
  tick(*warp.timeline);
}

void barrier_passed(Warp& warp, uint32_t number) {
  if (warp.timeline) take(*warp.timeline, warp.block->shadow->barriers[number]);
}

void barrier_emptied(Block& block, uint32_t number) {
  if (block.shadow) block.shadow->barriers[number] = {};
}

void cluster_arrived(Warp& warp, const Instruction& in) {
  if (!warp.timeline) return;
  Timeline& t = *warp.timeline;
  lanes_met(warp);
  Gathered& gathered = warp.block->cluster->clocks->gathering;
  if (in.order & kReleases) {
    gather(gathered, t);
    tick(t);
  } else {
    take(t.cluster, gathered.near, gathered.far, t.fences[kClusterScope]);
  }
}

void cluster_completed(Cluster& cluster) {
  if (!cluster.clocks) return;
  cluster.clocks->complete = std::move(cluster.clocks->gathering);
  cluster.clocks->gathering = {};
}

void cluster_passed(Warp& warp) {
  if (warp.timeline) take(*warp.timeline, warp.block->cluster->clocks->complete);
}

void mbarrier_arrived(Warp& warp, const Instruction& in, int lane, Block& block, uint32_t offset) {
  if (!warp.timeline || !block.shadow) return;
  Timeline& t = *warp.timeline;
  Signal& signal = block.shadow->signals[offset];
  const bool remote = &block != warp.block;
  Gathered& gathered = signal.gathering[remote];
  const uint8_t scope = scope_of(in);
  if (in.order & kReleases) {
    release_part(t);
    if (remote && scope < kClusterScope) {
      refuse(signal.refused, publish(t), scope, kClusterScope);
    } else {
      gather(gathered, t);
      if (remote) reached(warp, in, lane, block);
    }
    tick(t);
  } else {
    take(t.cluster, gathered.near, gathered.far, t.fences[remote ? kClusterScope : kCta]);
  }
}

void mbarrier_completed(Block& block, uint32_t offset) {
  if (!block.shadow) return;
  Signal& signal = block.shadow->signals[offset];
  signal.complete = std::move(signal.gathering);
  signal.gathering = {};
  ++signal.phases;
  if (signal.agent) raise(signal.complete[0].near.seen, signal.agent, signal.phases);
  raise(signal.copies_complete, signal.copies_gathering);
  signal.copies_gathering.clear();
}

void mbarrier_passed(Warp& warp, const Instruction& in, Block& block, uint32_t offset) {
  if (!warp.timeline || !block.shadow) return;
  Timeline& t = *warp.timeline;
  Signal& signal = block.shadow->signals[offset];
  for (const auto& refused : signal.refused)
    refuse(t.refused, refused.what, refused.has, refused.needs);
  for (const uint8_t remote : {0, 1}) {
    const Gathered& what = signal.complete[remote];
    if (!(in.order & kAcquires)) {
      const Published later = publish(t.cluster, what.near, what.far);
      for (uint8_t scope = remote; scope < kScopes; ++scope)
        t.pending[scope] = merge(t.pending[scope], later);
    } else if (remote <= scope_of(in)) {
      take(t, what);
    } else if (!what.near.seen.empty()) {
      refuse(t.refused, publish(t.cluster, what.near, what.far), scope_of(in), kClusterScope);
    }
  }
  // Copied bytes are visible to all warps that observe the phase.
  if (signal.agent) raise(t.near.seen, signal.agent, signal.phases);
  if (!signal.copies_complete.empty()) raise(t.near.seen, signal.copies_complete);
}

void fence_executed(Warp& warp, const Instruction& in) {
  if (!warp.timeline) return;
  Timeline& t = *warp.timeline;
  const uint8_t scope = scope_of(in);
  if (in.order & kAcquires) {
    const Published wider = t.pending[kGpu];
    take(t, t.pending[scope]);
    if (!wider.empty() && wider != t.pending[scope]) refuse(t.refused, wider, scope, kGpu);
    if (in.order & kSequential) {
      take(t, t.met_read[scope]);
      for (uint8_t s = 0; s <= scope; ++s) t.met_read[s] = {};
    }
    for (uint8_t s = 0; s <= scope; ++s) t.pending[s] = {};
  }
  if (in.order & kReleases) {
    release_part(t);
    const Published now = publish(t);
    for (uint8_t s = 0; s <= scope; ++s) t.fences[s] = now;
    if (in.order & kSequential)
      for (uint8_t s = kClusterScope; s <= scope; ++s) t.met_release[s] = now;
    tick(t);
  }
}

void proxy_fence_executed(Warp& warp, bool shared, bool global) {
  if (!warp.timeline) return;
  Timeline& t = *warp.timeline;
  for (int i = 0; i < 2; ++i) {
    if (!(i == 0 ? shared : global)) continue;
    t.near.proxied[i] = t.near.seen;
    t.far.proxied[i] = t.far.seen;
  }
  tick(t);
}

namespace {

void see_release(Warp& warp, const Instruction& in, const Flag::Release& release) {
  Timeline& t = *warp.timeline;
  const uint8_t scope = scope_of(in);
  const bool acquires = in.order & kAcquires;
  const uint8_t needs = release.several ? kGpu : distance(warp, release.cluster, release.rank);
  if (release.scope < needs || (acquires && scope < needs)) {
    refuse(t.refused, release.what, std::min(release.scope, acquires ? scope : kGpu), needs);
  } else if (acquires) {
    take(t, release.what);
  } else {
    for (uint8_t s = 0; s < kScopes; ++s)
      if (std::min(s, scope) >= needs) t.pending[s] = merge(t.pending[s], release.what);
  }
}

void read_flag(Warp& warp, const Instruction& in, const Flag& flag) {
  const size_t count = flag.releases.size();
  const size_t latest = count - std::min(count, Flag::kLatest);
  if (latest > 0) {
    if (flag.wide < latest) see_release(warp, in, flag.releases[flag.wide]);
    if (const auto own = flag.narrow.find(warp.timeline->cluster); own != flag.narrow.end())
      for (const uint32_t position : own->second)
        if (position < latest) see_release(warp, in, flag.releases[position]);
  }
  for (size_t i = latest; i < count; ++i) see_release(warp, in, flag.releases[i]);
}

void write_flag(Warp& warp, Flag& flag, uint8_t scope, const Published& what) {
  if (what.empty()) return;
  const Timeline& t = *warp.timeline;
  const auto rank = static_cast<uint8_t>(warp.block->rank);
  const auto next = static_cast<uint32_t>(flag.releases.size());
  const auto join = [&](Flag::Release& release) {
    release.several = release.several || release.cluster != t.cluster || release.rank != rank;
    release.what = merge(release.what, what);
  };
  if (scope == kGpu) {
    if (flag.wide != Flag::kNone) return join(flag.releases[flag.wide]);
    flag.wide = next;
  } else {
    auto& own = flag.narrow[t.cluster];
    for (const uint32_t position : own) {
      Flag::Release& release = flag.releases[position];
      if (release.scope == scope && release.rank == rank) return join(release);
    }
    own.push_back(next);
  }
  flag.releases.push_back({scope, t.cluster, rank, false, what});
}

void access_flags(Warp& warp, const Instruction& in, const uint64_t* places, Mask mask, bool reads,
                  bool writes) {
  Timeline& t = *warp.timeline;
  const uint8_t scope = scope_of(in);
  const bool releases = writes && in.order & kReleases;
  const bool publishes =
      writes && (releases || !t.fences[kCta].empty() || !t.met_release[kClusterScope].empty());
  if (!publishes && t.released.empty() && global_flags.empty() && shared_flags.empty()) return;
  const bool shared = is_shared(warp, places[__builtin_ctz(mask)]);
  auto& flags = shared ? shared_flags : global_flags;
  const bool sees = reads && observes(in);
  Published own;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const uint64_t place = places[__builtin_ctz(rest)];
    const auto found = flags.find(place);
    if (sees && found != flags.end()) read_flag(warp, in, found->second);
    if (!writes) continue;
    const auto earlier = t.released.find(place);
    const bool goes_on = earlier != t.released.end();
    if (!publishes && !goes_on && (reads || found == flags.end())) continue;
    Flag& flag = found != flags.end() ? found->second : flags[place];
    if (!reads) flag = {};
    if (releases) {
      if (own.empty()) own = publish(t);
      write_flag(warp, flag, scope, own);
      Timeline::Releases& all = t.released[place];
      std::fill_n(all.begin(), scope + 1, Published{});
      all[scope] = own;
    } else {
      if (goes_on)
        for (uint8_t s = 0; s < kScopes; ++s)
          write_flag(warp, flag, std::min(s, scope), earlier->second[s]);
      for (uint8_t s = 0; s <= scope; ++s)
        if (s == scope || t.fences[s] != t.fences[s + 1]) write_flag(warp, flag, s, t.fences[s]);
      for (uint8_t s = kClusterScope; s <= scope; ++s)
        if (s == scope || t.met_release[s] != t.met_release[s + 1])
          write_flag(warp, flag, s, t.met_release[s]);
    }
  }
  if (!releases) return;
  release_part(t);
  tick(t);
}

}  // namespace

void strong_accessed(Warp& warp, const Instruction& in, const uint64_t* places, Mask mask,
                     bool reads, bool writes, int elements, uint32_t bytes) {
  if (!warp.timeline) return;
  access_flags(warp, in, places, mask, reads, writes);
  for (int i = 1; i < elements; ++i) {
    uint64_t at[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) at[lane] = places[lane] + i * bytes;
    access_flags(warp, in, at, mask, reads, writes);
  }
}

void flag_acquired(Warp& warp, const Instruction& in, uint64_t place) {
  auto& flags = is_shared(warp, place) ? shared_flags : global_flags;
  const auto found = flags.find(place);
  if (found != flags.end() && observes(in)) read_flag(warp, in, found->second);
}

bool observes(const Instruction& in) { return in.writes > 0; }

void forget_flags(uint64_t place, uint32_t bytes) {
  for (uint64_t end = place + bytes; place < end; ++place) {
    shared_flags.erase(place);
    global_flags.erase(place);
  }
}

}  // namespace ptxvm
