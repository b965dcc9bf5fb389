// The PTX machine's shared declarations. A warp is 32 lanes that execute one instruction at a time
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

// A program that the machine refuses, or a kernel that broke a rule (KernelFault of reports.h). The
// message names kernel, PTX line and instruction text; the launch catches it and returns a CUDA
// error.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
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

// Action of the scheduler in addition to, or instead of, calling the handler.
enum class Control : uint8_t {
  none,
  branch,    // to `target`
  indirect,  // to an entry of the kernel's table number `target`, selected by the last slot
  exit,      // ret, exit
  barrier,   // bar, barrier: blocks the warp until the barrier releases it
  converge,  // waits for all live lanes named by the member mask in slot `member` (kNoSlot: the
             // whole warp, the .aligned instructions), then runs once for all of them
  await,     // lanes that the handler leaves in Warp::asleep run it again when they are woken
};

struct Instruction {
  Handler run = nullptr;
  // Byte offsets into the register file: destinations first, then sources; kNoSlot for an absent
  // operand or "_".
  const uint32_t* slots = nullptr;
  int64_t offset = 0;   // constant part of an address
  int64_t offset2 = 0;  // constant part of a second address (the source of cp.async)
  uint32_t target = 0;
  uint32_t guard = kNoSlot;
  uint32_t member = kNoSlot;      // a decode function sets its position among `slots`
  uint32_t line = 0;              // line in the PTX text
  uint8_t writes = 0, reads = 0;  // numbers of destination and source slots
  bool guard_negated = false;
  Control control = Control::none;
  uint8_t variant = 0, width = 0, flags = 0;  // meaning is private to the handler
  uint8_t order = 0;                          // memory order and scope: clocks.h
  const char* text = nullptr;                 // as in the PTX, for reports
};

// Address spaces. A generic address is a host pointer (global) or lies in one of these windows.
// Shared memory of other blocks of the cluster (Space::cluster) has the block's rank + 1 above the
// offset.
enum class Space : uint8_t { generic, global, shared, local, param, constant, cluster };
constexpr uint64_t kSharedWindow = uint64_t{1} << 60;
constexpr uint64_t kLocalWindow = uint64_t{2} << 60;
constexpr uint64_t kParamWindow = uint64_t{3} << 60;
constexpr uint64_t kWindowMask = uint64_t{0xf} << 60;
constexpr int kRankShift = 24;  // of shared memory addresses; 0 in the bits above: own block
constexpr uint64_t kRankMask = 0x1f;

struct Parameter {
  std::string name, type;  // type of an element: u64, f32, b8, ...
  uint32_t offset, bytes, alignment;
  uint32_t count;  // elements of an array, such as a struct; 0: a scalar
};

// One statement of a kernel body, split into parts but not decoded.
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

// A variable in shared memory; `bytes` is 0 for dynamic shared memory.
struct SharedVariable {
  std::string name;  // mangled
  uint32_t offset, bytes;
};

struct Kernel {
  std::string name, title;  // mangled and demangled
  Module* module = nullptr;
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;
  uint32_t max_threads = 0;                      // .maxntid, 0 if none
  uint32_t required[3] = {};                     // .reqntid, 0 if none
  uint32_t cluster[3] = {};                      // .reqnctapercluster, 0 if none
  bool any_cluster = false;                      // by attribute: more than 8 blocks are allowed too
  uint32_t min_blocks = 1;                       // .minnctapersm
  uint32_t static_shared = 0;                    // bytes
  uint32_t dynamic_offset = 0;                   // start of .extern .shared
  std::vector<SharedVariable> shared_variables;  // that the code names
  uint32_t local_bytes = 0;                      // per lane
  uint32_t stack = 0;  // offset of the alloca stack in local memory, 0 if there is none
  std::map<int, uint32_t> max_dynamic_shared;  // by device, set by cudaFuncSetAttribute
  uint32_t registers = 0;          // per thread, from the cubin next to the PTX, 0 if unknown
  std::vector<Instruction> code;   // empty until the first launch decodes it
  const Device* device = nullptr;  // device for which it was decoded
  std::vector<uint32_t> slots;     // of all instructions
  std::vector<char> texts;         // of all instructions
  std::vector<std::vector<uint32_t>> tables;  // targets of indirect branches
  uint32_t file_bytes = 0;                    // size of one warp's register file
  uint32_t scratch = kNoSlot;  // offset of kScratchBytes, in kernels with wmma or wgmma
  struct Constant {  // slots filled before the first instruction: immediates and addresses
    uint32_t slot;
    int bits;
    uint64_t value;
  };
  std::vector<Constant> constants;
  struct Special {
    uint32_t slot;
    int index;  // index into the scheduler's table of special registers
    int bits;
  };
  std::vector<Special> specials;
  // Additional operands of mma and wmma, indexed by Instruction::target.
  std::vector<std::shared_ptr<const Tile>> tiles;
  std::vector<std::shared_ptr<const Wmma>> products;
  std::vector<std::shared_ptr<const WmmaCopy>> copies;
  // Counting mode: executions and active lanes per instruction, summed over launches since reset.
  std::vector<uint64_t> issued, active;
};

// Lanes of a warp that share one program counter.
struct Group {
  uint32_t pc;
  Mask mask;
  enum class Wait : uint8_t { none, barrier, converge, sleep } wait = Wait::none;
  uint32_t barrier = 0;  // or what a sleeping group waits for (async.h)
};

// A pending cp.async copy of one lane.
struct AsyncCopy {
  uint32_t destination;  // shared address
  uint32_t number;       // sequence number within the warp
  uint64_t source;
  const Instruction* from;
  uint32_t group;
  uint8_t bytes, source_bytes, lane;
  bool landed;  // the data is in place, though no wait has completed it
};

