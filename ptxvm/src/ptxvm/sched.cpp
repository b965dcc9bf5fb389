#include "ptxvm/sched.h"

#include <algorithm>
#include <list>
#include <numeric>

#include "ptxvm/async.h"
#include "ptxvm/check.h"
#include "ptxvm/device.h"
#include "ptxvm/parse.h"
#include "ptxvm/random.h"
#include "ptxvm/reports.h"
#include "ptxvm/special.h"
#include "ptxvm/store_buffer.h"
#include "ptxvm/warps.h"

namespace ptxvm {

Options options;

namespace {

uint64_t issued_in_all = 0;

std::unique_ptr<char[]> allocate(uint64_t bytes, char*& aligned) {
  constexpr uint64_t kAlignment = 1024;
  auto memory = std::make_unique_for_overwrite<char[]>(bytes + kAlignment);
  const auto base = reinterpret_cast<uint64_t>(memory.get());
  aligned = reinterpret_cast<char*>((base + kAlignment - 1) / kAlignment * kAlignment);
  return memory;
}

template <typename T>
void fill_slot(Warp& warp, uint32_t slot, uint64_t value) {
  std::fill_n(lanes<T>(warp, slot), kLanes, static_cast<T>(value));
}

class Grid {
 public:
  explicit Grid(const Launch& launch)
      : launch_(launch), kernel_(*launch.kernel), random_(options.seed) {
    threads_ = launch.block[0] * launch.block[1] * launch.block[2];
    warps_ = (threads_ + kLanes - 1) / kLanes;
    for (int i = 0; i < 3; ++i) {
      cluster_[i] = std::max(launch.cluster[i], 1u);
      clusters_[i] = launch.grid[i] / cluster_[i];
    }
    cluster_blocks_ = cluster_[0] * cluster_[1] * cluster_[2];
    blocks_ = uint64_t{clusters_[0]} * clusters_[1] * clusters_[2];
    shared_bytes_ = kernel_.dynamic_offset + launch.dynamic_shared;
    capacity_ =
        std::max<uint64_t>(uint64_t{multiprocessors()} *
                               blocks_per_multiprocessor(kernel_, threads_, launch.dynamic_shared),
                           std::max(options.resident_blocks, cluster_blocks_));
    // A stride coprime to the number of clusters visits each of them.
    do {
      stride_ = 1 + random_.below(blocks_);
    } while (std::gcd(stride_, blocks_) != 1);
    first_ = random_.below(blocks_);
  }

  void run() {
    const bool seeded = options.order >= Options::Order::seeded;
    do admit();
    while (launch_.workspace && next_ < blocks_);  // cooperative: all at once
    while (!residents_.empty()) {
      if (seeded && residents_.size() < options.resident_blocks && next_ < blocks_) {
        admit();
        continue;
      }
      for (auto resident = residents_.begin(); resident != residents_.end();) {
        Block& block = (*resident)->block;
        if (!(*resident)->finished) run_turn(**resident);
        // A block's memory stays valid until the last block of its cluster has finished.
        if (block.cluster->unfinished > 0) {
          ++resident;
          continue;
        }
        spare_.splice(spare_.end(), residents_, resident++);
        rounds_ = 0;
        since_finish_ = 0;
      }
      ++rounds_;
      if (next_ < blocks_ && residents_.size() < options.resident_blocks) admit();
      // The residents may wait for blocks that have not begun: admit more, up to the device's
      // capacity.
      if (rounds_ >= kPatience)
        for (size_t i = residents_.size() / 4 + 1; i > 0; --i)
          if (next_ < blocks_ && residents_.size() < capacity_) admit();
      if (options.watchdog && since_finish_ > options.watchdog * 1000000) report_hang();
    }
  }

