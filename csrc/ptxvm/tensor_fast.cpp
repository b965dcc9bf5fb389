// m16n8k16 without leaving the layout of the fragments. A group of 4 lanes is a row of D, so that
// an element of A is broadcast within 128 bits and a row of B is the same in each 128 bits; every
// accumulator takes its products in the order of ordered_sum.
#include "ptxvm/tensor.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#endif

namespace ptxvm {

#if defined(__AVX512F__)

namespace {

// Low and high elements of 16 registers.
template <Half16 type>
void widen(__m512i pairs, __m512& low, __m512& high) {
  if constexpr (type == Half16::f16) {
    low = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
    high = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
  } else {
    low = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    high = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(~0xffff)));
  }
}

struct Accumulators {
  __m512 chain[4][2];
};

// Products of column 8 * half + 2 * pair + odd of A. b holds even and odd columns of B.
template <int pair>
void step(Accumulators& d, const __m512* a, const __m512 (*b)[2], int odd) {
  const __m512 upper = _mm512_permute_ps(a[0], pair * 0x55);
  const __m512 lower = _mm512_permute_ps(a[1], pair * 0x55);
  const __m512 even_columns = _mm512_shuffle_f32x4(b[odd][0], b[odd][0], pair * 0x55);
  const __m512 odd_columns = _mm512_shuffle_f32x4(b[odd][1], b[odd][1], pair * 0x55);
  d.chain[0][odd] = _mm512_fmadd_ps(upper, even_columns, d.chain[0][odd]);
  d.chain[1][odd] = _mm512_fmadd_ps(upper, odd_columns, d.chain[1][odd]);
  d.chain[2][odd] = _mm512_fmadd_ps(lower, even_columns, d.chain[2][odd]);
  d.chain[3][odd] = _mm512_fmadd_ps(lower, odd_columns, d.chain[3][odd]);
}

}  // namespace

template <Half16 type>
bool multiply_fast(Warp& warp, const uint32_t* slots) {
  const auto load = [&](int index, int block) {
    return _mm512_loadu_si512(lanes<uint32_t>(warp, slots[index]) + 16 * block);
  };
  // b[half][odd][parity]: 128 bits per pair of k, in them 4 columns of one parity.
  __m512 b[2][2][2];
  const __m512i even = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(4));
  for (int half = 0; half < 2; ++half) {
    __m512 first[2], second[2];
    widen<type>(load(8 + half, 0), first[0], first[1]);
    widen<type>(load(8 + half, 1), second[0], second[1]);
    for (int h = 0; h < 2; ++h) {
      b[half][h][0] = _mm512_permutex2var_ps(first[h], even, second[h]);
      b[half][h][1] = _mm512_permutex2var_ps(first[h], odd, second[h]);
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
      __m512 a[2][2];  // [odd][upper or lower rows]
      for (int row = 0; row < 2; ++row)
        widen<type>(load(4 + 2 * half + row, block), a[0][row], a[1][row]);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        step<0>(d, a[h], b[half], h);
        step<1>(d, a[h], b[half], h);
        step<2>(d, a[h], b[half], h);
        step<3>(d, a[h], b[half], h);
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

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

namespace {

// Low and high elements of 8 registers.
template <Half16 type>
void widen(const uint32_t* pairs, __m256& low, __m256& high) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs));
  if constexpr (type == Half16::f16) {
    const __m256 first = _mm256_cvtph_ps(_mm256_castsi256_si128(bits));
    const __m256 second = _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1));
    const auto in_order = [](__m256 x) {
      return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8));
    };
    low = in_order(_mm256_shuffle_ps(first, second, 0x88));
    high = in_order(_mm256_shuffle_ps(first, second, 0xdd));
  } else {
    low = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    high = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(~0xffff)));
  }
}

struct Accumulators {
  __m256 chain[4][2];
};

template <int pair>
void step(Accumulators& d, const __m256* a, const __m128* b, int odd) {
  const __m256 upper = _mm256_permute_ps(a[0], pair * 0x55);
  const __m256 lower = _mm256_permute_ps(a[1], pair * 0x55);
  const __m256 even_columns = _mm256_broadcast_ps(b + pair);
  const __m256 odd_columns = _mm256_broadcast_ps(b + 4 + pair);
  d.chain[0][odd] = _mm256_fmadd_ps(upper, even_columns, d.chain[0][odd]);
  d.chain[1][odd] = _mm256_fmadd_ps(upper, odd_columns, d.chain[1][odd]);
  d.chain[2][odd] = _mm256_fmadd_ps(lower, even_columns, d.chain[2][odd]);
  d.chain[3][odd] = _mm256_fmadd_ps(lower, odd_columns, d.chain[3][odd]);
}

}  // namespace

template <Half16 type>
bool multiply_fast(Warp& warp, const uint32_t* slots) {
  // b[half][odd][parity][pair of k]: 4 columns of one parity.
  __m128 b[2][2][2][4];
  for (int half = 0; half < 2; ++half) {
    alignas(32) float columns[2][kLanes];
    for (int i = 0; i < kLanes; i += 8) {
      __m256 low, high;
      widen<type>(lanes<uint32_t>(warp, slots[8 + half]) + i, low, high);
      _mm256_store_ps(columns[0] + i, low);
      _mm256_store_ps(columns[1] + i, high);
    }
    for (int h = 0; h < 2; ++h)
      for (int parity = 0; parity < 2; ++parity) {
        __m128* rows = b[half][h][parity];
        for (int t = 0; t < 4; ++t) rows[t] = _mm_load_ps(columns[h] + 8 * t + 4 * parity);
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
      __m256 a[2][2];  // [odd][upper or lower rows]
      for (int row = 0; row < 2; ++row)
        widen<type>(lanes<uint32_t>(warp, slots[4 + 2 * half + row]) + block, a[0][row], a[1][row]);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const __m128* rows = b[half][h][0];
        step<0>(d, a[h], rows, h);
        step<1>(d, a[h], rows, h);
        step<2>(d, a[h], rows, h);
        step<3>(d, a[h], rows, h);
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

template <Half16 type>
bool multiply_fast(Warp&, const uint32_t*) {
  return false;
}

#endif

template bool multiply_fast<Half16::f16>(Warp&, const uint32_t*);
template bool multiply_fast<Half16::bf16>(Warp&, const uint32_t*);

}  // namespace ptxvm
