// Many query rows against a step of keys that is widened to words once: the rows of a block are the
// lanes of a vector of scores, one vector per key.
//
//   S[key][row] = sum_c K[key][c] Q[c][row]      A: words of keys,     B: panels of queries
//   O[row][c]  += sum_key P[key][row] V[key][c]  A: weights, by rows,  B: words of values
#pragma once
#include "core/kv_cache.h"
#include "cpu/float8.h"
#include "cpu/tile.h"
#include "dense/attention_decode/cpu_rows.h"

namespace tokenmill::TOKENMILL_ISA {

constexpr int kTileHeight = kTileVectors == 4 ? 8 : 4;  // keys; rows of weights
// words of a key per pass: two panels of queries and a step of keys fit in L1
constexpr int64_t kTileWords = 128;
constexpr int kTileColumns = 2;  // vectors of values

// Rows of a step of one head as words, times their scales. ld, an odd number of 64-byte lines,
// spreads rows over the sets of L1.
template <class Op>
class StepWords {
 public:
  StepWords(const KvCache& cache, int64_t head_dim, int64_t value_dim)
      : head_dim_(head_dim),
        value_dim_(value_dim),
        ld_(round_up(head_dim > value_dim ? head_dim : value_dim, 2 * kWidth) + kWidth),
        shared_(Op::kPair == 1 && value_dim <= head_dim && same(cache.k, cache.v) &&
                same(cache.k_scale, cache.v_scale)) {}

  int64_t size() const { return 2 * kStep * ld_; }
  void place(float* memory) { keys_ = memory, values_ = memory + kStep * ld_; }
  int64_t ld() const { return ld_; }
  bool shared() const { return shared_; }  // values are the first channels of the keys
  const float* keys() const { return keys_; }
  const float* values() const { return values_; }

  template <class Placed>
  void load_keys(const Placed& placed, const float* scales, int64_t count, DType type) {
    for (int64_t i = 0; i < count; ++i) {
      const char* const row = placed.k[i] + placed.k_offset;
      const float scale = scales ? scales[i] : 1;
      float* const to = keys_ + i * ld_;
      if (type == DType::float8_e4m3fn)
        widen_row(row, type, head_dim_, scale, to, ld_);
      else
        pack_rows<Op>(row, type, 0, 1, 1, head_dim_, scale, to, ld_);
    }
  }

  // float32 rows already include their scales.
  template <class Placed>
  void load_values(const Placed& placed, const float* scales, int64_t count, DType type) {
    const char* rows[kStep];
    for (int64_t i = 0; i < count; ++i) rows[i] = placed.v[i] + placed.v_offset;
    if (type != DType::float8_e4m3fn)
      return pack_reduced_rows<Op>(ScatteredRows{rows}, type, count, value_dim_, values_, ld_);
    for (int64_t i = 0; i < count; ++i)
      widen_row(rows[i], type, value_dim_, scales ? scales[i] : 1, values_ + i * ld_, ld_);
  }

 private:
  static bool same(const Rows& a, const Rows& b) {
    return a.data == b.data && a.batch == b.batch && a.seq == b.seq && a.head == b.head;
  }
  static bool same(const CacheScale& a, const CacheScale& b) {
    return a.data == b.data && a.page == b.page && a.row == b.row && a.head == b.head;
  }

  int64_t head_dim_, value_dim_, ld_;
  bool shared_;
  float *keys_ = nullptr, *values_ = nullptr;
};

// Prefetch queue of the rows needed next, issued to L2 a few lines at a time between products.
class RowsAhead {
 public:
  static constexpr int64_t kLine = 64;
  RowsAhead() = default;
  RowsAhead(const char* const* rows, int64_t offset, int64_t bytes)
      : rows_(rows), offset_(offset), bytes_(bytes), left_(kStep * ceil_div(bytes, kLine)) {}
  int64_t left() const { return left_; }
  TM_INLINE void ask(int64_t lines) {
    for (; lines > 0 && left_ > 0; --lines, --left_) {
      __builtin_prefetch(rows_[row_] + offset_ + byte_, 0, 2);
      byte_ += kLine;
      if (byte_ < bytes_) continue;
      byte_ = 0;
      ++row_;
    }
  }

