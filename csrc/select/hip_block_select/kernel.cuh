// The search of one query block by one block of threads. Nodes are in shared memory; a warp scores
// 16 keys of representatives at a time, straight from memory, against queries in shared memory; the
// best nodes are found by digits of their scores and stay in order by a scan.
#pragma once
#include <cub/block/block_scan.cuh>

#include "cuda/math.cuh"
#include "select/hip_block_select/params.h"
#include "select/products.cuh"

namespace tokenmill::cuda::hip_block_select {

// Of a block: few where the device has several blocks for each multiprocessor, else many, so that
// the keys of as many units are on their way to it.
constexpr int kFewWarps = 4, kManyWarps = 16;
constexpr int kHipDigitBits = 8;
constexpr int kHipBins = 1 << kHipDigitBits;

struct HipPlan {
  int wanted;
  int slots;           // blocks of keys among 16 rows; 1: a block is taken 16 rows at a time
  int chunks, slices;  // 16 and 64 bytes of a row
  int query_bytes;     // between columns in shared memory
  int rounds;          // of a search from a list
  bool keys_aligned, queries_aligned;
};

template <int kColumnTiles>
struct HipShape {
  static constexpr int kColumns = 8 * kColumnTiles;  // queries in shared memory

  // Nodes that were kept and their halves have a beginning, an end and a score each.
  static constexpr int shared_bytes(int query_bytes, int wanted) {
    return kColumns * (query_bytes + 4) + 3 * wanted * 12 + 2 * wanted * 2;
  }
};

// Nodes by number. A score that is not known is NaN.
struct HipNodes {
  int *begin, *end;
  float* score;

  __device__ void set(int i, HipNode node, float value) const {
    begin[i] = node.begin, end[i] = node.end, score[i] = value;
  }
};

template <int kThreads>
struct HipShared {
  using Scan = cub::BlockScan<unsigned, kThreads>;
  using MaxScan = cub::BlockScan<int, kThreads>;

  union {
    typename Scan::TempStorage sum;
    typename MaxScan::TempStorage most;
  } scan;
  unsigned bins[kHipBins];
  unsigned prefix;
  int wanted;  // of the scores that begin with the prefix
};

struct Most {
  __device__ int operator()(int a, int b) const { return a > b ? a : b; }
};

// Unsigned integers in the order of the scores.
__device__ __forceinline__ unsigned hip_key(float score) {
  const unsigned bits = __float_as_uint(score);
  return bits ^ (static_cast<unsigned>(static_cast<int>(bits) >> 31) | 0x80000000u);
}

// Keys of one key head of one request, which begin at row `start`.
template <typename T>
struct HipKeys {
  const HipParams& p;
  const HipPlan& plan;
  int64_t b, start, kv_head;

  // null: zeros
  __device__ __forceinline__ const T* row(int64_t t) const {
    const KeyRun run = key_run(p.k, b, start + t);
    if (run.offset < 0) return nullptr;
    return static_cast<const T*>(p.k.data) + run.offset + kv_head * p.k.head;
  }
  __device__ __forceinline__ void load(uint32_t (&words)[4], const T* row, int chunk) const {
    words[0] = words[1] = words[2] = words[3] = 0;
    if (row == nullptr || chunk >= plan.chunks) return;
    load_chunk(words, row, chunk, static_cast<int>(p.head_dim), plan.keys_aligned);
  }
};

// One query block: all methods by all threads of a block, which meet at the end of each.
template <typename T, int kColumnTiles, int kWarps>
class HipSearch {
 public:
  static constexpr int kColumns = HipShape<kColumnTiles>::kColumns;
  static constexpr int kThreads = kWarps * kWarpSize;
  using Shared = HipShared<kThreads>;

  __device__ HipSearch(const HipParams& p, const HipPlan& plan, Shared& shared, void* memory)
      : p(p), plan(plan), shared(shared), item(blockIdx.x) {
    queries = shared_address(memory);
    ends = reinterpret_cast<int*>(static_cast<char*>(memory) + kColumns * plan.query_bytes);
    kept.begin = ends + kColumns;
    kept.end = kept.begin + plan.wanted;
    kept.score = reinterpret_cast<float*>(kept.end + plan.wanted);
    halves.begin = kept.end + 2 * plan.wanted;
    halves.end = halves.begin + 2 * plan.wanted;
    halves.score = reinterpret_cast<float*>(halves.end + 2 * plan.wanted);
    todo = reinterpret_cast<uint16_t*>(halves.score + 2 * plan.wanted);
    list = item / p.blocks % p.lists;
    at = hip_block(p, item / (p.blocks * p.lists), item % p.blocks);
    rows = hip_rows(p, at);
    end = hip_end(p, at, rows.first);
    all = hip_admissible(p, rows, end);
    columns = static_cast<int>(p.group * rows.rows);
  }

