// Exact selection by digits of ordered keys, without a sort: histograms find the k-th key, an
// ordered pass writes the positions. A row takes one block, or several that share histograms in
// memory.
#pragma once
#include <cub/block/block_reduce.cuh>

#include "cuda/vector.cuh"
#include "select/radix_select.cuh"
#include "select/topk_select/params.h"

namespace tokenmill::cuda::topk_select {

constexpr int kCandidates = 4096;  // held in shared memory

// The part of a row where scores decide.
template <typename T>
struct TopkRow {
  static constexpr int kVector = 16 / sizeof(T);

  const T* scores;  // position 0
  int length, begin, end;
  int wanted;  // of begin .. end - 1

  __device__ TopkRow(const TopkParams& p, int64_t row) {
    const TopkWindow window = topk_window(p, row);
    scores = static_cast<const T*>(p.scores) + row * p.row_stride + window.start;
    length = static_cast<int>(window.length);
    begin = static_cast<int>(p.force_first < length ? p.force_first : length);
    end = length - p.force_last > begin ? static_cast<int>(length - p.force_last) : begin;
    wanted = static_cast<int>(p.k) - begin - (length - end);
  }

  // Vectors of 16 aligned bytes count from the one that holds `from`; the first may begin before
  // it.
  __device__ int first_position(int from) const {
    return from - static_cast<int>(reinterpret_cast<uintptr_t>(scores + from) % 16 / sizeof(T));
  }
  // Keys of positions i .. i + kVector - 1, an aligned vector; 0 outside from .. until - 1.
  __device__ __forceinline__ void load_keys(uint32_t (&keys)[kVector], int i, int from,
                                            int until) const {
    if (i >= from && i + kVector <= until) {
      float x[kVector];
      load_floats(x, scores + i);
#pragma unroll
      for (int v = 0; v < kVector; ++v) keys[v] = key_of(x[v]);
    } else {
#pragma unroll
      for (int v = 0; v < kVector; ++v)
        keys[v] = i + v >= from && i + v < until ? key_of(static_cast<float>(scores[i + v])) : 0;
    }
  }
  __device__ uint32_t key_at(int i) const { return key_of(static_cast<float>(scores[i])); }
};

// Of a row that several blocks share: bins and ticket are 0 between kernels.
struct TopkSharedRow {
  unsigned bins[kBins];
  unsigned ticket;
  TopkState state;
};

// The workspace.
struct TopkMemory {
  uint64_t* sort_keys;  // sort_stride for each row, if in the order of the scores
  int64_t sort_stride;
  TopkSharedRow* rows;  // null: a block per row
  int2* part_counts;    // [rows, parts], keys above and equal to the threshold
  int parts;
};

template <typename T>
__device__ void count_row(unsigned* bins, const TopkRow<T>& row, int from, int until, int digit,
                          uint32_t prefix) {
  constexpr int kVector = TopkRow<T>::kVector;
  for (int i = row.first_position(from) + static_cast<int>(threadIdx.x) * kVector; i < until;
       i += kTopkThreads * kVector) {
    uint32_t keys[kVector];
    row.load_keys(keys, i, from, until);
#pragma unroll
    for (int v = 0; v < kVector; ++v) count_key(bins, keys[v], digit, prefix);
  }
}

// visit(position, key, above, equal) for the keys above and equal to a threshold, with their ranks
// among those of their kind, in the order of the positions. load(keys, i) gives kVector keys from
// i.
template <int kVector, typename Load, typename Visit>
__device__ void visit_in_order(TopkShared& shared, int from, int until, uint32_t threshold,
                               unsigned above, unsigned equal, const Load& load,
                               const Visit& visit) {
  for (int tile = from; tile < until; tile += kTopkThreads * kVector) {
    const int i = tile + static_cast<int>(threadIdx.x) * kVector;
    uint32_t keys[kVector] = {};
    if (i < until) load(keys, i);
    unsigned counts = 0, total;  // above in the low half
#pragma unroll
    for (int v = 0; v < kVector; ++v)
      counts += keys[v] > threshold ? 1u : keys[v] == threshold ? 0x10000u : 0u;
    unsigned before;
    TopkShared::Scan(shared.scan).ExclusiveSum(counts, before, total);
    unsigned a = above + (before & 0xffff), e = equal + (before >> 16);
    if (counts) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        if (keys[v] > threshold)
          visit(i + v, keys[v], a++, e);
        else if (keys[v] == threshold)
          visit(i + v, keys[v], a, e++);
      }
    }
    above += total & 0xffff;
    equal += total >> 16;
    __syncthreads();
  }
}

// Writes the position of a key that is above the threshold, or equal to it and among those that are
// taken: the first `state.wanted`, or the last ones.
struct TopkWriter {
  int32_t* indices;  // of begin
  uint32_t threshold;
  unsigned first_tie, ties;

