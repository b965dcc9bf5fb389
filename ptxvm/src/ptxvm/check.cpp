#include "ptxvm/check.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <string_view>

#include "ptxvm/async.h"
#include "ptxvm/parse.h"
#include "ptxvm/reports.h"
#include "ptxvm/shadow.h"
#include "ptxvm/store_buffer.h"

namespace ptxvm {
namespace {

bool is_strong(Access kind) { return kind >= Access::strong_read; }
bool is_read(Access kind) { return kind == Access::read || kind == Access::strong_read; }

// Scope of a strong access; system scope (kGpu here) if its opcode names none.
uint8_t reach(const Instruction& in) { return in.order & kIsStrong ? scope_of(in) : kGpu; }

// Numbers of the instructions that have accessed memory in this launch, for kernels with more
// instructions than a cell has numbers.
struct Numbers {
  std::unordered_map<uint32_t, uint32_t> of;  // by index
  std::vector<uint32_t> indices;              // by number
} numbers;
bool is_long(const Kernel& kernel) { return kernel.code.size() > kNumberMask + 1; }

[[gnu::noinline]] uint32_t new_number(Warp& warp, const Instruction& in, uint32_t index) {
  const auto next = static_cast<uint32_t>(numbers.indices.size());
  const auto [found, added] = numbers.of.try_emplace(index, next);
  if (added && next > kNumberMask)
    fault(warp, in, 0,
          "check=1 follows the accesses of at most " + std::to_string(kNumberMask + 1) +
              " instructions of a launch");
  if (added) numbers.indices.push_back(index);
  return found->second;
}

uint32_t number_of(Warp& warp, const Instruction& in) {
  const Kernel& kernel = *warp.block->kernel;
  const auto index = static_cast<uint32_t>(&in - kernel.code.data());
  return is_long(kernel) ? new_number(warp, in, index) : index;
}

// Info of a reader: the number of its instruction, its lane or kSeveralLanes, and the low bits of
// its segment's number.
constexpr uint32_t kReaderBits = 32 - kFlagShift;
uint32_t info_of(uint32_t number, int lane) {
  return number | static_cast<uint32_t>(lane) << kLaneShift;
}
uint32_t read_info(uint32_t info, uint32_t reader) { return info | reader << kFlagShift; }
uint32_t lane_of(uint32_t info) { return std::min(info >> kLaneShift & kLaneMask, kSeveralLanes); }

// Info of the last of several writers: the low bits of its number.
uint32_t write_info(uint32_t info, uint32_t writer) { return info | (writer & 15) << kWriterShift; }

// One access to shared memory of a block or, if `block` is null, to global memory.
struct Look {
  Warp& warp;
  const Instruction& in;
  int lane;
  const Block* block;
  bool writes;
  Proxy proxy;
  bool strong;
  uint8_t scope;
  uint32_t flight;    // flags of what is in flight from now on
  uint64_t host = 0;  // address that the lane accesses
  uint32_t cell = 0;  // bytes of a cell there, for writes

  // The proxy whose fence must lie between the access and earlier reads.
  Proxy after_reads() const { return options.strict_proxy ? proxy : kGeneric; }

