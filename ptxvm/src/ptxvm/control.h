// Interface between the decoding of control instructions (control.cpp) and the scheduler
// (sched.cpp).
#pragma once
#include <cstdint>

namespace ptxvm {

// Instruction::flags of barriers and of bar.warp.sync.
constexpr uint8_t kAligned = 1;            // all lanes of a warp execute the same barrier
constexpr uint8_t kNegated = 2;            // the predicate of a reduction
constexpr uint8_t kConvergesAnywhere = 4;  // converges with the same instruction at another place
// Control::await: the whole warp executes it together.
constexpr uint8_t kAwaitsAligned = 128;

// A barrier of a block. Slots of the instructions: [result,] number, threads [, predicate].
struct Barrier {
  enum Kind : uint8_t { sync, arrive, sum, all, any };  // Instruction::variant
  uint32_t arrived = 0;                                 // threads
  uint32_t expected = 0;                                // threads, 0: all that have not exited
  bool in_use = false;
  uint32_t true_predicates = 0, predicates = 0;
};

}  // namespace ptxvm