  __device__ TopkWriter(const TopkParams& p, int64_t row, int begin, const TopkState& state)
      : indices(p.indices + row * p.k + begin),
        threshold(state.prefix),
        first_tie(p.tie_high ? state.equal - state.wanted : 0),
        ties(state.wanted) {}
  __device__ __forceinline__ void operator()(int position, uint32_t key, unsigned above,
                                             unsigned equal) const {
    const unsigned taken = equal < first_tie ? 0 : min(equal - first_tie, ties);
    if (key > threshold || (equal >= first_tie && equal - first_tie < ties))
      indices[above + taken] = position;
  }
};

// Sorts the positions of one row by descending score. `keys` has room for a power of two >= count.
template <typename T>
__device__ void order_by_score(const TopkParams& p, const TopkRow<T>& row, int32_t* indices,
                               int count, uint64_t* keys) {
  int size = 1;
  while (size < count) size *= 2;
  for (int i = threadIdx.x; i < size; i += kTopkThreads) {
    if (i >= count) {
      keys[i] = ~uint64_t{0};
      continue;
    }
    const uint32_t position = indices[i];
    keys[i] =
        static_cast<uint64_t>(~row.key_at(position)) << 32 | (p.tie_high ? ~position : position);
  }
  sort_ascending(keys, size);
  for (int i = threadIdx.x; i < count; i += kTopkThreads) {
    const uint32_t position = static_cast<uint32_t>(keys[i]);
    indices[i] = static_cast<int32_t>(p.tie_high ? ~position : position);
  }
  __syncthreads();
}

// Forced positions, the tail, and what lies beside the positions. `selected` is how many the
// ordered pass wrote.
template <typename T>
__device__ void finish_row(const TopkParams& p, const TopkMemory& memory, int64_t r,
                           const TopkRow<T>& row, int selected) {
  int32_t* const indices = p.indices + r * p.k;
  const int last = row.begin + selected, count = last + row.length - row.end;
  for (int i = threadIdx.x; i < row.begin; i += kTopkThreads) indices[i] = i;
  for (int i = last + threadIdx.x; i < p.k; i += kTopkThreads)
    indices[i] = i < count ? row.end + i - last : -1;
  if (threadIdx.x == 0) p.counts[r] = count;
  __syncthreads();
  if (p.by_score) order_by_score(p, row, indices, count, memory.sort_keys + r * memory.sort_stride);
  for (int i = threadIdx.x; i < p.k; i += kTopkThreads) {
    const int position = indices[i];
    if (p.values)
      static_cast<T*>(p.values)[r * p.k + i] =
          position < 0 ? static_cast<T>(__int_as_float(0xff800000)) : row.scores[position];
    if (p.physical) p.physical[r * p.k + i] = position < 0 ? -1 : topk_physical(p, r, position);
  }
}

// One block per row.
template <typename T>
__global__ void __launch_bounds__(kTopkThreads, 1)
    topk_row_kernel(const __grid_constant__ TopkParams p,
                    const __grid_constant__ TopkMemory memory) {
  constexpr int kVector = TopkRow<T>::kVector;
  __shared__ TopkShared shared;
  __shared__ uint32_t candidate_keys[kCandidates];
  __shared__ int32_t candidate_positions[kCandidates];
  for (int64_t r = blockIdx.x; r < p.rows; r += gridDim.x) {
    const TopkRow<T> row(p, r);
    const auto load = [&](uint32_t (&keys)[kVector], int i) {
      row.load_keys(keys, i, row.begin, row.end);
    };
    if (threadIdx.x == 0) shared.state = {0, row.wanted, 0, 0};
    clear_bins(shared.bins);
    __syncthreads();
    count_row(shared.bins, row, row.begin, row.end, 0, 0);
    __syncthreads();
    narrow(shared, 0);
    const int candidates = shared.state.candidates;
    const bool held = candidates <= kCandidates;
    const uint32_t prefix = shared.state.prefix;
    if (held && candidates > 0) {
      const uint32_t floor = (prefix << digit_shift(0)) - 1;  // no key has the lowest prefix but 0
      visit_in_order<kVector>(shared, row.first_position(row.begin), row.end, floor, 0, 0, load,
                              [&](int position, uint32_t key, unsigned above, unsigned) {
                                if (key == floor) return;
                                candidate_keys[above] = key;
                                candidate_positions[above] = position;
                              });
    }
    for (int digit = 1; digit < kDigits; ++digit) {
      const uint32_t so_far = shared.state.prefix;
      clear_bins(shared.bins);
      __syncthreads();
      if (held) {
        for (int c = threadIdx.x; c < candidates; c += kTopkThreads)
          count_key(shared.bins, candidate_keys[c], digit, so_far);
      } else {
        count_row(shared.bins, row, row.begin, row.end, digit, so_far);
      }
      __syncthreads();
      narrow(shared, digit);
    }
    const TopkState state = shared.state;
    const TopkWriter write(p, r, row.begin, state);
    if (held) {
      visit_in_order<1>(
          shared, 0, candidates, state.prefix, 0, 0,
          [&](uint32_t (&keys)[1], int c) { keys[0] = candidate_keys[c]; },
          [&](int c, uint32_t key, unsigned above, unsigned equal) {
            write(candidate_positions[c], key, above, equal);
          });
    } else {
      visit_in_order<kVector>(shared, row.first_position(row.begin), row.end, state.prefix, 0, 0,
                              load, write);
    }
    finish_row(p, memory, r, row, state.candidates - state.equal + state.wanted);
    __syncthreads();
  }
}

