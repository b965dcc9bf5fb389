// mma computed in the layout of its fragments. A group of 4 lanes is a row of D, so that an element
// of A is broadcast within 128 bits and a row of B is the same in each 128 bits; every accumulator
// adds its products in the order of ordered_sum.
#include <cstring>

#include "ptxvm/memory_ops.h"
#include "ptxvm/tensor.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define PTXVM_PANELS 1
#else
#define PTXVM_PANELS 0
#endif

namespace ptxvm {
namespace {

constexpr int kTf32Bits = ~0x1fff;  // the hardware ignores the low 13 bits

template <Operand type>
constexpr int kPer = type == Operand::tf32 ? 1 : 2;  // elements per register

}  // namespace

#if defined(__AVX512F__)

namespace {

// Elements of 16 registers, low ones first.
template <Operand type>
void widen(__m512i bits, __m512* elements) {
  if constexpr (type == Operand::f16) {
    elements[0] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits));
    elements[1] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
  } else if constexpr (type == Operand::bf16) {
    elements[0] = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    elements[1] = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(~0xffff)));
  } else {
    elements[0] = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(kTf32Bits)));
  }
}

struct Accumulators {
  __m512 chain[4][2];
};

// Products with the column of A held by lane `lane` of each group of 4, for its upper and lower
// rows. b: even and odd columns of B. odd: parity of k.
template <int lane>
void step(Accumulators& d, const __m512* a, const __m512* b, int odd) {
  const __m512 upper = _mm512_permute_ps(a[0], lane * 0x55);
  const __m512 lower = _mm512_permute_ps(a[1], lane * 0x55);
  const __m512 even_columns = _mm512_shuffle_f32x4(b[0], b[0], lane * 0x55);
  const __m512 odd_columns = _mm512_shuffle_f32x4(b[1], b[1], lane * 0x55);
  d.chain[0][odd] = _mm512_fmadd_ps(upper, even_columns, d.chain[0][odd]);
  d.chain[1][odd] = _mm512_fmadd_ps(upper, odd_columns, d.chain[1][odd]);
  d.chain[2][odd] = _mm512_fmadd_ps(lower, even_columns, d.chain[2][odd]);
  d.chain[3][odd] = _mm512_fmadd_ps(lower, odd_columns, d.chain[3][odd]);
}

}  // namespace

template <Operand type>
bool multiply_fast(Warp& warp, const uint32_t* slots) {
  const auto load = [&](int index, int block) {
    return _mm512_loadu_si512(lanes<uint32_t>(warp, slots[index]) + 16 * block);
  };
  constexpr int per = kPer<type>;
  // b[half of k][element][parity of the column]: 128 bits, 4 columns, per lane of a group.
  __m512 b[2][per][2];
  const __m512i even = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(4));
  for (int half = 0; half < 2; ++half) {
    __m512 first[per], second[per];
    widen<type>(load(8 + half, 0), first);
    widen<type>(load(8 + half, 1), second);
    for (int e = 0; e < per; ++e) {
      b[half][e][0] = _mm512_permutex2var_ps(first[e], even, second[e]);
      b[half][e][1] = _mm512_permutex2var_ps(first[e], odd, second[e]);
    }
  }
  for (int block = 0; block < 2; ++block) {
    Accumulators d;
    for (int q = 0; q < 4; ++q) {
      d.chain[q][0] = _mm512_castsi512_ps(load(10 + q, block));
      d.chain[q][1] = _mm512_setzero_ps();
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512 upper[per], lower[per];
      widen<type>(load(4 + 2 * half, block), upper);
      widen<type>(load(5 + 2 * half, block), lower);
#pragma GCC unroll 2
      for (int e = 0; e < per; ++e) {
        const __m512 a[2] = {upper[e], lower[e]};
        step<0>(d, a, b[half][e], per == 2 ? e : 0);
        step<1>(d, a, b[half][e], per == 2 ? e : 1);
        step<2>(d, a, b[half][e], per == 2 ? e : 0);
        step<3>(d, a, b[half][e], per == 2 ? e : 1);
      }
    }
    const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff));
    for (int q = 0; q < 4; ++q) {
      const __m512 sum = _mm512_add_ps(d.chain[q][0], d.chain[q][1]);
      const __mmask16 unordered = _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q);
      _mm512_storeu_ps(lanes<float>(warp, slots[q]) + 16 * block,
                       _mm512_mask_blend_ps(unordered, sum, nan));
    }
  }
  return true;
}

