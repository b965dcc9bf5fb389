// Matrix product of the CPU backend, and the packings that feed it.
//
// Operands are rows of 32-bit words. With Float32 a word is one float; with BFloat16 it is a pair
// of neighbours along the reduction, so the same loads, broadcasts and transposes serve both:
//
//   C[m][n] += sum_k A[m][k] * B[k][n]      A: broadcast words,  B: vectors along n
#pragma once
#include <bit>
#include <cstring>

#include "cpu/simd.h"

namespace tokenmill::TOKENMILL_ISA {

constexpr int kPanel = kTileVectors * kWidth;  // columns of a register tile

struct Float32 {
  static constexpr int kPair = 1;   // reduction steps per word
  static constexpr int kWords = 1;  // a reduction takes a multiple of as many words
  using Words = Float32;            // the same words, any number of them
  struct Unit {
    Unit() {}  // nothing to configure
  };
  static TM_INLINE vf madd(vf acc, vf a, vf b) { return fma(a, b, acc); }
  // shown: b where a is not 0, else 0; first: the first n reduction steps of b, n at least 1.
  static TM_INLINE vf shown(float a, vf b) { return a == 0 ? zero() : b; }
  static TM_INLINE vf first(int64_t, vf b) { return b; }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
  static constexpr int kPair = 2;
  static constexpr int kWords = 1;
  using Words = BFloat16;
  using Unit = Float32::Unit;
  static TM_INLINE vf madd(vf acc, vf a, vf b) { return dot_bfloat(acc, a, b); }
  static TM_INLINE vf shown(float a, vf b) {
    const uint32_t pair = std::bit_cast<uint32_t>(a);
    const uint32_t low = pair & 0x7fff ? 0xffff : 0, high = pair << 1 >> 17 ? 0xffff0000 : 0;
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(low | high));
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(b), mask));
  }
  static TM_INLINE vf first(int64_t n, vf b) {
    return n > 1 ? b : shown(std::bit_cast<float>(0x3f80), b);
  }
};
#endif

// C += A B. Word (m, k) of A is at a[m * lda + k], or at a[k * lda + m] if kTransposedA.
template <class Op, bool kTransposedA, int M, int N>
TM_INLINE void multiply(vf (&c)[M][N], const float* a, int64_t lda, const float* b, int64_t ldb,
                        int64_t words) {
  TM_UNROLL(2)
  for (int64_t k = 0; k < words; ++k) {
    vf bk[N];
    TM_UNROLL(8)
    for (int j = 0; j < N; ++j) bk[j] = load(b + k * ldb + j * kWidth);
    TM_UNROLL(16)
    for (int i = 0; i < M; ++i) {
      const vf ai = set(kTransposedA ? a[k * lda + i] : a[i * lda + k]);
      TM_UNROLL(8)
      for (int j = 0; j < N; ++j) c[i][j] = Op::madd(c[i][j], ai, bk[j]);
    }
  }
}

// The same with B in N panels of kWidth columns, each packed separately: word (k, n) of panel j is
// at b[j][k * kWidth + n].
template <class Op, int M, int N>
TM_INLINE void multiply_panels(vf (&c)[M][N], const float* a, int64_t lda,
                               const float* const (&b)[N], int64_t words) {
  TM_UNROLL(2)
  for (int64_t k = 0; k < words; ++k) {
    vf bk[N];
    TM_UNROLL(8)
    for (int j = 0; j < N; ++j) bk[j] = load(b[j] + k * kWidth);
    TM_UNROLL(16)
    for (int i = 0; i < M; ++i) {
      const vf ai = set(a[i * lda + k]);
      TM_UNROLL(8)
      for (int j = 0; j < N; ++j) c[i][j] = Op::madd(c[i][j], ai, bk[j]);
    }
  }
}

template <int M, int N>
TM_INLINE void clear(vf (&c)[M][N]) {
  TM_UNROLL(16)
  for (int i = 0; i < M; ++i) {
    TM_UNROLL(8)
    for (int j = 0; j < N; ++j) c[i][j] = zero();
  }
}

template <int M, int N>
TM_INLINE bool finite(const vf (&c)[M][N]) {
  vf nothing = zero();  // becomes NaN after an infinity or a NaN
  TM_UNROLL(16)
  for (int i = 0; i < M; ++i) {
    TM_UNROLL(8)
    for (int j = 0; j < N; ++j) nothing = fma(c[i][j], zero(), nothing);
  }
  return sum_lanes(nothing) == 0;
}

