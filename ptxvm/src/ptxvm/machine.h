// The PTX machine: what its parts share. A warp is 32 lanes that execute one instruction at a time
// under a mask; its registers are slots of 32 values each. Instructions are decoded once into a
// handler and the slots of its operands, so that nothing is looked up while a kernel runs.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptxvm {

constexpr int kLanes = 32;
constexpr uint32_t kFullMask = 0xffffffffu;
constexpr uint32_t kNoSlot = 0xffffffffu;
constexpr uint32_t kScratchBytes = 8 * 4 * kLanes;  // fragments of wgmma, or D of wmma
using Mask = uint32_t;                              // one bit per lane

// A program that the machine refuses, or a kernel that broke a rule. What it says names kernel, PTX
// line and instruction text; thrown through the launch, which turns it into a CUDA error.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// An assertion of the kernel's own that did not hold.
struct FailedAssertion : Fault {
  using Fault::Fault;
};

struct Warp;
struct Block;
struct Kernel;
struct Module;
struct Instruction;
struct Device;
struct Tile;
struct Wmma;
struct WmmaCopy;

// Executes one instruction for the lanes in `mask`, which is never 0.
using Handler = void (*)(Warp&, const Instruction&, Mask mask);

// What the scheduler does beside, or instead of, calling the handler.
enum class Control : uint8_t {
  none,
  branch,    // to `target`
  indirect,  // to an entry of the kernel's table number `target`, chosen by the last slot
  exit,      // ret, exit
  barrier,   // bar, barrier: blocks the warp until the barrier releases it
  converge,  // waits for all live lanes named by the member mask in slot `member` (kNoSlot: the
             // whole warp, the .aligned instructions), then runs once for all of them
  await,     // lanes that the handler leaves in Warp::asleep run it again when something wakes them
};

struct Instruction {
  Handler run = nullptr;
  // Byte offsets into the register file: destinations first, then sources; kNoSlot for an operand
  // that is absent or "_".
  const uint32_t* slots = nullptr;
  int64_t offset = 0;   // constant part of an address
  int64_t offset2 = 0;  // of a second address (the source of cp.async)
  uint32_t target = 0;
  uint32_t guard = kNoSlot;
  uint32_t member = kNoSlot;      // a decode function gives the position among `slots`
  uint32_t line = 0;              // in the PTX text
  uint8_t writes = 0, reads = 0;  // numbers of destination and source slots
  bool guard_negated = false;
  Control control = Control::none;
  uint8_t variant = 0, width = 0, flags = 0;  // meaning is the handler's own
  uint8_t order = 0;                          // of memory: clocks.h
  const char* text = nullptr;                 // as in the PTX, for reports
};

// Address spaces. A generic address is a host pointer (global), or lies in one of these windows.
// Shared memory of other blocks of the cluster (Space::cluster) has their rank + 1 above the
// offset.
enum class Space : uint8_t { generic, global, shared, local, param, constant, cluster };
constexpr uint64_t kSharedWindow = uint64_t{1} << 60;
constexpr uint64_t kLocalWindow = uint64_t{2} << 60;
constexpr uint64_t kParamWindow = uint64_t{3} << 60;
constexpr uint64_t kWindowMask = uint64_t{0xf} << 60;
constexpr int kRankShift = 24;  // of addresses in shared memory; 0 in the bits above: the own block
constexpr uint64_t kRankMask = 0x1f;

struct Parameter {
  std::string name, type;  // of an element: u64, f32, b8, ...
  uint32_t offset, bytes, alignment;
  uint32_t count;  // elements of an array, such as a struct; 0: a scalar
};

// One statement of a kernel body, taken apart but not yet understood.
struct Statement {
  uint32_t line;
  std::string text;   // without the guard
  std::string guard;  // predicate register or empty
  bool guard_negated = false;
  std::vector<std::string> opcode;    // "ld.global.v4.b32" -> ld, global, v4, b32
  std::vector<std::string> operands;  // split at commas outside brackets and braces
  int scope = 0;                      // index into the kernel's scopes, innermost
  bool has(const char* part) const {
    for (const auto& p : opcode)
      if (p == part) return true;
    return false;
  }
};

