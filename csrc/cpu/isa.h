// Run-time choice among the copies of a kernel that CMake compiled for each instruction set.
#pragma once
#include <cstdint>
#include <cstdlib>

// In the params.h of an operator, TOKENMILL_CPU_KERNEL declares the copies of its kernel, each in
// the namespace of its set, and defines the function that host.cpp calls.

#if !defined(__CUDACC__)
#include "cpu/built_isas.h"  // of CMakeLists.txt: TOKENMILL_EACH_BUILT_ISA(X, ...)
#endif

namespace tokenmill::cpu {

enum class Isa : int32_t { baseline, avx2, avx512, avx512_bf16 };

Isa best_isa();     // of those that were built, the best that this machine has
Isa current_isa();  // best_isa(), or the one asked for
const char* isa_name(Isa);
bool select_isa(const char* name);  // false: unknown, not built, or not here; "" restores the best

}  // namespace tokenmill::cpu

#define TOKENMILL_DECLARE_FOR(isa, fn, Params) \
  namespace isa {                              \
  void fn(const Params&);                      \
  }
#define TOKENMILL_CASE_FOR(isa, fn) \
  case Isa::isa:                    \
    return isa::fn(p);

// Declares `void fn(const Params&)` in each namespace and defines the chooser
// `tokenmill::cpu::fn(const Params&)`. A .cu calls none.
#if defined(__CUDACC__)
#define TOKENMILL_CPU_KERNEL(fn, Params)
#else
#define TOKENMILL_CPU_KERNEL(fn, Params)                           \
  namespace tokenmill {                                            \
  TOKENMILL_EACH_BUILT_ISA(TOKENMILL_DECLARE_FOR, fn, Params)      \
  namespace cpu {                                                  \
  inline void fn(const Params& p) {                                \
    switch (current_isa()) {                                       \
      TOKENMILL_EACH_BUILT_ISA(TOKENMILL_CASE_FOR, fn)             \
      default:                                                     \
        std::abort(); /* select_isa admits what was built alone */ \
    }                                                              \
  }                                                                \
  }                                                                \
  }
#endif