 private:
  const char* const* rows_ = nullptr;
  int64_t offset_ = 0, bytes_ = 0, left_ = 0, row_ = 0, byte_ = 0;
};

// Scores of kTileHeight keys with kBlocks blocks of rows, over `words` words. Blocks are q_block
// and s_block floats apart. first: stores the scores, else adds to them.
template <class Op, int kBlocks>
__attribute__((noinline)) void multiply_key_tile(const float* keys, int64_t ldk, const float* q,
                                                 int64_t q_block, int64_t words, bool first,
                                                 float* scores, int64_t s_block) {
  vf sum[kTileHeight][kBlocks];
  clear(sum);
  const float* panels[kBlocks];
  for (int j = 0; j < kBlocks; ++j) panels[j] = q + j * q_block;
  multiply_panels<Op>(sum, keys, ldk, panels, words);
  TM_UNROLL(16)
  for (int i = 0; i < kTileHeight; ++i) {
    TM_UNROLL(2)
    for (int j = 0; j < kBlocks; ++j) {
      float* const to = scores + j * s_block + i * kWidth;
      store(to, first ? sum[i][j] : load(to) + sum[i][j]);
    }
  }
}

// Scores of `keys` keys, a multiple of kTileHeight, with all blocks, kTileWords words at a time.
// Each tile issues some prefetches of `ahead`.
template <class Op>
void multiply_key_tiles(const float* k, int64_t ldk, int64_t keys, int64_t words, const float* q,
                        int64_t q_block, int64_t blocks, float* scores, int64_t s_block,
                        RowsAhead& ahead) {
  const int64_t tiles = ceil_div(words, kTileWords) * ceil_div(blocks, 2) * (keys / kTileHeight);
  const int64_t lines = ceil_div(ahead.left(), tiles);
  for (int64_t word = 0; word < words; word += kTileWords) {
    const int64_t some = words - word < kTileWords ? words - word : kTileWords;
    for (int64_t n = 0; n < blocks; n += 2) {
      const float* const panels = q + n * q_block + word * kWidth;
      float* const to = scores + n * s_block;
      for (int64_t key = 0; key < keys; key += kTileHeight) {
        ahead.ask(lines);
        const auto product = n + 1 < blocks ? &multiply_key_tile<Op, 2> : &multiply_key_tile<Op, 1>;
        product(k + key * ldk + word, ldk, panels, q_block, some, word == 0, to + key * kWidth,
                s_block);
      }
    }
  }
}

// The product with rows of B replaced by 0 where the weight is 0, for rows that are not finite.
template <class Op>
__attribute__((noinline, cold)) void multiply_shown_values(vf (&c)[kTileHeight][kTileColumns],
                                                           const float* a, const float* b,
                                                           int64_t ldb, int64_t words) {
  for (int i = 0; i < kTileHeight; ++i)
    for (int j = 0; j < kTileColumns; ++j) {
      c[i][j] = zero();
      for (int64_t k = 0; k < words; ++k) {
        const float weight = a[k * kWidth + i];
        c[i][j] = Op::madd(c[i][j], set(weight), Op::shown(weight, load(b + k * ldb + j * kWidth)));
      }
    }
}

// O += P V for kTileHeight rows of weights and kTileColumns vectors of columns.
template <class Op>
__attribute__((noinline)) void multiply_value_tile(const float* p, const float* v, int64_t ldv,
                                                   int64_t words, bool hides, float* out,
                                                   int64_t ldo) {
  vf sum[kTileHeight][kTileColumns];
  clear(sum);
  multiply<Op, true>(sum, p, kWidth, v, ldv, words);
  if (hides && !finite(sum)) [[unlikely]] {
    vf shown[kTileHeight][kTileColumns];
    multiply_shown_values<Op>(shown, p, v, ldv, words);
    std::memcpy(sum, shown, sizeof sum);
  }
  TM_UNROLL(16)
  for (int i = 0; i < kTileHeight; ++i) {
    TM_UNROLL(2)
    for (int j = 0; j < kTileColumns; ++j) {
      float* const to = out + i * ldo + j * kWidth;
      store(to, load(to) + sum[i][j]);
    }
  }
}

// Stores weights of a block as words that multiply_value_tile broadcasts.
template <class Op>
TM_INLINE void store_weight_rows(float* p, int64_t key, vf first, vf second) {
  if constexpr (Op::kPair == 1) {
    store(p + key * kWidth, first);
    store(p + (key + 1) * kWidth, second);
  } else {
#if defined(__AVX512BF16__)
    store(p + key / 2 * kWidth, pair_bfloat(first, second));
#endif
  }
}

}  // namespace tokenmill::TOKENMILL_ISA