  std::string place(uint64_t where) const {
    char text[64];
    snprintf(text, sizeof text, "%s address 0x%" PRIx64, block ? "shared" : "global", where);
    std::string all = text;
    if (block && block != warp.block) all += " of block " + std::to_string(block->rank);
    return all;
  }
  std::string act(uint64_t where) const {
    return (writes ? "write to " : "read of ") + place(where);
  }
  // The instruction of an earlier access.
  const Instruction& other(uint32_t info) const {
    const Kernel& kernel = *warp.block->kernel;
    const uint32_t number = info & kNumberMask;
    return kernel.code[is_long(kernel) ? numbers.indices[number] : number];
  }
  std::string at(uint32_t info) const { return " at" + at_line(warp, other(info)); }
  void broke(const char* rule, const std::string& what, const Instruction* cause = nullptr) const {
    broke_rule(warp, in, lane, rule, what, cause);
  }
  // "; the address is tile+0x80"
  std::string variable(uint64_t where) const {
    const std::string name =
        block ? shared_symbol(*block->kernel, static_cast<uint32_t>(where)) : std::string();
    return name.empty() ? name : "; the address is " + name;
  }
  // Strong accesses do not race if the scope of each includes the other.
  bool is_race(const Segment& other) const {
    return !strong || !other.strong || std::min(scope, other.scope) < distance(warp, other);
  }
  std::string missing(const Segment& other) const {
    if (!strong || !other.strong) return remedy(warp, other, proxy);
    return "one of them is of " + name_of_scope(std::min(scope, other.scope)) +
           " scope: " + name_of_scope(distance(warp, other)) + " is needed";
  }
};

// Slow path of touch(): the earlier access is not known to happen before.
void explain_flight(const Look& look, const Cell& cell, uint64_t where) {
  const Segment& writer = segment(cell.wrote & kSet ? members(cell.wrote).back() : cell.wrote);
  const std::string who = "warp " + std::to_string(writer.warp);
  if (cell.write_info & kCopying)
    return look.broke("copy",
                      look.act(where) + " while a cp.async of " + who +
                          " into it is in flight (no cp.async.wait_group or wait_all since)" +
                          look.at(cell.write_info),
                      &look.other(cell.write_info));
  look.broke("copy",
             look.act(where) + " while a bulk copy of " + who +
                 " into it is in flight (its mbarrier has not completed)" +
                 look.at(cell.write_info),
             &look.other(cell.write_info));
}

void explain_race(const Look& look, const Cell& cell, uint64_t where, uint32_t other, bool wrote) {
  const Segment& s = segment(other);
  const uint32_t info = wrote ? cell.write_info : cell.read_info;
  // If there are several, the info describes the last one.
  const bool has_info = wrote ? !(cell.wrote & kSet) || info >> kWriterShift == (other & 15)
                              : info >> kFlagShift == (other & ((1u << kReaderBits) - 1));
  const std::string at = has_info ? look.at(info) : std::string();
  look.broke(wrote ? "race with a write" : "race with a read",
             "race: " + look.act(where) + (wrote ? ", written by " : ", read by ") +
                 name_of(look.warp, s) + at + "; " + look.missing(s) + look.variable(where),
             has_info ? &look.other(info) : nullptr);
}

// The segment that the access races with, 0 if there is none; among several, preferably the one
// whose number is `last` modulo 2^bits. lane: of a single one.
uint32_t race_in(const Look& look, uint32_t id, uint32_t last, uint32_t bits, uint32_t lane) {
  if (id & kSet) lane = kUnknownLane;
  const auto races = [&](uint32_t each) {
    return first_unordered(look.warp, each, look.proxy) && look.is_race(segment(each)) &&
           !is_covered(look.warp, each, lane, look.proxy);
  };
  if (is_over(id)) return 0;
  if (!(id & kSet)) return races(id) ? id : 0;
  uint32_t found = 0;
  for (const uint32_t member : members(id))
    if (races(member) && (!found || last == (member & ((1u << bits) - 1)))) found = member;
  return found;
}

Timeline::Saw& saw_at(const Look& look, uint64_t host) {
  return look.warp.timeline->saw[host / 4 % kRemembered];
}

// True if a reader of the bytes since their last write happens before the access: it has observed
// the write, so the write happens before too.
bool was_seen(const Look& look, const Cell& cell, uint64_t host) {
  if (look.proxy != kGeneric) return false;
  const Timeline::Saw& saw = saw_at(look, host);
  if (saw.place == host && saw.wrote == cell.wrote) return true;
  if (is_over(cell.read)) return false;
  const auto before = [&](uint32_t each) { return !first_unordered(look.warp, each, kGeneric); };
  if (!(cell.read & kSet)) return before(cell.read);
  const auto all = members(cell.read);
  return std::any_of(all.begin(), all.end(), before);
}

// True if an asynchronous access needs no proxy fence after the write, which cp.async made.
bool needs_no_fence(const Look& look, const Cell& cell) {
  if (options.strict_proxy || look.proxy == kGeneric || cell.wrote & kSet) return false;
  return std::string_view(look.other(cell.write_info).text).starts_with("cp.async.c") &&
         comes_before(look.warp, cell.wrote, kGeneric);
}

// True if another lane wrote the bytes by the same instruction: CUTLASS copies the same with all
// lanes.
bool is_repeated(const Cell& cell, uint32_t mine, uint32_t info) {
  return ((cell.write_info ^ info) & kNumberMask) == 0 && !(cell.wrote & kSet) &&
         are_same(cell.wrote, mine);
}

// A store over what a racing store wrote, of this or of another warp, before it is known whether
// both store the same.
struct Doubt {
  Look look;
  Cell* at;
  Cell cell;  // before the store
  uint64_t where;
  uint32_t other;  // the earlier segment
  char before[16];
};
std::vector<Doubt> doubts;

bool is_store(const Instruction& in) { return std::string_view(in.text).starts_with("st."); }

bool is_same_instruction(const Cell& cell, uint32_t info) {
  return ((cell.write_info ^ info) & kNumberMask) == 0;
}

// An access to what another lane of the warp wrote since the lanes met.
bool is_of_another_lane(const Look& look, const Cell& cell, uint32_t mine) {
  return cell.wrote == mine && !look.strong && look.proxy == kGeneric &&
         lane_of(cell.write_info) != static_cast<uint32_t>(look.lane) &&
         (look.writes || lane_of(cell.write_info) != kSeveralLanes);
}

void explain_lanes(const Look& look, const Cell& cell, uint64_t where) {
  look.broke("race of lanes",
             "race: " + look.act(where) + ", written by lane " +
                 std::to_string(cell.write_info >> kLaneShift & (kLanes - 1)) + " of the warp" +
                 look.at(cell.write_info) +
                 "; no bar.warp.sync (__syncwarp) or barrier lies between them" +
                 look.variable(where),
             &look.other(cell.write_info));
}

// The access races with the write of another warp, or of another lane if `other` is its own
// segment.
void explain_write(const Look& look, Cell& cell, uint64_t where, uint64_t host, uint32_t other,
                   uint32_t mine) {
  const bool of_lane = other == mine;
  if (look.writes && !look.strong && is_store(look.in) && !segment(other).strong) {
    Doubt& doubt = doubts.emplace_back(Doubt{look, &cell, cell, where, other, {}});
    doubt.look.host = host;
    read_last_stored(host, look.cell, doubt.before);
  } else if (of_lane) {
    explain_lanes(look, cell, where);
  } else {
    explain_race(look, cell, where, other, true);
  }
}

// The writer that the access races with. What an acquire takes over here happens before the access.
uint32_t racing_writer(const Look& look, const Cell& cell, uint64_t host) {
  if (was_seen(look, cell, host)) return 0;
  const uint32_t lane = lane_of(cell.write_info);
  const auto find = [&] {
    return race_in(look, cell.wrote, cell.write_info >> kWriterShift, 32 - kWriterShift,
                   lane == kSeveralLanes ? kUnknownLane : lane);
  };
  const uint32_t other = find();
  if (!other || !look.strong || look.proxy != kGeneric || !(look.in.order & kAcquires))
    return other;
  flag_acquired(look.warp, look.in, look.host);
  if (host != look.host) flag_acquired(look.warp, look.in, host);  // not the first element
  return find();
}

[[gnu::noinline]] void settle(const Look& look, Cell& cell, uint64_t where, uint64_t host,
                              uint32_t mine, uint32_t info) {
  const bool over = is_over(cell.wrote);
  const bool both_reduce = look.flight & cell.write_info & kReducing;
  if (!over && cell.write_info & kInFlight && !both_reduce) {
    explain_flight(look, cell, where);
  } else if (is_of_another_lane(look, cell, mine)) {
    if (!look.writes || is_store(look.in) || !is_same_instruction(cell, info))
      explain_write(look, cell, where, host, mine, mine);
  } else if (!comes_before(look.warp, cell.wrote, look.proxy) && !is_repeated(cell, mine, info) &&
             !needs_no_fence(look, cell)) {
    if (const uint32_t other = racing_writer(look, cell, host))
      explain_write(look, cell, where, host, other, mine);
    else if (look.strong && !look.writes && look.proxy == kGeneric)
      saw_at(look, host) = {host, cell.wrote};
  }
  if (look.writes) {
    Look after = look;
    after.proxy = look.after_reads();
    if (!comes_before(look.warp, cell.read, after.proxy))
      if (const uint32_t other = race_in(after, cell.read, cell.read_info >> kFlagShift,
                                         kReaderBits, lane_of(cell.read_info)))
        explain_race(after, cell, where, other, false);
    if (!look.strong && cell.write_info & kStrongWrite && !over) forget_flags(host, look.cell);
    if (look.strong) {
      const bool sees = look.proxy == kGeneric && observes(look.in);
      cell.wrote = join_writers(look.warp, cell.wrote, mine, look.proxy, sees);
      cell.write_info = write_info(info, mine) | (look.proxy ? 0 : kStrongWrite) | look.flight;
    } else {
      const bool doubted = !doubts.empty() && doubts.back().look.host == host;
      cell.wrote = doubted ? join_writers(look.warp, cell.wrote, mine, kGeneric, false) : mine;
      cell.write_info = (cell.wrote & kSet ? write_info(info, mine) : info) | look.flight;
    }
    cell.read = cell.read_info = 0;
  } else if (cell.read != mine) {
    const uint32_t readers = join_readers(look.warp, cell.read, mine, look.proxy);
    if (readers != cell.read) cell.read_info = read_info(info, mine);
    cell.read = readers;
  }
}

// Fast path for most accesses: every earlier access of the cell happens before them.
template <bool writes, bool async>
inline void touch(const Look& look, Cell& cell, uint64_t where, uint64_t host, uint32_t mine,
                  uint32_t info) {
  const Timeline& t = *look.warp.timeline;
  const auto passed = [&](uint32_t id) { return t.has_passed(id, async ? look.proxy : kGeneric); };
  const bool of_lane =
      !async && cell.wrote == mine && (cell.write_info ^ info) >> kLaneShift & kLaneMask;
  if constexpr (writes) {
    if (passed(cell.wrote) && t.has_passed(cell.read, async ? look.after_reads() : kGeneric) &&
        !(cell.write_info >> kFlagShift) && !look.strong && !of_lane) [[likely]] {
      cell = {mine, info | look.flight, 0, 0};
      return;
    }
  } else {
    if (passed(cell.wrote) && !(cell.write_info & kInFlight) && !of_lane) [[likely]] {
      if (cell.read == mine) {
        if (lane_of(cell.read_info) != static_cast<uint32_t>(look.lane))
          cell.read_info |= kSeveralLanes << kLaneShift;
        return;
      }
      const Timeline::Joined& joined = t.joined[cell.read % kRemembered];
      if (passed(cell.read)) {
        cell.read = mine;
        cell.read_info = read_info(info, mine);
        return;
      }
      if (joined.set == cell.read && joined.with == mine) {
        if (joined.result != cell.read) cell.read_info = read_info(info, mine);
        cell.read = joined.result;
        return;
      }
    }
  }
  settle(look, cell, where, host, mine, info);
}

// unset: bits of the loaded bytes that hold no value. A load loses the elements that contain such a
// byte (width: bytes per element), an ldmatrix the row.
void load_unset(Warp& warp, const Instruction& instruction, int lane, uint32_t bytes,
                uint32_t unset) {
  Undefined& undefined = warp.undefined;
  if (undefined.by != &instruction) undefined = {&instruction, &instruction};
  for (uint32_t b = 0; b < bytes; ++b)
    if (unset >> b & 1)
      (instruction.width ? undefined.values[b / instruction.width] : undefined.loaded) |= Mask{1}
                                                                                          << lane;
}

// True if byte b of the lane's stored value is undefined.
bool stores_unset(const Warp& warp, const Instruction& instruction, int lane, uint32_t b) {
  const Undefined& undefined = warp.undefined;
  return undefined.by == &instruction && undefined.values[b / instruction.width] >> lane & 1;
}

void report_unset(const Look& look, uint64_t offset, uint32_t unset) {
  look.broke("uninitialised", "read of uninitialised " + look.place(offset + __builtin_ctz(unset)));
}

template <bool writes>
void shadow_lanes(Look look, SharedShadow& shadow, const uint64_t* offsets, Mask mask,
                  uint32_t bytes, bool atomic, uint32_t mine) {
  Warp& warp = look.warp;
  const uint32_t number = number_of(warp, look.in);
  if (writes) ++shadow.writes;
  const bool stores = writes && warp.undefined.by == &look.in;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    const uint64_t offset = offsets[lane];
    Region& region = shadow.regions[offset >> Region::kShift];
    Cell* cell = region.at(offset, bytes);
    look.lane = lane;
    look.cell = 1u << region.shift;
    look.host = reinterpret_cast<uint64_t>(look.block->shared) + offset;
    uint64_t where = offset;
    for (uint32_t n = bytes >> region.shift; n > 0; --n, ++cell, where += 1u << region.shift)
      touch<writes, false>(look, *cell, where,
                           reinterpret_cast<uint64_t>(look.block->shared) + where, mine,
                           info_of(number, lane));
    const uint32_t unset = shadow.unset_in(offset, bytes);
    if (!writes) {
      if (unset) [[unlikely]]
        load_unset(warp, look.in, lane, bytes, unset);
    } else if (unset | uint32_t{stores}) {
      if (atomic && unset) report_unset(look, offset, unset);
      uint32_t now = 0;
      if (stores)
        for (uint32_t b = 0; b < bytes; ++b)
          now |= uint32_t{stores_unset(warp, look.in, lane, b)} << b;
      uint16_t& bits = shadow.unset[offset / 16];
      bits = static_cast<uint16_t>((bits & ~(((1u << bytes) - 1) << offset % 16)) |
                                   now << offset % 16);
    }
  }
}

Look look_of(Warp& warp, const Instruction& in, const Block* block, Access kind) {
  return {warp, in, 0, block, !is_read(kind), kGeneric, is_strong(kind), reach(in), 0};
}
uint32_t segment_for(const Look& look) {
  return look.strong ? strong_segment_of(look.warp, look.scope) : segment_of(look.warp);
}

// Shadow of global memory, in pages that are allocated at first touch.
struct Page {
  static constexpr uint32_t kShift = 16;
  std::array<Region, (1u << kShift) / Region::kBytes> regions;
};
constexpr size_t kMostPages = 4096, kRecent = 64;
std::unordered_map<uint64_t, std::unique_ptr<Page>> pages;
struct Recent {
  uint64_t number;
  Page* page;
};
std::array<Recent, kRecent> recent{};

Region& global_region(uint64_t address) {
  const uint64_t number = address >> Page::kShift;
  Recent& known = recent[number % kRecent];
  if (known.number != number || !known.page) [[unlikely]] {
    auto& page = pages[number];
    if (!page) page = std::make_unique<Page>();
    known = {number, page.get()};
  }
  return known.page->regions[address >> Region::kShift & (known.page->regions.size() - 1)];
}

// ld.global.nc reads no memory that its launch writes, before or after. Of several readers the last
// one is known.
template <bool writes>
void check_read_only(const Look& look, const Cell& cell, uint64_t where) {
  const Instruction* other = nullptr;
  if constexpr (writes) {
    if (!cell.read || is_over(cell.read)) return;
    other = &look.other(cell.read_info);
    if (!is_read_only(*other)) return;
  } else {
    if (!is_read_only(look.in) || !cell.wrote || is_over(cell.wrote)) return;
    other = &look.other(cell.write_info);
  }
  look.broke("read-only",
             look.act(where) +
                 (writes ? ", which ld.global.nc reads in the same launch, at"
                         : " by ld.global.nc, written in the same launch at") +
                 at_line(look.warp, *other),
             other);
}

template <bool writes>
void shadow_addresses(Look look, const uint64_t* addresses, Mask mask, uint32_t bytes,
                      uint32_t mine) {
  const uint32_t number = number_of(look.warp, look.in);
  for (Mask rest = mask; rest; rest &= rest - 1) {
    look.lane = __builtin_ctz(rest);
    uint64_t where = look.host = addresses[look.lane];
    Region& region = global_region(where);
    Cell* cell = region.at(where, bytes);
    look.cell = 1u << region.shift;
    for (uint32_t n = bytes >> region.shift; n > 0; --n, ++cell, where += look.cell) {
      check_read_only<writes>(look, *cell, where);
      touch<writes, false>(look, *cell, where, where, mine, info_of(number, look.lane));
    }
  }
}

// A contiguous range, at any alignment, that an asynchronous operation accesses; host: address of
// its first byte.
template <bool writes, typename Of>
void touch_range(Look look, uint64_t begin, uint64_t host, uint64_t bytes, uint32_t mine,
                 Of region_of) {
  const uint32_t info = info_of(number_of(look.warp, look.in), look.lane);
  for (uint64_t where = begin; where < begin + bytes;) {
    Region& region = region_of(where);
    uint32_t size = 16;
    while (where % size || where + size > begin + bytes) size /= 2;
    Cell* cell = region.at(where, size);
    // Cells up to the end of the region or of the range.
    const uint64_t region_end = (where | (Region::kBytes - 1)) + 1;
    const uint64_t end = std::min(region_end, begin + bytes);
    look.cell = 1u << region.shift;
    for (; where + look.cell <= end; where += look.cell, ++cell) {
      if (writes && !look.block) check_read_only<true>(look, *cell, where);
      touch<writes, true>(look, *cell, where, host + (where - begin), mine, info);
    }
  }
}

}  // namespace

