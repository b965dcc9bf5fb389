#include "ptxvm/knowledge.h"

#include <algorithm>

namespace ptxvm {

namespace {

constexpr size_t kMostRefused = 8;

}  // namespace

void raise(Known& known, const Known& other) {
  raise(known.seen, other.seen);
  for (int i = 0; i < 2; ++i) raise(known.proxied[i], other.proxied[i]);
}

Published merge(const Published& a, const Published& b) {
  Published both{merge(a.seen, b.seen), {}};
  for (int i = 0; i < 2; ++i) {
    const bool alike = a.seen == a.proxied[i] && b.seen == b.proxied[i];
    both.proxied[i] = alike ? both.seen : merge(a.proxied[i], b.proxied[i]);
  }
  return both;
}

Published publish(uint32_t cluster, const Known& near, const Published& far) {
  Published all = far;
  if (!near.seen.empty()) all.seen = far.seen.with(cluster, near.seen);
  for (int i = 0; i < 2; ++i)
    if (!near.proxied[i].empty()) all.proxied[i] = far.proxied[i].with(cluster, near.proxied[i]);
  return all;
}

Published publish(const Timeline& t) { return publish(t.cluster, t.near, t.far); }

void take(uint32_t cluster, Known& near, Published& far, const Published& what) {
  if (const Times* own = what.seen.find(cluster)) raise(near.seen, *own);
  for (int i = 0; i < 2; ++i)
    if (const Times* own = what.proxied[i].find(cluster)) raise(near.proxied[i], *own);
  far = merge(far, what);
}

void take(Timeline& t, const Published& what) {
  if (what.empty() || what == t.last) return;
  take(t.cluster, t.near, t.far, what);
  t.last = what;
}

void take(Timeline& t, const Gathered& what) {
  raise(t.near, what.near);
  t.far = merge(t.far, what.far);
  for (uint8_t s = kClusterScope; s < kScopes; ++s) {
    t.met_release[s] = merge(t.met_release[s], what.released[s]);
    t.met_read[s] = merge(t.met_read[s], what.read[s]);
  }
}

void gather(Gathered& gathered, const Timeline& t) {
  raise(gathered.near, t.near);
  gathered.far = merge(gathered.far, t.far);
  for (uint8_t s = kClusterScope; s < kScopes; ++s) {
    gathered.released[s] = merge(gathered.released[s], t.met_release[s]);
    gathered.read[s] = merge(merge(gathered.read[s], t.met_read[s]), t.pending[s]);
  }
}

void tick(Timeline& t) {
  ++t.near.seen[t.agent];
  t.weak = 0;
  t.strong = {};
}

void refuse(std::vector<Timeline::Refused>& list, const Published& what, uint8_t has,
            uint8_t needs) {
  for (const auto& known : list)
    if (known.what == what) return;
  if (list.size() == kMostRefused) list.erase(list.begin());
  list.push_back({what, has, needs});
}

bool holds(const Published& what, const Segment& s) {
  const Times* known = what.seen.find(s.cluster);
  return known && at(*known, s.agent) >= s.time;
}

}  // namespace ptxvm
