// Scores on tensor cores: s[i, j] = sum over heads h of w[i, h] act(q[i, h] . k[j]), for a stripe
// of query rows against all keys; topk_select then reads them. A warp holds 16 kUnits key rows in
// registers and multiplies them by the heads of one query after the other, which pass through
// shared memory. float8_e4m3fn codes are converted to T exactly, without the magnitude of their
// scale, which is applied to the sum over heads.
#pragma once
#include "cuda/arch/mma_sm80.cuh"
#include "cuda/float8.cuh"
#include "cuda/load_tile.cuh"
#include "cuda/math.cuh"
#include "cuda/warp.cuh"
#include "select/indexer_topk_select/params.h"

namespace tokenmill::cuda::indexer_topk_select {

constexpr int kUnitKeys = 16;    // key rows per MMA tile
constexpr int kHeadTiles = 8;    // tiles of 8 columns
constexpr int kSliceBytes = 64;  // 16 per lane of a quad, two MMA k-steps
constexpr int kSliceBatch = 4;   // slices of keys in registers
constexpr int kTileTokens = 16;  // maximum queries per CTA
constexpr int kStages = 2;       // pipeline stages of queries in shared memory, if they fit

// Rows are relative to a stripe: row r is query `first` + r.
struct ScorePlan {
  int64_t first;
  int64_t ld;  // row stride of scores, a multiple of 4
  int rows, tile_tokens, key_groups, rounds;
  int head_tiles;      // 8 heads each
  int log2_chunks;     // 16 bytes of `slices`, rounded up
  int chunks, slices;  // 16 and 64 bytes of a row of q or k
  int query_bytes;     // stride of heads in shared memory: 64 bytes more than a multiple of 128, so
                       // that adjacent heads are in different banks
  int stages;
  bool queries_aligned, keys_aligned;
  float* scores;     // [rows, ld]
  float* blocks;     // [rows, ld], block maxima; aliases scores if block_k is 1
  int32_t* lengths;  // [rows], lengths of `blocks`

  // One query and its weights.
  TOKENMILL_HOST_DEVICE int stage_bytes() const { return 8 * head_tiles * (query_bytes + 4); }
};

// A query of the tile, and the range of keys that its list may contain.
struct IndexerToken {
  int64_t query, weight;  // offsets, in elements
  int64_t k_start, keys;  // extent of the sequence
  int b, begin, end;
};

// A query outside of every sequence sees nothing.
__device__ inline IndexerToken find_token(const IndexerParams& p, int64_t token) {
  int64_t b = 0;
  if (p.cu_seqlens_q) {  // the last sequence that begins at or before the token
    int64_t low = -1, high = p.batch + 1;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (p.cu_seqlens_q[middle] <= token ? low : high) = middle;
    }
    if (low < 0 || low == p.batch) return {};
    b = low;
  } else {
    b = token / p.queries;
  }
  const IndexerSequence s = indexer_sequence(p, b);
  const int64_t i = token - s.q_start;
  if (i < 0 || i >= s.queries) return {};
  const SeenKeys seen = seen_keys(p, s, i);
  return {query_offset(p, p.q, s, b, i),
          query_offset(p, p.weights, s, b, i),
          s.k_start,
          s.keys,
          static_cast<int>(b),
          static_cast<int>(seen.begin < seen.end ? seen.begin : 0),
          static_cast<int>(seen.end)};
}

__device__ __forceinline__ float load_weight(const IndexerParams& p, int64_t at) {
  if (p.weight_dtype == DType::float32) return static_cast<const float*>(p.weights.data)[at];
  if (p.weight_dtype == DType::float16)
    return static_cast<float>(static_cast<const __half*>(p.weights.data)[at]);
  return static_cast<float>(static_cast<const __nv_bfloat16*>(p.weights.data)[at]);
}