// The product with rows of B replaced by 0 where the weight in A is 0; bitwise equal to multiply
// where B is finite.
template <class Op, int M, int N>
__attribute__((noinline, cold)) void multiply_shown(vf (&c)[M][N], const float* a, int64_t lda,
                                                    const float* b, int64_t ldb, int64_t words) {
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j)
      for (int64_t k = 0; k < words; ++k) {
        const float weight = a[i * lda + k];
        c[i][j] = Op::madd(c[i][j], set(weight), Op::shown(weight, load(b + k * ldb + j * kWidth)));
      }
}

// multiply from zero, or multiply_shown where the result would differ.
template <class Op, int M, int N>
TM_INLINE void multiply_weights(vf (&c)[M][N], const float* a, int64_t lda, const float* b,
                                int64_t ldb, int64_t words) {
  clear(c);
  multiply<Op, false>(c, a, lda, b, ldb, words);
  if (!finite(c)) [[unlikely]] {
    vf shown[M][N];  // a copy: indexing c itself would move it out of registers
    clear(shown);
    multiply_shown<Op>(shown, a, lda, b, ldb, words);
    std::memcpy(c, shown, sizeof c);
  }
}

// C[M][width] += A * B (or = if kAssign), width a multiple of kWidth. The product is summed in
// registers from zero and added once: a second level of accumulation for long reductions. kWeights:
// a weight of 0 in A hides its row of B.
// Not inlined: when it shared the registers of its caller, the row pointers of the inner loop were
// spilled, which cost a tenth of its speed.
template <class Op, bool kTransposedA, int M, bool kAssign, bool kWeights = false,
          int N = kTileVectors>
__attribute__((noinline)) void multiply_rows(float* c, int64_t ldc, const float* a, int64_t lda,
                                             const float* b, int64_t ldb, int64_t words,
                                             int64_t width) {
  static_assert(!kWeights || !kTransposedA);
  int64_t n = 0;
  for (; n + N * kWidth <= width; n += N * kWidth) {
    vf acc[M][N];
    if constexpr (kWeights) {
      multiply_weights<Op>(acc, a, lda, b + n, ldb, words);
    } else {
      clear(acc);
      multiply<Op, kTransposedA>(acc, a, lda, b + n, ldb, words);
    }
    TM_UNROLL(16)
    for (int i = 0; i < M; ++i) {
      TM_UNROLL(8)
      for (int j = 0; j < N; ++j) {
        float* out = c + i * ldc + n + j * kWidth;
        store(out, kAssign ? acc[i][j] : load(out) + acc[i][j]);
      }
    }
  }
  if constexpr (N > 1)
    if (n < width)
      multiply_rows<Op, kTransposedA, M, kAssign, kWeights, N - 1>(c + n, ldc, a, lda, b + n, ldb,
                                                                   words, width - n);
}

// The same with rows of C at arbitrary addresses.
template <class Op, bool kTransposedA, int M, int N = kTileVectors>
__attribute__((noinline)) void add_to_rows(float* const* c, int64_t column, const float* a,
                                           int64_t lda, const float* b, int64_t ldb, int64_t words,
                                           int64_t width) {
  int64_t n = column;
  for (; n + N * kWidth <= width; n += N * kWidth) {
    vf acc[M][N];
    clear(acc);
    multiply<Op, kTransposedA>(acc, a, lda, b + n, ldb, words);
    TM_UNROLL(16)
    for (int i = 0; i < M; ++i) {
      TM_UNROLL(8)
      for (int j = 0; j < N; ++j) {
        float* out = c[i] + n + j * kWidth;
        store(out, load(out) + acc[i][j]);
      }
    }
  }
  if constexpr (N > 1)
    if (n < width) add_to_rows<Op, kTransposedA, M, N - 1>(c, n, a, lda, b, ldb, words, width);
}

// Products in tile registers (cpu/tile_amx.h) take whole tiles of 16 rows and words.
template <class Op>
constexpr bool kInTiles = Op::kWords > 1;

template <class Op>
constexpr int64_t words_of(int64_t elements) {
  return round_up(ceil_div(elements, Op::kPair), Op::kWords);
}

