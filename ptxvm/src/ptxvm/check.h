// One hook for every access to memory. Bounds and alignment are always checked; in check mode also
// initialisation and races, and in counting mode the traffic is counted.
#pragma once
#include "ptxvm/machine.h"

namespace ptxvm {

// Strong accesses (volatile, relaxed, acquire, release, atomic) do not race with one another
// where the scope of each holds the other.
enum class Access : uint8_t { read, write, strong_read, strong_write, atomic };
enum class Traffic : uint8_t { load, store, atomic, copy, matrix };  // row of the counters

// Host address of `bytes` bytes at `address` of a space for one lane, or a Fault. `address` of
// shared and local memory may be plain or in its window; generic addresses are resolved here.
char* access(Warp&, const Instruction&, Space, uint64_t address, int lane, uint32_t bytes, Access);

// The same for the lanes in mask at once: addresses become host addresses. Entries of other lanes
// become those of the first lane in mask, so that reading them is harmless.
void resolve(Warp&, const Instruction&, Space, uint64_t* addresses, Mask, uint32_t bytes, Access);

// Bytes of global memory, any number of them, that must lie in one allocation.
void require_global(Warp&, const Instruction&, int lane, uint64_t address, uint32_t bytes,
                    uint32_t alignment, Access);

// An asynchronous copy into shared memory between its issue and the wait that completes it. Race
// checks see a write at both ends and an error in every access between them. segment (clocks.h): of
// those that know of the copy; 0: of the warp that waits. No-ops unless checking.
void copy_issued(Warp&, const Instruction&, const AsyncCopy&);
void copy_landed(Warp&, const AsyncCopy&, uint32_t segment);

// The same of a bulk copy into shared memory of a block of the cluster. Its source in shared memory
// must hold values; of a reduction its destination too, which others may reduce into meanwhile.
void bulk_issued(Warp&, const Instruction&, int lane, Block& target, uint32_t offset,
                 uint32_t bytes, bool reduces, uint32_t segment);
void bulk_landed(Block& target, uint32_t offset, uint32_t bytes, bool reduces, uint32_t segment);
void bulk_read(Warp&, const Instruction&, int lane, uint64_t offset, uint32_t bytes,
               uint32_t segment);
// What it reads or writes of global memory.
void bulk_global(Warp&, const Instruction&, int lane, uint64_t address, uint32_t bytes, bool writes,
                 bool reduces, uint32_t segment);
// What wgmma reads of shared memory from its issue on, 16 bytes each; of B with its descriptor, for
// the other warps of the warpgroup read the same. Whether one did, and this one would find no more.
// Whether bytes hold values.
void operand_read(Warp&, const Instruction&, const uint64_t* offsets, uint32_t count,
                  uint32_t segment, const uint64_t* b);
bool was_read_alike(Warp&, const Instruction&, uint64_t b, uint32_t segment);
bool holds_values(const Block&, uint64_t offset, uint32_t bytes);

// The block whose shared memory an address of Space::cluster names; the address becomes an offset
// in it. A fault if there is none or if it has finished.
Block& block_of(Warp&, const Instruction&, int lane, uint64_t& address);

// Counts one warp-wide request: addresses of the lanes in mask, `bytes` each. No-op unless
// counting.
void count_request(Warp&, const Instruction&, Space, const uint64_t* addresses, Mask,
                   uint32_t bytes, Traffic);
// Counts a bulk copy: contiguous bytes, read or written, of global and of shared memory.
void count_bulk(uint32_t global_bytes, uint32_t shared_bytes);
// Counts bytes of shared memory that wgmma reads as A, and as B once for the four warps.
void count_operands(uint32_t a_bytes, uint32_t b_bytes);

// Global allocations, as the host registers them. Unregistered memory faults.
void register_memory(const void* base, size_t bytes, bool writable);
void unregister_memory(const void* base);
void unregister_all_memory();

// Where a range lies that the host copies or fills: in one allocation, in none, or neither.
enum class Where : uint8_t { inside, outside, across };
Where locate(const void* base, size_t bytes, Access);

// Called by the scheduler.
void block_started(Block&);
void block_finished(Block&);
// Before a guard is asked, by the lanes in the mask. Before and after an instruction runs for the
// lanes in the mask: sources hold values where they must, destinations do where the sources did
// (definedness.cpp).
void check_guard(Warp&, const Instruction&, Mask);
void check_registers(Warp&, const Instruction&, Mask);
void define_registers(Warp&, const Instruction&, Mask);

// Registers of a wgmma, of which accumulators come first among the destinations: they hold no value
// from the issue to the wait. lost: lanes that get none, per accumulator. No-ops unless checking.
void missing_values(Warp&, const uint32_t* slots, int count, Mask* lost);
void accumulators_issued(Warp&, const Instruction&, int count);
void accumulators_landed(Warp&, const Instruction&, int count, bool accumulates, const Mask* lost);
void accumulators_waited(Warp&, uint64_t keep);  // all groups but the last `keep`

// The registers of a wgmma are its own from the issue to the wait, and a wgmma.fence lies between
// what wrote them and the issue.
void product_registers(Warp&, const Instruction&, const uint32_t* slots, int count);
void product_fence(Warp&);

}  // namespace ptxvm
