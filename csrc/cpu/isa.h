// Run-time choice among the copies of a kernel that CMake compiled for each instruction set.
#pragma once
#include <cstdint>
#if defined(TOKENMILL_EMULATED)
#include <stdexcept>
#endif

namespace tokenmill::cpu {

enum class Isa : int32_t { baseline, avx2, avx512, avx512_bf16 };

Isa best_isa();     // what this machine has
Isa current_isa();  // best_isa(), or a lower one asked for
const char* isa_name(Isa);
bool select_isa(const char* name);  // false: unknown, or not on this machine; "" restores the best

}  // namespace tokenmill::cpu

// Declares `void fn(const Params&)` in each namespace and defines the chooser
// `tokenmill::cpu::fn(const Params&)`. The emulated library has no CPU kernels.
#if defined(TOKENMILL_EMULATED)
#define TOKENMILL_CPU_KERNEL(fn, Params)                                             \
  namespace tokenmill {                                                              \
  namespace cpu {                                                                    \
  [[noreturn]] inline void fn(const Params&) { throw std::logic_error("not CUDA"); } \
  }                                                                                  \
  }
#elif defined(__x86_64__)
#define TOKENMILL_CPU_KERNEL(fn, Params) \
  namespace tokenmill {                  \
  namespace baseline {                   \
  void fn(const Params&);                \
  }                                      \
  namespace avx2 {                       \
  void fn(const Params&);                \
  }                                      \
  namespace avx512 {                     \
  void fn(const Params&);                \
  }                                      \
  namespace avx512_bf16 {                \
  void fn(const Params&);                \
  }                                      \
  namespace cpu {                        \
  inline void fn(const Params& p) {      \
    switch (current_isa()) {             \
      case Isa::avx512_bf16:             \
        return avx512_bf16::fn(p);       \
      case Isa::avx512:                  \
        return avx512::fn(p);            \
      case Isa::avx2:                    \
        return avx2::fn(p);              \
      case Isa::baseline:                \
        return baseline::fn(p);          \
    }                                    \
  }                                      \
  }                                      \
  }
#else
#define TOKENMILL_CPU_KERNEL(fn, Params)               \
  namespace tokenmill {                                \
  namespace baseline {                                 \
  void fn(const Params&);                              \
  }                                                    \
  namespace cpu {                                      \
  inline void fn(const Params& p) { baseline::fn(p); } \
  }                                                    \
  }
#endif
