#include "ptxvm/knowledge.h"

#include <algorithm>

namespace ptxvm {

uint32_t at(const Times& times, uint32_t agent) { return agent < times.size() ? times[agent] : 0; }

namespace {

constexpr size_t kMostRefused = 8;

void raise(Times& times, const Times& others) {
  if (times.size() < others.size()) times.resize(others.size());
  for (size_t i = 0; i < others.size(); ++i) times[i] = std::max(times[i], others[i]);
}

void raise(Known& known, const Known& other) {
  raise(known.seen, other.seen);
  for (int i = 0; i < 2; ++i) raise(known.proxied[i], other.proxied[i]);
}

bool covers(const Times& times, const Times& others) {
  for (uint32_t i = 0; i < others.size(); ++i)
    if (at(times, i) < others[i]) return false;
  return true;
}

bool covers(const Known& known, const Known& other) {
  return covers(known.seen, other.seen) && covers(known.proxied[0], other.proxied[0]) &&
         covers(known.proxied[1], other.proxied[1]);
}

}  // namespace

void raise(Times& times, uint32_t agent, uint32_t time) {
  if (times.size() <= agent) times.resize(agent + 1);
  times[agent] = std::max(times[agent], time);
}

Published merge(const Published& a, const Published& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  auto merged = std::make_shared<Far>();
  merged->reserve(a->size() + b->size());
  bool is_a = true, is_b = true;
  auto i = a->begin();
  auto j = b->begin();
  while (i != a->end() || j != b->end()) {
    if (j == b->end() || (i != a->end() && i->first < j->first)) {
      merged->push_back(*i++);
      is_b = false;
    } else if (i == a->end() || j->first < i->first) {
      merged->push_back(*j++);
      is_a = false;
    } else {
      if (i->second == j->second || covers(*i->second, *j->second)) {
        is_b = is_b && i->second == j->second;
        merged->push_back(*i);
      } else if (covers(*j->second, *i->second)) {
        is_a = false;
        merged->push_back(*j);
      } else {
        auto both = std::make_shared<Known>(*i->second);
        raise(*both, *j->second);
        merged->push_back({i->first, both});
        is_a = is_b = false;
      }
      ++i;
      ++j;
    }
  }
  return is_a ? a : is_b ? b : merged;
}

Published publish(uint32_t cluster, const Known& near, const Published& far) {
  auto all = far ? std::make_shared<Far>(*far) : std::make_shared<Far>();
  const auto place = std::lower_bound(all->begin(), all->end(), cluster,
                                      [](const auto& e, uint32_t c) { return e.first < c; });
  all->insert(place, {cluster, std::make_shared<const Known>(near)});
  return all;
}

Published publish(const Timeline& t) { return publish(t.cluster, t.near, t.far); }

// What is published into knowledge of one's own cluster and of others.
void take(uint32_t cluster, Known& near, Published& far, const Published& what) {
  if (!what) return;
  const auto own =
      std::find_if(what->begin(), what->end(), [&](const auto& e) { return e.first == cluster; });
  if (own == what->end()) {
    far = merge(far, what);
    return;
  }
  raise(near, *own->second);
  if (what->size() == 1) return;
  auto others = std::make_shared<Far>(*what);
  others->erase(others->begin() + (own - what->begin()));
  far = merge(far, others);
}

void take(Timeline& t, const Published& what) {
  if (!what || what == t.last) return;
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
  return std::any_of(what->begin(), what->end(), [&](const auto& e) {
    return e.first == s.cluster && at(e.second->seen, s.agent) >= s.time;
  });
}

}  // namespace ptxvm
