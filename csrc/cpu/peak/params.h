// Measured peaks of this core, the rooflines of the benchmarks.
#pragma once
#include "core/dtype.h"
#include "cpu/isa.h"

namespace tokenmill {

struct PeakParams {
  DType dtype;         // float32, or bfloat16 where the instruction set has a dot product for it
  int64_t iterations;  // of 24 independent accumulator chains, or of 4 tiles
  int64_t* flops;      // out: floating-point operations done
  float* sink;         // out: keeps the compiler from removing the work
};

struct RateParams {
  enum class Of : int32_t { read, copy, exp } of;
  float* memory;   // read and copy: aligned to 64 bytes
  int64_t bytes;   // size of memory, a multiple of kRateStep
  int64_t passes;  // over the memory; exp: 1024 steps of independent chains each
  int64_t* done;   // out: bytes read and written, or exponentials computed
  float* sink;     // out: keeps the compiler from removing the work
};

constexpr int64_t kRateStep = 2048;  // bytes; two of 16 vectors of any instruction set

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(peak, PeakParams)
TOKENMILL_CPU_KERNEL(rate, RateParams)
