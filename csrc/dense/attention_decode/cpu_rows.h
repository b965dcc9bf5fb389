// A few query rows against keys and values in place: no packing, each key is read once.
//
// kRows rows share a vector of scores: lane r * kKeys + k is row r and key k.
#pragma once
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace tokenmill::TOKENMILL_ISA {

constexpr int kStep = 32;  // keys

template <int kRows>
constexpr int kKeys = kWidth / kRows;

// Pointers to the rows of one step; past its last key they repeat it. Scales: pointers for the
// first head of the unit.
struct StepRows {
  const char *k[kStep], *v[kStep];
  const float *k_scale[kStep], *v_scale[kStep];
};

// A query row in the element type that the products take.
struct QueryRow {
  const void* elements;
  DType type;
};

// kRows rows of one head of a unit, spread over the lanes of a vector of scores.
template <int kRows>
struct RowBlock {
  int64_t query[kRows], head[kRows];
  bool uneven;  // some of its queries may not see all keys that were read in the step
  alignas(64) float slope[kWidth], constant[kWidth];
  alignas(64) float row_max[kWidth], raise_above[kWidth], sums[kWidth];
  // Kinds other than softmax: sums of weights rounded to 16 bits for their product with V.
  alignas(64) float divisors[kWidth];
};

// f(r) in the lanes of row r.
template <int kRows, typename F>
TM_INLINE vf lanes_of(const F& f) {
  alignas(64) float x[kWidth];
  for (int r = 0; r < kRows; ++r)
    for (int k = 0; k < kKeys<kRows>; ++k) x[r * kKeys<kRows> + k] = f(r);
  return load(x);
}
// f(k) in the lanes of key k.
template <int kRows, typename F>
TM_INLINE vf lanes_of_keys(const F& f) {
  alignas(64) float x[kWidth];
  for (int l = 0; l < kWidth; ++l) x[l] = f(l % kKeys<kRows>);
  return load(x);
}
// x[k] in the lanes of key k of vector j of a step.
template <int kRows>
TM_INLINE vf by_key(const float* x, int64_t j) {
  constexpr int kCount = kKeys<kRows>;
  if constexpr (kRows == 1) {
    return load(x + j * kWidth);
  } else if constexpr (kCount == 1) {
    return set(x[j]);
#if defined(__AVX512F__)
  } else if constexpr (kCount == 4) {
    return _mm512_broadcast_f32x4(_mm_loadu_ps(x + j * kCount));
#endif
  } else {
    alignas(64) float lane[kWidth];
    for (int r = 0; r < kRows; ++r)
      std::memcpy(lane + r * kCount, x + j * kCount, kCount * sizeof(float));
    return load(lane);
  }
}

// A row of keys as words of Op, `words` of which exist.
template <class Op, DType kType>
TM_INLINE vf load_words(const char* row, int64_t word, int64_t words) {
  if constexpr (Op::kPair == 1) {
    if (word + kWidth <= words) return Elements<kType>::load(row, word);
    return Elements<kType>::load_n(row, word, words - word);
  } else {
    return PairWords()(reinterpret_cast<const uint16_t*>(row), 2 * word, words);
  }
}

// S = Q K^T of kRows query rows, ldq words apart, and kKeys keys at `rows` + `offset` bytes. Not
// inlined: in a loop over heads its sums would leave their registers.
template <class Op, DType kType, int kRows>
__attribute__((noinline)) vf multiply_keys(const float* q, int64_t ldq, const char* const* rows,
                                           int64_t offset, int64_t dim) {
  constexpr int kCount = kKeys<kRows>;
  vf sum[kWidth];
  TM_UNROLL(16)
  for (int i = 0; i < kWidth; ++i) sum[i] = zero();
  const int64_t whole = dim / Op::kPair / kWidth * kWidth;
  const auto add = [&](int64_t word, const auto& key) TM_LAMBDA {
    TM_UNROLL(16)
    for (int k = 0; k < kCount; ++k) {
      const vf x = key(rows[k] + offset);
      TM_UNROLL(4)
      for (int r = 0; r < kRows; ++r)
        sum[r * kCount + k] = Op::madd(sum[r * kCount + k], load(q + r * ldq + word), x);
    }
  };
  for (int64_t word = 0; word < whole; word += kWidth)
    add(word, [&](const char* row) TM_LAMBDA {
      if constexpr (Op::kPair == 1)
        return Elements<kType>::load(row, word);
      else
        return load(reinterpret_cast<const float*>(row) + word);
    });
  if (whole * Op::kPair < dim)
    add(whole, [&](const char* row) TM_LAMBDA { return load_words<Op, kType>(row, whole, dim); });
  return sum_each(sum);
}

// Stores weights of a block of keys as words that multiply_values broadcasts.
template <class Op>
TM_INLINE void store_weights(float* p, int64_t block, vf first, vf second) {
  if constexpr (Op::kPair == 1) {
    store(p + block * kWidth, first);
    store(p + (block + 1) * kWidth, second);
  } else {
#if defined(__AVX512BF16__)
    store(p + block / 2 * kWidth, narrow_bfloat(first, second));
#endif
  }
}

// O += P V for kVectors vectors of columns, rows of `out` ldo floats apart. A step is summed from
// zero in registers and added once. kShown: a weight of 0 hides its value.
template <class Op, DType kType, int kRows, bool kShown, int kVectors>
TM_INLINE void multiply_value_columns(const float* p, const char* const* rows, int64_t offset,
                                      int64_t keys, int64_t column, int64_t columns, float* out,
                                      int64_t ldo) {
  constexpr int kCount = kKeys<kRows> / Op::kPair;  // words per row in a block
  const bool whole = column + kVectors * kWidth <= columns;
  vf sum[kRows][kVectors];
  clear(sum);
  for (int64_t key = 0; key < keys; key += Op::kPair) {
    vf value[kVectors];
    if constexpr (Op::kPair == 1) {
      TM_UNROLL(4)
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = column + j * kWidth;
        value[j] = whole ? Elements<kType>::load(rows[key] + offset, at)
                         : Elements<kType>::load_n(rows[key] + offset, at, columns - at);
      }
    } else {
#if defined(__AVX512BF16__)
      TM_UNROLL(2)
      for (int j = 0; j < kVectors; j += 2) {
        const int64_t at = column + j * kWidth;
        const auto row = [&](int64_t r) TM_LAMBDA {
          const uint16_t* from = reinterpret_cast<const uint16_t*>(rows[r] + offset);
          return whole ? load(reinterpret_cast<const float*>(from + at))
                       : PairWords()(from, at, columns);
        };
        interleave_bfloat(row(key), row(key + 1), value[j], value[j + 1]);
      }
#endif
    }
    const int64_t word = key / Op::kPair;
    const float* weights = p + word / kCount * (kRows * kCount) + word % kCount;
    TM_UNROLL(4)
    for (int r = 0; r < kRows; ++r) {
      const float weight = weights[r * kCount];
      TM_UNROLL(4)
      for (int j = 0; j < kVectors; ++j)
        sum[r][j] =
            Op::madd(sum[r][j], set(weight), kShown ? Op::shown(weight, value[j]) : value[j]);
    }
  }
  TM_UNROLL(4)
  for (int r = 0; r < kRows; ++r) {
    TM_UNROLL(4)
    for (int j = 0; j < kVectors; ++j) {
      float* to = out + r * ldo + column + j * kWidth;
      store(to, load(to) + sum[r][j]);
    }
  }
}

template <class Op, DType kType, int kRows, bool kShown>
__attribute__((noinline)) void multiply_values(const float* p, const char* const* rows,
                                               int64_t offset, int64_t keys, int64_t columns,
                                               float* out, int64_t ldo) {
  int64_t column = 0;
  for (; column + kTileVectors * kWidth <= columns; column += kTileVectors * kWidth)
    multiply_value_columns<Op, kType, kRows, kShown, kTileVectors>(p, rows, offset, keys, column,
                                                                   columns, out, ldo);
  for (; column < columns; column += Op::kPair * kWidth)
    multiply_value_columns<Op, kType, kRows, kShown, Op::kPair>(p, rows, offset, keys, column,
                                                                columns, out, ldo);
}

// Restores the column order of the sums of multiply_values.
template <class Op>
TM_INLINE void restore_order(float* row, int64_t width) {
#if defined(__AVX512BF16__)
  if constexpr (Op::kPair == 2)
    for (int64_t c = 0; c < width; c += 2 * kWidth) {
      vf low = load(row + c), high = load(row + c + kWidth);
      restore_columns(low, high);
      store(row + c, low);
      store(row + c + kWidth, high);
    }
#endif
}

}  // namespace tokenmill::TOKENMILL_ISA
