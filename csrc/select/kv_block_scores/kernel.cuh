// Scores on tensor cores. A warp loads 16 key rows at a time from global memory directly into its
// fragments, and multiplies them by query rows in shared memory. Boxes are keys of twice the width,
// with queries split by sign.
#pragma once
#include "cuda/float8.cuh"
#include "cuda/math.cuh"
#include "select/kv_block_scores/params.h"
#include "select/products.cuh"

namespace tokenmill::cuda::kv_block_scores {

constexpr int kScoreWarps = 4;
constexpr int kScoreThreads = kScoreWarps * kWarpSize;
constexpr int kSlotLd = kScoreRows + 1;

// Score rows ("columns", since the keys are the rows of the product) of a KV head are ordered by
// row of the result, head, query. A set of them makes one result. A CTA processes one part, whole
// sets, with a piece of the columns in shared memory at a time. A unit is the work of a warp: 16
// key rows, whose whole blocks are its slots, or all rows of one block.
struct ScorePlan {
  int group, row_queries, set;
  int columns, part_columns, parts;
  int units, unit_rows, slots;
  int rounds;  // units per warp
  int unit_groups;
  int half_chunks, chunks, slices;  // 16 bytes of a row of keys, of a row and its other half; 64
  int query_bytes;  // column stride in shared memory: 64 bytes more than a multiple of 128, so that
                    // adjacent columns are in different banks
  bool keys_aligned, queries_aligned;
};

template <int kColumnTiles>
struct ScoreShape {
  static constexpr int kColumns = 8 * kColumnTiles;   // columns in shared memory
  static constexpr int kScores = kColumns * kSlotLd;  // per warp

  static int shared_bytes(int query_bytes) {
    return kColumns * query_bytes + (kScoreWarps * kScores + kColumns) * 4;
  }
};

struct ScoreColumn {
  int row, query;  // row of the result; query of the sequence, -1 past its end
  int head;        // index in the GQA group

  __device__ ScoreColumn(const BlockScoreParams& p, const ScorePlan& plan, int column) {
    const int rest = column / plan.row_queries;
    row = rest / plan.group;
    head = rest % plan.group;
    query = static_cast<int>(p.mean_q ? last_query(p, row)
                                      : row * p.block_q + column % plan.row_queries);
    if (query >= p.queries) query = -1;
  }
};

// The negative elements, or the positive ones; NaN is in both.
template <typename T>
__device__ __forceinline__ void keep_sign(uint32_t (&words)[4], bool positive) {
  constexpr int kCount = kChunkBytes / sizeof(T);
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < 4; ++i) reinterpret_cast<uint32_t (&)[4]>(pack)[i] = words[i];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float x = static_cast<float>(pack.x[i]);
    if (positive ? x < 0 : x > 0) pack.x[i] = static_cast<T>(0.f);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = reinterpret_cast<const uint32_t (&)[4]>(pack)[i];
}

// Loads a piece of the columns of one KV head: queries to shared memory, and the end of the keys
// that each sees. Called by all threads of a CTA.
template <typename T>
__device__ void load_queries(const BlockScoreParams& p, const ScorePlan& plan, int64_t b,
                             int64_t kv_head, int first, int columns, int padded, uint32_t queries,
                             int* ends) {
  const int chunks = plan.slices * (kSliceBytes / kChunkBytes);
#pragma unroll 1
  for (int i = threadIdx.x; i < padded * chunks; i += kScoreThreads) {
    const int c = i / chunks, chunk = i % chunks;
    uint32_t words[4] = {};
    if (c < columns && chunk < plan.chunks) {
      const ScoreColumn column(p, plan, first + c);
      const int64_t at = p.mean_q ? column.row : column.query < 0 ? 0 : column.query;
      const T* row = static_cast<const T*>(p.q.data) + b * p.q.batch + at * p.q.seq +
                     (kv_head * plan.group + column.head) * p.q.head;
      const bool high = chunk >= plan.half_chunks;
      load_chunk(words, row, high ? chunk - plan.half_chunks : chunk, static_cast<int>(p.head_dim),
                 plan.queries_aligned);
      if (p.boxes) keep_sign<T>(words, high);
    }
    store_shared(queries + c * plan.query_bytes + chunk * kChunkBytes, words);
  }
  if (threadIdx.x < padded) {
    const int c = threadIdx.x;
    ends[c] = 0;
    if (c < columns) {
      const int64_t query = ScoreColumn(p, plan, first + c).query;
      if (query >= 0) ends[c] = static_cast<int>(seen_rows(p, tokens_of(p, b), query).end);
    }
  }
}

// Keys of one KV head, of T or Float8.
template <typename T, typename Cache>
struct ScoreKeys {
  static constexpr bool kFloat8 = std::is_same_v<Cache, Float8>;
  struct Row {
    const T* data;  // null: zeros; for Float8 an address that only load() dereferences
    bool hidden;
    float scale;
  };

  const BlockScoreParams& p;
  const ScorePlan& plan;
  int64_t b, kv_head;