// Conversion of elements to words: reads kWidth words that start at element i, zero-filled beyond
// `length`. As floats, times a factor:
template <DType kFrom>
struct FloatWords {
  using Element = typename Elements<kFrom>::type;
  vf factor;
  TM_INLINE vf operator()(const Element* p, int64_t i, int64_t length) const {
    return Elements<kFrom>::load_n(p, i, length - i) * factor;
  }
};
// As pairs of bfloat16, which lie in memory as required:
struct PairWords {
  using Element = uint16_t;
  TM_INLINE vf operator()(const uint16_t* p, int64_t i, int64_t length) const {
    if (i + 2 * kWidth <= length) return load(reinterpret_cast<const float*>(p + i));
    uint16_t lane[2 * kWidth] = {};
    for (int64_t l = i; l < length; ++l) lane[l - i] = p[l];
    return load(reinterpret_cast<const float*>(lane));
  }
};

// Calls visit(p, words) with p and words of the right types; BFloat16 takes only bfloat16 elements.
template <class Op, typename Visit>
TM_INLINE void visit_words(const void* p, DType t, float factor, const Visit& visit) {
  if constexpr (Op::kPair == 2) {
    visit(static_cast<const uint16_t*>(p), PairWords());
  } else {
    const vf f = set(factor);
    switch (t) {
      case DType::float16:
        return visit(static_cast<const uint16_t*>(p), FloatWords<DType::float16>{f});
      case DType::bfloat16:
        return visit(static_cast<const uint16_t*>(p), FloatWords<DType::bfloat16>{f});
      default:
        return visit(static_cast<const float*>(p), FloatWords<DType::float32>{f});
    }
  }
}

// Rows of an operand, `stride` elements apart:
struct EvenRows {
  const void* first;
  int64_t stride;
  template <typename T>
  TM_INLINE const T* at(int64_t r) const {
    return static_cast<const T*>(first) + r * stride;
  }
};
// Rows at arbitrary addresses:
struct ScatteredRows {
  const char* const* rows;
  template <typename T>
  TM_INLINE const T* at(int64_t r) const {
    return reinterpret_cast<const T*>(rows[r]);
  }
};

// Packs an A operand: `rows` rows of `length` elements to `padded` rows of words (ld words apart,
// ld a multiple of kWidth); rows past `rows` are zero.
template <class Op, class Source>
inline void pack_rows(const Source from, DType t, int64_t rows, int64_t padded, int64_t length,
                      float factor, float* dst, int64_t ld) {
  visit_words<Op>(nullptr, t, factor, [&]<typename T>(const T*, const auto words) TM_LAMBDA {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t w = 0; w < ld; w += kWidth)
        store(dst + r * ld + w, words(from.template at<T>(r), w * Op::kPair, length));
  });
  for (int64_t i = rows * ld; i < padded * ld; i += kWidth) store(dst + i, zero());
}
template <class Op>
inline void pack_rows(const void* src, DType t, int64_t stride, int64_t rows, int64_t padded,
                      int64_t length, float factor, float* dst, int64_t ld) {
  pack_rows<Op>(EvenRows{src, stride}, t, rows, padded, length, factor, dst, ld);
}

// Packs a B operand for a reduction over `length`: up to kColumns rows transposed, word (k, row) at
// dst[k * kColumns + row]; rows past `rows` are zero, up to `columns` of them in whole vectors.
template <class Op, int kColumns = kPanel, class Source>
inline void pack_transposed(const Source from, DType t, int64_t rows, int64_t length, float factor,
                            float* dst, int64_t columns = kColumns) {
  const int64_t all = words_of<Op>(length);
  visit_words<Op>(nullptr, t, factor, [&]<typename T>(const T*, const auto words) TM_LAMBDA {
    const auto word = [&](int64_t r, int64_t w) TM_LAMBDA {
      return words(from.template at<T>(r), w * Op::kPair, length);
    };
    for (int64_t c = 0; c < columns; c += kWidth)
      for (int64_t w = 0; w < all; w += kWidth) {
        vf block[kWidth];
        if (c + kWidth <= rows) {
          TM_UNROLL(16)
          for (int i = 0; i < kWidth; ++i) block[i] = word(c + i, w);
        } else {
          for (int i = 0; i < kWidth; ++i) block[i] = c + i < rows ? word(c + i, w) : zero();
        }
        transpose(block);
        if (w + kWidth <= all) {
          TM_UNROLL(16)
          for (int i = 0; i < kWidth; ++i) store(dst + (w + i) * kColumns + c, block[i]);
        } else {
          for (int64_t i = 0; i < all - w; ++i) store(dst + (w + i) * kColumns + c, block[i]);
        }
      }
  });
}
template <class Op, int kColumns = kPanel>
inline void pack_transposed(const void* src, DType t, int64_t stride, int64_t rows, int64_t length,
                            float factor, float* dst) {
  pack_transposed<Op, kColumns>(EvenRows{src, stride}, t, rows, length, factor, dst);
}

