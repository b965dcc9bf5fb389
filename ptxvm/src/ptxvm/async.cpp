#include "ptxvm/async.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <tuple>

#include "ptxvm/check.h"
#include "ptxvm/floats.h"
#include "ptxvm/reports.h"

namespace ptxvm {
namespace {

using Combine = Transfer::Combine;
using Element = Transfer::Element;

template <typename T>
T combine_integers(Combine how, T old, T value) {
  switch (how) {
    case Combine::add:
      return static_cast<T>(old + value);
    case Combine::min:
      return std::min(old, value);
    case Combine::max:
      return std::max(old, value);
    case Combine::inc:
      return old >= value ? 0 : static_cast<T>(old + 1);
    case Combine::dec:
      return old == 0 || old > value ? value : static_cast<T>(old - 1);
    case Combine::bit_and:
      return old & value;
    case Combine::bit_or:
      return old | value;
    case Combine::bit_xor:
      return old ^ value;
    default:
      return value;
  }
}

// min and max return the number if one operand is NaN, as min and max of PTX do. Sums of f32 flush
// subnormal inputs and results to zeros of their sign: PTX specifies this for contiguous bytes and
// says nothing of tensors.
template <typename T>
T combine_floats(Combine how, T old, T value) {
  if constexpr (std::is_class_v<T>) {
    const float a = to_float(old), b = to_float(value);
    if (how == Combine::add) return nearest<T>(a + b);
    if (is_nan(old) || is_nan(value)) return is_nan(old) ? value : old;
    const bool below = b < a || (a == b && std::signbit(b));
    return (how == Combine::min) == below ? value : old;
  } else if constexpr (std::is_same_v<T, float>) {
    return flush(canonical(flush(old) + flush(value)));
  } else {
    return canonical(old + value);
  }
}

template <typename T>
void combine_all(Combine how, uint64_t to, const char* from, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes; i += sizeof(T)) {
    T old, value;
    std::memcpy(&old, reinterpret_cast<const char*>(to) + i, sizeof old);
    std::memcpy(&value, from + i, sizeof value);
    if constexpr (std::is_integral_v<T>)
      value = combine_integers(how, old, value);
    else
      value = combine_floats(how, old, value);
    std::memcpy(reinterpret_cast<char*>(to) + i, &value, sizeof value);
  }
}

void combine(const Transfer& transfer, uint64_t to, const char* from, uint32_t bytes) {
  const Combine how = transfer.combine;
  switch (transfer.element) {
    case Element::s32:
      return combine_all<int32_t>(how, to, from, bytes);
    case Element::u64:
      return combine_all<uint64_t>(how, to, from, bytes);
    case Element::s64:
      return combine_all<int64_t>(how, to, from, bytes);
    case Element::f16:
      return combine_all<Half>(how, to, from, bytes);
    case Element::bf16:
      return combine_all<BFloat>(how, to, from, bytes);
    case Element::f32:
    case Element::tf32:
      return combine_all<float>(how, to, from, bytes);
    case Element::f64:
      return combine_all<double>(how, to, from, bytes);
    default:
      return combine_all<uint32_t>(how, to, from, bytes);
  }
}

// Fills elements outside the bounds of a tensor with zeros or the NaN of the type.
void fill(const Transfer& transfer, char* to, uint32_t bytes) {
  std::memset(to, 0, bytes);
  if (!transfer.fill_nan) return;
  const bool wide = transfer.element == Element::f64;
  const uint64_t nan = transfer.element == Element::f16 || transfer.element == Element::bf16
                           ? uint64_t{kNaN16} * 0x0001000100010001
                       : wide ? kNaN64
                              : uint64_t{kNaN32} * 0x0000000100000001;
  for (uint32_t i = 0; i < bytes; i += 8) std::memcpy(to + i, &nan, std::min(8u, bytes - i));
}

// A tensor map of tf32 rounds f32 to nearest on the way into shared memory.
void round_to_tf32(char* data, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes; i += 4) {
    uint32_t x;
    std::memcpy(&x, data + i, sizeof x);
    if ((x & 0x7f800000) != 0x7f800000) x = (x + 0xfff + (x >> 13 & 1)) & ~0x1fffu;
    std::memcpy(data + i, &x, sizeof x);
  }
}

