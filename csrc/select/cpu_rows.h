// Helpers shared by the CPU kernels that multiply queries with keys.
#pragma once
#include <limits>
#include <type_traits>

#include "core/rows.h"
#include "cpu/tile.h"

namespace tokenmill::TOKENMILL_ISA {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();

TM_INLINE int64_t lower(int64_t a, int64_t b) { return a < b ? a : b; }

TM_INLINE char* row_of(const Rows& r, DType t, int64_t b, int64_t i, int64_t h) {
  return static_cast<char*>(r.data) +
         (b * r.batch + i * r.seq + h * r.head) * (t == DType::float32 ? 4 : 2);
}

// Calls run(row, integral_constant of the rows at once) over `rows` rows: full tiles, and single
// rows where a tile would be mostly idle. Operands must have room for whole tiles.
template <typename Run>
TM_INLINE void each_tile(int64_t rows, const Run& run) {
  int64_t r = 0;
  for (; rows - r > 2; r += kTileRows) run(r, std::integral_constant<int, kTileRows>());
  for (; r < rows; ++r) run(r, std::integral_constant<int, 1>());
}

// 2^t, only as accurate as 16-bit operands require, or to float32 accuracy.
template <bool kCoarse>
TM_INLINE vf power(vf t) {
  return exp2<kCoarse ? 3 : 5>(t);
}

}  // namespace tokenmill::TOKENMILL_ISA