// Positions of one of the parts of a row.
struct TopkPart {
  int from, until;

  template <typename T>
  __device__ TopkPart(const TopkRow<T>& row, int part, int parts) {
    constexpr int kTile = kTopkThreads * TopkRow<T>::kVector;
    const int tiles = (row.end - row.begin + kTile - 1) / kTile, each = (tiles + parts - 1) / parts;
    from = min(row.end, row.begin + part * each * kTile);
    until = min(row.end, from + each * kTile);
  }
};

// True in the block that comes last, which then sees what all others of the row have written.
__device__ inline bool is_last(unsigned* ticket, int parts) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(ticket, 1u) == static_cast<unsigned>(parts - 1);
    if (last) *ticket = 0;
  }
  __syncthreads();
  __threadfence();
  return last;
}

// One digit of the wanted-th key of rows that several blocks share: blockIdx.x is the part.
template <typename T>
__global__ __launch_bounds__(kTopkThreads) void topk_digit_kernel(
    const __grid_constant__ TopkParams p, const __grid_constant__ TopkMemory memory, int digit) {
  __shared__ TopkShared shared;
  const int64_t r = blockIdx.y;
  TopkSharedRow& all = memory.rows[r];
  const TopkRow<T> row(p, r);
  const TopkPart part(row, static_cast<int>(blockIdx.x), memory.parts);
  const TopkState state = digit == 0 ? TopkState{0, row.wanted, 0, 0} : all.state;
  clear_bins(shared.bins);
  __syncthreads();
  count_row(shared.bins, row, part.from, part.until, digit, state.prefix);
  __syncthreads();
  for (int b = threadIdx.x; b < kBins; b += kTopkThreads)
    if (shared.bins[b]) atomicAdd(&all.bins[b], shared.bins[b]);
  if (!is_last(&all.ticket, memory.parts)) return;
  for (int b = threadIdx.x; b < kBins; b += kTopkThreads) {
    shared.bins[b] = __ldcg(&all.bins[b]);
    all.bins[b] = 0;
  }
  if (threadIdx.x == 0) shared.state = state;
  __syncthreads();
  narrow(shared, digit);
  if (threadIdx.x == 0) all.state = shared.state;
}

template <typename T>
__global__ __launch_bounds__(kTopkThreads) void topk_count_kernel(
    const __grid_constant__ TopkParams p, const __grid_constant__ TopkMemory memory) {
  using Reduce = cub::BlockReduce<int, kTopkThreads>;
  __shared__ typename Reduce::TempStorage above_storage, equal_storage;
  constexpr int kVector = TopkRow<T>::kVector;
  const int64_t r = blockIdx.y;
  const uint32_t threshold = memory.rows[r].state.prefix;
  const TopkRow<T> row(p, r);
  const TopkPart part(row, static_cast<int>(blockIdx.x), memory.parts);
  int above = 0, equal = 0;
  for (int i = row.first_position(part.from) + static_cast<int>(threadIdx.x) * kVector;
       i < part.until; i += kTopkThreads * kVector) {
    uint32_t keys[kVector];
    row.load_keys(keys, i, part.from, part.until);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      above += keys[v] > threshold;
      equal += keys[v] == threshold;
    }
  }
  above = Reduce(above_storage).Sum(above);
  equal = Reduce(equal_storage).Sum(equal);
  if (threadIdx.x == 0) memory.part_counts[r * memory.parts + blockIdx.x] = {above, equal};
}

template <typename T>
__global__ __launch_bounds__(kTopkThreads) void topk_write_kernel(
    const __grid_constant__ TopkParams p, const __grid_constant__ TopkMemory memory) {
  constexpr int kVector = TopkRow<T>::kVector;
  __shared__ TopkShared shared;
  const int64_t r = blockIdx.y;
  const TopkRow<T> row(p, r);
  const TopkPart part(row, static_cast<int>(blockIdx.x), memory.parts);
  const TopkState state = memory.rows[r].state;
  unsigned above = 0, equal = 0;
  for (unsigned i = 0; i < blockIdx.x; ++i) {
    const int2 counts = memory.part_counts[r * memory.parts + i];
    above += counts.x;
    equal += counts.y;
  }
  visit_in_order<kVector>(
      shared, row.first_position(part.from), part.until, state.prefix, above, equal,
      [&](uint32_t (&keys)[kVector], int i) { row.load_keys(keys, i, part.from, part.until); },
      TopkWriter(p, r, row.begin, state));
  if (is_last(&memory.rows[r].ticket, memory.parts))
    finish_row(p, memory, r, row, state.candidates - state.equal + state.wanted);
}

}  // namespace tokenmill::cuda::topk_select