// Loads the heads of one query and their weights to a stage; missing heads are zero-filled.
template <typename T>
__device__ __forceinline__ void load_query(const IndexerParams& p, const ScorePlan& plan,
                                           const IndexerToken& token, uint32_t queries,
                                           float* weights) {
  constexpr int kCount = kChunkBytes / sizeof(T);
  const T* const query = static_cast<const T*>(p.q.data) + token.query;
  const int heads = static_cast<int>(p.heads);
  // A thread loads one chunk of every step-th head.
  const int chunk = threadIdx.x & ((1 << plan.log2_chunks) - 1);
  const int step = blockDim.x >> plan.log2_chunks;
  const int columns = static_cast<int>(p.head_dim) - chunk * kCount;
  int h = threadIdx.x >> plan.log2_chunks;
  uint32_t to = queries + h * plan.query_bytes + chunk * kChunkBytes;
  const T* from = query + h * p.q.head + chunk * kCount;
  if (chunk >= plan.slices * (kSliceBytes / kChunkBytes)) h = 8 * kHeadTiles;
#pragma unroll 1
  for (; h < 8 * plan.head_tiles; h += step) {
    const int there = h < heads ? columns : 0;
    if (plan.queries_aligned)
      cp_async_zfill(to, there > 0 ? from : query, there > 0);
    else
      copy_elements(to, from, there);
    to += step * plan.query_bytes;
    from += step * p.q.head;
  }
  const int own = threadIdx.x;
  if (own < 8 * plan.head_tiles)
    weights[own] = own < heads ? load_weight(p, token.weight + own) : 0.f;
}

// Chunk `chunk` of a row of codes as 16 bytes of T, zero past the columns; whole: all chunks of the
// row exist and are aligned. A NaN code becomes +-480; returns true if there is one.
template <typename T>
__device__ __forceinline__ bool load_codes(uint32_t (&words)[4], const Float8* row, int chunk,
                                           int columns, bool whole) {
  constexpr int kCount = kChunkBytes / sizeof(T);
  const int column = chunk * kCount;
  Pack<uint32_t, kCount / 4> codes{};
  if (whole) {
    codes = *reinterpret_cast<const Pack<uint32_t, kCount / 4>*>(row + column);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (column + i < columns) codes.x[i / 4] |= uint32_t{row[column + i].code} << 8 * (i % 4);
  }
  uint32_t found = 0;  // high bit of a byte: NaN
#pragma unroll
  for (uint32_t four : codes.x) found |= (four & 0x7f7f7f7fu) + 0x01010101u;
  // Exponents are relative to the minimum of T, whose subnormal numbers correspond to the codes'
  // subnormal numbers; a power of two corrects the result.
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      const uint32_t code = codes.x[0] << (24 - 8 * i);
      const uint32_t bits = (code & 0x80000000u) | (code & 0x7f000000u) >> 4;
      words[i] = __float_as_uint(__uint_as_float(bits) * 0x1p120f);
    } else {
      // Codes 2 i and 2 i + 1, each in the high byte of a half.
      const uint32_t code = __byte_perm(codes.x[i / 2], 0, i % 2 ? 0x3424 : 0x1404);
      constexpr int kShift = std::is_same_v<T, __half> ? 1 : 4;
      const uint32_t bits = (code & 0x80008000u) | (code & 0x7f007f00u) >> kShift;
      using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
      constexpr float kPower = std::is_same_v<T, __half> ? 0x1p8f : 0x1p120f;
      const T power = static_cast<T>(kPower);
      const Pair pair = __hmul2(reinterpret_cast<const Pair&>(bits), Pair{power, power});
      words[i] = reinterpret_cast<const uint32_t&>(pair);
    }
  }
  return (found & 0x80808080u) != 0;
}

// 1 with the sign of a scale, or 0.
__device__ __forceinline__ float sign_of(float scale) {
  return scale == 0 ? 0.f : copysignf(1.f, scale);
}

// Rows g and g + 8 of each unit of a warp, from key `first` on.
template <typename T, typename Key, int kUnits>
struct KeyTile {
  static constexpr bool kCodes = !std::is_same_v<T, Key>;
  const Key* rows[kUnits][2];  // null: missing
  float scales[kUnits][2];     // scales of codes; NaN: the key is NaN
  uint32_t words[kUnits][kSliceBatch][2][4];