 private:
  // Admits all blocks of a cluster.
  void admit() {
    const uint64_t index = block_at(next_++);
    const uint64_t at[3] = {index % clusters_[0], index / clusters_[0] % clusters_[1],
                            index / clusters_[0] / clusters_[1]};
    // A cluster of one block keeps its state together with the block.
    const bool reuses = cluster_blocks_ == 1 && !spare_.empty();
    const auto cluster = reuses ? spare_.front()->cluster : std::make_shared<Cluster>();
    std::copy_n(cluster_, 3, cluster->shape);
    cluster->blocks.clear();
    cluster->number = static_cast<uint32_t>(index);
    cluster->random = Random(options.async_seed ^ index << 20);
    cluster->unfinished = cluster_blocks_;
    cluster->arrived = cluster->phase = cluster->stalled = cluster->impatience = 0;
    cluster->quiet = cluster->worked = 0;
    for (uint32_t rank = 0; rank < cluster_blocks_; ++rank) {
      std::list<std::unique_ptr<Resident>> fresh;
      if (!spare_.empty())
        fresh.splice(fresh.end(), spare_, spare_.begin());
      else
        fresh.push_back(make_resident());
      Resident& resident = *fresh.front();
      resident.cluster = cluster;
      Block& block = resident.block;
      block.cluster = cluster.get();
      block.rank = rank;
      block.x = static_cast<uint32_t>(at[0] * cluster_[0] + rank % cluster_[0]);
      block.y = static_cast<uint32_t>(at[1] * cluster_[1] + rank / cluster_[0] % cluster_[1]);
      block.z = static_cast<uint32_t>(at[2] * cluster_[2] + rank / cluster_[0] / cluster_[1]);
      cluster->blocks.push_back(&block);
      start(resident);
      residents_.splice(residents_.end(), fresh);
    }
  }

  // A block has finished when all its threads have exited and memory holds what they stored.
  void run_turn(Resident& resident) {
    Block& block = resident.block;
    if (resident.unfinished > 0) {
      run_block(resident);
      land_for_those_that_poll(*block.cluster);
    } else {
      land_some_stores(block, random_);
    }
    if (resident.unfinished > 0 || !block.stores.empty()) return;
    resident.finished = true;
    finish_transfers(block);
    if (--block.cluster->unfinished > 0) return;
    finish_transfers(*block.cluster);
    // All blocks of a cluster at once: a released block becomes part of another cluster.
    for (Block* each : block.cluster->blocks) block_finished(*each);
  }

  uint64_t block_at(uint64_t position) const {
    switch (options.order) {
      case Options::Order::forward:
        return position;
      case Options::Order::reverse:
        return blocks_ - 1 - position;
      default:
        return static_cast<uint64_t>((static_cast<unsigned __int128>(position) * stride_ + first_) %
                                     blocks_);
    }
  }

  std::unique_ptr<Resident> make_resident() {
    auto resident = std::make_unique<Resident>();
    Block& block = resident->block;
    block.kernel = &kernel_;
    std::copy_n(launch_.grid, 3, block.grid);
    std::copy_n(launch_.block, 3, block.shape);
    block.threads = threads_;
    block.parameters = launch_.parameters;
    block.workspace = launch_.workspace;
    block.shared_bytes = shared_bytes_;
    resident->shared = allocate(shared_bytes_, block.shared);
    resident->local = allocate(uint64_t{threads_} * kernel_.local_bytes, block.local);
    block.warps.resize(warps_);
    // Register files at multiples of 4 KiB would map to the same cache sets.
    const uint64_t stride = kernel_.file_bytes + 64 * (1 + kernel_.file_bytes / 64 % 2);
    char* files = nullptr;
    resident->files = allocate(stride * warps_, files);
    for (uint32_t i = 0; i < warps_; ++i) {
      Warp& warp = block.warps[i];
      warp.file = files + stride * i;
      warp.block = &block;
      warp.index = i;
      for (const Kernel::Constant& constant : kernel_.constants) fill_constant(warp, constant);
    }
    return resident;
  }

  static void fill_constant(Warp& warp, const Kernel::Constant& constant) {
    switch (constant.bits) {
      case 1:
        predicate(warp, constant.slot) = constant.value ? kFullMask : 0;
        break;
      case 8:
        fill_slot<uint8_t>(warp, constant.slot, constant.value);
        break;
      case 16:
        fill_slot<uint16_t>(warp, constant.slot, constant.value);
        break;
      case 32:
        fill_slot<uint32_t>(warp, constant.slot, constant.value);
        break;
      default:
        fill_slot<uint64_t>(warp, constant.slot, constant.value);
    }
  }