void shadow_shared(Warp& warp, const Instruction& in, Block& block, const uint64_t* offsets,
                   Mask mask, uint32_t bytes, Access kind) {
  const Look look = look_of(warp, in, &block, kind);
  const uint32_t mine = segment_for(look);
  if (in.control != Control::converge) warp.timeline->touched |= mask;
  const bool atomic = kind == Access::atomic;
  if (look.writes)
    shadow_lanes<true>(look, *block.shadow, offsets, mask, bytes, atomic, mine);
  else
    shadow_lanes<false>(look, *block.shadow, offsets, mask, bytes, atomic, mine);
}

void shadow_global(Warp& warp, const Instruction& in, const uint64_t* addresses, Mask mask,
                   uint32_t bytes, Access kind) {
  if (!warp.timeline) return;
  const Look look = look_of(warp, in, nullptr, kind);
  const uint32_t mine = segment_for(look);
  if (look.writes) warp.timeline->touched |= mask;
  if (look.writes)
    shadow_addresses<true>(look, addresses, mask, bytes, mine);
  else
    shadow_addresses<false>(look, addresses, mask, bytes, mine);
}

bool has_doubts() { return !doubts.empty(); }

void stored(const uint64_t* addresses, Mask mask, const char* const* rows, uint32_t bytes) {
  for (const Doubt& doubt : std::exchange(doubts, {})) {
    const Look& look = doubt.look;
    const uint64_t from = look.host - addresses[look.lane];
    const bool of_lane = segment(doubt.other).agent == look.warp.timeline->agent;
    // The value of a lane that runs the same instruction is not in memory yet.
    const uint32_t lane = doubt.cell.write_info >> kLaneShift & (kLanes - 1);
    const bool of_instruction = of_lane &&
                                is_same_instruction(doubt.cell, number_of(look.warp, look.in)) &&
                                mask >> lane & 1 && look.host - addresses[lane] < bytes;
    const char* before = of_instruction ? rows[lane] + (look.host - addresses[lane]) : doubt.before;
    if (std::memcmp(before, rows[look.lane] + from, look.cell) == 0) {
      if (of_instruction)
        doubt.at->write_info |= kSeveralLanes << kLaneShift;
      else
        note(look.warp, look.in, look.lane, "equal values",
             look.act(doubt.where) + ", to which " +
                 (of_lane ? "another lane of the warp" : name_of(look.warp, segment(doubt.other))) +
                 " stores the same value in no order");
    } else if (of_lane) {
      explain_lanes(look, doubt.cell, doubt.where);
    } else {
      explain_race(look, doubt.cell, doubt.where, doubt.other, true);
    }
  }
}