// Packs a B operand for a reduction over rows: word (k, column) at dst[k * ld + column], where k
// counts groups of kPair rows; missing rows and columns up to ld (a multiple of kWidth) are zero.
template <class Op, class Source>
inline void pack_reduced_rows(const Source from, DType t, int64_t rows, int64_t length, float* dst,
                              int64_t ld) {
  visit_elements(t, [&](auto e) TM_LAMBDA {
    using T = typename decltype(e)::type;
    for (int64_t k = 0; k < words_of<Op>(rows); ++k) {
      int64_t w = 0;
#if defined(__AVX512BF16__)
      if constexpr (Op::kPair == 2 && decltype(e)::kIsBFloat)
        if (2 * k + 1 < rows) {
          const T *even = from.template at<T>(2 * k), *odd = from.template at<T>(2 * k + 1);
          for (; w + 2 * kWidth <= (length < ld ? length : ld); w += 2 * kWidth) {
            const vf a = load(reinterpret_cast<const float*>(even + w));
            const vf b = load(reinterpret_cast<const float*>(odd + w));
            store(dst + k * ld + w, interleave(a, b, false));
            store(dst + k * ld + w + kWidth, interleave(a, b, true));
          }
        }
#endif
      for (; w < ld; w += kWidth) {
        const auto row = [&](int64_t r) TM_LAMBDA {
          return r < rows ? e.load_n(from.template at<T>(r), w, length - w) : zero();
        };
        if constexpr (Op::kPair == 1) {
          store(dst + k * ld + w, row(k));
        } else {
#if defined(__AVX512BF16__)
          store(dst + k * ld + w, pair_bfloat(row(2 * k), row(2 * k + 1)));
#endif
        }
      }
    }
  });
}
template <class Op>
inline void pack_reduced_rows(const void* src, DType t, int64_t stride, int64_t rows,
                              int64_t length, float* dst, int64_t ld) {
  pack_reduced_rows<Op>(EvenRows{src, stride}, t, rows, length, dst, ld);
}

// Transposes kWidth rows of kWidth words.
TM_INLINE void transpose_words(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
  vf block[kWidth];
  TM_UNROLL(16)
  for (int i = 0; i < kWidth; ++i) block[i] = load(from + i * ld_from);
  transpose(block);
  TM_UNROLL(16)
  for (int i = 0; i < kWidth; ++i) store(to + i * ld_to, block[i]);
}

// Stores a row of floats, times factor, as elements.
TM_INLINE void store_row(const float* src, float factor, void* dst, DType t, int64_t length) {
  visit_elements(t, [&](auto e) TM_LAMBDA {
    const vf f = set(factor);
    for (int64_t d = 0; d < length; d += kWidth) e.store_n(dst, d, load(src + d) * f, length - d);
  });
}

}  // namespace tokenmill::TOKENMILL_ISA

#if defined(__AMX_BF16__)
#include "cpu/tile_amx.h"
#endif

namespace tokenmill::TOKENMILL_ISA {

#if defined(__AMX_BF16__)
using FastBFloat16 = BFloat16Tiles;
using FastBFloat16Vectors = BFloat16HalfTiles;
#elif defined(__AVX512BF16__)
using FastBFloat16 = BFloat16;
using FastBFloat16Vectors = BFloat16;
#endif

// multiply_rows, or the same in tiles, where a weight of 0 in A hides its row of B. finite: B has
// no infinities and NaN.
template <class Op, int M>
constexpr auto* rows_product([[maybe_unused]] bool finite) {
#if defined(__AMX_BF16__)
  if constexpr (kInTiles<Op>)
    return finite ? &multiply_rows_in_tiles<false, M / kTile>
                  : &multiply_rows_in_tiles<true, M / kTile>;
  else
#endif
    return &multiply_rows<Op, false, M, false, true>;
}

// The same without rows to hide.
template <class Op, int M>
constexpr auto* sum_product() {
#if defined(__AMX_BF16__)
  if constexpr (kInTiles<Op>)
    return &multiply_rows_in_tiles<false, M / kTile>;
  else
#endif
    return &multiply_rows<Op, false, M, false>;
}

}  // namespace tokenmill::TOKENMILL_ISA