void read_source(Transfer& transfer) {
  size_t bytes = 0;
  for (const auto& piece : transfer.pieces) bytes += piece.bytes;
  if (transfer.arrives || transfer.data.size() == bytes) return;
  transfer.data.resize(bytes);
  char* at = transfer.data.data();
  for (const auto& piece : transfer.pieces) {
    if (piece.from)
      std::memcpy(at, reinterpret_cast<const void*>(piece.from), piece.bytes);
    else
      fill(transfer, at, piece.bytes);
    if (transfer.element == Element::tf32 && !transfer.to_global) round_to_tf32(at, piece.bytes);
    at += piece.bytes;
  }
}

void land(Transfer transfer) {
  Warp& warp = *transfer.warp;
  happened(*warp.block);
  if (transfer.arrives) {
    // Arrivals track all earlier copies of their thread, and may overtake one another.
    const auto land_before = [&](const Transfer& arrival) {
      land_copies(warp, transfer.lane, arrival.group);
    };
    for (const Transfer& other : warp.block->cluster->transfers)
      if (other.arrives && other.warp == &warp && other.lane == transfer.lane &&
          static_cast<int32_t>(other.group - transfer.group) < 0)
        land_before(other);
    land_before(transfer);
    const auto& target = transfer.targets[0];
    copies_arrived(warp, transfer.lane, transfer.group, target.mbarrier);
    return arrive_at(warp, *transfer.from, transfer.lane, *target.block, target.mbarrier);
  }
  for (const auto& target : transfer.targets)
    if (target.block->shadow && target.block->exited == target.block->threads)
      broke_rule(warp, *transfer.from, transfer.lane, "landed in a finished block",
                 "block " + std::to_string(target.block->rank) +
                     " of the cluster finished while this copy into its shared memory was in "
                     "flight");
  read_source(transfer);
  for (auto& target : transfer.targets)
    if (target.block->shadow)
      target.segment =
          signal_segment(warp, *target.block, target.mbarrier, transfer.combine != Combine::copy);
  const char* at = transfer.data.data();
  for (const auto& piece : transfer.pieces) {
    if (transfer.to_global) {
      if (transfer.combine == Combine::copy)
        std::memcpy(reinterpret_cast<void*>(piece.to), at, piece.bytes);
      else
        combine(transfer, piece.to, at, piece.bytes);
    }
    for (const auto& target : transfer.targets) {
      if (transfer.combine == Combine::copy)
        std::memcpy(target.block->shared + piece.to, at, piece.bytes);
      else
        combine(transfer, reinterpret_cast<uint64_t>(target.block->shared + piece.to), at,
                piece.bytes);
      bulk_landed(*target.block, static_cast<uint32_t>(piece.to), piece.bytes,
                  transfer.combine != Combine::copy, target.segment);
    }
    at += piece.bytes;
  }
  for (const auto& target : transfer.targets)
    complete_bytes(warp, *transfer.from, transfer.lane, *target.block, target.mbarrier,
                   transfer.bytes);
}

bool in_shared(const Block& block, const std::vector<Transfer::Piece>& pieces) {
  const auto begin = reinterpret_cast<uint64_t>(block.shared);
  return !pieces.empty() && pieces[0].from - begin < block.shared_bytes;
}

// Removes the transfer from the queue and lands it.
void land_at(Cluster& cluster, size_t index) {
  Transfer transfer = std::move(cluster.transfers[index]);
  cluster.transfers.erase(cluster.transfers.begin() + static_cast<std::ptrdiff_t>(index));
  land(std::move(transfer));
}

template <typename Choose>
void land_chosen(Cluster& cluster, Choose choose) {
  for (size_t i = 0; i < cluster.transfers.size();)
    if (choose(cluster.transfers[i]))
      land_at(cluster, i);
    else
      ++i;
}

// True if the previous lane stores the same data by the same instruction: CUTLASS stores with whole
// warps.
bool is_alike(const Transfer& a, const Transfer& b) {
  const auto same = [](const Transfer::Piece& x, const Transfer::Piece& y) {
    return x.to == y.to && x.from == y.from && x.bytes == y.bytes;
  };
  return a.to_global && b.to_global && a.warp == b.warp && a.from == b.from && a.group == b.group &&
         a.lane + 1 == b.lane && a.pieces.size() == b.pieces.size() && !a.pieces.empty() &&
         same(a.pieces.front(), b.pieces.front()) && same(a.pieces.back(), b.pieces.back());
}

