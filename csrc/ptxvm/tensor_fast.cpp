// mma without leaving the layout of the fragments. A group of 4 lanes is a row of D, so that
// an element of A is broadcast within 128 bits and a row of B is the same in each 128 bits; every
// accumulator takes its products in the order of ordered_sum.
#include <cstring>

#include "ptxvm/memory_ops.h"
#include "ptxvm/tensor.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#endif

namespace ptxvm {
namespace {

constexpr int kTf32Bits = ~0x1fff;  // the hardware ignores the rest

template <Operand type>
constexpr int kPer = type == Operand::tf32 ? 1 : 2;  // elements per register

}  // namespace

#if defined(__AVX512F__)

namespace {

// The elements of 16 registers, low ones first.
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

// Products of the column of A that is an element of lane `lane` of each group of 4, of its upper
// and lower rows. b holds even and odd columns of B, odd says whether k is.
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
  // b[half of k][element][parity of the column]: 128 bits per lane of a group, in them 4 columns.
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

namespace {

template <Operand type>
constexpr int kDepth = 8 * kPer<type>;  // k of a wgmma

// Rows of k from columns of 16 bytes.
template <Operand type>
void widen_columns(const uint32_t* core, float* rows) {
  if constexpr (type == Operand::tf32) {
    const auto masked = [&](int c) {
      return _mm_castsi128_ps(
          _mm_and_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(core + 4 * c)),
                        _mm_set1_epi32(kTf32Bits)));
    };
    for (int parity = 0; parity < 2; ++parity) {
      __m128 c[4] = {masked(parity), masked(2 + parity), masked(4 + parity), masked(6 + parity)};
      _MM_TRANSPOSE4_PS(c[0], c[1], c[2], c[3]);
      for (int k = 0; k < 4; ++k) _mm_storeu_ps(rows + 8 * k + 4 * parity, c[k]);
    }
  } else {
    alignas(16) uint16_t columns[64], turned[64];
    for (int c = 0; c < 8; ++c) std::memcpy(columns + 8 * (c % 2 * 4 + c / 2), core + 4 * c, 16);
    transpose(columns, turned);
    for (int k = 0; k < 8; ++k) {
      const __m128i row = _mm_load_si128(reinterpret_cast<const __m128i*>(turned + 8 * k));
      const __m256 wide =
          type == Operand::f16
              ? _mm256_cvtph_ps(row)
              : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(row), 16));
      _mm256_storeu_ps(rows + 8 * k, wide);
    }
  }
}

// The accumulators of 8 columns: of upper and lower rows, of 16 lanes, of even and odd columns.
template <Operand type>
void multiply_columns(Warp& warp, const uint32_t* slots, const __m512 (*a)[4], const float* b,
                      bool accumulates) {
  const auto place = [&](int rows, int parity) {
    return lanes<float>(warp, slots[rows / 2 * 2 + parity]) + 16 * (rows % 2);
  };
  __m512 chain[2][4][2];
  for (int rows = 0; rows < 4; ++rows)
    for (int parity = 0; parity < 2; ++parity) {
      chain[0][rows][parity] =
          accumulates ? _mm512_loadu_ps(place(rows, parity)) : _mm512_setzero_ps();
      chain[1][rows][parity] = _mm512_setzero_ps();
    }
#pragma GCC unroll 2
  for (int k = 0; k < kDepth<type>; ++k) {
    const __m512 even = _mm512_broadcast_f32x4(_mm_load_ps(b + 8 * k));
    const __m512 odd = _mm512_broadcast_f32x4(_mm_load_ps(b + 8 * k + 4));
#pragma GCC unroll 4
    for (int rows = 0; rows < 4; ++rows) {
      auto& sums = chain[k % 2][rows];
      sums[0] = _mm512_fmadd_ps(a[k][rows], even, sums[0]);
      sums[1] = _mm512_fmadd_ps(a[k][rows], odd, sums[1]);
    }
  }
  const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff));
#pragma GCC unroll 4
  for (int rows = 0; rows < 4; ++rows) {
    __m512 sums[2];
    for (int parity = 0; parity < 2; ++parity)
      sums[parity] = _mm512_add_ps(chain[0][rows][parity], chain[1][rows][parity]);
    if (_mm512_cmp_ps_mask(sums[0], sums[1], _CMP_UNORD_Q)) [[unlikely]]
      for (__m512& sum : sums)
        sum = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q), sum, nan);
    for (int parity = 0; parity < 2; ++parity) _mm512_storeu_ps(place(rows, parity), sums[parity]);
  }
}

// An element of A is the same in the four lanes of its row.
template <Operand type>
void multiply_rows(Warp& warp, const uint32_t* d, const uint32_t* const* fragments,
                   const Panel& panel, uint32_t columns, bool accumulates) {
  constexpr int per = kPer<type>;
  __m512 a[kDepth<type>][4];
  for (int i = 0; i < 8; ++i) {  // fragment, 16 lanes of it
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

bool widen_core(Operand type, const uint32_t* core, uint32_t column, uint32_t half, Panel& panel) {
  float* const place = panel.values + (type == Operand::tf32 ? 64 : 128) * (column / 8);
  if (type == Operand::f16) widen_columns<Operand::f16>(core, place + 64 * half);
  if (type == Operand::bf16) widen_columns<Operand::bf16>(core, place + 64 * half);
  if (type == Operand::tf32) widen_columns<Operand::tf32>(core, place + 32 * half);
  return type != Operand::f8;
}

bool multiply_panel(Operand type, Warp& warp, const uint32_t* d, const uint32_t* const* a,
                    const Panel& panel, uint32_t columns, bool accumulates) {
  const auto multiply = type == Operand::f16    ? multiply_rows<Operand::f16>
                        : type == Operand::bf16 ? multiply_rows<Operand::bf16>
                                                : multiply_rows<Operand::tf32>;
  multiply(warp, d, a, panel, columns, accumulates);
  return type != Operand::f8;
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

namespace {

// The elements of 8 registers, low ones first.
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

// As above, with the 128 bits of b in memory.
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

#if !defined(__AVX512F__)

bool widen_core(Operand, const uint32_t*, uint32_t, uint32_t, Panel&) { return false; }
bool multiply_panel(Operand, Warp&, const uint32_t*, const uint32_t* const*, const Panel&, uint32_t,
                    bool) {
  return false;
}

#endif

template bool multiply_fast<Operand::f16>(Warp&, const uint32_t*);
template bool multiply_fast<Operand::bf16>(Warp&, const uint32_t*);
template bool multiply_fast<Operand::tf32>(Warp&, const uint32_t*);

}  // namespace ptxvm
