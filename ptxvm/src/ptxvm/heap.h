// Memory that kernels allocate by malloc and free in device code.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ptxvm {

extern size_t heap_limit;  // bytes that kernels may hold, cudaLimitMallocHeapSize

// Null for 0 bytes, and if the heap has no such memory.
void* allocate_on_heap(uint64_t bytes);
// False if the address is none of a living allocation. Its memory is not used again in this launch,
// so that later accesses to it fault, and so that its next owner does not race with this one.
bool free_on_heap(uint64_t address);

void heap_launched();  // at the begin of a launch
void register_heap();  // after all memory was unregistered

}  // namespace ptxvm
