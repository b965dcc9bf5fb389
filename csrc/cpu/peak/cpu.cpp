#include "cpu/peak/params.h"
#include "cpu/tile.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

// Peak of multiply-adds: independent accumulators in the shape of the register tile, fed from
// registers only.
template <class Op>
void spin(const PeakParams& p) {
  vf c[kTileRows][kTileVectors];
  clear(c);
  for (auto& row : c)
    for (vf& x : row) asm volatile("" : "+x"(x));  // otherwise equal chains are merged
  vf b[kTileVectors];
  for (int j = 0; j < kTileVectors; ++j) b[j] = set(1e-9f * static_cast<float>(j + 1));
  const vf a = set(1e-9f);
  for (int64_t k = 0; k < p.iterations; ++k) {
    TM_UNROLL(8)
    for (int j = 0; j < kTileVectors; ++j) {
      asm volatile("" : "+x"(b[j]));  // otherwise the product is hoisted
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

#if defined(__AMX_BF16__)
// The same in the tile registers: two rows and two columns of tiles.
template <>
void spin<BFloat16Tiles>(const PeakParams& p) {
  const BFloat16Tiles::Unit unit;
  alignas(64) float ones[2 * kTile * kTile];
  for (float& pair : ones) pair = std::bit_cast<float>(0x3f803f80);
  clear_tiles<2, 2>();
  _tile_loadd(4, ones, 64);
  _tile_loadd(5, ones + kTile * kTile, 64);
  _tile_loadd(6, ones, 64);
  _tile_loadd(7, ones + kTile * kTile, 64);
  for (int64_t k = 0; k < p.iterations; ++k) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  store_tiles<1, 1>(ones, kTile);
  *p.sink = ones[0];
  *p.flops = p.iterations * 4 * 2 * kTile * kTile * kTile * BFloat16Tiles::kPair;
}
#endif

constexpr int kChains = 8;

// Keeps the compiler from carrying memory from one pass to the next.
TM_INLINE void forget() { asm volatile("" ::: "memory"); }

void read(const RateParams& p) {
  const int64_t count = p.bytes / static_cast<int64_t>(sizeof(float));
  vf sum[kChains];
  for (vf& x : sum) x = zero();
  for (int64_t pass = 0; pass < p.passes; ++pass) {
    for (int64_t i = 0; i < count; i += kChains * kWidth) {
      TM_UNROLL(8)
      for (int j = 0; j < kChains; ++j) sum[j] = sum[j] + load(p.memory + i + j * kWidth);
    }
    forget();
  }
  vf total = zero();
  for (vf x : sum) total = total + x;
  *p.sink = sum_lanes(total);
  *p.done = p.passes * p.bytes;
}

// Copies the first half to the second.
void copy(const RateParams& p) {
  const int64_t half = p.bytes / static_cast<int64_t>(2 * sizeof(float));
  for (int64_t pass = 0; pass < p.passes; ++pass) {
    for (int64_t i = 0; i < half; i += kChains * kWidth) {
      vf x[kChains];
      TM_UNROLL(8)
      for (int j = 0; j < kChains; ++j) x[j] = load(p.memory + i + j * kWidth);
      TM_UNROLL(8)
      for (int j = 0; j < kChains; ++j) store(p.memory + half + i + j * kWidth, x[j]);
    }
    forget();
  }
  *p.sink = p.memory[half];
  *p.done = p.passes * p.bytes;
}

// x = 2^-x stays between 1/2 and 1.
void exponentials(const RateParams& p) {
  constexpr int64_t kSteps = 1024;
  vf x[kChains];
  for (int j = 0; j < kChains; ++j) x[j] = set(0.5f + 0.01f * static_cast<float>(j));
  for (int64_t i = 0; i < p.passes * kSteps; ++i) {
    TM_UNROLL(8)
    for (int j = 0; j < kChains; ++j) {
      asm volatile("" : "+x"(x[j]));  // otherwise equal chains are merged
      x[j] = exp2<5>(zero() - x[j]);
    }
  }
  vf total = zero();
  for (vf y : x) total = total + y;
  *p.sink = sum_lanes(total);
  *p.done = p.passes * kSteps * kChains * kWidth;
}

}  // namespace

void rate(const RateParams& p) {
  if (p.of == RateParams::Of::read) return read(p);
  if (p.of == RateParams::Of::copy) return copy(p);
  exponentials(p);
}

void peak(const PeakParams& p) {
#if defined(__AVX512BF16__)
  if (p.dtype == DType::bfloat16) return spin<FastBFloat16>(p);
#endif
  spin<Float32>(p);
}

}  // namespace tokenmill::TOKENMILL_ISA
