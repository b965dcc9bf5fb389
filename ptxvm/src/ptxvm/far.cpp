#include "ptxvm/far.h"

#include <algorithm>
#include <array>

namespace ptxvm {

uint32_t at(const Times& times, uint32_t agent) { return agent < times.size() ? times[agent] : 0; }

void raise(Times& times, uint32_t agent, uint32_t time) {
  if (times.size() <= agent) times.resize(agent + 1);
  times[agent] = std::max(times[agent], time);
}

void raise(Times& times, const Times& others) {
  if (times.size() < others.size()) times.resize(others.size());
  for (size_t i = 0; i < others.size(); ++i) times[i] = std::max(times[i], others[i]);
}

namespace {

constexpr uint32_t kBits = 4, kChildren = 1u << kBits;

constexpr uint32_t kMostLevels = 32 / kBits;

uint32_t levels = 1;  // tree depth for all clusters of the launch
uint64_t made = 0;    // number of nodes made, which numbers them

bool covers(const Times& times, const Times& others) {
  for (uint32_t i = 0; i < others.size(); ++i)
    if (at(times, i) < others[i]) return false;
  return true;
}

}  // namespace

void set_clusters(uint64_t count) {
  levels = 1;
  while (levels < kMostLevels && count > uint64_t{1} << kBits * levels) ++levels;
}

// Level 0 holds the times of one cluster, level n the clusters of a subtree of 16^n.
struct Far::Node {
  explicit Node(uint32_t of_level) : level(of_level), number(made++) {}
  Node(const Node& other) : level(other.level), number(made++) {}

  mutable uint32_t owners = 0;
  uint32_t level;
  uint64_t number;
};

namespace {

using Node = Far::Node;

struct Leaf : Node {
  explicit Leaf(Times all) : Node(0), times(std::move(all)) {}
  Times times;
};

struct Branch : Node {
  using Node::Node;
  std::array<Far, kChildren> children;
};

const Times& times_of(const Node* node) { return static_cast<const Leaf*>(node)->times; }
const Branch* branch(const Node* node) { return static_cast<const Branch*>(node); }
uint32_t digit(uint32_t cluster, uint32_t level) {
  return cluster >> kBits * (level - 1) & (kChildren - 1);
}

}  // namespace

Far::Far(const Node* root) : root_(root) {
  if (root_) ++root_->owners;
}

Far::Far(const Far& other) : Far(other.root_) {}

void Far::release(const Node* node) {
  if (--node->owners) return;
  if (node->level)
    delete branch(node);
  else
    delete static_cast<const Leaf*>(node);
}

const Times* Far::find(uint32_t cluster) const {
  const Node* node = root_;
  while (node && node->level) node = branch(node)->children[digit(cluster, node->level)].root_;
  return node ? &times_of(node) : nullptr;
}

Far Far::with(uint32_t cluster, const Times& times) const {
  const Node* path[kMostLevels + 1];  // existing nodes, by level
  path[levels] = root_;
  for (uint32_t level = levels; level > 0; --level)
    path[level - 1] =
        path[level] ? branch(path[level])->children[digit(cluster, level)].root_ : nullptr;
  Far tree(new Leaf(times));
  for (uint32_t level = 1; level <= levels; ++level) {
    auto* const copy = path[level] ? new Branch(*branch(path[level])) : new Branch(level);
    copy->children[digit(cluster, level)] = std::move(tree);
    tree = Far(copy);
  }
  return tree;
}

Far merge(const Far& a, const Far& b) {
  if (!b.root_ || a == b) return a;
  if (!a.root_) return b;
  const Far& older = a.root_->number < b.root_->number ? a : b;
  if (!a.root_->level) {
    const Times &mine = times_of(a.root_), &others = times_of(b.root_);
    const bool is_a = covers(mine, others), is_b = covers(others, mine);
    if (is_a || is_b) return is_a && is_b ? older : is_a ? a : b;
    Times both = mine;
    raise(both, others);
    return Far(new Leaf(std::move(both)));
  }
  std::array<Far, kChildren> merged;
  bool is_a = true, is_b = true;
  for (uint32_t i = 0; i < kChildren; ++i) {
    const Far &mine = branch(a.root_)->children[i], &others = branch(b.root_)->children[i];
    merged[i] = merge(mine, others);
    is_a = is_a && merged[i] == mine;
    is_b = is_b && merged[i] == others;
  }
  if (is_a || is_b) return is_a && is_b ? older : is_a ? a : b;
  auto* const both = new Branch(a.root_->level);
  both->children = std::move(merged);
  return Far(both);
}

}  // namespace ptxvm