  __device__ __forceinline__ Row row(int i, int end) const {
    if (i >= end) return {nullptr, true, 1};
    const KeyRun run = key_run(p.k, b, i);
    if (run.offset < 0) return {nullptr, false, 1};
    const Cache* const data = static_cast<const Cache*>(p.k.data) + run.offset + kv_head * p.k.head;
    if constexpr (kFloat8)
      return {reinterpret_cast<const T*>(data), false, scale(i)};
    else
      return {data, p.boxes && static_cast<float>(data[0]) > static_cast<float>(data[p.k_half]), 1};
  }
  // Scale of a row whose page exists.
  __device__ __forceinline__ float scale(int i) const {
    if (!p.k.table) return p.k_scale.at(b, i, kv_head);
    const int64_t page = i / p.k.page_size;
    return p.k_scale.at(p.k.table[b * p.k.table_stride + page], i - page * p.k.page_size, kv_head);
  }
  // Chunk of a row or, after it, of its other half.
  __device__ __forceinline__ void load(uint32_t (&words)[4], const T* row, int chunk) const {
    words[0] = words[1] = words[2] = words[3] = 0;
    if (row == nullptr || chunk >= plan.chunks) return;
    if constexpr (kFloat8) {
      load_codes(words, reinterpret_cast<const Float8*>(row), chunk);
      return;
    }
    const bool high = chunk >= plan.half_chunks;
    load_chunk(words, high ? row + p.k_half : row, high ? chunk - plan.half_chunks : chunk,
               static_cast<int>(p.head_dim), plan.keys_aligned);
  }
  __device__ __forceinline__ void load_codes(uint32_t (&words)[4], const Float8* row,
                                             int chunk) const {
    constexpr int kCount = kChunkBytes / sizeof(T);
    const int column = chunk * kCount;
    Pack<Float8, kCount> codes{};
    if (plan.keys_aligned) {
      codes = *reinterpret_cast<const Pack<Float8, kCount>*>(row + column);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (column + i < p.head_dim) codes.x[i] = row[column + i];
    }
    convert_float8<T>(words, reinterpret_cast<const uint32_t (&)[kCount / 4]>(codes));
  }
};

// Scores of one unit against the columns in shared memory, to scores[column * kSlotLd + slot].
template <typename T, int kColumnTiles, typename Keys>
__device__ __forceinline__ void score_unit(const Keys& keys, int unit, int seen_begin, int seen_end,
                                           uint32_t queries, const int* ends, int tiles,
                                           float* scores) {
  const BlockScoreParams& p = keys.p;
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, c = lane % 4;
  const int first = unit * keys.plan.unit_rows;
  const int last = min(first + keys.plan.unit_rows, static_cast<int>(p.k.rows));
  const int span = keys.plan.slots == 1 ? 8 : kScoreRows / keys.plan.slots;  // rows per half
  bool fresh = true;
#pragma unroll 1
  for (int row = first; row < last; row += kScoreRows) {
    if (row >= seen_end || row + kScoreRows <= seen_begin) continue;
    const auto low = keys.row(row + g, min(last, seen_end));
    const auto high = keys.row(row + g + 8, min(last, seen_end));
    // S = K Q^T
    float s[kColumnTiles][4];
    multiply_queries(s, keys, low.data, high.data, queries, tiles);
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      if (n >= tiles) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = row + g + 8 * (i / 2), column = 8 * n + 2 * c + i % 2;
        const bool hidden = i / 2 == 0 ? low.hidden : high.hidden;
        const bool seen = !hidden && at >= seen_begin && at < ends[column];
        if constexpr (Keys::kFloat8) s[n][i] *= i / 2 == 0 ? low.scale : high.scale;
        s[n][i] = seen ? p.scale * s[n][i] : -infinity();
#pragma unroll 1
        for (int o = 1; o < span; o *= 2)
          s[n][i] = max_or_nan(s[n][i], __shfl_xor_sync(kFullWarp, s[n][i], 4 * o));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float* const to = scores + (8 * n + 2 * c + i) * kSlotLd;
        if (keys.plan.slots == 1) {
          const float maximum = max_or_nan(s[n][i], s[n][i + 2]);
          if (g == 0) to[0] = fresh ? maximum : max_or_nan(to[0], maximum);
        } else if (g % span == 0) {
          to[g / span] = s[n][i];
          to[(g + 8) / span] = s[n][i + 2];
        }
      }
    }
    fresh = false;
  }
  if (fresh)
    for (int i = lane; i < 8 * kColumnTiles * kSlotLd; i += kWarpSize) scores[i] = -infinity();
}

// Partial result of a set; sets larger than shared memory go through several pieces.
struct ScoreSet {
  float maximum, total;
  int query, head;

