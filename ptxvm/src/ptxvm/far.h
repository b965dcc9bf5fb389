// Check mode: vector clock over the agents of many clusters, as a radix tree by cluster number.
// Nodes are immutable, so that trees share common parts: replacing the times of one of n clusters
// takes O(log n) memory, and merging two trees takes time proportional to the nodes that differ. A
// chain of n blocks, each of which knows all blocks before it, takes O(n log n).
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

namespace ptxvm {

using Times = std::vector<uint32_t>;  // by agent of a cluster; missing entries are 0

uint32_t at(const Times&, uint32_t agent);
void raise(Times&, uint32_t agent, uint32_t time);
void raise(Times&, const Times& others);  // element-wise maximum

class Far {
 public:
  struct Node;

  Far() = default;
  Far(const Far&);
  Far(Far&& other) noexcept : root_(std::exchange(other.root_, nullptr)) {}
  Far& operator=(Far other) noexcept {
    std::swap(root_, other.root_);
    return *this;
  }
  ~Far() {
    if (root_) release(root_);
  }

  bool empty() const { return !root_; }
  // True for the same tree; trees with equal contents may compare unequal.
  bool operator==(const Far&) const = default;
  const Times* find(uint32_t cluster) const;  // null if nothing is known
  // A copy with other times for one cluster.
  Far with(uint32_t cluster, const Times&) const;

 private:
  explicit Far(const Node* root);  // takes shared ownership of the node
  static void release(const Node*);
  friend Far merge(const Far&, const Far&);

  const Node* root_ = nullptr;
};

// Element-wise maximum. For equal trees the older one, so that copies become one.
Far merge(const Far&, const Far&);

// Number of clusters of the launch; called before its first tree.
void set_clusters(uint64_t count);

}  // namespace ptxvm
