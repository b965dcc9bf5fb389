// Memory of the tensors that an operator reads and writes, noted for the PTX machine, which checks
// every access of a kernel. core/door.h notes it, CudaScope (core/stream.h) passes it on around a
// launch. Empty functions in a build without the machine; in one with it, core/emulated.cpp of the
// emulated library notes, core/stream.cpp of the other library does not.
#pragma once
#include <cstdint>

namespace tokenmill::emulated {

#if defined(TOKENMILL_PTXVM)
inline constexpr bool kBuilt = true;

// Clears the notes of this thread at the start and at the end of an operator's call.
struct Frame {
  Frame();
  ~Frame();
};

void note(const void* base, int64_t bytes, bool writable);
#else
inline constexpr bool kBuilt = false;

struct Frame {};

inline void note(const void*, int64_t, bool) {}
#endif

}  // namespace tokenmill::emulated
