// What the PTX machine must know to check every access of a kernel: the memory of the tensors that
// an operator reads and writes. core/door.h notes them, core/stream.h hands them over around the
// launch. Nothing but empty functions unless TOKENMILL_EMULATED.
#pragma once
#include <cstdint>

namespace tokenmill::emulated {

#if defined(TOKENMILL_EMULATED)
inline constexpr bool kEnabled = true;

// Forgets the notes of this thread at both ends of an operator's call.
struct Frame {
  Frame();
  ~Frame();
};

void note(const void* base, int64_t bytes, bool writable);

// While it lives the machine knows what was noted, and this thread alone uses the machine.
class Registration {
 public:
  Registration();
  ~Registration();
  Registration(const Registration&) = delete;
  Registration& operator=(const Registration&) = delete;
};
#else
inline constexpr bool kEnabled = false;

struct Frame {};

inline void note(const void*, int64_t, bool) {}
#endif

}  // namespace tokenmill::emulated
