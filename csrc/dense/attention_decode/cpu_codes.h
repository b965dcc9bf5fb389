// Products of cpu_rows.h with float8_e4m3fn keys and values, which are widened in registers. Sums
// are of codes times kCodeUnit, and are multiplied by its inverse once.
#pragma once
#include "cpu/float8.h"
#include "dense/attention_decode/cpu_rows.h"

namespace tokenmill::TOKENMILL_ISA {

constexpr int kCodesAtOnce = NanCodes::kCount / kWidth;  // vectors

TM_INLINE const uint8_t* codes_at(const char* row, int64_t offset) {
  return reinterpret_cast<const uint8_t*>(row + offset);
}
TM_INLINE void load_four(const uint8_t* p, vf (&x)[kCodesAtOnce]) {
  TM_UNROLL(4)
  for (int j = 0; j < kCodesAtOnce; j += 2) load_codes(p + j * kWidth, x[j], x[j + 1]);
}

// The score of a key with a NaN code is NaN.
template <int kRows>
__attribute__((noinline, cold)) vf show_nan_keys(vf sums, const char* const* rows, int64_t offset,
                                                 int64_t dim) {
  alignas(64) float lane[kWidth];
  store(lane, sums);
  for (int k = 0; k < kKeys<kRows>; ++k) {
    bool any = false;
    for (int64_t c = 0; c < dim; ++c) any |= is_nan_code(codes_at(rows[k], offset)[c]);
    for (int r = 0; any && r < kRows; ++r) lane[r * kKeys<kRows> + k] = __builtin_nanf("");
  }
  return load(lane);
}

// multiply_keys of float8 codes.
template <int kRows>
__attribute__((noinline)) vf multiply_key_codes(const float* q, int64_t ldq,
                                                const char* const* rows, int64_t offset,
                                                int64_t dim) {
  constexpr int kCount = kKeys<kRows>;
  vf sum[kWidth];
  TM_UNROLL(16)
  for (int i = 0; i < kWidth; ++i) sum[i] = zero();
  NanCodes nan;
  const int64_t whole = dim / NanCodes::kCount * NanCodes::kCount;
  for (int64_t column = 0; column < whole; column += NanCodes::kCount) {
    TM_UNROLL(16)
    for (int k = 0; k < kCount; ++k) {
      const uint8_t* const codes = codes_at(rows[k], offset) + column;
      nan.add(codes);
      TM_UNROLL(2)
      for (int half = 0; half < kCodesAtOnce; half += 2) {
        vf x[2];
        load_codes(codes + half * kWidth, x[0], x[1]);
        TM_UNROLL(4)
        for (int r = 0; r < kRows; ++r) {
          const float* const query = q + r * ldq + column + half * kWidth;
          vf& to = sum[r * kCount + k];
          to = fma(load(query), x[0], to);
          to = fma(load(query + kWidth), x[1], to);
        }
      }
    }
  }
  using Codes = Elements<DType::float8_e4m3fn>;
  for (int64_t column = whole; column < dim; column += kWidth) {
    TM_UNROLL(16)
    for (int k = 0; k < kCount; ++k) {
      const vf x = Codes::load_n(codes_at(rows[k], offset), column, dim - column) * set(kCodeUnit);
      TM_UNROLL(4)
      for (int r = 0; r < kRows; ++r)
        sum[r * kCount + k] = fma(load(q + r * ldq + column), x, sum[r * kCount + k]);
    }
  }
  const vf sums = sum_each(sum) * set(1 / kCodeUnit);
  if (nan.any()) [[unlikely]]
    return show_nan_keys<kRows>(sums, rows, offset, dim);
  return sums;
}

// Sets the output of rows to NaN where they see a NaN code in a block of columns.
template <int kRows, bool kShown>
__attribute__((noinline, cold)) void show_nan_values(const float* p, const char* const* rows,
                                                     int64_t offset, int64_t keys, int64_t column,
                                                     float* out, int64_t ldo) {
  constexpr int kCount = kKeys<kRows>;
  for (int64_t key = 0; key < keys; ++key) {
    const float* const weights = p + key / kCount * (kRows * kCount) + key % kCount;
    for (int64_t c = column; c < column + NanCodes::kCount; ++c) {
      if (!is_nan_code(codes_at(rows[key], offset)[c])) continue;
      for (int r = 0; r < kRows; ++r)
        if (!kShown || weights[r * kCount] != 0) out[r * ldo + c] = __builtin_nanf("");
    }
  }
}

// multiply_values of float8 codes. kShown: weights do not yet include the V scales; null: there are
// none.
template <int kRows, bool kShown>
__attribute__((noinline)) void multiply_value_codes(const float* p, const float* scales,
                                                    const char* const* rows, int64_t offset,
                                                    int64_t keys, int64_t columns, float* out,
                                                    int64_t ldo) {
  constexpr int kCount = kKeys<kRows>;
  const auto weighted = [&](vf value, int64_t key, float weight) TM_LAMBDA {
    if (!kShown) return value;
    if (weight == 0) return zero();
    return scales ? value * set(scales[key]) : value;
  };
  int64_t column = 0;
  for (; column + NanCodes::kCount <= columns; column += NanCodes::kCount) {
    vf sum[kRows][kCodesAtOnce];
    clear(sum);
    NanCodes nan;
    for (int64_t key = 0; key < keys; ++key) {
      const uint8_t* const codes = codes_at(rows[key], offset) + column;
      nan.add(codes);
      vf value[kCodesAtOnce];
      load_four(codes, value);
      const float* const weights = p + key / kCount * (kRows * kCount) + key % kCount;
      TM_UNROLL(4)
      for (int r = 0; r < kRows; ++r) {
        const float weight = weights[r * kCount];
        TM_UNROLL(4)
        for (int j = 0; j < kCodesAtOnce; ++j)
          sum[r][j] = fma(set(weight), weighted(value[j], key, weight), sum[r][j]);
      }
    }
    TM_UNROLL(4)
    for (int r = 0; r < kRows; ++r) {
      TM_UNROLL(4)
      for (int j = 0; j < kCodesAtOnce; ++j) {
        float* const to = out + r * ldo + column + j * kWidth;
        store(to, fma(sum[r][j], set(1 / kCodeUnit), load(to)));
      }
    }
    if (nan.any()) [[unlikely]]
      show_nan_values<kRows, kShown>(p, rows, offset, keys, column, out, ldo);
  }
  for (; column < columns; column += kWidth) {
    vf sum[kRows][1];
    clear(sum);
    for (int64_t key = 0; key < keys; ++key) {
      const vf value = Elements<DType::float8_e4m3fn>::load_n(codes_at(rows[key], offset), column,
                                                              columns - column);
      const float* const weights = p + key / kCount * (kRows * kCount) + key % kCount;
      TM_UNROLL(4)
      for (int r = 0; r < kRows; ++r) {
        const float weight = weights[r * kCount];
        sum[r][0] = fma(set(weight), weighted(value, key, weight), sum[r][0]);
      }
    }
    TM_UNROLL(4)
    for (int r = 0; r < kRows; ++r) {
      float* const to = out + r * ldo + column;
      store(to, load(to) + sum[r][0]);
    }
  }
}

}  // namespace tokenmill::TOKENMILL_ISA
