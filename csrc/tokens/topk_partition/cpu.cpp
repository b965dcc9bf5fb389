// Tokens partitioned by their scores, a row at a time: the k-th largest key, then one pass that
// sends each token to its side. None of it depends on branches that scores decide.
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "select/cpu_keys.h"
#include "tokens/topk_partition/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int kDigitBits = 8;
constexpr int kDigitBins = 1 << kDigitBits;
constexpr int64_t kParallelTokens = 1 << 15;  // fewer are not worth a parallel region

// Memory for one row.
struct Scratch {
  uint32_t *keys, *sorted;
  uint64_t *entries, *moved;

  Scratch(cpu::Workspace& memory, const TopkPartitionParams& p)
      : keys(reinterpret_cast<uint32_t*>(memory.take(p.tokens + kWidth))),
        sorted(reinterpret_cast<uint32_t*>(memory.take(p.tokens))),
        entries(reinterpret_cast<uint64_t*>(memory.take(2 * p.k))),
        moved(reinterpret_cast<uint64_t*>(memory.take(2 * p.k))) {}
  static int64_t floats(const TopkPartitionParams& p) {
    return 2 * p.tokens + 4 * p.k + kWidth + 4 * 16;
  }
};

template <DType kType>
void load_keys(const TopkPartitionParams& p, int64_t b, uint32_t* keys) {
  const float sign = p.largest ? 1.f : -1.f;
  const int64_t from = b * p.scores_batch;
  float* const scores = reinterpret_cast<float*>(keys);
  int64_t i = 0;
  for (; i + kWidth <= p.tokens; i += kWidth)
    store(scores + i, Elements<kType>::load(p.scores, from + i));
  if (i < p.tokens) store(scores + i, Elements<kType>::load_n(p.scores, from + i, p.tokens - i));
  for (i = 0; i < p.tokens; ++i) keys[i] = key_of(scores[i] * sign);
  if (p.valid) {
    const bool* const valid = p.valid + b * p.valid_batch;
    for (i = 0; i < p.tokens; ++i) keys[i] = valid[i] ? keys[i] : kInvalidKey;
  }
  for (i = 0; i < p.protect_first; ++i) keys[i] = kProtectedKey;
  for (i = p.tokens - p.protect_last; i < p.tokens; ++i) keys[i] = kProtectedKey;
}

// Sorts entries, a key above an index each, by descending key. Stable. Returns where they are.
const uint64_t* sort_by_key(uint64_t* from, uint64_t* to, int64_t count) {
  constexpr int kDigits = 32 / kDigitBits;
  int32_t bins[kDigits][kDigitBins] = {};
  const auto digit_of = [](uint64_t entry, int digit) {
    return ~entry >> (32 + digit * kDigitBits) & (kDigitBins - 1);
  };
  for (int64_t i = 0; i < count; ++i)
    for (int d = 0; d < kDigits; ++d) ++bins[d][digit_of(from[i], d)];
  for (int d = 0; d < kDigits; ++d) {
    if (count == 0 || bins[d][digit_of(from[0], d)] == count) continue;  // all the same
    int32_t place = 0;
    for (int32_t& bin : bins[d]) {
      const int32_t here = bin;
      bin = place;
      place += here;
    }
    for (int64_t i = 0; i < count; ++i) to[bins[d][digit_of(from[i], d)]++] = from[i];
    uint64_t* const sorted = to;
    to = from;
    from = sorted;
  }
  return from;
}

template <DType kType>
void partition_row(const TopkPartitionParams& p, int64_t b, const Scratch& scratch) {
  int32_t *keep = p.keep + b * p.k, *rest = p.rest + b * (p.tokens - p.k);
  if (p.k == 0 || (p.k == p.tokens && !p.by_score)) {
    int32_t* const all = p.k == 0 ? rest : keep;
    for (int64_t i = 0; i < p.tokens; ++i) all[i] = static_cast<int32_t>(i);
    return;
  }
  uint32_t* const keys = scratch.keys;
  load_keys<kType>(p, b, keys);
  uint32_t threshold = 0;
  int64_t ties = 0;  // to keep, of the tokens at the threshold
  if (p.k < p.tokens) {
    std::memcpy(scratch.sorted, keys, p.tokens * sizeof(uint32_t));
    threshold = nth_largest(scratch.sorted, p.tokens, p.k);
    int64_t greater = 0;
    for (int64_t i = 0; i < p.tokens; ++i) greater += keys[i] > threshold;
    ties = p.k - greater;
  }
  int32_t* const kept = keep;
  for (int64_t i = 0; i < p.tokens; ++i) {
    const bool tie = keys[i] == threshold, taken = keys[i] > threshold || (tie && ties > 0);
    ties -= tie;
    *(taken ? keep : rest) = static_cast<int32_t>(i);
    keep += taken;
    rest += !taken;
  }
  if (!p.by_score) return;
  for (int64_t i = 0; i < p.k; ++i)
    scratch.entries[i] =
        static_cast<uint64_t>(keys[kept[i]]) << 32 | static_cast<uint32_t>(kept[i]);
  const uint64_t* const sorted = sort_by_key(scratch.entries, scratch.moved, p.k);
  for (int64_t i = 0; i < p.k; ++i) kept[i] = static_cast<int32_t>(sorted[i]);
}

}  // namespace

void topk_partition(const TopkPartitionParams& p) {
  const int threads = p.batch * p.tokens < kParallelTokens ? 1 : cpu::num_threads();
  cpu::parallel_items(p.batch, threads, [&](cpu::ItemCounter& items) {
    cpu::Workspace memory(Scratch::floats(p));
    const Scratch scratch(memory, p);
    for (int64_t b; (b = items.next()) >= 0;) {
      switch (p.dtype) {
        case DType::float16:
          partition_row<DType::float16>(p, b, scratch);
          break;
        case DType::bfloat16:
          partition_row<DType::bfloat16>(p, b, scratch);
          break;
        default:
          partition_row<DType::float32>(p, b, scratch);
      }
    }
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
