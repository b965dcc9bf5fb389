// Decay factors between the tokens of a chunk, for the CPU kernels.
#pragma once
#include <cmath>
#include <cstring>

#include "cpu/simd.h"
#include "linear/params.h"

namespace tokenmill::TOKENMILL_ISA {

constexpr int64_t kMaxChunk = 32;  // tokens

// Exponents below these give the same float32 results, and inf - inf cannot occur.
constexpr double kMinConstant = -1e4, kMinOfToken = -128;

// A recurrence runs forward in time or, for gradients, backward: its row r is then token n - 1 - r
// of the chunk. All factors are powers of e with exponents <= 0; the factors of outputs, of pairs
// and from_start, include `scale`.
class ChunkDecay {
 public:
  ChunkDecay(const LogDecay& decay, bool backward, float scale)
      : decay_(decay), backward_(backward), scale_(scale) {}

  bool none() const { return !decay_.data; }

  static constexpr int64_t kRowsPad = 16;
  // Floats of the table of a constant decay, computed before the first chunk.
  static constexpr int64_t kTable =
      kMaxChunk + kRowsPad + kRowsPad + kMaxChunk + kMaxChunk + kWidth;

  void fill_table(float* table, int64_t b, int64_t h) const {
    if (decay_.per_token) return;
    const double each = none() ? 0 : clamp(*head(b, h), kMinConstant);
    for (int64_t i = 0; i < kMaxChunk + kRowsPad; ++i)
      table[i] = i == 0 ? 1 : static_cast<float>(std::exp(each * static_cast<double>(i)));
    float* row = row_of(table);
    for (int64_t i = 0; i < kRowsPad + kMaxChunk; ++i) row[-i] = table[i] * scale_;
    for (int64_t i = 1; i < kMaxChunk + kWidth; ++i) row[i] = 0;
  }

  // Tokens first .. first + n - 1, counted along seq, of head h of batch b.
  void start_chunk(const float* table, int64_t b, int64_t h, int64_t first, int64_t n) {
    if (decay_.per_token) return per_token(head(b, h), first, n);
    pair = row_of(table);
    pair_step = -1;
    total = table[n];
    const float* power = table + (backward_ ? 0 : 1);
    for (int64_t r = 0; r < n; ++r) from_start[r] = power[r] * scale_;
    power = table + n - (backward_ ? 0 : 1);
    for (int64_t r = 0; r < n; ++r) to_end[r] = power[-r];
    std::memset(from_start + n, 0, kRowsPad * sizeof(float));
    std::memset(to_end + n, 0, kRowsPad * sizeof(float));
  }

  float from_start[kMaxChunk + kRowsPad] = {};  // weight of the state before the chunk in row r
  float to_end[kMaxChunk + kRowsPad] = {};      // weight of row r in the state after the chunk
  float total;
  const float* pair;  // weight of row s in row r: pair[r * pair_step + s], 0 for s > r
  int64_t pair_step;

 private:
  static double clamp(float x, double minimum) { return x < minimum ? minimum : x; }

  const float* head(int64_t b, int64_t h) const {
    return decay_.data + b * decay_.batch + h * decay_.head;
  }
  // Table of a constant decay, indexed by s - r; 0 for later rows, s > r.
  template <typename Float>
  static Float* row_of(Float* table) {
    return table + kMaxChunk + kRowsPad + kRowsPad + kMaxChunk - 1;
  }

  void per_token(const float* head, int64_t first, int64_t n) {
    double prefix[kMaxChunk];
    double sum = 0;
    for (int64_t t = 0; t < n; ++t)
      prefix[t] = sum += clamp(head[(first + t) * decay_.seq], kMinOfToken);
    total = static_cast<float>(std::exp(sum));
    // Log2 differences as two floats each: a single float32 prefix sum is too coarse.
    constexpr double kLog2eDouble = 1.4426950408889634;
    float high[kMaxChunk + kRowsPad], low[kMaxChunk + kRowsPad];
    float start[kMaxChunk + kRowsPad], end[kMaxChunk + kRowsPad];
    for (int64_t r = 0; r < n + kRowsPad; ++r) {
      const int64_t row = r < n ? r : n - 1, t = backward_ ? n - 1 - row : row;
      const double x = kLog2eDouble * (backward_ ? -prefix[t] : prefix[t]);
      high[r] = static_cast<float>(x);
      low[r] = static_cast<float>(x - static_cast<double>(high[r]));
      start[r] = static_cast<float>(kLog2eDouble * (backward_ ? sum - prefix[t] : prefix[t]));
      end[r] = static_cast<float>(kLog2eDouble * (backward_ ? prefix[t] : sum - prefix[t]));
    }
    const vf scale = set(scale_);
    for (int64_t r = 0; r < n; r += kWidth) {
      store(from_start + r, select(lanes(0, n - r), exp2<5>(load(start + r)) * scale, zero()));
      store(to_end + r, select(lanes(0, n - r), exp2<5>(load(end + r)), zero()));
    }
    pair = pairs_;
    const int64_t step = pair_step = round_up(n, 2 * kRowsPad);  // whole vectors of any tile
    for (int64_t r = 0; r < n; ++r) {
      const vf row_high = set(high[r]), row_low = set(low[r]);
      for (int64_t s = 0; s < r + 1; s += kWidth) {
        const vf x = (row_high - load(high + s)) + (row_low - load(low + s));
        store(pairs_ + r * step + s, select(lanes(0, r + 1 - s), exp2<5>(x) * scale, zero()));
      }
      for (int64_t s = round_up(r + 1, kWidth); s < step; s += kWidth)
        store(pairs_ + r * step + s, zero());
    }
    std::memset(pairs_ + n * step, 0, kRowsPad * step * sizeof(float));
  }

  const LogDecay& decay_;
  bool backward_;
  float scale_;
  float pairs_[(kMaxChunk + kRowsPad) * kMaxChunk];  // for per-token decays
};

}  // namespace tokenmill::TOKENMILL_ISA