  void start(Resident& resident) {
    Block& block = resident.block;
    block.exited = 0;
    block.stores.clear();
    block.shadow.reset();
    std::memset(block.shared, 0xff, shared_bytes_);
    std::memset(block.local, 0xff, uint64_t{threads_} * kernel_.local_bytes);
    for (Barrier& barrier : resident.barriers) barrier = {};
    resident.unfinished = warps_;
    resident.finished = false;
    if (options.order == Options::Order::sleepy)
      resident.sleeper = static_cast<uint32_t>(random_.below(warps_));
    resident.slept = 0;
    for (Warp& warp : block.warps) {
      const uint32_t first = warp.index * kLanes;
      const uint32_t count = std::min<uint32_t>(threads_ - first, kLanes);
      warp.live = count == kLanes ? kFullMask : (Mask{1} << count) - 1;
      warp.pc = 0;
      warp.stint = 0;
      warp.mask = warp.live;
      warp.others.clear();
      warp.copies.clear();
      std::fill(std::begin(warp.copy_groups), std::end(warp.copy_groups), 0);
      std::fill(std::begin(warp.bulk_groups), std::end(warp.bulk_groups), 0);
      warp.products.clear();
      warp.product_groups = warp.polls = 0;
      warp.alike.clear();
      warp.alike_done = warp.alike_by_all = 0;
      warp.timed_out = warp.cluster_arrived = 0;
      warp.registers = registers_at_start(kernel_, warps_);
      set_specials(warp);
    }
    block_started(block);
  }

  // One turn of a block: its warps take turns, until it has finished or used up its share.
  void run_block(Resident& resident) {
    const bool seeded = options.order >= Options::Order::seeded;
    uint64_t most = launch_.workspace ? std::min(options.fuel, kShortTurn) : options.fuel;
    if (is_weak()) most = std::min<uint64_t>(most, kWeakTurn);
    uint64_t share = most * warps_;
    if (seeded) share = 1 + random_.below(share);
    for (uint64_t used = 0; used < share && resident.unfinished > 0;) {
      uint64_t issued = 0;
      const bool sleepy = options.order == Options::Order::sleepy;
      const uint32_t rotation = seeded ? static_cast<uint32_t>(random_.below(warps_)) : 0;
      for (uint32_t i = 0; i < warps_; ++i) {
        uint32_t index = options.order == Options::Order::reverse ? warps_ - 1 - i : i;
        if (seeded) index = (i + rotation) % warps_;
        Warp& warp = resident.block.warps[index];
        if (!warp.live || (sleepy && index == resident.sleeper)) continue;
        if (is_weak()) land_some_stores(resident.block, random_);
        set_clocks(warp, issued_in_all + issued);
        const uint64_t fuel = seeded ? 1 + random_.below(most) : most;
        issued += run_warp(resident, warp, kernel_, fuel);
      }
      if (sleepy && (issued == 0 || (resident.slept += issued) > kLongSleep))
        issued += wake_sleeper(resident, issued_in_all + issued);
      issued_in_all += issued;
      since_finish_ += issued;
      used += issued;
      resident.block.cluster->quiet += issued;
      Cluster& cluster = *resident.block.cluster;
      cluster.worked += issued;
      if (issued > 0) {
        cluster.stalled = 0;
      } else {
        // A block may be unblocked by another block of the cluster, a transfer, or an expired wait.
        if (++cluster.stalled < cluster.unfinished) return;
        cluster.stalled = 0;
        if (!land_oldest(cluster)) {
          if (are_all_stuck(cluster) || !cut_waits_short(cluster)) report_deadlock(cluster);
          return;  // the condition it polls instead may depend on another block
        }
        if (cluster.unfinished > 1) return;
      }
    }
  }