// Check mode: marks what the transfer reads and writes from now on.
void watch(Warp& warp, Transfer& transfer) {
  const auto& issued = warp.block->cluster->transfers;
  if (!issued.empty() && is_alike(issued.back(), transfer)) return;
  const Instruction& in = *transfer.from;
  const int lane = transfer.lane;
  const bool reduces = transfer.combine != Combine::copy;
  uint32_t reads = 0, writes = 0;
  if (transfer.to_global) std::tie(reads, writes) = group_segments(warp, transfer.group, reduces);
  for (auto& target : transfer.targets) {
    target.segment = signal_segment(warp, *target.block, target.mbarrier, reduces);
    if (!reads) reads = target.segment;
    for (const auto& piece : transfer.pieces)
      bulk_issued(warp, in, lane, *target.block, static_cast<uint32_t>(piece.to), piece.bytes,
                  reduces, target.segment);
  }
  const bool from_shared = in_shared(*warp.block, transfer.pieces);
  for (const auto& piece : transfer.pieces) {
    if (from_shared)
      bulk_read(warp, in, lane, piece.from - reinterpret_cast<uint64_t>(warp.block->shared),
                piece.bytes, reads);
    else if (piece.from)
      bulk_global(warp, in, lane, piece.from, piece.bytes, false, false, reads);
    if (transfer.to_global)
      bulk_global(warp, in, lane, piece.to, piece.bytes, true, reduces, writes);
  }
}

}  // namespace

void start_transfer(Warp& warp, Transfer transfer) {
  transfer.warp = &warp;
  if (warp.timeline && !transfer.arrives) watch(warp, transfer);
  if (options.async == Options::Async::earliest) return land(std::move(transfer));
  warp.block->cluster->transfers.push_back(std::move(transfer));
  land_some(warp);
}

void finish_groups(Warp& warp, Mask mask, uint32_t keep, bool reads_only) {
  Cluster& cluster = *warp.block->cluster;
  const auto waited_for = [&](const Transfer& t) {
    return t.to_global && t.warp == &warp && mask >> t.lane & 1 &&
           t.group + uint64_t{keep} < warp.bulk_groups[t.lane];
  };
  if (!reads_only) return land_chosen(cluster, waited_for);
  for (Transfer& transfer : cluster.transfers)
    if (waited_for(transfer)) read_source(transfer);
}

bool land_oldest(Cluster& cluster) {
  const auto found = std::find_if(cluster.transfers.begin(), cluster.transfers.end(),
                                  [](const Transfer& t) { return !t.to_global; });
  if (found == cluster.transfers.end()) return false;
  land_at(cluster, static_cast<size_t>(found - cluster.transfers.begin()));
  return true;
}

void land_some(Warp& warp) {
  if (options.async != Options::Async::seeded) return;
  Cluster& cluster = *warp.block->cluster;
  while (!cluster.transfers.empty() && cluster.random.below(2))
    land_at(cluster, cluster.random.below(cluster.transfers.size()));
}

void finish_transfers(Block& block) {
  land_chosen(*block.cluster, [&](const Transfer& t) {
    if (!t.to_global || t.warp->block != &block) return false;
    const bool reads_shared = in_shared(block, t.pieces);
    if (block.shadow && t.data.empty() && reads_shared)
      broke_rule(*t.warp, *t.from, t.lane, "unread",
                 "the block finished while this copy had to read its shared memory "
                 "(no cp.async.bulk.wait_group since)");
    return true;
  });
}

void finish_transfers(Cluster& cluster) {
  for (const Transfer& t : cluster.transfers)
    if (t.warp->block->shadow && !t.arrives)
      broke_rule(*t.warp, *t.from, t.lane, "in flight at the end",
                 "the blocks finished while this copy into their shared memory was in flight");
  cluster.transfers.clear();
}

void wake(Block& block, uint32_t what) {
  for (Warp& warp : block.warps)
    for (Group& group : warp.others)
      if (group.wait == Group::Wait::sleep && group.barrier == what) group.wait = Group::Wait::none;
}

void happened(Block& block) {
  block.cluster->impatience = 0;
  block.cluster->quiet = 0;
}

Mask sleep_unless_timed_out(Warp& warp, Mask waiting, uint32_t what) {
  const Mask gives_up = waiting & warp.timed_out;
  warp.timed_out &= ~waiting;
  warp.asleep = waiting & ~gives_up;
  warp.asleep_for = what;
  return gives_up;
}

}  // namespace ptxvm