void forget_global_shadow() {
  pages.clear();
  recent = {};
}

void shadow_launched() {
  numbers = {};
  doubts.clear();
  forget_last_stored();
  if (pages.size() > kMostPages) forget_global_shadow();
}

void shadow_local(Warp& warp, const Instruction& instruction, uint64_t offset, int lane,
                  uint32_t bytes, Access kind) {
  uint8_t* written = warp.block->shadow->local_written.data() + offset;
  if (is_read(kind)) {
    uint32_t unset = 0;
    for (uint32_t b = 0; b < bytes; ++b) unset |= uint32_t{!written[b]} << b;
    if (unset) load_unset(warp, instruction, lane, bytes, unset);
  } else {
    for (uint32_t b = 0; b < bytes; ++b) written[b] = !stores_unset(warp, instruction, lane, b);
  }
}

bool holds_values(const Block& block, uint64_t offset, uint32_t bytes) {
  return !block.shadow || !block.shadow->unset_in(offset, bytes);
}

void copy_issued(Warp& warp, const Instruction& in, const AsyncCopy& copy) {
  Look look = look_of(warp, in, warp.block, Access::write);
  look.flight = kCopying;
  uint64_t offsets[kLanes];
  offsets[copy.lane] = copy.destination;
  shadow_lanes<true>(look, *warp.block->shadow, offsets, Mask{1} << copy.lane, copy.bytes, false,
                     segment_of(warp));
}

