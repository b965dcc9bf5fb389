// What the PTX machine must know to check every access of a kernel: the memory of the tensors that
// an operator reads and writes. core/door.h notes them, CudaScope (core/stream.h) hands them over
// around a launch. Nothing but empty functions in a build without the machine; in one with it,
// core/emulated.cpp of the emulated library notes, core/stream.cpp of the other does not.
#pragma once
#include <cstdint>

namespace tokenmill::emulated {

#if defined(TOKENMILL_PTXVM)
inline constexpr bool kBuilt = true;

// Forgets the notes of this thread at both ends of an operator's call.
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
