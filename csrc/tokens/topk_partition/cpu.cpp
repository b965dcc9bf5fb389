// Partitions tokens by score, one row at a time: the k-th largest key, then one pass that sends
// each token to its side. A short row in score order is sorted as a whole.
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "select/cpu_keys.h"
#include "tokens/topk_partition/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kShortRow = 1024;
constexpr int kDigitBits = 8;
constexpr int kDigitBins = 1 << kDigitBits;
constexpr int kDigits = 32 / kDigitBits;
constexpr int64_t kParallelTokens = 1 << 15;  // fewer do not pay for a parallel region

// Scratch memory for one row.
struct Scratch {
  uint32_t *keys, *sorted;
  uint64_t *entries, *moved;

  Scratch(cpu::Workspace& memory, const TopkPartitionParams& p)
      : keys(reinterpret_cast<uint32_t*>(memory.take(p.tokens + kWidth))),
        sorted(reinterpret_cast<uint32_t*>(memory.take(p.tokens))),
        entries(reinterpret_cast<uint64_t*>(memory.take(2 * entries_of(p)))),
        moved(reinterpret_cast<uint64_t*>(memory.take(2 * entries_of(p)))) {}
  static int64_t entries_of(const TopkPartitionParams& p) {
    return std::max(p.k, std::min(p.tokens, kShortRow));
  }
  static int64_t floats(const TopkPartitionParams& p) {
    return 2 * p.tokens + 4 * entries_of(p) + kWidth + 4 * 16;
  }
};

template <DType kType>
void load_keys(const TopkPartitionParams& p, int64_t b, uint32_t* keys) {
  // Same as key_of, branch-free: NaN becomes -inf, and -0 + 0 is 0.
  const vf sign = set(p.largest ? 1.f : -1.f), minimum = set(kNegInf);
  const int64_t from = b * p.scores_batch;
  float* const scores = reinterpret_cast<float*>(keys);
  for (int64_t i = 0; i < p.tokens; i += kWidth) {
    const vf x = sign * Elements<kType>::load_n(p.scores, from + i, p.tokens - i);
    store(scores + i, select(less(minimum, x), x, minimum) + zero());
  }
  int64_t i = 0;
  for (; i < p.tokens; ++i)
    keys[i] ^= static_cast<uint32_t>(static_cast<int32_t>(keys[i]) >> 31) | 0x80000000u;
  if (p.valid) {
    const bool* const valid = p.valid + b * p.valid_batch;
    for (i = 0; i < p.tokens; ++i) keys[i] = valid[i] ? keys[i] : kInvalidKey;
  }
  for (i = 0; i < p.protect_first; ++i) keys[i] = kProtectedKey;
  for (i = p.tokens - p.protect_last; i < p.tokens; ++i) keys[i] = kProtectedKey;
}

TM_INLINE uint64_t entry_of(uint32_t key, int64_t i) {
  return static_cast<uint64_t>(key) << 32 | static_cast<uint32_t>(i);
}
TM_INLINE uint32_t key_of_entry(uint64_t entry) { return static_cast<uint32_t>(entry >> 32); }

// Stable radix sort of entries, a key above an index each, by descending digits of their keys from
// `digit` on. `from` and `to` are swapped for every digit in which entries differ.
void sort_by_digits(uint64_t*& from, uint64_t*& to, int64_t count, int digit) {
  int32_t bins[kDigits][kDigitBins];
  std::memset(bins[digit], 0, (kDigits - digit) * sizeof bins[0]);
  const auto digit_of = [](uint64_t entry, int d) {
    return ~entry >> (32 + d * kDigitBits) & (kDigitBins - 1);
  };
  for (int64_t i = 0; i < count; ++i)
    for (int d = digit; d < kDigits; ++d) ++bins[d][digit_of(from[i], d)];
  for (int d = digit; d < kDigits; ++d) {
    if (count == 0 || bins[d][digit_of(from[0], d)] == count) continue;
    int32_t place = 0;
    for (int32_t& bin : bins[d]) {
      const int32_t here = bin;
      bin = place;
      place += here;
    }
    for (int64_t i = 0; i < count; ++i) to[bins[d][digit_of(from[i], d)]++] = from[i];
    std::swap(from, to);
  }
}

