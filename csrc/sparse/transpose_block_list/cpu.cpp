// Counting sort of one list head's entries by key block. Rows are visited in order, so that the
// rows of a block ascend.
#include <cstring>

#include "cpu/parallel.h"
#include "sparse/transpose_block_list/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

template <typename Visit>
void for_each_entry(const TransposeBlockListParams& p, int64_t b, int64_t h, const Visit& visit) {
  for (int64_t row = 0; row < p.list.rows; ++row) {
    const int32_t* ids = p.list.at(b, h, row);
    const int64_t count = p.list.count(b, h, row);
    ListWalk walk{p.blocks};
    for (int64_t e = 0; e < count; ++e)
      if (walk.counts(ids[e])) visit(row, ids[e]);
  }
}

void transpose(const TransposeBlockListParams& p, int64_t b, int64_t h) {
  const int64_t head = b * p.list.heads + h, capacity = p.list.rows * p.list.entries;
  int32_t* offsets = p.offsets + head * (p.blocks + 1);
  int32_t* rows = p.rows + head * capacity;
  std::memset(offsets, 0, (p.blocks + 1) * sizeof(int32_t));
  // offsets[j + 1] first counts the entries of block j, then becomes the index of its next entry.
  for_each_entry(p, b, h, [&](int64_t, int32_t id) { ++offsets[id + 1]; });
  int32_t begin = 0;
  for (int64_t j = 1; j <= p.blocks; ++j) {
    const int32_t count = offsets[j];
    offsets[j] = begin;
    begin += count;
  }
  for_each_entry(p, b, h, [&](int64_t row, int32_t id) {
    rows[offsets[id + 1]++] = static_cast<int32_t>(row);
  });
  for (int64_t i = begin; i < capacity; ++i) rows[i] = -1;
}

}  // namespace

void transpose_block_list(const TransposeBlockListParams& p) {
  const int64_t heads = p.batch * p.list.heads;
  const int threads = heads * p.list.rows * p.list.entries < 100000 ? 1 : cpu::num_threads();
  cpu::parallel_items(heads, threads, [&](cpu::ItemCounter& items) {
    for (int64_t item; (item = items.next()) >= 0;)
      transpose(p, item / p.list.heads, item % p.list.heads);
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