struct Kernel {
  std::string name;
  Module* module = nullptr;
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;
  uint32_t max_threads = 0;                    // .maxntid, 0 if none
  uint32_t required[3] = {};                   // .reqntid, 0 if none
  uint32_t cluster[3] = {};                    // .reqnctapercluster, 0 if none
  bool any_cluster = false;                    // by attribute: of more than 8 blocks too
  uint32_t min_blocks = 1;                     // .minnctapersm
  uint32_t static_shared = 0;                  // bytes
  uint32_t dynamic_offset = 0;                 // of .extern .shared
  uint32_t local_bytes = 0;                    // per lane
  uint32_t stack = 0;                          // of alloca, in local memory, 0 if there is none
  std::map<int, uint32_t> max_dynamic_shared;  // by device, set by cudaFuncSetAttribute
  uint32_t registers = 0;                      // of the cubin beside the PTX, 0 if unknown
  std::vector<Instruction> code;               // empty until the first launch decodes it
  const Device* device = nullptr;              // for which it was decoded
  std::vector<uint32_t> slots;                 // of all instructions
  std::vector<char> texts;                     // of all instructions
  std::vector<std::vector<uint32_t>> tables;   // targets of indirect branches
  uint32_t file_bytes = 0;                     // size of one warp's register file
  uint32_t scratch = kNoSlot;                  // of kScratchBytes, where a kernel has w(g)mma
  struct Constant {  // slots filled before the first instruction: immediates and addresses
    uint32_t slot;
    int bits;
    uint64_t value;
  };
  std::vector<Constant> constants;
  struct Special {
    uint32_t slot;
    int index;  // into the scheduler's table of special registers
    int bits;
  };
  std::vector<Special> specials;
  // What mma and wmma have beside their slots, by Instruction::target.
  std::vector<std::shared_ptr<const Tile>> tiles;
  std::vector<std::shared_ptr<const Wmma>> products;
  std::vector<std::shared_ptr<const WmmaCopy>> copies;
  // Counting mode: executions and active lanes per instruction, summed over launches since reset.
  std::vector<uint64_t> issued, active;
};

// A group of lanes of a warp that stand at one program counter.
struct Group {
  uint32_t pc;
  Mask mask;
  enum class Wait : uint8_t { none, barrier, converge, sleep } wait = Wait::none;
  uint32_t barrier = 0;  // or what a sleeping group waits for, of async.h
};

// A pending cp.async copy of one lane.
struct AsyncCopy {
  uint32_t destination;  // shared address
  uint32_t number;       // among those of the warp
  uint64_t source;
  const Instruction* from;
  uint32_t group;
  uint8_t bytes, source_bytes, lane;
  bool landed;  // the data is there, though nothing says so yet
};

// Check mode: what the instruction that runs does with values that were never set.
struct Undefined {
  const Instruction* by = nullptr;      // the rest holds for this instruction alone
  const Instruction* origin = nullptr;  // of the values
  Mask loaded = 0;                      // lanes that read memory that was never written (ldmatrix)
  Mask values[8] = {};                  // per destination, or per value that is stored
};

struct Product;   // ops_wgmma.cpp: a wgmma that has not taken effect
struct Timeline;  // clocks.h: what comes before the next access of a warp