#if PTXVM_PANELS

namespace {

template <Operand type>
constexpr int kDepth = 8 * kPer<type>;  // k of a wgmma

// Four rows of 128 bits.
__m512i join(const char* a, const char* b, const char* c, const char* d) {
  const auto load = [](const char* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  };
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(load(a)), load(b), 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(load(c)), load(d), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// 16 elements of 16 bits as f32.
template <Operand type>
__m512 widen(__m256i bits) {
  if constexpr (type == Operand::f16) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Stores rows of k, even columns before odd ones, from columns or, if transposed, rows of 16 bytes.
template <Operand type>
void widen_columns(const char* const* from, bool transposed, uint32_t sign, float* rows) {
  const __m512 flip = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(sign)));
  if constexpr (type == Operand::tf32) {
    const auto masked = [&](int c) {
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[c]));
      return _mm_xor_ps(_mm_castsi128_ps(_mm_and_si128(bits, _mm_set1_epi32(kTf32Bits))),
                        _mm512_castps512_ps128(flip));
    };
    for (int parity = 0; parity < 2; ++parity) {
      __m128 c[4] = {masked(parity), masked(2 + parity), masked(4 + parity), masked(6 + parity)};
      _MM_TRANSPOSE4_PS(c[0], c[1], c[2], c[3]);
      for (int k = 0; k < 4; ++k) _mm_storeu_ps(rows + 8 * k + 4 * parity, c[k]);
    }
  } else {
    __m512i four[2];  // rows of k
    if (transposed) {
      const __m512i order = _mm512_broadcast_i32x4(
          _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
      four[0] = _mm512_shuffle_epi8(join(from[0], from[1], from[2], from[3]), order);
      four[1] = _mm512_shuffle_epi8(join(from[4], from[5], from[6], from[7]), order);
    } else {
      // Word k of each 128 bits of both.
      const __m512i even = join(from[0], from[2], from[4], from[6]);
      const __m512i odd = join(from[1], from[3], from[5], from[7]);
      const __m512i columns = _mm512_broadcast_i32x4(_mm_setr_epi16(0, 8, 16, 24, 32, 40, 48, 56));
      const __m512i k = _mm512_set_epi64(0x3000300030003, 0x3000300030003, 0x2000200020002,
                                         0x2000200020002, 0x1000100010001, 0x1000100010001, 0, 0);
      const __m512i first = _mm512_add_epi16(columns, k);
      four[0] = _mm512_permutex2var_epi16(even, first, odd);
      four[1] = _mm512_permutex2var_epi16(even, _mm512_add_epi16(first, _mm512_set1_epi16(4)), odd);
    }
    for (int half = 0; half < 2; ++half) {
      const __m512 low = widen<type>(_mm512_castsi512_si256(four[half]));
      const __m512 high = widen<type>(_mm512_extracti64x4_epi64(four[half], 1));
      _mm512_storeu_ps(rows + 32 * half, _mm512_xor_ps(low, flip));
      _mm512_storeu_ps(rows + 32 * half + 16, _mm512_xor_ps(high, flip));
    }
  }
}

// Sums of 8 columns, even and odd: 16 lanes each of the upper and lower rows.
struct Sums {
  __m512 even[4], odd[4];
};

// D += A B for one k. b: even columns, then odd columns.
inline void add_products(Sums& sums, const __m512* a, const float* b) {
  const __m512 even = _mm512_broadcast_f32x4(_mm_load_ps(b));
  const __m512 odd = _mm512_broadcast_f32x4(_mm_load_ps(b + 4));
#pragma GCC unroll 4
  for (int rows = 0; rows < 4; ++rows) {
    sums.even[rows] = _mm512_fmadd_ps(a[rows], even, sums.even[rows]);
    sums.odd[rows] = _mm512_fmadd_ps(a[rows], odd, sums.odd[rows]);
  }
}

