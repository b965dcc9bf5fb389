// Search of one query block by one CTA. Nodes are in shared memory; a warp scores 16 representative
// keys at a time, directly from global memory, against queries in shared memory; the best nodes are
// found by radix select on their scores and kept in order by a scan.
//
// If there are few lists, CTAs on all SMs first score every node of the first tree levels, of which
// a search needs some.
#pragma once
#include "select/hip_block_select/kernel_shape.cuh"

namespace tokenmill::cuda::hip_block_select {

// One query block. All methods are called by all threads of the CTA, which synchronize at the end
// of each.
template <typename T, int kColumnTiles, int kWarps>
class HipSearch {
 public:
  static constexpr int kColumns = HipShape<kColumnTiles>::kColumns;
  static constexpr int kThreads = kWarps * kWarpSize;
  using Shared = HipShared<kThreads>;

  __device__ HipSearch(const HipParams& p, const HipPlan& plan, Shared& shared, void* memory,
                       int64_t item)
      : p(p), plan(plan), shared(shared), item(item) {
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

  // Scores part `part` of the blocks that the search looks up in plan.ahead: the representatives of
  // the nodes of its first levels, or all blocks.
  __device__ void score_ahead(int part) {
    if (all.end - all.begin <= plan.wanted) return;
    if (columns <= kColumns) load_queries(0);
    float* const scores = plan.ahead + item * plan.blocks;
    const bool each = levels_ahead() == rounds_of_tree();
    score(
        each ? all.end - all.begin : plan.wanted * ((2 << plan.levels) - 2), part, plan.parts,
        [&](int slot) { return each ? all.begin + slot : representative_of(slot); },
        [](int block) { return block; }, [&](int block) -> float& { return scores[block]; });
  }

 private:
  // The tree has `wanted` root nodes.
  __device__ HipNode start_node(int i) const { return {start_of(i), start_of(i + 1)}; }
  __device__ int start_of(int i) const {  // n i / wanted, whose product may overflow int
    const int n = all.end - all.begin, each = n / plan.wanted, more = n % plan.wanted;
    return all.begin + each * i + more * i / plan.wanted;
  }
  // Depth for the largest node, of ceil(n / wanted) blocks.
  __device__ int rounds_of_tree() const {
    return 32 - __clz((all.end - all.begin - 1) / plan.wanted);
  }
  // Scoring all blocks costs about as much as the nodes of one level less.
  __device__ int levels_ahead() const {
    if (kColumnTiles > 1 || plan.levels == 0) return 0;
    const int rounds = rounds_of_tree();
    return rounds <= plan.levels + 1 ? rounds : plan.levels;
  }

  // Block that represents node `slot`, counting level by level from the first one; node i has the
  // halves 2 i and 2 i + 1 in the next level. Two more levels follow, so that no node is a single
  // block yet. -1: it also represents the node's parent.
  __device__ int representative_of(int slot) const {
    const int level = 31 - __clz(slot / plan.wanted + 2);
    const int number = slot - plan.wanted * ((1 << level) - 2);
    HipNode node = start_node(number >> level);
    int before = -1;
#pragma unroll 1
    for (int step = level - 1; step >= 0; --step) {
      if (step == 0 && level > 1) before = hip_representative(p, node);
      const int middle = node.begin + (node.end - node.begin) / 2;
      (number >> step & 1 ? node.begin : node.end) = middle;
    }
    const int block = hip_representative(p, node);
    return block == before ? -1 : block;
  }

  __device__ int descend() {
    int count = 0, rounds = plan.rounds;
    const int ahead = levels_ahead();
    if (p.start) count = list_nodes();
    if (count == 0) {
      for (int i = threadIdx.x; i < plan.wanted; i += kThreads)
        kept.set(i, start_node(i), quiet_nan());
      __syncthreads();
      count = plan.wanted;
      rounds = rounds_of_tree();
    }
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
      unsigned unknown;
      const float* const scores = round < ahead ? plan.ahead + item * plan.blocks : nullptr;
      const int all_halves = halve(count, scores, unknown);
      if (all_halves > plan.wanted) score(static_cast<int>(unknown));
      count = keep_best(all_halves);
    }
    return count;
  }

  // Scores all admissible blocks, at most one list's length at a time.
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

  // Consecutive items per thread, of `count`.
  __device__ static int share(int count) { return (count + kThreads - 1) / kThreads; }

