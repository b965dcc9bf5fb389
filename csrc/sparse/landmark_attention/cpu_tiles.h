// Key tiles of the CPU kernels, and the scores of a tile against a panel of queries. Scores are
// transposed, keys by queries, so that block statistics are vectors over queries.
#pragma once
#include "attention/cpu_backward_operands.h"
#include "sparse/landmark_attention/params.h"

namespace tokenmill::TOKENMILL_ISA {

// A tile holds whole blocks, or a part of one block that is longer than a tile.
struct BlockTiles {
  int64_t length, block, parts;  // parts: tiles per block
  int64_t keys, count;           // keys per tile; tiles of the sequence

  BlockTiles(int64_t length, int64_t block)
      : length(length),
        block(block <= length ? block : length + 1),
        parts(ceil_div(this->block, kKeyTile)),
        keys(parts == 1 ? kKeyTile / this->block * this->block : kKeyTile),
        count(parts == 1 ? ceil_div(length, keys)
                         : length / this->block * parts + ceil_div(length % this->block, keys)) {}

  bool whole() const { return parts == 1; }
  int64_t first(int64_t tile) const {
    return whole() ? tile * keys : tile / parts * block + tile % parts * keys;
  }
  int64_t count_of(int64_t tile) const {
    const int64_t at = first(tile), end = whole() ? at + keys : (at / block + 1) * block;
    const int64_t left = (end < length ? end : length) - at;
    return left < keys ? left : keys;
  }
  bool is_landmark(int64_t key) const { return key % block == block - 1; }
};

// Row addresses of a tile of one KV head: keys, and values with zeros for landmarks.
struct TileRows {
  const char *k[kKeyTile], *v[kKeyTile];

  TileRows(const AttentionParams& p, const BlockTiles& tiles, int64_t b, int64_t h, int64_t first,
           int64_t count) {
    alignas(64) static const float kZeros[256] = {};
    for (int64_t j = 0; j < count; ++j) {
      k[j] = row_of(p.k, p.dtype, b, 0, first + j, h);
      v[j] = tiles.is_landmark(first + j) ? reinterpret_cast<const char*>(kZeros)
                                          : row_of(p.v, p.dtype, b, 0, first + j, h);
    }
  }
};

// Part of a block within a tile: rows [from, to) are its ordinary keys.
struct BlockRows {
  int64_t from, to;
  int64_t landmark;  // row of the landmark, or -1
  int64_t end;       // end of the block; queries from here on see it through its landmark

  bool earlier(int64_t query) const { return query >= end; }
  // Mask of the queries from `query` on that see the block through its landmark.
  vm earlier_lanes(int64_t query) const { return lanes(end - query, kWidth); }
};

// Block n of a tile of `count` keys from `first` on.
inline BlockRows block_rows(const BlockTiles& tiles, int64_t first, int64_t count, int64_t n) {
  const int64_t begin = tiles.whole() ? n * tiles.block : 0;
  const int64_t end = (first + begin) / tiles.block * tiles.block + tiles.block;
  const int64_t behind = end - first < count ? end - first : count;
  const bool has_landmark = behind == end - first;
  return {begin, behind - has_landmark, has_landmark ? behind - 1 : -1, end};
}
inline int64_t blocks_of(const BlockTiles& tiles, int64_t count) {
  return tiles.whole() ? ceil_div(count, tiles.block) : 1;
}
constexpr int64_t kMaxBlocks = kKeyTile / 2;  // per tile

// Mask of the queries from `query` on that see row j of their own block, which begins at key
// `first`.
TM_INLINE vm own_lanes(int64_t first, int64_t j, int64_t query) {
  return lanes(first + j - query, kWidth);
}

// Maximum m over the ordinary keys of a block, for kWidth queries; -inf becomes finite, so that
// differences from it are not NaN.
TM_INLINE vf finite_max(vf m) { return max_of(set(-kMax), m); }
// weight / sum; 0 for a block without a weight.
TM_INLINE vf share_of(vf weight, vf sum) {
  return select(equal(sum, zero()), zero(), weight / sum);
}

// Statistics of a block that spans several tiles: the maximum, and the sum relative to it.
struct LongBlock {
  float *max, *sum, *landmark;  // max and landmark are exponents; one per query

  int64_t size(int64_t queries) const { return 3 * queries + 3 * 16; }
  void place(cpu::Workspace& workspace, int64_t queries) {
    max = workspace.take(queries);
    sum = workspace.take(queries);
    landmark = workspace.take(queries);
  }
  void clear(int64_t from, int64_t to) const {
    for (int64_t i = from; i < to; ++i) max[i] = -kInf, sum[i] = 0;
  }
};

}  // namespace tokenmill::TOKENMILL_ISA