  __device__ __forceinline__ void find(const IndexerParams& p, const IndexerToken& token,
                                       int first) {
    const int g = static_cast<int>(threadIdx.x) % kWarpSize / 4;
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t key = int64_t{first} + (kUnitKeys * u + 8 * half + g);
        rows[u][half] = nullptr;
        if (key >= token.keys) continue;
        const KeyRun run = key_run(p.k, token.b, token.k_start + key);
        if (run.offset >= 0) rows[u][half] = static_cast<const Key*>(p.k.data) + run.offset;
        if constexpr (kCodes) {
          scales[u][half] = 1;
          if (p.k_scale.data && run.offset >= 0) {
            const float scale = static_cast<const float*>(
                p.k_scale.data)[key_run(p.k_scale, token.b, token.k_start + key).offset];
            scales[u][half] = scale + (scale - scale);
          }
        }
      }
  }
  __device__ __forceinline__ void load(const IndexerParams& p, const ScorePlan& plan, int slice) {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
#pragma unroll
      for (int j = 0; j < kSliceBatch; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t (&w)[4] = words[u][j][half];
          const int chunk = 4 * (slice + j) + c;
          w[0] = w[1] = w[2] = w[3] = 0;
          if (!rows[u][half] || chunk >= plan.chunks) continue;
          const int columns = static_cast<int>(p.head_dim);
          if constexpr (kCodes) {
            float& scale = scales[u][half];
            if (load_codes<T>(w, rows[u][half], chunk, columns, plan.keys_aligned))
              scale = __int_as_float(0x7fc00000);
            if (scale <= 0) turn(w, scale);
          } else {
            load_chunk(w, rows[u][half], chunk, columns, plan.keys_aligned);
          }
        }
  }
  // Multiplies words by the sign of their scale.
  __device__ static void turn(uint32_t (&w)[4], float scale) {
    constexpr uint32_t kSigns = sizeof(T) == 4 ? 0x80000000u : 0x80008000u;
#pragma unroll
    for (uint32_t& word : w) word = scale == 0 ? 0 : word ^ kSigns;
  }
};

// products[u][n] += keys of unit u times heads 8 n .. 8 n + 7, for kSliceBatch slices from `first`
// on.
template <typename T, typename Key, int kUnits>
__device__ __forceinline__ void multiply_slices(float (&products)[kUnits][kHeadTiles][4],
                                                const KeyTile<T, Key, kUnits>& keys,
                                                const ScorePlan& plan, uint32_t queries,
                                                int first) {
  const int lane = threadIdx.x % kWarpSize, slices = plan.slices - first;
  const int tile_bytes = 8 * plan.query_bytes;
  const uint32_t own =
      queries + lane / 4 * plan.query_bytes + lane % 4 * kChunkBytes + first * kSliceBytes;
  const auto fragments_of = [&](auto j, Fragment<T, 4>(&a)[kUnits][2]) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const uint32_t (&k)[2][4] = keys.words[u][j];
#pragma unroll
      for (int v = 0; v < 2; ++v)
        a[u][v] = make_fragment<T>(k[0][2 * v], k[1][2 * v], k[0][2 * v + 1], k[1][2 * v + 1]);
    }
  };
  const auto multiply = [&](auto j, int n, uint32_t tile, const Fragment<T, 4>(&a)[kUnits][2]) {
    uint32_t w[4];
    load_shared<j * kSliceBytes>(w, tile);
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const Fragment<T, 2> b = make_fragment<T>(w[2 * v], w[2 * v + 1]);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) mma(products[u][n], a[u][v], b);
    }
  };
  Fragment<T, 4> a[kUnits][2];
  if constexpr (sizeof(T) == 4) {  // split a slice into tf32 parts once for all heads
    unroll<kSliceBatch>([&](auto j) {
      if (j >= slices) return;
      fragments_of(j, a);
      uint32_t tile = own;
#pragma unroll
      for (int n = 0; n < kHeadTiles; ++n, tile += tile_bytes) {
        if (n >= plan.head_tiles) break;
        opt_barrier(tile);
        multiply(j, n, tile, a);
      }
    });
  } else {
    uint32_t tile = own;
#pragma unroll
    for (int n = 0; n < kHeadTiles; ++n, tile += tile_bytes) {
      if (n >= plan.head_tiles) break;
      opt_barrier(tile);  // otherwise the address is computed for each slice
      unroll<kSliceBatch>([&](auto j) {
        if (j >= slices) return;
        fragments_of(j, a);
        multiply(j, n, tile, a);
      });
    }
  }
}