  __device__ void run() {
    int count = min(all.end - all.begin, plan.wanted);
    const bool whole = all.end - all.begin <= plan.wanted;
    if (!whole) {
      if (columns <= kColumns) load_queries(0);
      count = p.exact ? scan_all() : descend();
    }
    int32_t* const indices = p.indices + item * plan.wanted;
    for (int i = threadIdx.x; i < plan.wanted; i += kThreads)
      indices[i] = i >= count ? -1 : whole ? all.begin + i : kept.begin[i];
    if (threadIdx.x == 0) p.counts[item] = count;
  }

 private:
  __device__ int descend() {
    int count = 0, rounds = plan.rounds;
    if (p.start) count = list_nodes();
    if (count == 0) {
      const int64_t n = all.end - all.begin;
      for (int i = threadIdx.x; i < plan.wanted; i += kThreads)
        kept.set(i,
                 {static_cast<int>(all.begin + n * i / plan.wanted),
                  static_cast<int>(all.begin + n * (i + 1) / plan.wanted)},
                 quiet_nan());
      __syncthreads();
      count = plan.wanted;
      // Of ceil(n / wanted) blocks, the most that a node has.
      rounds = 32 - __clz(static_cast<int>((n - 1) / plan.wanted));
    }
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
      unsigned unknown;
      const int all_halves = halve(count, unknown);
      if (all_halves > plan.wanted) score(static_cast<int>(unknown));
      count = keep_best(all_halves);
    }
    return count;
  }

  // All admissible blocks, so many at a time as a list has.
  __device__ int scan_all() {
    int count = 0;
#pragma unroll 1
    for (int first = all.begin; first < all.end; first += plan.wanted) {
      const int more = min(plan.wanted, all.end - first);
      for (int i = threadIdx.x; i < count; i += kThreads)
        halves.set(i, {kept.begin[i], kept.end[i]}, kept.score[i]);
      for (int i = threadIdx.x; i < more; i += kThreads) {
        halves.set(count + i, {first + i, first + i + 1}, quiet_nan());
        todo[i] = static_cast<uint16_t>(count + i);
      }
      __syncthreads();
      score(more);
      count = keep_best(count + more);
    }
    return count;
  }

  // How many of `count` things each thread takes, side by side.
  __device__ static int share(int count) { return (count + kThreads - 1) / kThreads; }

