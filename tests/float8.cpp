// csrc/cpu/float8.h as C functions, for tests/test_float8.py.
#include "cpu/float8.h"

using namespace tokenmill;
using Codes = TOKENMILL_ISA::Elements<DType::float8_e4m3fn>;
using Floats = TOKENMILL_ISA::Elements<DType::float32>;

extern "C" void codes_of(const float* x, uint8_t* to, int64_t n) {
  for (int64_t i = 0; i < n; i += TOKENMILL_ISA::kWidth)
    Codes::store_n(to, i, Floats::load_n(x, i, n - i), n - i);
}

extern "C" void values_of(const uint8_t* codes, float* to, int64_t n) {
  const TOKENMILL_ISA::FlushDenormals mode;  // as in kernels that decode float8
  for (int64_t i = 0; i < n; i += TOKENMILL_ISA::kWidth)
    Floats::store_n(to, i, Codes::load_n(codes, i, n - i), n - i);
}
