// Measured peak of this core's multiply-add units: the roofline of the benchmarks.
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

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(peak, PeakParams)