  __device__ void start() { maximum = -infinity(), query = 0, head = 0; }
  __device__ __forceinline__ void add(const BlockScoreParams& p, const ScorePlan& plan, float x) {
    maximum = max_or_nan(maximum, x);
    if (++query < plan.row_queries) return;
    total = head == 0                                 ? maximum
            : p.head_reduce == HeadReduce::group_mean ? total + maximum
                                                      : max_or_nan(total, maximum);
    maximum = -infinity(), query = 0, ++head;
  }
  __device__ float result(const BlockScoreParams& p, const ScorePlan& plan) const {
    return p.head_reduce == HeadReduce::group_mean ? total / static_cast<float>(plan.group) : total;
  }
};

// Reduces the columns of whole sets, or of a piece of one, and writes the results of a unit.
// Adjacent lanes have adjacent key blocks.
__device__ __forceinline__ void reduce_sets(const BlockScoreParams& p, const ScorePlan& plan,
                                            int64_t b, int64_t kv_head, int first, int columns,
                                            int unit, const float* scores, ScoreSet& set) {
  const int lane = threadIdx.x % kWarpSize, slot = lane % plan.slots;
  const int64_t block = int64_t{unit} * plan.slots + slot;
#pragma unroll 1
  for (int c = lane / plan.slots * plan.set; c < columns; c += kWarpSize / plan.slots * plan.set) {
    const int number = (first + c) / plan.set;
    if (number * plan.set == first + c) set.start();
    const int end = min(c + plan.set, columns);
#pragma unroll 4
    for (int i = c; i < end; ++i) set.add(p, plan, scores[i * kSlotLd + slot]);
    if (first + end != (number + 1) * plan.set || block >= p.blocks) continue;
    float* const out = p.head_reduce == HeadReduce::softmax_vote ? p.scores : p.out;
    const int64_t head = reduces_group(p)
                             ? b * p.kv_heads + kv_head
                             : b * p.heads + kv_head * plan.group + number % plan.group;
    const int row = reduces_group(p) ? number : number / plan.group;
    out[(head * p.rows + row) * p.blocks + block] = set.result(p, plan);
  }
}

template <typename T, int kColumnTiles, typename Cache>
__device__ __forceinline__ void score_blocks(const BlockScoreParams& p, const ScorePlan& plan) {
  using Shape = ScoreShape<kColumnTiles>;
  extern __shared__ uint4 shared[];
  float* const all_scores =
      reinterpret_cast<float*>(shared) + Shape::kColumns * plan.query_bytes / 4;
  int* const ends = reinterpret_cast<int*>(all_scores + kScoreWarps * Shape::kScores);
  const uint32_t queries = shared_address(shared);
  const int warp = threadIdx.x / kWarpSize;
  float* const scores = all_scores + warp * Shape::kScores;

  const int group = static_cast<int>(blockIdx.x) % plan.unit_groups;
  const int rest = static_cast<int>(blockIdx.x) / plan.unit_groups;
  const int part = rest % plan.parts, head = rest / plan.parts;
  const int64_t b = head / p.kv_heads, kv_head = head % p.kv_heads;
  const ScoreKeys<T, Cache> keys{p, plan, b, kv_head};
  const int part_begin = part * plan.part_columns;
  const int part_end = min(part_begin + plan.part_columns, plan.columns);
  const int last_row = ScoreColumn(p, plan, part_end - 1).row;
  const SeenRows seen = seen_rows(p, tokens_of(p, b), last_query(p, last_row));
  const int seen_begin = static_cast<int>(min(seen.begin, p.k.rows));
  const int seen_end = static_cast<int>(seen.end);
  const bool whole = part_end - part_begin <= Shape::kColumns;

  ScoreSet set;
  set.start();
#pragma unroll 1
  for (int round = 0; round < plan.rounds; ++round) {
    const int unit = (group * plan.rounds + round) * kScoreWarps + warp;
#pragma unroll 1
    for (int first = part_begin; first < part_end; first += Shape::kColumns) {
      const int columns = min(part_end - first, Shape::kColumns);
      if (round == 0 || !whole) {
        __syncthreads();
        load_queries<T>(p, plan, b, kv_head, first, columns, Shape::kColumns, queries, ends);
        __syncthreads();
      }
      if (unit < plan.units) {
        score_unit<T, kColumnTiles>(keys, unit, seen_begin, seen_end, queries, ends,
                                    (columns + 7) / 8, scores);
        __syncwarp();
        reduce_sets(p, plan, b, kv_head, first, columns, unit, scores, set);
        __syncwarp();
      }
    }
  }
}

template <typename T, int kColumnTiles>
__global__ void __launch_bounds__(kScoreThreads, kColumnTiles == 1 ? 4 : 3)
    score_kernel(const __grid_constant__ BlockScoreParams p,
                 const __grid_constant__ ScorePlan plan) {
  score_blocks<T, kColumnTiles, T>(p, plan);
}

// float8_e4m3fn keys.
template <typename T, int kColumnTiles>
__global__ void __launch_bounds__(kScoreThreads, kColumnTiles == 1 ? 4 : 3)
    score_float8_kernel(const __grid_constant__ BlockScoreParams p,
                        const __grid_constant__ ScorePlan plan) {
  score_blocks<T, kColumnTiles, Float8>(p, plan);
}

}  // namespace tokenmill::cuda::kv_block_scores
