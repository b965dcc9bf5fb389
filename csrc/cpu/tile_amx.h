// Products in the tile registers of AMX: 16 rows of 16 words by 16 rows of 16 words, in which a
// word is a pair of bfloat16, to 16 x 16 sums in float32. Operands lie in memory as those of
// BFloat16; a reduction takes whole tiles, so that packed operands are zero up to a multiple of 16
// words.
#pragma once

namespace tokenmill::TOKENMILL_ISA {

constexpr int kTile = 16;  // rows of a tile, words of its rows, and vectors' width

struct BFloat16Tiles {
  static constexpr int kPair = 2;
  static constexpr int kWords = kTile;
  static TM_INLINE vf madd(vf acc, vf a, vf b) { return BFloat16::madd(acc, a, b); }
  static TM_INLINE vf shown(float a, vf b) { return BFloat16::shown(a, b); }

  // Configures the tile registers of a thread for as long as it multiplies.
  class Unit {
   public:
    Unit() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
      } config;
      for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = kTile;
      _tile_loadconfig(&config);
    }
    ~Unit() { _tile_release(); }
    Unit(const Unit&) = delete;
    Unit& operator=(const Unit&) = delete;
  };
};

// A product C = A B of 16 rows and N tiles of columns, in parts: sums are in tiles 0 to 3, A in 4,
// B in 5 to 7 in turn. Strides are of rows, in words and floats.
template <int N>
TM_INLINE void clear_tiles() {
  static_assert(N >= 1 && N <= 4);
  _tile_zero(0);
  if constexpr (N > 1) _tile_zero(1);
  if constexpr (N > 2) _tile_zero(2);
  if constexpr (N > 3) _tile_zero(3);
}

// Words `from` to `to` of the reduction.
template <int N>
TM_INLINE void add_to_tiles(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t from,
                            int64_t to) {
  asm volatile("" ::: "memory");  // GCC's loads of tiles do not say that they read memory
  TM_UNROLL(1)
  for (int64_t k = from; k < to; k += kTile) {
    const float* rows = b + k * ldb;
    _tile_loadd(4, a + k, lda * 4);
    _tile_loadd(5, rows, ldb * 4);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (N > 1) {
      _tile_loadd(6, rows + kTile, ldb * 4);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (N > 2) {
      _tile_loadd(7, rows + 2 * kTile, ldb * 4);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (N > 3) {
      _tile_loadd(5, rows + 3 * kTile, ldb * 4);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
}

template <int N>
TM_INLINE void store_tiles(float* c, int64_t ldc) {
  _tile_stored(0, c, ldc * 4);
  if constexpr (N > 1) _tile_stored(1, c + kTile, ldc * 4);
  if constexpr (N > 2) _tile_stored(2, c + 2 * kTile, ldc * 4);
  if constexpr (N > 3) _tile_stored(3, c + 3 * kTile, ldc * 4);
}

// C[16][width] += A B, summed from zero and added once, as multiply_rows does. kHides: a weight of
// 0 in A hides its row of B, which has infinities or NaN.
template <bool kHides, int N = 4>
__attribute__((noinline)) void multiply_rows_in_tiles(float* c, int64_t ldc, const float* a,
                                                      int64_t lda, const float* b, int64_t ldb,
                                                      int64_t words, int64_t width) {
  constexpr int kRow = N * kTile;
  alignas(64) float sums[kTile * kRow];
  int64_t n = 0;
  for (; n + kRow <= width; n += kRow) {
    if constexpr (!kHides) {
      clear_tiles<N>();
      add_to_tiles<N>(a, lda, b + n, ldb, 0, words);
      store_tiles<N>(sums, kRow);
    }
    TM_UNROLL(4)
    for (int i = 0; i < kTile; ++i) {
      vf x[1][N];
      if constexpr (kHides) {
        clear(x);
        multiply_shown<BFloat16>(x, a + i * lda, lda, b + n, ldb, words);
      }
      TM_UNROLL(4)
      for (int j = 0; j < N; ++j) {
        float* out = c + i * ldc + n + j * kTile;
        store(out, load(out) + (kHides ? x[0][j] : load(sums + i * kRow + j * kTile)));
      }
    }
  }
  if constexpr (N > 1)
    if (n < width)
      multiply_rows_in_tiles<kHides, N - 1>(c + n, ldc, a, lda, b + n, ldb, words, width - n);
}

// True if none of `words` words, a multiple of kWidth, holds an infinity or a NaN.
inline bool are_finite(const float* pairs, int64_t words) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 found = 0;
  for (int64_t i = 0; i < words; i += kWidth)
    found |= _mm512_cmpeq_epi16_mask(
        _mm512_and_si512(_mm512_castps_si512(load(pairs + i)), exponent), exponent);
  return found == 0;
}

}  // namespace tokenmill::TOKENMILL_ISA