  // Nodes of a start list. An id begins a node if its group comes after the groups of all previous
  // ids.
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
    int maximum = -1, before;
    for (int i = first; i < last; ++i) maximum = max(maximum, group_of(i));
    typename Shared::MaxScan(shared.scan.maximum).ExclusiveScan(maximum, before, -1, Maximum());
    __syncthreads();
    unsigned nodes = 0, place, total;
    maximum = before;
    for (int i = first; i < last; ++i) {
      const int group = group_of(i);
      nodes += group > maximum;
      maximum = max(maximum, group);
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

  // Replaces kept nodes by their halves. A half with the same representative as its node keeps the
  // node's score; other scores come from `scores` at the representative, unless null. Returns the
  // number of halves; `unknown` of them remain to be scored.
  __device__ int halve(int count, const float* scores, unsigned& unknown) {
    const int each = share(count), first = static_cast<int>(threadIdx.x) * each;
    const int last = min(first + each, count);
    const auto visit = [&](const auto& half) {
      for (int i = first; i < last; ++i) {
        const HipNode node{kept.begin[i], kept.end[i]};
        const int middle = node.begin + (node.end - node.begin) / 2;
        const int known = hip_representative(p, node);
        const float value = kept.score[i];
        const auto one = [&](HipNode part) {
          const int block = hip_representative(p, part);
          half(part, scores ? scores[block] : block == known ? value : quiet_nan());
        };
        if (middle > node.begin) one({node.begin, middle});
        one({middle, node.end});
      }
    };
    // halves in the low half of the word, unscored ones in the high half
    unsigned sums = 0, before, total;
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

  // Loads columns first .. first + kColumns - 1 of the queries that score the block, the last query
  // first, head by head.
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

  // Scores the halves in `todo`.
  __device__ void score(int count) {
    score(
        count, 0, 1, [&](int slot) { return todo[slot]; },
        [&](int number) {
          return hip_representative(p, {halves.begin[number], halves.end[number]});
        },
        [&](int number) -> float& { return halves.score[number]; });
  }

  // Scores part `part` of `count` slots. number_of(slot) is -1 or the argument of block_of, a block
  // of keys, and of score_of, the destination of its score.
  template <typename NumberOf, typename BlockOf, typename ScoreOf>
  __device__ __forceinline__ void score(int count, int part, int parts, const NumberOf& number_of,
                                        const BlockOf& block_of, const ScoreOf& score_of) {
    const int units = (count + plan.slots - 1) / plan.slots;
#pragma unroll 1
    for (int first = 0; first < columns; first += kColumns) {
      if (columns > kColumns) load_queries(first);
      const int tiles = (min(columns - first, kColumns) + 7) / 8;
#pragma unroll 1
      for (int unit = part * kWarps + threadIdx.x / kWarpSize; unit < units; unit += parts * kWarps)
        score_unit(unit, count, tiles, first == 0, number_of, block_of, score_of);
      __syncthreads();
    }
  }

  // Scores 16 key rows, or all rows of a block, against the queries in shared memory.
  template <typename NumberOf, typename BlockOf, typename ScoreOf>
  __device__ __forceinline__ void score_unit(int unit, int count, int tiles, bool fresh,
                                             const NumberOf& number_of, const BlockOf& block_of,
                                             const ScoreOf& score_of) {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, c = lane % 4;
    const int block_k = static_cast<int>(p.block_k);
    const int span = plan.slots > 1 ? kScoreRows / plan.slots : 8;  // lanes that share a block
    const HipKeys<T> keys{p, plan, at.b, at.k_start, list * p.kv_heads / p.lists};
    float maximum[2] = {-infinity(), -infinity()};
    int number[2];
#pragma unroll 1
    for (int piece = 0; piece < block_k; piece += kScoreRows) {
      const T* data[2];
      int64_t place[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = g + 8 * i, slot = unit * plan.slots + (plan.slots > 1 ? row / span : 0);
        const int offset = plan.slots > 1 ? row % span : piece + row;
        number[i] = slot < count ? number_of(slot) : -1;
        data[i] = nullptr;
        place[i] = -1;
        if (number[i] >= 0 && offset < block_k) {
          const int64_t t = block_of(number[i]) * p.block_k + offset;
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
            maximum[i / 2] = fmaxf(maximum[i / 2], s[n][i]);  // not NaN
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      maximum[i] = quad_max(maximum[i]);
#pragma unroll
      for (int o = 1; o < 8; o *= 2) {
        const float other = __shfl_xor_sync(kFullWarp, maximum[i], 4 * o);
        if (o < span) maximum[i] = fmaxf(maximum[i], other);
      }
    }
    if (plan.slots == 1) maximum[0] = fmaxf(maximum[0], maximum[1]);
    if (c == 0 && g % span == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (number[i] < 0 || (i == 1 && plan.slots == 1)) continue;
        float& score = score_of(number[i]);
        score = fresh ? maximum[i] + 0.f : fmaxf(score, maximum[i] + 0.f);  // not -0
      }
    }
  }

  // Keeps the best halves, in order; among equal ones the lower blocks win. Returns their number.
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
    unsigned sums = 0, before,
             total;  // above the bar in the low half, equal to it in the high half
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

  // Finds the wanted-th key of the halves (shared.prefix), and how many halves equal to it are
  // wanted.
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
      // Bins from the highest down.
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
  int* ends;  // per column
  HipNodes kept, halves;
  uint16_t* todo;  // halves without a score
  int64_t item, list, end;
  HipBlock at;
  HipRows rows;
  HipNode all;
  int columns;
};

// CTAs per SM.
template <typename T, int kColumnTiles, int kWarps>
constexpr int kHipBlocks =
    kWarps == kManyWarps ? 1 : (kColumnTiles == 1 ? 4 : 3) - (sizeof(T) == 4 ? 1 : 0);

template <typename T, int kColumnTiles, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpSize, kHipBlocks<T, kColumnTiles, kWarps>)
    hip_kernel(const __grid_constant__ HipParams p, const __grid_constant__ HipPlan plan) {
  extern __shared__ uint4 memory[];
  using Search = HipSearch<T, kColumnTiles, kWarps>;
  __shared__ typename Search::Shared shared;
  Search(p, plan, shared, memory, blockIdx.x).run();
}

// plan.parts CTAs per list.
template <typename T, int kColumnTiles, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpSize, kHipBlocks<T, kColumnTiles, kWarps>)
    hip_ahead_kernel(const __grid_constant__ HipParams p, const __grid_constant__ HipPlan plan) {
  extern __shared__ uint4 memory[];
  using Search = HipSearch<T, kColumnTiles, kWarps>;
  __shared__ typename Search::Shared shared;
  Search(p, plan, shared, memory, blockIdx.x / plan.parts).score_ahead(blockIdx.x % plan.parts);
}

}  // namespace tokenmill::cuda::hip_block_select