// segment: agents that have waited for the copy.
void copy_landed(Warp& warp, const AsyncCopy& copy, uint32_t segment) {
  Region& region = warp.block->shadow->regions[copy.destination >> Region::kShift];
  Cell* cell = region.at(copy.destination, copy.bytes);
  const uint32_t mine = segment ? segment : segment_of(warp);
  ++warp.block->shadow->writes;
  for (uint32_t n = copy.bytes >> region.shift; n > 0; --n, ++cell)
    *cell = {mine, info_of(number_of(warp, *copy.from), copy.lane), 0, 0};
}

void bulk_issued(Warp& warp, const Instruction& in, int lane, Block& target, uint32_t offset,
                 uint32_t bytes, bool reduces, uint32_t segment) {
  if (!target.shadow) return;
  SharedShadow& shadow = *target.shadow;
  const uint32_t flight = reduces ? kBulk | kReducing : kBulk;
  const Look look{warp, in, lane, &target, true, kAsyncShared, reduces, kClusterScope, flight};
  ++shadow.writes;
  if (reduces) shadow.reductions.resize(shadow.unset.size());
  for (uint32_t at = offset; at < offset + bytes;) {
    const uint32_t size = std::min(16 - at % 16, offset + bytes - at);
    if (reduces) {
      if (const uint32_t unset = shadow.unset_in(at, size)) report_unset(look, at, unset);
      ++shadow.reductions[at / 16];
    }
    shadow.unset[at / 16] &= static_cast<uint16_t>(~(((1u << size) - 1) << at % 16));
    at += size;
  }
  touch_range<true>(
      look, offset, reinterpret_cast<uint64_t>(target.shared) + offset, bytes, segment,
      [&](uint64_t where) -> Region& { return shadow.regions[where >> Region::kShift]; });
}