  // The sleeping warp runs for a while; then another one falls asleep.
  uint64_t wake_sleeper(Resident& resident, uint64_t now) {
    Warp& warp = resident.block.warps[resident.sleeper];
    resident.sleeper = static_cast<uint32_t>(random_.below(warps_));
    resident.slept = 0;
    if (!warp.live) return 0;
    set_clocks(warp, now);
    return run_warp(resident, warp, kernel_, 1 + random_.below(options.fuel));
  }

  // Warps that poll memory never wait, but what they poll for may depend on a transfer.
  static void land_for_those_that_poll(Cluster& cluster) {
    if (cluster.quiet < kLongQuiet) return;
    cluster.quiet = 0;
    land_oldest(cluster);
  }

  // True if the waits of all clusters, `cluster` first, were cut short many times without effect,
  // no block has finished, and none can begin.
  bool are_all_stuck(const Cluster& cluster) const {
    const auto is_stuck = [&](const Cluster& each) {
      return each.impatience >= kRefusals && each.worked < kShortWork * warps_;
    };
    return is_stuck(cluster) && rounds_ >= kRefusals &&
           (next_ >= blocks_ || residents_.size() >= capacity_) &&
           std::all_of(residents_.begin(), residents_.end(),
                       [&](const auto& resident) { return is_stuck(*resident->cluster); });
  }

  // A wait for an mbarrier may end before its phase does, as on hardware after a time limit. False
  // if nothing waits this way.
  static bool cut_waits_short(Cluster& cluster) {
    ++cluster.impatience;
    cluster.worked = 0;
    bool any = false;
    for (Block* block : cluster.blocks)
      for (Warp& warp : block->warps)
        for (Group& group : warp.others)
          if (group.wait == Group::Wait::sleep && group.barrier < kWarpgroup) {
            warp.timed_out |= group.mask;
            group.wait = Group::Wait::none;
            any = true;
          }
    return any;
  }

  [[noreturn]] void report_deadlock(const Cluster& cluster) const {
    std::string text;
    const Instruction* first = nullptr;
    for (const auto& resident : residents_) {
      const Block& block = resident->block;
      if (block.cluster != &cluster || block.exited == block.threads) continue;
      text += (text.empty() ? kernel_.title + ": deadlock in " : "and in ") + describe(*resident);
      if (!first) first = waiting_instruction(block);
    }
    throw KernelFault(finding_of(kernel_, first, "deadlock", text));
  }

  [[noreturn]] void report_hang() const {
    std::string text = kernel_.title + ": no block finished within " +
                       std::to_string(options.watchdog) + " million instructions\n";
    size_t shown = 0;
    for (const auto& resident : residents_) {
      if (shown++ == 8) break;
      text += " " + describe(*resident);
    }
    throw KernelFault(finding_of(kernel_, nullptr, "hang", text));
  }

  static constexpr uint64_t kLongQuiet = 300000;  // instructions of a cluster without an event
  static constexpr uint64_t kLongSleep = 30000;   // instructions of a block: others may poll
  static constexpr uint64_t kPatience = 16;       // turns of all blocks without a finished block

  static constexpr uint32_t kShortTurn = 500;  // instructions: cooperative blocks poll a barrier

  // Instructions of a turn in order=weak: few, so that other threads run while a store waits.
  static constexpr uint32_t kWeakTurn = 16;

  static constexpr uint32_t kRefusals = 1000;    // waits cut short that count as a deadlock
  static constexpr uint64_t kShortWork = 10000;  // instructions of a warp between two of them

  const Launch& launch_;
  Kernel& kernel_;
  Random random_;
  uint32_t threads_, warps_, shared_bytes_;
  uint32_t cluster_[3], clusters_[3], cluster_blocks_;
  uint64_t blocks_, capacity_, stride_, first_;  // in clusters
  uint64_t next_ = 0, rounds_ = 0, since_finish_ = 0;
  std::list<std::unique_ptr<Resident>> residents_, spare_;
};

}  // namespace

void run_grid(const Launch& launch) {
  if (launch.grid[0] && launch.grid[1] && launch.grid[2]) Grid(launch).run();
}

}  // namespace ptxvm
