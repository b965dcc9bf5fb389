// order=weak: a store waits in a buffer of its thread before memory holds it, so that other threads
// may see two stores of different places in another order, or a store after a later load of its
// thread (store buffering). Loads and atomics take effect when they are issued.
//
// What a fence.sc of .cta scope or a barrier of the block passes on is visible in the block, and
// still waits for all others.
#pragma once
#include "ptxvm/machine.h"
#include "ptxvm/random.h"

namespace ptxvm {

// Instruction::order, above the bits of clocks.h: what happens to the buffer before the instruction
// runs. kFlushes: memory holds all stores of the warp; kShares: the block sees them.
constexpr uint8_t kFlushes = 64, kShares = 128;

inline bool is_weak() { return options.order == Options::Order::weak; }

// Stores `bytes` bytes of one lane at a host address.
void defer_store(Warp&, int lane, uint64_t address, const void* data, uint32_t bytes);
// Before an access of the lanes to host addresses: stores that they must see reach memory, and with
// `all_before` those before the last release or fence.
void settle_stores(Warp&, const uint64_t* addresses, Mask, uint32_t bytes, bool all_before);
void order_stores(Warp&);  // later stores of the warp follow earlier ones
void share_stores(Warp&);
void flush_stores(Warp&);
// Some stores of the block reach memory, at a moment that nothing else determines.
void land_some_stores(Block&, Random&);
// Check mode: the value at a place if all stores had reached memory. Of the launch.
void read_last_stored(uint64_t address, uint32_t bytes, void* data);
void forget_last_stored();

}  // namespace ptxvm
