// Work partition of a decode: units, and items, which are ranges of a unit's keys.
#pragma once
#include "core/knobs.h"
#include "cpu/element_bytes.h"
#include "cpu/workspace.h"
#include "dense/attention_decode/cpu_rows.h"
#include "dense/attention_decode/params.h"

namespace tokenmill::TOKENMILL_ISA {

// Steps of an automatic range of one head: short ranges until there are kRanges for threads to
// share, then longer ones (Knob::attention_decode_range), as the first keys of a range are never
// prefetched.
constexpr int64_t kShortRange = 64, kRanges = 16;
// Max KV heads of a unit: their rows of one token are adjacent, so memory is read in longer runs.
constexpr int64_t kMaxHeads = 8;
// Rows of a head per unit with tiles, so that their outputs stay in L2.
constexpr int64_t kTileRowsTogether = 256;
// Keys whose values are read before the values of the next head.
constexpr int64_t kRun = 8;
// log2 of the factor by which weights may exceed 1 before row_max of a softmax row is updated.
constexpr float kHeadroom = 8;

// Scale of rows without one, shared by all of them.
constexpr float kUnscaled = 1;
TM_INLINE const float* scale_of(const CacheScale& scale, KvCache::Slot at, int64_t head) {
  if (!scale.data) return &kUnscaled;
  return scale.data + at.page * scale.page + at.row * scale.row + head * scale.head;
}
TM_INLINE bool has_scales(const KvCache& cache) { return cache.k_scale.data || cache.v_scale.data; }

// Largest divisor of a number of heads that is at most kMaxHeads.
TM_INLINE int64_t heads_together(int64_t all) {
  int64_t heads = kMaxHeads;
  while (all % heads != 0) --heads;
  return heads;
}

// lse of query i of request b in head h. Packed sequences, of which this one starts at `start`, are
// adjacent.
template <class Params>
TM_INLINE float* lse_at(const Params& d, int64_t b, int64_t start, int64_t i, int64_t h) {
  const AttentionParams& p = d.attention;
  return p.lse + (p.cu_seqlens_q ? h * p.seqlen_q + start + i : d.lse_at(b, i, h));
}

// State shared by all workers. A unit has all queries of a request or, with tiles, a chunk of them.
template <class Keys, int kRows, bool kTiles>
struct DecodePlan {
  using Params = typename Keys::Params;
  struct Unit {
    typename Keys::Row row;
    int64_t first_item, kept;  // kept: offset in floats
    int32_t arrived;           // ranges that have finished
  };

  explicit DecodePlan(const Params& d)
      : d(d),
        p(d.attention),
        heads(Keys::heads(d)),
        head_groups(Keys::row_heads(d) / heads),
        group(p.heads / Keys::row_heads(d)),
        chunk(queries_together()),
        chunks(ceil_div(Keys::queries(d), chunk)),
        rows(group * chunk),
        head_blocks(ceil_div(rows, kRows)),
        ldo(round_up(p.value_dim, 2 * kWidth)),
        partial_row(ldo + 2),
        long_range(knob(Knob::attention_decode_range)),
        unit_memory(ceil_div((units() + 1) * sizeof(Unit), 4)),
        unit(reinterpret_cast<Unit*>(unit_memory.take(0))),
        memory(describe_units()),
        partials(memory.take(partial_floats)),
        kept(memory.take(kept_floats)) {}

  int64_t units() const { return Keys::requests(d) * chunks * head_groups; }
  int64_t request(int64_t u) const { return Keys::request(d, u / (chunks * head_groups)); }
  int64_t first_query(int64_t u) const { return u / head_groups % chunks * chunk; }
  int64_t items() const { return unit[units()].first_item; }
  KeyRange range_of(int64_t u) const { return Keys::range(unit[u].row); }
  int64_t parts_of(int64_t steps) const {
    int64_t wanted = d.num_splits;
    if (wanted <= 0) {
      const int64_t maximum = ceil_div(steps * heads, kShortRange);
      const int64_t minimum = ceil_div(steps * heads, long_range);
      wanted = maximum < kRanges ? maximum : minimum > kRanges ? minimum : kRanges;
    }
    return wanted < steps ? wanted : steps > 1 ? steps : 1;
  }
  int64_t partial_size() const { return heads * rows * partial_row; }

  const Params& d;
  const AttentionParams& p;
  int64_t heads, head_groups;  // of a unit; units per request
  int64_t group;               // query heads per KV head
  int64_t chunk, chunks;       // queries per unit; units per request and head group
  int64_t rows;                // rows of one head
  int64_t head_blocks;         // RowBlocks of one head
  int64_t ldo, partial_row;
  int64_t long_range;
  cpu::Workspace unit_memory;
  Unit* unit;  // and one more past the end, of which only first_item is used
  int64_t partial_floats = 0, kept_floats = 0;
  cpu::Workspace memory;
  // [items][heads * rows][partial_row]: O, row_sum, and row_max (kinds other than softmax: the
  // divisor of the row)
  float* partials;
  float* kept;

 private:
  int64_t queries_together() const {
    const int64_t queries = Keys::queries(d);
    if (!kTiles || !Keys::kChunks || queries * group <= kTileRowsTogether) return queries;
    return group < kTileRowsTogether ? kTileRowsTogether / group : 1;
  }

  // Returns the floats of partials and of what Keys keeps; partials are needed only where a unit
  // has several ranges.
  int64_t describe_units() {
    int64_t items = 0;
    bool any = false;
    for (int64_t u = 0; u < units(); ++u) {
      unit[u].row = Keys::row(d, request(u), u % head_groups * heads);
      if constexpr (Keys::kChunks)
        if (chunks > 1) unit[u].row = Keys::row_of_chunk(d, request(u), first_query(u), chunk);
      unit[u].first_item = items;
      unit[u].kept = kept_floats;
      unit[u].arrived = 0;
      const int64_t parts = parts_of(range_of(u).steps(kStep));
      items += parts;
      any |= parts > 1;
      kept_floats += Keys::template kept<kRows>(d, unit[u].row, heads * head_blocks);
    }
    unit[units()].first_item = items;
    if (any) partial_floats = items * partial_size();
    return partial_floats + kept_floats + 16;
  }
};

}  // namespace tokenmill::TOKENMILL_ISA