struct Warp {
  char* file;  // registers
  Block* block;
  uint32_t index;  // in its block
  Mask live;       // lanes that have not exited
  uint32_t pc = 0;
  Mask mask = 0;       // lanes that run now
  uint64_t stint = 0;  // instructions since another group ran
  Mask carry = 0;      // CC.CF, the condition code of add.cc and its kin
  std::vector<Group> others;
  std::vector<AsyncCopy> copies;
  uint32_t copies_issued = 0;
  uint32_t copy_groups[kLanes] = {};  // commit_group instructions executed per lane
  uint32_t bulk_groups[kLanes] = {};  // the same of cp.async.bulk
  Mask asleep = 0;                    // lanes for which the handler that ran must wait ...
  uint32_t asleep_for = 0;            // ... and what for, of async.h
  Mask timed_out = 0;                 // lanes whose wait must end without what they waited for
  uint32_t polls = 0;                 // mbarrier.test_wait that found nothing
  Mask cluster_arrived = 0, cluster_phase = 0;  // at barrier.cluster, and in which of two phases
  uint32_t registers = 0;                       // per lane, by setmaxnreg
  std::vector<std::shared_ptr<Product>> products;
  // Check mode: slots that products which nothing has waited for write; lanes that will hold a
  // value after those that have landed, and the group of the last.
  struct Flight {
    uint32_t slot;
    Mask settled;
    uint32_t group;
  };
  std::vector<Flight> flights;
  std::vector<uint32_t> flight_of;  // by 64-byte unit of the file: its place in flights + 1, or 0
  uint32_t product_groups = 0;      // wgmma.commit_group executed
  // What warps of a warpgroup do alike (async.h): how often this one did; in the first of them,
  // what some have done and others have not, after those that all have.
  struct Alike {
    const Instruction* by;
    uint64_t a, b;
    uint32_t warps;
  };
  std::deque<Alike> alike;
  uint64_t alike_done = 0, alike_by_all = 0;
  // Check mode: lanes of each 64-byte unit of the file that hold a value, and where the others lost
  // theirs (null: they never had one).
  std::vector<Mask> defined;
  std::vector<const Instruction*> origins;
  Undefined undefined;
  std::shared_ptr<Timeline> timeline;  // null unless checking
};

struct SharedShadow;  // shadow.h: readers, writers and initialised bytes of shared memory
struct Cluster;       // async.h

struct Block {
  const Kernel* kernel;
  uint32_t x, y, z;            // blockIdx
  uint32_t grid[3], shape[3];  // gridDim, blockDim
  uint32_t threads;
  char* shared;
  uint32_t shared_bytes;
  char* local;  // threads x local_bytes
  const char* parameters;
  const void* workspace;  // of a cooperative launch, else null
  std::vector<Warp> warps;
  Cluster* cluster;
  uint32_t rank = 0;                     // in the cluster
  uint32_t exited = 0;                   // threads
  std::shared_ptr<SharedShadow> shadow;  // check mode
};

template <typename T>
T* lanes(Warp& warp, uint32_t slot) {
  return reinterpret_cast<T*>(warp.file + slot);
}
inline Mask& predicate(Warp& warp, uint32_t slot) { return *lanes<Mask>(warp, slot); }

// destination = values in the lanes of mask; the rest keeps its value.
template <typename T>
void assign(T* destination, const T* values, Mask mask) {
  if (mask == kFullMask) {
    std::memcpy(destination, values, sizeof(T) * kLanes);
    return;
  }
  for (int i = 0; i < kLanes; ++i)
    if (mask >> i & 1) destination[i] = values[i];
}

// Reports and raises Fault for a rule that `instruction` broke in `lane`.
[[noreturn]] void fault(Warp&, const Instruction&, int lane, const std::string& what);
// What such a report says.
std::string report_of(const Warp&, const Instruction&, int lane, const std::string& what);

// How the machine runs: environment PTXVM_* at start, ptxvm_configure later.
struct Options {
  bool check = false;  // everything of check.h beyond bounds and alignment, which are always on
  bool go_on = false;  // after a broken rule of check mode: reports.h
  bool quiet = false;  // reports are taken or logged, not printed
  bool count = false;  // counters.h
  int approximate =
      0;  // -1, 0, 1: ex2, rcp, ... as good as can be, or off by their bound down or up
  bool hardware_mma = false;  // tensor cores add as those of the device do, not exactly: tensor.h
  enum class Order : uint8_t { forward, reverse, seeded } order = Order::forward;
  uint64_t seed = 0;
  uint32_t resident_blocks = 8;  // blocks that run interleaved
  uint32_t fuel = 20000;         // instructions before another warp gets its turn (seeded: at most)
  uint64_t watchdog = 4000;      // million instructions without a finished block that mean a hang
  // When what is asynchronous takes effect, between its issue and the wait that orders it.
  enum class Async : uint8_t { latest, earliest, seeded } async = Async::latest;
  uint64_t async_seed = 0;
};
extern Options options;

}  // namespace ptxvm