// Check mode: how the running instruction uses values that were never set.
struct Undefined {
  const Instruction* by = nullptr;      // the other fields are valid for this instruction only
  const Instruction* origin = nullptr;  // instruction that the values come from
  Mask loaded = 0;                      // lanes that read memory that was never written (ldmatrix)
  Mask values[8] = {};  // lanes without a value, per destination or per stored value
};

// A store that memory does not hold yet: store_buffer.h.
struct PendingStore {
  uint64_t address;
  uint32_t epoch, warp;  // epoch: number of releases and fences of the warp before it
  uint8_t bytes, lane;
  bool shared;  // other threads of the block see it
  char data[16];
};

struct Product;   // ops_wgmma.cpp: a wgmma that has not taken effect
struct Timeline;  // clocks.h: what happens before the next access of a warp

struct Warp {
  char* file;  // registers
  Block* block;
  uint32_t index;  // index in its block
  Mask live;       // lanes that have not exited
  uint32_t pc = 0;
  Mask mask = 0;       // lanes that run now
  uint64_t stint = 0;  // instructions since another group ran
  Mask carry = 0;      // CC.CF, the carry flag of add.cc and related instructions
  std::vector<Group> others;
  std::vector<AsyncCopy> copies;
  uint32_t copies_issued = 0;
  uint32_t copy_groups[kLanes] = {};  // commit_group instructions executed per lane
  uint32_t bulk_groups[kLanes] = {};  // cp.async.bulk.commit_group instructions executed per lane
  Mask asleep = 0;                    // lanes that must wait, set by the handler
  uint32_t asleep_for = 0;            // what they wait for (async.h)
  Mask timed_out = 0;                 // lanes whose wait must end without its condition
  uint32_t polls = 0;                 // number of mbarrier.test_wait that found nothing
  Mask cluster_arrived = 0, cluster_phase = 0;  // at barrier.cluster: lanes, phase parity
  uint32_t registers = 0;                       // registers per lane, set by setmaxnreg
  uint32_t store_epoch = 0;                     // PendingStore::epoch of its next store
  std::vector<std::shared_ptr<Product>> products;
  // Check mode: slots that products in flight write; the lanes that will hold a value after they
  // have landed, and the group of the last product.
  struct Flight {
    uint32_t slot;
    Mask settled;
    uint32_t group;
  };
  std::vector<Flight> flights;
  std::vector<uint32_t> flight_of;  // per 64-byte unit of the file: its index in flights + 1, or 0
  uint32_t product_groups = 0;      // number of wgmma.commit_group executed
  // Instructions that all warps of a warpgroup must execute alike (async.h): the number that this
  // warp has executed; in the first warp, the number that all have executed, and the later ones.
  struct Alike {
    const Instruction* by;
    uint64_t a, b;
    uint32_t warps;
  };
  std::deque<Alike> alike;
  uint64_t alike_done = 0, alike_by_all = 0;
  // Check mode, per 64-byte unit of the file: lanes that hold a value, and the instruction that
  // invalidated the others (null: they never had one).
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
  uint32_t exited = 0;                   // number of threads that have exited
  std::vector<PendingStore> stores;      // order=weak
  std::shared_ptr<SharedShadow> shadow;  // check mode
};

template <typename T>
T* lanes(Warp& warp, uint32_t slot) {
  return reinterpret_cast<T*>(warp.file + slot);
}
inline Mask& predicate(Warp& warp, uint32_t slot) { return *lanes<Mask>(warp, slot); }

// Stores values in the lanes of the mask; other lanes keep theirs.
template <typename T>
void assign(T* destination, const T* values, Mask mask) {
  if (mask == kFullMask) {
    std::memcpy(destination, values, sizeof(T) * kLanes);
    return;
  }
  for (int i = 0; i < kLanes; ++i)
    if (mask >> i & 1) destination[i] = values[i];
}

// Reports and throws Fault for a rule that `instruction` broke in `lane`.
[[noreturn]] void fault(Warp&, const Instruction&, int lane, const std::string& what);

// Options of the machine: environment PTXVM_* at start, ptxvm_configure later.
struct Options {
  bool check = false;  // checks of check.h other than bounds and alignment (always on)
  bool go_on = false;  // continue after a broken rule of check mode: reports.h
  bool quiet = false;  // reports are fetched or logged, not printed
  bool count = false;  // counters.h
  // Ask for proxy fences that the PTX ISA asks for and that practice omits: before an asynchronous
  // write over what ordinary reads read, and between cp.async and asynchronous reads.
  bool strict_proxy = false;
  int approximate =
      0;  // -1, 0, 1: ex2, rcp, ... as good as can be, or off by their bound down or up
  bool hardware_mma = false;  // tensor cores add as the device's do, not exactly: tensor.h
  // weak: seeded, and stores wait in a buffer: store_buffer.h. sleepy: seeded, and one warp of each
  // block at a time runs only when no other can.
  enum class Order : uint8_t { forward, reverse, seeded, weak, sleepy } order = Order::forward;
  uint64_t seed = 0;
  uint32_t resident_blocks = 8;  // number of blocks that run interleaved
  uint32_t fuel = 20000;         // instructions before the next warp's turn (seeded: upper bound)
  uint64_t watchdog = 4000;  // million instructions without a finished block that count as a hang
  // When asynchronous operations take effect, between issue and the wait that orders them.
  enum class Async : uint8_t { latest, earliest, seeded } async = Async::latest;
  uint64_t async_seed = 0;
};
extern Options options;

}  // namespace ptxvm
