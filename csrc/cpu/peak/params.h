// Measured peaks of this core: the ceilings of the benchmarks.
#pragma once
#include "core/dtype.h"
#include "cpu/isa.h"

namespace tokenmill {

struct PeakParams {
  DType dtype;         // float32, or bfloat16 where the instruction set has its dot product
  int64_t iterations;  // of 24 independent accumulator chains
  int64_t* flops;      // out: floating-point operations done
  float* sink;         // out: keeps the compiler honest
};

struct RateParams {
  enum class Of : int32_t { read, copy, exp } of;
  float* memory;   // of read and copy, aligned to 64 bytes
  int64_t bytes;   // of memory, a multiple of kRateStep
  int64_t passes;  // over the memory, or 1024 steps of independent chains of exp
  int64_t* done;   // out: bytes read and written, or values of exp
  float* sink;     // out: keeps the compiler honest
};

constexpr int64_t kRateStep = 2048;  // bytes; two of 16 vectors of any instruction set

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(peak, PeakParams)
TOKENMILL_CPU_KERNEL(rate, RateParams)