// Product of a key row and a query row in shared memory. In split tf32, an infinity becomes
// infinity and NaN, and so does a value that rounds to infinity: NaN products are recomputed here.
template <typename Key>
__device__ __forceinline__ float multiply_again(const Key* key, float sign, uint32_t query,
                                                int dim) {
  float sum = 0;
#pragma unroll 1
  for (int d = 0; d < dim; ++d)
    sum =
        fmaf(sign * static_cast<float>(key[d]), __uint_as_float(load_word<0>(query + 4 * d)), sum);
  return sum;
}

// Sums a warp's products over heads, and stores the scores of the query: lane l of 32 has key
// `first` + l of 16 kUnits.
template <typename T, typename Key, int kUnits>
__device__ __forceinline__ void store_scores(const IndexerParams& p, const ScorePlan& plan,
                                             float (&products)[kUnits][kHeadTiles][4],
                                             const KeyTile<T, Key, kUnits>& keys,
                                             const IndexerToken& token, uint32_t queries,
                                             const float* weights, int first, float* scores) {
  const int lane = threadIdx.x % kWarpSize, c = lane % 4;
  const int heads = static_cast<int>(p.heads);
  const float floor = p.relu ? 0.f : -infinity();
  float sums[2 * kUnits] = {};
#pragma unroll
  for (int n = 0; n < kHeadTiles; ++n) {
    if (n >= plan.head_tiles) break;
    const int h = 8 * n + 2 * c;
    if (8 * n + 8 > heads) {  // zeros times an infinite key are NaN
#pragma unroll
      for (int u = 0; u < kUnits; ++u)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (h + i % 2 >= heads) products[u][n][i] = 0;
    }
    const float weight[2] = {weights[h], weights[h + 1]};
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float z = products[u][n][i];
        if constexpr (sizeof(T) == 4)
          if (z != z && keys.rows[u][i / 2])
            z = multiply_again(
                keys.rows[u][i / 2], keys.kCodes ? sign_of(keys.scales[u][i / 2]) : 1.f,
                queries + (h + i % 2) * plan.query_bytes, static_cast<int>(p.head_dim));
        sums[2 * u + i / 2] = fmaf(weight[i % 2], max_or_nan(z, floor), sums[2 * u + i / 2]);
      }
  }
#pragma unroll
  for (int i = 0; i < 2 * kUnits; ++i) {
    if constexpr (keys.kCodes) sums[i] *= fabsf(keys.scales[i / 2][i % 2]);
    sums[i] += __shfl_xor_sync(kFullWarp, sums[i], 1);
    sums[i] += __shfl_xor_sync(kFullWarp, sums[i], 2);
    if (keys.rows[i / 2][i % 2] == nullptr) sums[i] = -infinity();
  }
  // The lanes of a quad have the same sums, for keys 8 apart; lane c stores number c.
  float own = sums[0];
#pragma unroll
  for (int i = 1; i < 2 * kUnits; ++i)
    if (c == i) own = sums[i];
  const int key = first + 8 * c + lane / 4;
  if (c < 2 * kUnits && key < token.end) scores[key] = key < token.begin ? -infinity() : own;
}

