// B operands of the forward: packed keys and values of one head, from a tensor or a KV cache.
#pragma once
#include "attention/cpu_weights.h"
#include "cpu/element_bytes.h"
#include "cpu/float8.h"
#include "cpu/workspace.h"
#include "dense/attention_decode/params.h"

namespace tokenmill::TOKENMILL_ISA {

TM_INLINE bool holds_codes(const KvCache& cache) { return cache.dtype == DType::float8_e4m3fn; }

// Keys and values of one head, packed panel by panel on first use.
template <class Op>
struct PackedHead {
  float *k, *v;
  uint8_t* done;         // per panel: 1 where packed, 2 where some value is not finite
  float* codes;          // float8 only: widened rows of keys, [kPanel][words]; else null
  int64_t words, width;  // words per k row; floats per v row
  const AttentionParams* p;
  const KvCache* cache;  // the KV cache, or null
  Sequence s;
  int64_t b, h;

  static int64_t k_size(int64_t length, int64_t head_dim) {
    return round_up(length, kPanel) * words_of<Op>(head_dim);
  }
  static int64_t v_size(int64_t length, int64_t width) {
    return round_up(length, kPanel) / Op::kPair * width;
  }
  static int64_t codes_size(const KvCache* cache, int64_t words) {
    return cache && holds_codes(*cache) ? kPanel * round_up(words, kWidth) : 0;
  }
  void place(cpu::Workspace& workspace) { codes = workspace.take(codes_size(cache, words)); }
  const float* k_panel(int64_t column) const { return k + column * words; }
  const float* v_rows(int64_t column) const { return v + column / Op::kPair * width; }
  char* k_row(int64_t j) const { return row(cache ? cache->k : p->k, j); }
  char* v_row(int64_t j) const { return row(cache ? cache->v : p->v, j); }
  char* row(const Rows& rows, int64_t j) const {
    if (!cache) return row_of(rows, p->dtype, b, s.k_start, j, h);
    const KvCache::Slot at = cache->slot(b, j);
    return static_cast<char*>(rows.data) + KvCache::offset(rows, at, h) * element();
  }
  int64_t element() const { return element_bytes(cache ? cache->dtype : p->dtype); }
  int64_t rows_at(int64_t column) const {
    return s.k_length - column < kPanel ? s.k_length - column : kPanel;
  }

  void ensure(int64_t column) {
    if (done[column / kPanel]) return;
    done[column / kPanel] = 1;
    const int64_t n = rows_at(column);
    if (!cache)
      return pack(EvenRows{k_row(column), p->k.seq}, EvenRows{v_row(column), p->v.seq}, column, n);
    if constexpr (Op::kPair == 1)
      if (holds_codes(*cache)) return pack_codes(column, n);
    const char *k_rows[kPanel], *v_rows[kPanel];
    for (int64_t r = 0; r < n; ++r) k_rows[r] = k_row(column + r), v_rows[r] = v_row(column + r);
    pack(ScatteredRows{k_rows}, ScatteredRows{v_rows}, column, n);
  }
  template <class Source>
  void pack(const Source k_rows, const Source v_rows, int64_t column, int64_t n) {
    pack_transposed<Op>(k_rows, p->dtype, n, p->head_dim, 1.f, k + column * words,
                        round_up(n, Op::kPair * kWidth));
    float* to = v + column / Op::kPair * width;
    pack_reduced_rows<Op>(v_rows, p->dtype, n, p->value_dim, to, width);
#if defined(__AMX_BF16__)
    if constexpr (kInTiles<Op>)
      if (!are_finite(to, words_of<Op>(n) * width)) done[column / kPanel] = 2;
#endif
  }
  // False where a packed value of keys begin .. end - 1 is not finite. Only products in tiles ask.
  bool finite(int64_t begin, int64_t end) const {
    bool all = true;
    if constexpr (kInTiles<Op>)
      for (int64_t n = begin / kPanel; n < ceil_div(end, kPanel); ++n) all &= done[n] != 2;
    return all;
  }
  // Widens float8 rows to floats, times their scales; v rows need no further packing.
  void pack_codes(int64_t column, int64_t n) {
    const auto widen = [&](const Rows& rows, const CacheScale& scale, int64_t length, float* to,
                           int64_t ld) {
      for (int64_t r = 0; r < n; ++r) {
        const KvCache::Slot at = cache->slot(b, column + r);
        widen_row(row(rows, column + r), cache->dtype, length, scale.at(at.page, at.row, h),
                  to + r * ld, ld);
      }
    };
    const int64_t ld = round_up(words, kWidth);
    widen(cache->k, cache->k_scale, p->head_dim, codes, ld);
    pack_transposed<Op>(EvenRows{codes, ld}, DType::float32, n, p->head_dim, 1.f,
                        k + column * words);
    widen(cache->v, cache->v_scale, p->value_dim, v + column * width, width);
  }

  // Prefetches share [part, part + count) of `parts` of the panel at `column`.
  void prefetch(int64_t column, int64_t part, int64_t count, int64_t parts) const {
    if (column < s.k_length && !done[column / kPanel]) prefetch_rows(column, part, count, parts);
  }
  // Prefetches the destination of that panel. Under a mask few tiles read a panel, and the memory
  // that it overwrites has left the caches.
  void prefetch_packed(int64_t column, int64_t part, int64_t count, int64_t parts) const {
    if (column >= s.k_length || done[column / kPanel]) return;
    const int64_t last = part + count < parts ? part + count : parts;
    const auto ask = [&](const float* panel, int64_t floats) {
      const char* from = reinterpret_cast<const char*>(panel + floats * part / parts);
      prefetch_row<true>(from, floats * (last - part) / parts * sizeof(float));
    };
    ask(k_panel(column), kPanel * words);
    ask(v_rows(column), kPanel / Op::kPair * width);
  }
  void prefetch_rows(int64_t column, int64_t part, int64_t count, int64_t parts) const {
    const int64_t n = rows_at(column);
    const int64_t last = part + count < parts ? part + count : parts;
    for (int64_t j = column + part * n / parts; j < column + last * n / parts; ++j) {
      prefetch_row<false>(k_row(j), p->head_dim * element());
      prefetch_row<false>(v_row(j), p->value_dim * element());
    }
  }
};

}  // namespace tokenmill::TOKENMILL_ISA
