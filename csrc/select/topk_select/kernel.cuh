// Exact radix select on order-preserving keys, without a sort: histograms find the k-th key, an
// ordered pass writes the positions. A row is processed by one CTA, or by several that share
// histograms in global memory: in two launches if the first digit probably leaves few candidates,
// which one CTA finishes, or else in one launch per digit and two for the ordered pass.
#pragma once
#include <cub/block/block_reduce.cuh>

#include "cuda/vector.cuh"
#include "select/radix_select.cuh"
#include "select/topk_select/params.h"

namespace tokenmill::cuda::topk_select {

// Candidates held in shared memory, for one CTA per row and for several.
constexpr int kCandidates = 4096, kListed = 8192;

// [capacity] keys, then their positions; afterwards the keys of a sort.
extern __shared__ uint4 topk_dynamic[];

// The range of a row in which scores decide.
template <typename T>
struct TopkRow {
  static constexpr int kVector = 16 / sizeof(T);

  const T* scores;  // position 0
  int length, begin, end;
  int wanted;  // selections from begin .. end - 1

  __device__ TopkRow(const TopkParams& p, int64_t row) {
    const TopkWindow window = topk_window(p, row);
    scores = static_cast<const T*>(p.scores) + row * p.row_stride + window.start;
    length = static_cast<int>(window.length);
    begin = static_cast<int>(p.force_first < length ? p.force_first : length);
    end = length - p.force_last > begin ? static_cast<int>(length - p.force_last) : begin;
    wanted = static_cast<int>(p.k) - begin - (length - end);
  }

