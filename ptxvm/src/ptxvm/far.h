// Check mode: what is known of the agents of many clusters, as a radix tree by the number of the
// cluster. Nodes never change, so that trees share what they have in common: to replace the times
// of one cluster of n takes O(log n) memory, and to merge two trees the time of the nodes that
// differ. A chain of n blocks, each of which knows all before it, takes O(n log n).
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

namespace ptxvm {

using Times = std::vector<uint32_t>;  // by agent of a cluster; those that are missing are 0

uint32_t at(const Times&, uint32_t agent);
void raise(Times&, uint32_t agent, uint32_t time);
void raise(Times&, const Times& others);  // the later of each

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
  // Whether they are one tree; equal ones need not be.
  bool operator==(const Far&) const = default;
  const Times* find(uint32_t cluster) const;  // null if nothing is known
  // The same with other times of one cluster.
  Far with(uint32_t cluster, const Times&) const;

 private:
  explicit Far(const Node* root);  // one more owner of it
  static void release(const Node*);
  friend Far merge(const Far&, const Far&);

  const Node* root_ = nullptr;
};

// The later of each time. Of trees that are equal the older one, so that copies become one.
Far merge(const Far&, const Far&);

// Of the launch, before its first tree.
void set_clusters(uint64_t count);

}  // namespace ptxvm