// Stable sort by descending key. Returns the location of the sorted entries.
const uint64_t* sort_by_key(uint64_t* from, uint64_t* to, int64_t count) {
  // Few entries share the upper half of their key: these are ordered by insertion, unless there are
  // many.
  int64_t moves = count <= kShortRow ? 2 * count : 0;
  if (moves > 0) sort_by_digits(from, to, count, kDigits / 2);
  for (int64_t i = 1; i < count && moves > 0; ++i) {
    const uint64_t entry = from[i];
    int64_t place = i;
    for (; place > 0 && key_of_entry(from[place - 1]) < key_of_entry(entry); --place)
      from[place] = from[place - 1];
    from[place] = entry;
    moves -= i - place;
  }
  if (moves <= 0) sort_by_digits(from, to, count, 0);
  return from;
}

// Sorts all tokens of a short row by score; the first k are kept.
void partition_sorted(const TopkPartitionParams& p, int64_t k, const Scratch& scratch,
                      int32_t* keep, int32_t* rest) {
  for (int64_t i = 0; i < p.tokens; ++i) scratch.entries[i] = entry_of(scratch.keys[i], i);
  const uint64_t* const sorted = sort_by_key(scratch.entries, scratch.moved, p.tokens);
  for (int64_t i = 0; i < k; ++i) keep[i] = static_cast<int32_t>(sorted[i]);
  const uint32_t minimum = key_of_entry(sorted[k - 1]);
  const int64_t last = keep[k - 1];  // last kept token with the smallest kept key
  int32_t* const others = reinterpret_cast<int32_t*>(scratch.sorted);  // room for all tokens
  int64_t count = 0;
  for (int64_t i = 0; i < p.tokens; ++i) {
    const uint32_t key = scratch.keys[i];
    others[count] = static_cast<int32_t>(i);
    count += (key < minimum) | ((key == minimum) & (i > last));
  }
  std::memcpy(rest, others, count * sizeof(int32_t));
}

template <DType kType>
void partition_row(const TopkPartitionParams& p, int64_t b, const Scratch& scratch) {
  const int64_t k = count_of(p, b);
  int32_t *keep = p.keep + b * p.k, *rest = p.rest + b * p.others;
  std::fill(keep + k, keep + p.k, -1);
  std::fill(rest + p.tokens - k, rest + p.others, -1);
  if (k == 0 || (k == p.tokens && !p.by_score)) {
    int32_t* const all = k == 0 ? rest : keep;
    for (int64_t i = 0; i < p.tokens; ++i) all[i] = static_cast<int32_t>(i);
    return;
  }
  uint32_t* const keys = scratch.keys;
  load_keys<kType>(p, b, keys);
  if (p.by_score && p.tokens <= kShortRow && p.tokens <= 4 * k)
    return partition_sorted(p, k, scratch, keep, rest);
  uint32_t threshold = 0;
  int64_t ties = 0;  // tokens at the threshold to keep
  if (k < p.tokens) {
    std::memcpy(scratch.sorted, keys, p.tokens * sizeof(uint32_t));
    threshold = nth_largest(scratch.sorted, p.tokens, k);
    int64_t greater = 0;
    for (int64_t i = 0; i < p.tokens; ++i) greater += keys[i] > threshold;
    ties = k - greater;
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
  for (int64_t i = 0; i < k; ++i) scratch.entries[i] = entry_of(keys[kept[i]], kept[i]);
  const uint64_t* const sorted = sort_by_key(scratch.entries, scratch.moved, k);
  for (int64_t i = 0; i < k; ++i) kept[i] = static_cast<int32_t>(sorted[i]);
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
