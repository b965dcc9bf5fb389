#include "cpu/peak/params.h"
#include "cpu/tile.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

// Independent accumulators in the shape of the register tile, fed from registers only.
template <class Op>
void spin(const PeakParams& p) {
  vf c[kTileRows][kTileVectors];
  clear(c);
  for (auto& row : c)
    for (vf& x : row) asm volatile("" : "+x"(x));  // else equal chains become one
  vf b[kTileVectors];
  for (int j = 0; j < kTileVectors; ++j) b[j] = set(1e-9f * static_cast<float>(j + 1));
  const vf a = set(1e-9f);
  for (int64_t k = 0; k < p.iterations; ++k) {
    TM_UNROLL(8)
    for (int j = 0; j < kTileVectors; ++j) {
      asm volatile("" : "+x"(b[j]));  // else the product is hoisted
      TM_UNROLL(16)
      for (int i = 0; i < kTileRows; ++i) c[i][j] = Op::madd(c[i][j], a, b[j]);
    }
  }
  vf sum = zero();
  for (auto& row : c)
    for (vf x : row) sum = sum + x;
  *p.sink = sum_lanes(sum);
  *p.flops = p.iterations * kTileRows * kTileVectors * kWidth * 2 * Op::kPair;
}

}  // namespace

void peak(const PeakParams& p) {
#if defined(__AVX512BF16__)
  if (p.dtype == DType::bfloat16) return spin<BFloat16>(p);
#endif
  spin<Float32>(p);
}

}  // namespace tokenmill::TOKENMILL_ISA