void bulk_read(Warp& warp, const Instruction& in, int lane, uint64_t offset, uint32_t bytes,
               uint32_t segment) {
  if (!warp.block->shadow) return;
  SharedShadow& shadow = *warp.block->shadow;
  const Look look{warp, in, lane, warp.block, false, kAsyncShared, false, kCta, 0};
  for (uint64_t at = offset; at < offset + bytes;) {
    const auto size = static_cast<uint32_t>(std::min(16 - at % 16, offset + bytes - at));
    if (const uint32_t unset = shadow.unset_in(at, size)) {
      report_unset(look, at, unset);
      break;
    }
    at += size;
  }
  touch_range<false>(
      look, offset, reinterpret_cast<uint64_t>(warp.block->shared) + offset, bytes, segment,
      [&](uint64_t where) -> Region& { return shadow.regions[where >> Region::kShift]; });
}

void bulk_global(Warp& warp, const Instruction& in, int lane, uint64_t address, uint32_t bytes,
                 bool writes, bool reduces, uint32_t segment) {
  if (!warp.timeline || (!writes && is_constant(address, bytes))) return;
  const Look look{warp, in, lane, nullptr, writes, kAsyncGlobal, reduces, kGpu, 0};
  const auto region = [](uint64_t where) -> Region& { return global_region(where); };
  if (writes)
    touch_range<true>(look, address, address, bytes, segment, region);
  else
    touch_range<false>(look, address, address, bytes, segment, region);
}