// A CTA has up to tile_tokens queries and every key_groups-th group of their keys, a group being
// `rounds` times 16 kUnits keys per warp. kHeld: the slices of a key row fit in registers and, with
// one round, stay there for all queries of a sequence.
template <typename T, typename Key, int kUnits, bool kHeld>
__global__ void __launch_bounds__(kUnits == 1 ? 128 : 256, kUnits == 1 ? 3 : 1)
    indexer_kernel(const __grid_constant__ IndexerParams p,
                   const __grid_constant__ ScorePlan plan) {
  extern __shared__ uint4 shared[];
  __shared__ IndexerToken tokens[kTileTokens];
  const int first_group = static_cast<int>(blockIdx.x) % plan.key_groups;
  const int row = static_cast<int>(blockIdx.x) / plan.key_groups * plan.tile_tokens;
  const int count = min(plan.tile_tokens, plan.rows - row);
  const int round_keys = static_cast<int>(blockDim.x) / kWarpSize * kUnitKeys * kUnits;
  const int stage_bytes = plan.stage_bytes();
  const auto queries_of = [&](int stage) { return shared_address(shared) + stage * stage_bytes; };
  const auto weights_of = [&](int stage) {
    return reinterpret_cast<float*>(reinterpret_cast<char*>(shared) + stage * stage_bytes +
                                    8 * plan.head_tiles * plan.query_bytes);
  };

  if (threadIdx.x < count) {
    const int i = threadIdx.x;
    tokens[i] = find_token(p, plan.first + row + i);
    if (first_group == 0)
      plan.lengths[row + i] = static_cast<int32_t>(ceil_div(tokens[i].end, p.block_k));
  }
  __syncthreads();

#pragma unroll 1
  for (int64_t group = first_group;; group += plan.key_groups) {
    const int64_t group_key = group * plan.rounds * round_keys;
    // Next query that sees a key of the group.
    const auto next = [&](int i) {
      while (i < count && tokens[i].end <= group_key) ++i;
      return i;
    };
    int i = next(0);
    if (i == count) break;
    KeyTile<T, Key, kUnits> keys;
    int stage = 0, held = -1;  // held: sequence whose keys are in registers
    load_query<T>(p, plan, tokens[i], queries_of(0), weights_of(0));
    cp_async_commit();
#pragma unroll 1
    while (i < count) {
      const int following = next(i + 1);
      if (plan.stages > 1 && following < count)
        load_query<T>(p, plan, tokens[following], queries_of(stage ^ 1), weights_of(stage ^ 1));
      cp_async_commit();
      const IndexerToken token = tokens[i];
      const uint32_t queries = queries_of(stage);
      float* const scores = plan.scores + (row + i) * plan.ld;
      int first = static_cast<int>(group_key) +
                  static_cast<int>(threadIdx.x) / kWarpSize * kUnitKeys * kUnits;
#pragma unroll 1
      for (int round = 0; round < plan.rounds; ++round, first += round_keys) {
        if (token.b != held || round > 0) {
          keys.find(p, token, first);
          if (kHeld) keys.load(p, plan, 0);
          held = plan.rounds > 1 ? -1 : token.b;
        }
        if (round == 0) {
          cp_async_wait<1>();
          __syncthreads();
        }
        if (first >= token.end) break;
        float products[kUnits][kHeadTiles][4] = {};
        if constexpr (kHeld) {
          multiply_slices(products, keys, plan, queries, 0);
        } else {
#pragma unroll 1
          for (int slice = 0; slice < plan.slices; slice += kSliceBatch) {
            keys.load(p, plan, slice);
            multiply_slices(products, keys, plan, queries, slice);
          }
        }
        store_scores(p, plan, products, keys, token, queries, weights_of(stage), first, scores);
      }
      __syncthreads();
      if (plan.stages > 1) {
        stage ^= 1;
      } else if (following < count) {
        load_query<T>(p, plan, tokens[following], queries_of(0), weights_of(0));
        cp_async_commit();
      }
      i = following;
    }
  }
}

constexpr int kBlockThreads = 256;

// Block maxima of scores, NaN if a score is NaN. `lanes` lanes, a power of two, share a block.
__global__ void __launch_bounds__(kBlockThreads)
    indexer_block_kernel(const __grid_constant__ IndexerParams p,
                         const __grid_constant__ ScorePlan plan, int lanes, int row_blocks) {
  const int row = static_cast<int>(blockIdx.x) / row_blocks;
  const int thread = static_cast<int>(blockIdx.x) % row_blocks * kBlockThreads + threadIdx.x;
  const int64_t block = thread / lanes, begin = block * p.block_k;
  const int end = find_token(p, plan.first + row).end;
  const int64_t until = min(begin + p.block_k, static_cast<int64_t>(end));
  const float* const scores = plan.scores + row * plan.ld;
  float maximum = -infinity();
  for (int64_t key = begin + thread % lanes; key < until; key += lanes)
    maximum = max_or_nan(maximum, scores[key]);
#pragma unroll 1
  for (int o = lanes / 2; o > 0; o /= 2)
    maximum = max_or_nan(maximum, __shfl_xor_sync(kFullWarp, maximum, o));
  if (thread % lanes == 0 && begin < end) plan.blocks[row * plan.ld + block] = maximum;
}

}  // namespace tokenmill::cuda::indexer_topk_select
