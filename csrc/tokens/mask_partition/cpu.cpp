// Packs the tokens selected by a mask. Rows are counted first, then written by different workers.
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "tokens/mask_partition/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kTile = 1024;               // tokens
constexpr int64_t kParallelTokens = 1 << 16;  // fewer do not pay for a parallel region

int64_t count(const uint8_t* mask, int64_t tokens) {
  int64_t taken = 0;
  for (int64_t i = 0; i < tokens; ++i) taken += mask[i] != 0;
  return taken;
}

void write_row(const MaskPartitionParams& p, int64_t b) {
  const uint8_t* const mask = p.mask + b * p.mask_batch;
  int32_t* const inverse = p.inverse + b * p.tokens;
  int32_t place = p.cu_seqlens[b];
  // Every token is written, and tokens that are not selected are overwritten.
  int32_t packed[kTile + 1];
  for (int64_t begin = 0; begin < p.tokens; begin += kTile) {
    const int64_t end = begin + kTile < p.tokens ? begin + kTile : p.tokens;
    const int32_t first = place;
    for (int64_t i = begin; i < end; ++i) {
      const int32_t taken = mask[i] != 0;
      packed[place - first] = static_cast<int32_t>(b * p.tokens + i);
      inverse[i] = place | (taken - 1);  // branch-free, since the mask is unpredictable
      place += taken;
    }
    std::memcpy(p.indices + first, packed, (place - first) * sizeof(int32_t));
  }
}

}  // namespace

void mask_partition(const MaskPartitionParams& p) {
  int32_t* const ends = p.cu_seqlens;
  ends[0] = 0;
  for (int64_t b = 0; b < p.batch; ++b)
    ends[b + 1] = ends[b] + static_cast<int32_t>(count(p.mask + b * p.mask_batch, p.tokens));
  const int threads = p.batch * p.tokens < kParallelTokens ? 1 : cpu::num_threads();
  cpu::parallel_items(p.batch, threads, [&](cpu::ItemCounter& items) {
    for (int64_t b; (b = items.next()) >= 0;) write_row(p, b);
  });
  for (int64_t i = ends[p.batch]; i < p.size; ++i) p.indices[i] = -1;
}

}  // namespace tokenmill::TOKENMILL_ISA