template <Operand type>
void multiply_columns(Warp& warp, const uint32_t* slots, const __m512 (*a)[4], const float* b,
                      bool accumulates) {
  const auto place = [&](int rows, int parity) {
    return lanes<float>(warp, slots[rows / 2 * 2 + parity]) + 16 * (rows % 2);
  };
  Sums first, second;  // sums over even and odd k
#pragma GCC unroll 4
  for (int rows = 0; rows < 4; ++rows) {
    first.even[rows] = accumulates ? _mm512_loadu_ps(place(rows, 0)) : _mm512_setzero_ps();
    first.odd[rows] = accumulates ? _mm512_loadu_ps(place(rows, 1)) : _mm512_setzero_ps();
    second.even[rows] = second.odd[rows] = _mm512_setzero_ps();
  }
  for (int k = 0; k < kDepth<type>; k += 2) {
    add_products(first, a[k], b + 8 * k);
    add_products(second, a[k + 1], b + 8 * k + 8);
  }
  const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff));
  const auto canonical = [&](__m512 sum) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q), sum, nan);
  };
#pragma GCC unroll 4
  for (int rows = 0; rows < 4; ++rows) {
    __m512 even = _mm512_add_ps(first.even[rows], second.even[rows]);
    __m512 odd = _mm512_add_ps(first.odd[rows], second.odd[rows]);
    if (_mm512_cmp_ps_mask(even, odd, _CMP_UNORD_Q)) [[unlikely]] {
      even = canonical(even);
      odd = canonical(odd);
    }
    _mm512_storeu_ps(place(rows, 0), even);
    _mm512_storeu_ps(place(rows, 1), odd);
  }
}

// Broadcasts each element of A to the four lanes of its row.
template <Operand type>
void multiply_rows(Warp& warp, const uint32_t* d, const uint32_t* const* fragments,
                   const Panel& panel, uint32_t columns, bool accumulates) {
  constexpr int per = kPer<type>;
  __m512 a[kDepth<type>][4];
  for (int i = 0; i < 8; ++i) {  // half of a fragment, 16 lanes
    const int slot = i / 2, rows = slot % 2 * 2 + i % 2;
    __m512 elements[per];
    widen<type>(_mm512_loadu_si512(fragments[slot] + 16 * (i % 2)), elements);
    for (int e = 0; e < per; ++e) {
      const int k = slot / 2 * 4 * per + e;
      a[k][rows] = _mm512_permute_ps(elements[e], 0x00);
      a[k + per][rows] = _mm512_permute_ps(elements[e], 0x55);
      a[k + 2 * per][rows] = _mm512_permute_ps(elements[e], 0xaa);
      a[k + 3 * per][rows] = _mm512_permute_ps(elements[e], 0xff);
    }
  }
  for (uint32_t block = 0; block < columns / 8; ++block)
    multiply_columns<type>(warp, d + 4 * block, a, panel.values + 8 * kDepth<type> * block,
                           accumulates);
}

}  // namespace

bool widen_core(Operand type, const char* const* from, bool transposed, bool negated,
                uint32_t column, uint32_t half, Panel& panel) {
  float* const place = panel.values + (type == Operand::tf32 ? 64 : 128) * (column / 8) +
                       (type == Operand::tf32 ? 32 : 64) * half;
  const uint32_t sign = negated ? 0x80000000u : 0;
  if (type == Operand::f16) widen_columns<Operand::f16>(from, transposed, sign, place);
  if (type == Operand::bf16) widen_columns<Operand::bf16>(from, transposed, sign, place);
  if (type == Operand::tf32) widen_columns<Operand::tf32>(from, transposed, sign, place);
  return type != Operand::f8;
}

bool multiply_panel(Operand type, Warp& warp, const uint32_t* d, const uint32_t* const* a,
                    const Panel& panel, uint32_t columns, bool accumulates) {
  if (type == Operand::f8) return false;
  const auto multiply = type == Operand::f16    ? multiply_rows<Operand::f16>
                        : type == Operand::bf16 ? multiply_rows<Operand::bf16>
                                                : multiply_rows<Operand::tf32>;
  multiply(warp, d, a, panel, columns, accumulates);
  return true;
}

#endif

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

namespace {

// Elements of 8 registers, low ones first.
template <Operand type>
void widen(const uint32_t* registers, __m256* elements) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(registers));
  if constexpr (type == Operand::f16) {
    const __m256 first = _mm256_cvtph_ps(_mm256_castsi256_si128(bits));
    const __m256 second = _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1));
    const auto in_order = [](__m256 x) {
      return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8));
    };
    elements[0] = in_order(_mm256_shuffle_ps(first, second, 0x88));
    elements[1] = in_order(_mm256_shuffle_ps(first, second, 0xdd));
  } else if constexpr (type == Operand::bf16) {
    elements[0] = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    elements[1] = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(~0xffff)));
  } else {
    elements[0] = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(kTf32Bits)));
  }
}

