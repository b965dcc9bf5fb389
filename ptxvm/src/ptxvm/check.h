// One hook for every memory access. Bounds and alignment are always checked; check mode adds
// initialisation and races, counting mode counts the traffic.
#pragma once
#include "ptxvm/machine.h"

namespace ptxvm {

// Strong accesses (volatile, relaxed, acquire, release, atomic) do not race with one another if the
// scope of each includes the other.
enum class Access : uint8_t { read, write, strong_read, strong_write, atomic };
enum class Traffic : uint8_t { load, store, atomic, copy, matrix };  // row of the counters

// Host address of `bytes` bytes at `address` of a space for one lane, or a Fault. `address` of
// shared and local memory may be plain or in its window; generic addresses are resolved here.
char* access(Warp&, const Instruction&, Space, uint64_t address, int lane, uint32_t bytes, Access);

// access() for all lanes in the mask: addresses become host addresses. Entries of the other lanes
// become the first active lane's address, so that reading them is harmless.
void resolve(Warp&, const Instruction&, Space, uint64_t* addresses, Mask, uint32_t bytes, Access);

// Stores over what racing stores wrote are reported if the values differ. The handler of st passes
// the host addresses and values of its lanes if there are such.
bool has_doubts();
void stored(const uint64_t* addresses, Mask, const char* const* rows, uint32_t bytes);

// Checks that a range of global memory, of any size, lies in one allocation.
void require_global(Warp&, const Instruction&, int lane, uint64_t address, uint32_t bytes,
                    uint32_t alignment, Access);

// A cp.async copy into shared memory between its issue and the wait that completes it. Race checks
// see a write at both ends and an error in every access between them. segment (clocks.h): the
// agents that know of the copy; 0: the warp that waits. No-ops unless checking.
void copy_issued(Warp&, const Instruction&, const AsyncCopy&);
void copy_landed(Warp&, const AsyncCopy&, uint32_t segment);

// Bulk copy into shared memory of a block of the cluster. Its source in shared memory must hold
// values; so must the destination of a reduction, which other reductions may update meanwhile.
void bulk_issued(Warp&, const Instruction&, int lane, Block& target, uint32_t offset,
                 uint32_t bytes, bool reduces, uint32_t segment);
void bulk_landed(Block& target, uint32_t offset, uint32_t bytes, bool reduces, uint32_t segment);
void bulk_read(Warp&, const Instruction&, int lane, uint64_t offset, uint32_t bytes,
               uint32_t segment);
// Global memory that a bulk copy reads or writes.
void bulk_global(Warp&, const Instruction&, int lane, uint64_t address, uint32_t bytes, bool writes,
                 bool reduces, uint32_t segment);
// Shared memory that wgmma reads from its issue on, in units of 16 bytes; B is passed with its
// descriptor, since the other warps of the warpgroup read the same. was_read_alike: another warp
// has read the same B, and checking it again would find nothing new. holds_values: all bytes are
// initialised.
void operand_read(Warp&, const Instruction&, const uint64_t* offsets, uint32_t count,
                  uint32_t segment, const uint64_t* b);
bool was_read_alike(Warp&, const Instruction&, uint64_t b, uint32_t segment);
bool holds_values(const Block&, uint64_t offset, uint32_t bytes);

// The block whose shared memory an address of Space::cluster names; the address becomes an offset
// in it. Faults if there is no such block or if it has finished.
Block& block_of(Warp&, const Instruction&, int lane, uint64_t& address);

// Counts one warp-wide request: addresses of the lanes in mask, `bytes` each. No-op unless
// counting.
void count_request(Warp&, const Instruction&, Space, const uint64_t* addresses, Mask,
                   uint32_t bytes, Traffic);
// Counts a bulk copy: contiguous bytes, read or written, of global and of shared memory.
void count_bulk(uint32_t global_bytes, uint32_t shared_bytes);
// Counts the shared memory that wgmma reads: A per warp, B once for the four warps.
void count_operands(uint32_t a_bytes, uint32_t b_bytes);

// Global allocations, as the host registers them. Unregistered memory faults.
void register_memory(const void* base, size_t bytes, bool writable);
void unregister_memory(const void* base);
void unregister_all_memory();

// Position of a range that the host copies or fills: inside one allocation, outside of all, or
// across.
enum class Where : uint8_t { inside, outside, across };
Where locate(const void* base, size_t bytes, Access);

// Called by the scheduler.
void block_started(Block&);
void block_finished(Block&);
// check_guard: before a guard is evaluated for the lanes in the mask. The others: before and after
// an instruction runs for the lanes in the mask; required sources must hold values, and
// destinations hold values where the sources did (definedness.cpp).
void check_guard(Warp&, const Instruction&, Mask);
void check_registers(Warp&, const Instruction&, Mask);
void define_registers(Warp&, const Instruction&, Mask);

// Registers of a wgmma, accumulators first among the destinations: they hold no value from the
// issue to the wait. lost: lanes without a value, per accumulator. No-ops unless checking.
void missing_values(Warp&, const uint32_t* slots, int count, Mask* lost);
void accumulators_issued(Warp&, const Instruction&, int count);
void accumulators_landed(Warp&, const Instruction&, int count, bool accumulates, const Mask* lost);
void accumulators_waited(Warp&, uint64_t keep);  // all groups except the last `keep`

// From its issue to the wait, no other instruction may use the registers of a wgmma, and a
// wgmma.fence must separate writes to them from the issue.
void product_registers(Warp&, const Instruction&, const uint32_t* slots, int count);
void product_fence(Warp&);

}  // namespace ptxvm