  // Aligned 16-byte vectors are counted from the one that contains `from`; the first may begin
  // before it.
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

// State of a row shared by several CTAs: bins and ticket are 0 between kernels.
struct TopkSharedRow {
  unsigned bins[kBins];
  unsigned ticket;
  TopkState state;
};

// Workspace.
struct TopkMemory {
  uint64_t* sort_keys;  // sort_stride per row; null: a sort, if any, is in shared memory
  int64_t sort_stride;
  TopkSharedRow* rows;  // null: one CTA per row
  int2* part_counts;    // [rows, parts], keys above and equal to the threshold; or candidates, 0
  uint2* lists;         // [rows, parts, list_stride], candidates: key and position
  int64_t list_stride;
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

// Calls visit(position, key, above, equal) for the keys above and equal to a threshold, in the
// order of the positions; above and equal are ranks within each kind. load(keys, i) gives kVector
// keys from i on. Returns the number of keys above.
template <int kVector, typename Load, typename Visit>
__device__ unsigned visit_in_order(TopkShared& shared, int from, int until, uint32_t threshold,
                                   unsigned above, unsigned equal, const Load& load,
                                   const Visit& visit) {
  for (int tile = from; tile < until; tile += kTopkThreads * kVector) {
    const int i = tile + static_cast<int>(threadIdx.x) * kVector;
    uint32_t keys[kVector] = {};
    if (i < until) load(keys, i);
    unsigned counts = 0, total;  // above in the low half, equal in the high half
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
  return above;
}

// Writes the position of a key that is above the threshold, or equal to it and among the ties that
// are taken: the first `state.wanted`, or the last ones.
struct TopkWriter {
  int32_t* indices;  // for position begin
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

// Writes forced positions, the tail, and the other outputs. `selected`: number of positions written
// by the ordered pass.
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
  if (p.by_score)
    order_by_score(p, row, indices, count,
                   memory.sort_keys ? memory.sort_keys + r * memory.sort_stride
                                    : reinterpret_cast<uint64_t*>(topk_dynamic));
  for (int i = threadIdx.x; i < p.k; i += kTopkThreads) {
    const int position = indices[i];
    if (p.values)
      static_cast<T*>(p.values)[r * p.k + i] =
          position < 0 ? static_cast<T>(__int_as_float(0xff800000)) : row.scores[position];
    if (p.physical) p.physical[r * p.k + i] = position < 0 ? -1 : topk_physical(p, r, position);
  }
}

// Candidates: keys with the prefix of the first digit or a larger one, in the order of the
// positions.
template <int kCapacity>
struct TopkCandidates {
  __device__ static uint32_t* keys() { return reinterpret_cast<uint32_t*>(topk_dynamic); }
  __device__ static int32_t* positions() {
    return reinterpret_cast<int32_t*>(topk_dynamic) + kCapacity;
  }
  // No key has the lowest prefix but 0.
  __device__ static uint32_t floor(const TopkState& state) {
    return (state.prefix << digit_shift(0)) - 1;
  }
};

// Completes a selection after the first digit: the other digits, from the candidates if they are
// held, and the results.
template <int kCapacity, typename T>
__device__ void finish_selection(const TopkParams& p, const TopkMemory& memory, int64_t r,
                                 const TopkRow<T>& row, TopkShared& shared, bool held) {
  constexpr int kVector = TopkRow<T>::kVector;
  const uint32_t* const keys = TopkCandidates<kCapacity>::keys();
  const int32_t* const positions = TopkCandidates<kCapacity>::positions();
  const int candidates = shared.state.candidates;
  for (int digit = 1; digit < kDigits; ++digit) {
    const uint32_t so_far = shared.state.prefix;
    clear_bins(shared.bins);
    __syncthreads();
    if (held) {
      for (int c = threadIdx.x; c < candidates; c += kTopkThreads)
        count_key(shared.bins, keys[c], digit, so_far);
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
        [&](uint32_t (&key)[1], int c) { key[0] = keys[c]; },
        [&](int c, uint32_t key, unsigned above, unsigned equal) {
          write(positions[c], key, above, equal);
        });
  } else {
    visit_in_order<kVector>(
        shared, row.first_position(row.begin), row.end, state.prefix, 0, 0,
        [&](uint32_t (&some)[kVector], int i) { row.load_keys(some, i, row.begin, row.end); },
        write);
  }
  finish_row(p, memory, r, row, state.candidates - state.equal + state.wanted);
}

// One CTA per row.
template <typename T>
__global__ void __launch_bounds__(kTopkThreads, 1)
    topk_row_kernel(const __grid_constant__ TopkParams p,
                    const __grid_constant__ TopkMemory memory) {
  using Candidates = TopkCandidates<kCandidates>;
  constexpr int kVector = TopkRow<T>::kVector;
  __shared__ TopkShared shared;
  for (int64_t r = blockIdx.x; r < p.rows; r += gridDim.x) {
    const TopkRow<T> row(p, r);
    if (threadIdx.x == 0) shared.state = {0, row.wanted, 0, 0};
    clear_bins(shared.bins);
    __syncthreads();
    count_row(shared.bins, row, row.begin, row.end, 0, 0);
    __syncthreads();
    narrow(shared, 0);
    const int candidates = shared.state.candidates;
    const bool held = candidates <= kCandidates;
    if (held && candidates > 0) {
      const uint32_t floor = Candidates::floor(shared.state);
      visit_in_order<kVector>(
          shared, row.first_position(row.begin), row.end, floor, 0, 0,
          [&](uint32_t (&keys)[kVector], int i) { row.load_keys(keys, i, row.begin, row.end); },
          [&](int position, uint32_t key, unsigned above, unsigned) {
            if (key == floor) return;
            Candidates::keys()[above] = key;
            Candidates::positions()[above] = position;
          });
    }
    finish_selection<kCandidates>(p, memory, r, row, shared, held);
    __syncthreads();
  }
}

// Positions of one part of a row.
struct TopkPart {
  int from, until;

  template <typename T>
  __device__ TopkPart(const TopkRow<T>& row, int part, int parts) {
    constexpr unsigned kVector = TopkRow<T>::kVector;
    const unsigned length = row.end - row.begin, count = parts;
    const unsigned each = (length + count * kVector - 1) / (count * kVector) * kVector;
    from = row.begin + static_cast<int>(min(length, part * each));
    until = row.begin + static_cast<int>(min(length, (part + 1) * each));
  }
};

// True in the last CTA of a row to arrive, which then sees all writes of the others.
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

// Gathers the candidates of all parts of a row, listed by other CTAs, into shared memory. There are
// no more parts than threads.
__device__ inline void gather_lists(TopkShared& shared, const TopkMemory& memory, int64_t parts) {
  using Candidates = TopkCandidates<kListed>;
  const int thread = static_cast<int>(threadIdx.x);
  unsigned before, total,
      count = thread < memory.parts ? __ldcg(&memory.part_counts[parts + thread].x) : 0;
  TopkShared::Scan(shared.scan).ExclusiveSum(count, before, total);
  shared.bins[thread] = before;
  __syncthreads();
  for (int c = thread; c < static_cast<int>(total); c += kTopkThreads) {
    int part = 0;  // the last one that begins at c or before
    for (int step = kTopkThreads / 2; step > 0; step /= 2)
      if (part + step < memory.parts && shared.bins[part + step] <= static_cast<unsigned>(c))
        part += step;
    const uint2 found = __ldcg(memory.lists + (parts + part) * memory.list_stride + c -
                               static_cast<int>(shared.bins[part]));
    Candidates::keys()[c] = found.x;
    Candidates::positions()[c] = static_cast<int32_t>(found.y);
  }
  __syncthreads();
}

// One digit of the wanted-th key of rows shared by several CTAs: blockIdx.x is the part.
template <typename T>
__global__ __launch_bounds__(kTopkThreads) void topk_digit_kernel(
    const __grid_constant__ TopkParams p, const __grid_constant__ TopkMemory memory, int digit) {
  __shared__ TopkShared shared;
  const int64_t r = blockIdx.y;
  TopkSharedRow& all = memory.rows[r];
  const TopkRow<T> row(p, r);
  const TopkPart part(row, static_cast<int>(blockIdx.x), memory.parts);
  if (threadIdx.x == 0) shared.state = digit == 0 ? TopkState{0, row.wanted, 0, 0} : all.state;
  clear_bins(shared.bins);
  __syncthreads();
  const TopkState state = shared.state;
  count_row(shared.bins, row, part.from, part.until, digit, state.prefix);
  __syncthreads();
  for (int b = threadIdx.x; b < kBins; b += kTopkThreads)
    if (shared.bins[b]) atomicAdd(&all.bins[b], shared.bins[b]);
  if (!is_last(&all.ticket, memory.parts)) return;
  for (int b = threadIdx.x; b < kBins; b += kTopkThreads) {
    shared.bins[b] = __ldcg(&all.bins[b]);
    all.bins[b] = 0;
  }
  __syncthreads();
  narrow(shared, digit);
  if (threadIdx.x == 0) all.state = shared.state;
}

// Completes rows whose first digit is known. Each CTA lists the candidates of its part, and the
// last one gathers them; if they are too many, the first CTA processes the whole row.
template <typename T>
__global__ void __launch_bounds__(kTopkThreads, 1)
    topk_list_kernel(const __grid_constant__ TopkParams p,
                     const __grid_constant__ TopkMemory memory) {
  using Candidates = TopkCandidates<kListed>;
  constexpr int kVector = TopkRow<T>::kVector;
  __shared__ TopkShared shared;
  const int64_t r = blockIdx.y, parts = r * memory.parts;
  TopkSharedRow& all = memory.rows[r];
  const TopkRow<T> row(p, r);
  if (threadIdx.x == 0) shared.state = all.state;
  __syncthreads();
  const TopkState state = shared.state;
  const bool held = state.candidates <= kListed;
  if (held) {
    const TopkPart part(row, static_cast<int>(blockIdx.x), memory.parts);
    const uint32_t floor = Candidates::floor(state);
    uint2* const list = memory.lists + (parts + blockIdx.x) * memory.list_stride;
    const unsigned listed = visit_in_order<kVector>(
        shared, row.first_position(part.from), part.until, floor, 0, 0,
        [&](uint32_t (&keys)[kVector], int i) { row.load_keys(keys, i, part.from, part.until); },
        [&](int position, uint32_t key, unsigned above, unsigned) {
          if (key != floor) list[above] = {key, static_cast<uint32_t>(position)};
        });
    if (threadIdx.x == 0) memory.part_counts[parts + blockIdx.x] = {static_cast<int>(listed), 0};
    if (!is_last(&all.ticket, memory.parts)) return;
    gather_lists(shared, memory, parts);
  } else if (blockIdx.x != 0) {
    return;
  }
  finish_selection<kListed>(p, memory, r, row, shared, held);
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
__global__ void __launch_bounds__(kTopkThreads, 1)
    topk_write_kernel(const __grid_constant__ TopkParams p,
                      const __grid_constant__ TopkMemory memory) {
  constexpr int kVector = TopkRow<T>::kVector;
  __shared__ TopkShared shared;
  const int64_t r = blockIdx.y;
  const TopkRow<T> row(p, r);
  const TopkPart part(row, static_cast<int>(blockIdx.x), memory.parts);
  if (threadIdx.x == 0) shared.state = memory.rows[r].state;
  // Keys of the previous parts; there are no more parts than threads.
  int2 counts = {0, 0};
  if (threadIdx.x < blockIdx.x) counts = memory.part_counts[r * memory.parts + threadIdx.x];
  unsigned before, above, equal;
  TopkShared::Scan(shared.scan).ExclusiveSum(static_cast<unsigned>(counts.x), before, above);
  __syncthreads();
  TopkShared::Scan(shared.scan).ExclusiveSum(static_cast<unsigned>(counts.y), before, equal);
  __syncthreads();
  const TopkState state = shared.state;
  visit_in_order<kVector>(
      shared, row.first_position(part.from), part.until, state.prefix, above, equal,
      [&](uint32_t (&keys)[kVector], int i) { row.load_keys(keys, i, part.from, part.until); },
      TopkWriter(p, r, row.begin, state));
  if (is_last(&memory.rows[r].ticket, memory.parts))
    finish_row(p, memory, r, row, state.candidates - state.equal + state.wanted);
}

}  // namespace tokenmill::cuda::topk_select
