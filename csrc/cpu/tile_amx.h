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
  using Words = BFloat16;

  // Configures the tile registers of a thread for as long as it multiplies. kHalves: tiles 6 and 7
  // take a reduction of 8 words, as A and as B.
  template <bool kHalves>
  class Tiles {
   public:
    Tiles() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
      } config;
      for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = kTile;
      if (kHalves) config.row_bytes[6] = 32, config.rows[7] = kTile / 2;
      _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
  };
  using Unit = Tiles<false>;
};

// For keys in vectors of kWidth, whose values are a reduction of 8 words.
struct BFloat16HalfTiles : BFloat16Tiles {
  using Unit = Tiles<true>;
};

// A product C = A B of M tiles of rows and N tiles of columns, in parts. Sums are in tiles 0 to 3.
// One tile of rows: A is in 4, B in 5 to 7 in turn; two: A in 4 and 5, B in 6 and 7, so that every
// load serves two products. Strides are of rows, in words and floats.
template <int M, int N>
TM_INLINE void clear_tiles() {
  static_assert(N >= 1 && M * N <= 4 && M <= 2);
  _tile_zero(0);
  if constexpr (N > 1) _tile_zero(1);
  if constexpr (N > 2 || M > 1) _tile_zero(2);
  if constexpr (N > 3 || M * N > 3) _tile_zero(3);
}

