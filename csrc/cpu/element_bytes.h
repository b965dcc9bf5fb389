// Sizes of elements in memory.
#pragma once
#include "core/dtype.h"

namespace tokenmill::TOKENMILL_ISA {

constexpr int64_t element_bytes(DType t) {
  return t == DType::float32 ? 4 : t == DType::float8_e4m3fn ? 1 : 2;
}

}  // namespace tokenmill::TOKENMILL_ISA