struct Accumulators {
  __m256 chain[4][2];
};

// Like the AVX-512 step, with the 128 bits of b in memory.
template <int lane>
void step(Accumulators& d, const __m256* a, const __m128 (*b)[4], int odd) {
  const __m256 upper = _mm256_permute_ps(a[0], lane * 0x55);
  const __m256 lower = _mm256_permute_ps(a[1], lane * 0x55);
  const __m256 even_columns = _mm256_broadcast_ps(b[0] + lane);
  const __m256 odd_columns = _mm256_broadcast_ps(b[1] + lane);
  d.chain[0][odd] = _mm256_fmadd_ps(upper, even_columns, d.chain[0][odd]);
  d.chain[1][odd] = _mm256_fmadd_ps(upper, odd_columns, d.chain[1][odd]);
  d.chain[2][odd] = _mm256_fmadd_ps(lower, even_columns, d.chain[2][odd]);
  d.chain[3][odd] = _mm256_fmadd_ps(lower, odd_columns, d.chain[3][odd]);
}

}  // namespace

template <Operand type>
bool multiply_fast(Warp& warp, const uint32_t* slots) {
  constexpr int per = kPer<type>;
  // b[half of k][element][parity of the column][lane of a group]: 4 columns.
  __m128 b[2][per][2][4];
  for (int half = 0; half < 2; ++half) {
    alignas(32) float columns[per][kLanes];
    for (int i = 0; i < kLanes; i += 8) {
      __m256 elements[per];
      widen<type>(lanes<uint32_t>(warp, slots[8 + half]) + i, elements);
      for (int e = 0; e < per; ++e) _mm256_store_ps(columns[e] + i, elements[e]);
    }
    for (int e = 0; e < per; ++e)
      for (int parity = 0; parity < 2; ++parity) {
        __m128* rows = b[half][e][parity];
        for (int t = 0; t < 4; ++t) rows[t] = _mm_load_ps(columns[e] + 8 * t + 4 * parity);
        _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
      }
  }
  for (int block = 0; block < kLanes; block += 8) {
    Accumulators d;
    for (int q = 0; q < 4; ++q) {
      d.chain[q][0] = _mm256_loadu_ps(lanes<float>(warp, slots[10 + q]) + block);
      d.chain[q][1] = _mm256_setzero_ps();
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m256 upper[per], lower[per];
      widen<type>(lanes<uint32_t>(warp, slots[4 + 2 * half]) + block, upper);
      widen<type>(lanes<uint32_t>(warp, slots[5 + 2 * half]) + block, lower);
#pragma GCC unroll 2
      for (int e = 0; e < per; ++e) {
        const __m256 a[2] = {upper[e], lower[e]};
        step<0>(d, a, b[half][e], per == 2 ? e : 0);
        step<1>(d, a, b[half][e], per == 2 ? e : 1);
        step<2>(d, a, b[half][e], per == 2 ? e : 0);
        step<3>(d, a, b[half][e], per == 2 ? e : 1);
      }
    }
    const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    for (int q = 0; q < 4; ++q) {
      const __m256 sum = _mm256_add_ps(d.chain[q][0], d.chain[q][1]);
      const __m256 unordered = _mm256_cmp_ps(sum, sum, _CMP_UNORD_Q);
      _mm256_storeu_ps(lanes<float>(warp, slots[q]) + block, _mm256_blendv_ps(sum, nan, unordered));
    }
  }
  return true;
}

#else

template <Operand type>
bool multiply_fast(Warp&, const uint32_t*) {
  return false;
}

#endif

#if !PTXVM_PANELS

bool widen_core(Operand, const char* const*, bool, bool, uint32_t, uint32_t, Panel&) {
  return false;
}
bool multiply_panel(Operand, Warp&, const uint32_t*, const uint32_t* const*, const Panel&, uint32_t,
                    bool) {
  return false;
}

#endif

template bool multiply_fast<Operand::f16>(Warp&, const uint32_t*);
template bool multiply_fast<Operand::bf16>(Warp&, const uint32_t*);
template bool multiply_fast<Operand::tf32>(Warp&, const uint32_t*);

}  // namespace ptxvm