// Words `from` to `to` of the reduction.
template <int M, int N>
TM_INLINE void add_to_tiles(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t from,
                            int64_t to) {
  asm volatile("" ::: "memory");  // GCC's loads of tiles do not say that they read memory
  TM_UNROLL(1)
  for (int64_t k = from; k < to; k += kTile) {
    const float* rows = b + k * ldb;
    _tile_loadd(4, a + k, lda * 4);
    if constexpr (M == 2) {
      _tile_loadd(6, rows, ldb * 4);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (N > 1) {
        _tile_loadd(7, rows + kTile, ldb * 4);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_loadd(5, a + kTile * lda + k, lda * 4);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (N > 1) _tile_dpbf16ps(3, 5, 7);
    } else {
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
}

template <int M, int N>
TM_INLINE void store_tiles(float* c, int64_t ldc) {
  _tile_stored(0, c, ldc * 4);
  if constexpr (N > 1) _tile_stored(1, c + kTile, ldc * 4);
  if constexpr (M == 2) {
    _tile_stored(2, c + kTile * ldc, ldc * 4);
    if constexpr (N > 1) _tile_stored(3, c + kTile * ldc + kTile, ldc * 4);
  } else {
    if constexpr (N > 2) _tile_stored(2, c + 2 * kTile, ldc * 4);
    if constexpr (N > 3) _tile_stored(3, c + 3 * kTile, ldc * 4);
  }
}

// Lanes of 16 bits that hold an infinity or a NaN.
TM_INLINE __mmask32 not_finite(vf pairs) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  return _mm512_cmpeq_epi16_mask(_mm512_and_si512(_mm512_castps_si512(pairs), exponent), exponent);
}
TM_INLINE vf only(__mmask32 lanes, vf pairs) {
  return _mm512_castsi512_ps(_mm512_maskz_mov_epi16(lanes, _mm512_castps_si512(pairs)));
}

// True if none of `words` words, a multiple of kWidth, holds an infinity or a NaN.
inline bool are_finite(const float* pairs, int64_t words) {
  __mmask32 found = 0;
  for (int64_t i = 0; i < words; i += kWidth) found |= not_finite(load(pairs + i));
  return found == 0;
}

// add_to_tiles with zeros in place of infinities and NaN: the same bits as add_to_tiles for
// rows of A with weights of 0 there.
template <int M, int N>
inline void add_finite_to_tiles(const float* a, int64_t lda, const float* b, int64_t ldb,
                                int64_t words) {
  alignas(64) float block[kTile][N * kTile];
  for (int64_t k = 0; k < words; k += kTile) {
    for (int64_t r = 0; r < kTile; ++r)
      for (int64_t n = 0; n < N * kTile; n += kWidth) {
        const vf x = load(b + (k + r) * ldb + n);
        store(block[r] + n, only(~not_finite(x), x));
      }
    add_to_tiles<M, N>(a + k, lda, block[0], N * kTile, 0, kTile);
  }
}

// The rest of the product for one row of A and kWidth columns: infinities and NaN times weights
// other than 0.
inline vf product_of_others(const float* a, const float* b, int64_t ldb, int64_t words) {
  vf sum = zero();
  for (int64_t k = 0; k < words; ++k) {
    const vf x = load(b + k * ldb);
    sum = BFloat16::madd(sum, set(a[k]), BFloat16::shown(a[k], only(not_finite(x), x)));
  }
  return sum;
}

// C[16 M][width] += A B, summed from zero and added once, as multiply_rows does. kHides: a weight
// of 0 in A hides its row of B, which has infinities or NaN.
template <bool kHides, int M, int N = 4 / M>
__attribute__((noinline)) void multiply_rows_in_tiles(float* c, int64_t ldc, const float* a,
                                                      int64_t lda, const float* b, int64_t ldb,
                                                      int64_t words, int64_t width) {
  constexpr int kRow = N * kTile;
  alignas(64) float sums[M * kTile * kRow];
  int64_t n = 0;
  for (; n + kRow <= width; n += kRow) {
    clear_tiles<M, N>();
    if constexpr (kHides) {
      add_finite_to_tiles<M, N>(a, lda, b + n, ldb, words);
    } else {
      add_to_tiles<M, N>(a, lda, b + n, ldb, 0, words);
    }
    store_tiles<M, N>(sums, kRow);
    TM_UNROLL(4)
    for (int i = 0; i < M * kTile; ++i) {
      TM_UNROLL(4)
      for (int j = 0; j < kRow; j += kTile) {
        vf x = load(sums + i * kRow + j);
        if constexpr (kHides) x = x + product_of_others(a + i * lda, b + n + j, ldb, words);
        float* out = c + i * ldc + n + j;
        store(out, load(out) + x);
      }
    }
  }
  if constexpr (N > 1)
    if (n < width)
      multiply_rows_in_tiles<kHides, M, N - 1>(c + n, ldc, a, lda, b + n, ldb, words, width - n);
}

// C[16][16 N] = A B with B in N panels of kWidth columns, as multiply_panels. BFloat16HalfTiles.
template <int N>
TM_INLINE void multiply_panels_in_tiles(float* c, int64_t ldc, const float* a, int64_t lda,
                                        const float* const (&b)[N], int64_t words) {
  clear_tiles<1, N>();
  asm volatile("" ::: "memory");  // GCC's loads of tiles do not say that they read memory
  TM_UNROLL(1)
  for (int64_t k = 0; k < words; k += kTile) {
    _tile_loadd(4, a + k, lda * 4);
    _tile_loadd(5, b[0] + k * kWidth, kWidth * 4);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (N > 1) {
      _tile_loadd(5, b[1] + k * kWidth, kWidth * 4);
      _tile_dpbf16ps(1, 4, 5);
    }
    if constexpr (N > 2) {
      _tile_loadd(5, b[2] + k * kWidth, kWidth * 4);
      _tile_dpbf16ps(2, 4, 5);
    }
    if constexpr (N > 3) {
      _tile_loadd(5, b[3] + k * kWidth, kWidth * 4);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  store_tiles<1, N>(c, ldc);
}

// Adds 8 words of a reduction to the sums in tiles 0 to N - 1. BFloat16HalfTiles.
template <int N>
TM_INLINE void add_half_to_tiles(const float* a, int64_t lda, const float* b, int64_t ldb) {
  asm volatile("" ::: "memory");  // GCC's loads of tiles do not say that they read memory
  _tile_loadd(6, a, lda * 4);
  _tile_loadd(7, b, ldb * 4);
  _tile_dpbf16ps(0, 6, 7);
  if constexpr (N > 1) {
    _tile_loadd(7, b + kTile, ldb * 4);
    _tile_dpbf16ps(1, 6, 7);
  }
  if constexpr (N > 2) {
    _tile_loadd(7, b + 2 * kTile, ldb * 4);
    _tile_dpbf16ps(2, 6, 7);
  }
  if constexpr (N > 3) {
    _tile_loadd(7, b + 3 * kTile, ldb * 4);
    _tile_dpbf16ps(3, 6, 7);
  }
}

}  // namespace tokenmill::TOKENMILL_ISA