  // The nodes of a list. An id begins one if its group comes behind those of all ids before it.
  __device__ int list_nodes() {
    const int64_t row[] = {item / (p.blocks * p.lists), list, item % p.blocks};
    const int32_t *ids = p.start, *counts = p.start_counts;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      ids += row[i] * p.start_strides[i];
      counts += row[i] * p.start_count_strides[i];
    }
    const int count = max(min(*counts, plan.wanted), 0), each = share(count);
    const int first = static_cast<int>(threadIdx.x) * each, last = min(first + each, count);
    const int span = static_cast<int>(p.restart_span);
    const auto group_of = [&](int i) {
      const int id = ids[i];
      return id >= all.begin && id < all.end ? id / span : -1;
    };
    int most = -1, before;
    for (int i = first; i < last; ++i) most = max(most, group_of(i));
    typename Shared::MaxScan(shared.scan.most).ExclusiveScan(most, before, -1, Most());
    __syncthreads();
    unsigned nodes = 0, place, total;
    most = before;
    for (int i = first; i < last; ++i) {
      const int group = group_of(i);
      nodes += group > most;
      most = max(most, group);
    }
    typename Shared::Scan(shared.scan.sum).ExclusiveSum(nodes, place, total);
    for (int i = first; i < last; ++i) {
      const int group = group_of(i);
      if (group > before) kept.set(place++, hip_restart_node(p, all, ids[i]), quiet_nan());
      before = max(before, group);
    }
    __syncthreads();
    return static_cast<int>(total);
  }

  // Kept nodes to their halves; a half with the representative of its node has its score. Returns
  // how many there are; `unknown` of them are to be scored.
  __device__ int halve(int count, unsigned& unknown) {
    const int each = share(count), first = static_cast<int>(threadIdx.x) * each;
    const int last = min(first + each, count);
    const auto visit = [&](const auto& half) {
      for (int i = first; i < last; ++i) {
        const HipNode node{kept.begin[i], kept.end[i]};
        const int middle = node.begin + (node.end - node.begin) / 2;
        const int known = hip_representative(p, node);
        const float value = kept.score[i];
        const auto one = [&](HipNode part) {
          half(part, hip_representative(p, part) == known ? value : quiet_nan());
        };
        if (middle > node.begin) one({node.begin, middle});
        one({middle, node.end});
      }
    };
    unsigned sums = 0, before, total;  // halves in the low half, unknown ones in the high one
    visit([&](HipNode, float value) { sums += value == value ? 1u : 0x10001u; });
    typename Shared::Scan(shared.scan.sum).ExclusiveSum(sums, before, total);
    int to = static_cast<int>(before & 0xffff), place = static_cast<int>(before >> 16);
    visit([&](HipNode part, float value) {
      if (!(value == value)) todo[place++] = static_cast<uint16_t>(to);
      halves.set(to++, part, value);
    });
    __syncthreads();
    unknown = total >> 16;
    return static_cast<int>(total & 0xffff);
  }

  // Columns first .. first + kColumns - 1 of the queries that speak for the block, the last query
  // first, each head of the list by itself.
  __device__ void load_queries(int first) {
    const int chunks = plan.slices * (kSliceBytes / kChunkBytes);
#pragma unroll 1
    for (int i = threadIdx.x; i < kColumns * chunks; i += kThreads) {
      const int c = first + i / chunks, chunk = i % chunks;
      uint32_t words[4] = {};
      if (c < columns && chunk < plan.chunks) {
        const T* const row = static_cast<const T*>(p.q.data) + at.b * p.q.batch +
                             (at.q_start + query_of(c)) * p.q.seq +
                             (list * p.group + c / rows.rows) * p.q.head;
        load_chunk(words, row, chunk, static_cast<int>(p.head_dim), plan.queries_aligned);
      }
      store_shared(queries + i / chunks * plan.query_bytes + chunk * kChunkBytes, words);
    }
    for (int i = threadIdx.x; i < kColumns; i += kThreads) {
      const int64_t until = first + i < columns ? hip_end(p, at, query_of(first + i)) : 0;
      ends[i] = until > 0 ? static_cast<int>(until) : 0;
    }
    __syncthreads();
  }
  __device__ int64_t query_of(int column) const {
    return rows.first - column % rows.rows * p.stride_q;
  }

  // Scores of the halves that are to be done.
  __device__ void score(int count) {
    const int units = (count + plan.slots - 1) / plan.slots;
#pragma unroll 1
    for (int first = 0; first < columns; first += kColumns) {
      if (columns > kColumns) load_queries(first);
      const int tiles = (min(columns - first, kColumns) + 7) / 8;
#pragma unroll 1
      for (int unit = threadIdx.x / kWarpSize; unit < units; unit += kWarps)
        score_unit(unit, count, tiles, first == 0);
      __syncthreads();
    }
  }

  // 16 rows of keys, or all rows of a block, with the queries in shared memory.
  __device__ __forceinline__ void score_unit(int unit, int count, int tiles, bool fresh) {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, c = lane % 4;
    const int block_k = static_cast<int>(p.block_k);
    const int span = plan.slots > 1 ? kScoreRows / plan.slots : 8;  // lanes that share a block
    const HipKeys<T> keys{p, plan, at.b, at.k_start, list * p.kv_heads / p.lists};
    float most[2] = {-infinity(), -infinity()};
    int number[2];
#pragma unroll 1
    for (int piece = 0; piece < block_k; piece += kScoreRows) {
      const T* data[2];
      int64_t place[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = g + 8 * i, slot = unit * plan.slots + (plan.slots > 1 ? row / span : 0);
        const int offset = plan.slots > 1 ? row % span : piece + row;
        number[i] = slot < count ? todo[slot] : -1;
        data[i] = nullptr;
        place[i] = -1;
        if (number[i] >= 0 && offset < block_k) {
          const HipNode node{halves.begin[number[i]], halves.end[number[i]]};
          const int64_t t = hip_representative(p, node) * p.block_k + offset;
          if (t >= p.num_sink && t < end) {
            place[i] = t;
            data[i] = keys.row(t);
          }
        }
      }
      float s[kColumnTiles][4];
      multiply_queries(s, keys, data[0], data[1], queries, tiles);
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        if (n >= tiles) break;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (place[i / 2] >= 0 && place[i / 2] < ends[8 * n + 2 * c + i % 2])
            most[i / 2] = fmaxf(most[i / 2], s[n][i]);  // not a NaN
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      most[i] = quad_max(most[i]);
#pragma unroll
      for (int o = 1; o < 8; o *= 2) {
        const float other = __shfl_xor_sync(kFullWarp, most[i], 4 * o);
        if (o < span) most[i] = fmaxf(most[i], other);
      }
    }
    if (plan.slots == 1) most[0] = fmaxf(most[0], most[1]);
    if (c == 0 && g % span == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (number[i] < 0 || (i == 1 && plan.slots == 1)) continue;
        float& score = halves.score[number[i]];
        score = fresh ? most[i] + 0.f : fmaxf(score, most[i] + 0.f);  // not -0
      }
    }
  }

  // The best halves stay, in order; of equal ones the lower blocks. Returns how many.
  __device__ int keep_best(int count) {
    const int each = share(count), first = static_cast<int>(threadIdx.x) * each;
    const int last = min(first + each, count);
    unsigned bar = 0, ties = 0;  // all are above
    if (count > plan.wanted) {
      find_bar(count);
      bar = shared.prefix;
      ties = static_cast<unsigned>(shared.wanted);
    }
    const auto key = [&](int i) { return count > plan.wanted ? hip_key(halves.score[i]) : 1u; };
    unsigned sums = 0, before, total;  // above the bar in the low half, equal to it in the high one
    for (int i = first; i < last; ++i) sums += key(i) > bar ? 1u : key(i) == bar ? 0x10000u : 0u;
    typename Shared::Scan(shared.scan.sum).ExclusiveSum(sums, before, total);
    unsigned above = before & 0xffff, equal = before >> 16;
    for (int i = first; i < last; ++i) {
      const unsigned x = key(i);
      if (x > bar || (x == bar && equal < ties))
        kept.set(static_cast<int>(above + min(equal, ties)), {halves.begin[i], halves.end[i]},
                 halves.score[i]);
      above += x > bar;
      equal += x == bar;
    }
    __syncthreads();
    return min(count, plan.wanted);
  }

  // The wanted-th key of the halves (shared.prefix), and how many of its equals are wanted.
  __device__ void find_bar(int count) {
    constexpr int kEach = (kHipBins + kThreads - 1) / kThreads;
    if (threadIdx.x == 0) shared.prefix = 0, shared.wanted = plan.wanted;
#pragma unroll 1
    for (int shift = 32 - kHipDigitBits; shift >= 0; shift -= kHipDigitBits) {
      for (int i = threadIdx.x; i < kHipBins; i += kThreads) shared.bins[i] = 0;
      __syncthreads();
      const unsigned prefix = shared.prefix;
      const unsigned wanted = static_cast<unsigned>(shared.wanted);
      for (int i = threadIdx.x; i < count; i += kThreads) {
        const unsigned key = hip_key(halves.score[i]) >> shift;
        if (shift + kHipDigitBits == 32 || key >> kHipDigitBits == prefix)
          atomicAdd(&shared.bins[key % kHipBins], 1u);
      }
      __syncthreads();
      // Bins from the highest on.
      unsigned counts[kEach], sum = 0, before;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const bool has_bin = kThreads <= kHipBins || threadIdx.x < kHipBins;
        counts[i] = has_bin ? shared.bins[kHipBins - 1 - (threadIdx.x * kEach + i)] : 0;
        sum += counts[i];
      }
      typename Shared::Scan(shared.scan.sum).ExclusiveSum(sum, before);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (before < wanted && wanted <= before + counts[i]) {
          shared.prefix = prefix << kHipDigitBits | (kHipBins - 1 - (threadIdx.x * kEach + i));
          shared.wanted = static_cast<int>(wanted - before);
        }
        before += counts[i];
      }
      __syncthreads();
    }
  }

  const HipParams& p;
  const HipPlan& plan;
  Shared& shared;
  uint32_t queries;
  int* ends;  // of columns
  HipNodes kept, halves;
  uint16_t* todo;  // halves without a score
  int64_t item, list, end;
  HipBlock at;
  HipRows rows;
  HipNode all;
  int columns;
};

// Of a multiprocessor.
template <typename T, int kColumnTiles, int kWarps>
constexpr int kHipBlocks =
    kWarps == kManyWarps ? 1 : (kColumnTiles == 1 ? 4 : 3) - (sizeof(T) == 4 ? 1 : 0);

template <typename T, int kColumnTiles, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpSize, kHipBlocks<T, kColumnTiles, kWarps>)
    hip_kernel(const __grid_constant__ HipParams p, const __grid_constant__ HipPlan plan) {
  extern __shared__ uint4 memory[];
  using Search = HipSearch<T, kColumnTiles, kWarps>;
  __shared__ typename Search::Shared shared;
  Search(p, plan, shared, memory).run();
}

}  // namespace tokenmill::cuda::hip_block_select