// Fast path: most cells equal the previous one, with the same writer and the same reader or none.
void operand_read(Warp& warp, const Instruction& in, const uint64_t* offsets, uint32_t count,
                  uint32_t segment, const uint64_t* b) {
  SharedShadow& shadow = *warp.block->shadow;
  const Look look{warp, in, 0, warp.block, false, kAsyncShared, false, kCta, 0};
  const uint32_t info = number_of(warp, in), reader_info = read_info(info, segment);
  const Timeline& t = *warp.timeline;
  ReadOperand found{&in, b ? *b : 0, segment, shadow.writes};
  bool alike = b, known = false;
  uint32_t wrote = 0, read = segment;  // what happens before the product; `wrote` if known
  for (uint32_t i = 0; i < count; ++i) {
    uint64_t where = offsets[i];
    Region& region = shadow.regions[where >> Region::kShift];
    Cell* cell = region.at(where, 16);
    const uint32_t size = 1u << region.shift;
    for (; where < offsets[i] + 16; where += size, ++cell) {
      if (known && cell->wrote == wrote && !(cell->write_info & kInFlight)) [[likely]] {
        if (cell->read == segment) continue;
        if (cell->read == read) {
          cell->read = segment;
          cell->read_info = reader_info;
          continue;
        }
      }
      const uint32_t before = cell->read;
      touch<false, true>(look, *cell, where, 0, segment, info);
      known = t.has_passed(cell->wrote, kAsyncShared);
      wrote = cell->wrote;
      if (t.has_passed(before, kAsyncShared)) read = before;
      alike = alike && cell->read == segment && !(cell->write_info & kInFlight) &&
              found.add_writer(wrote);
    }
  }
  if (b) shadow.operand(*b) = alike ? found : ReadOperand{};
}

}  // namespace ptxvm
