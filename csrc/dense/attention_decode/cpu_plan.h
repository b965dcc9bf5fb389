// How the work of a decode is cut up: units, and items, which are ranges of their keys.
#pragma once
#include "core/knobs.h"
#include "cpu/element_bytes.h"
#include "cpu/workspace.h"
#include "dense/attention_decode/cpu_rows.h"
#include "dense/attention_decode/params.h"

namespace tokenmill::TOKENMILL_ISA {

// Steps of an automatic range of one head: short ones until there are kRanges for threads to
// share, then longer ones (Knob::attention_decode_range), as nobody asks for the first keys of a
// range ahead of time.
constexpr int64_t kShortRange = 64, kRanges = 16;
// Heads of a unit: what they have of a token lies together, and memory is read in longer runs.
constexpr int64_t kMaxHeads = 8;
// Rows of a head that tiles take together, so that their outputs stay in L2.
constexpr int64_t kTileRowsTogether = 256;
// Keys whose values are read before those of the next head, where there is one.
constexpr int64_t kRun = 8;
// Weights may exceed 1 by this power of two before row_max of a softmax row moves.
constexpr float kHeadroom = 8;

// Where the scale of a row lies, of which one stands for all that have none.
constexpr float kUnscaled = 1;
TM_INLINE const float* scale_of(const CacheScale& scale, KvCache::Slot at, int64_t head) {
  if (!scale.data) return &kUnscaled;
  return scale.data + at.page * scale.page + at.row * scale.row + head * scale.head;
}
TM_INLINE bool has_scales(const KvCache& cache) { return cache.k_scale.data || cache.v_scale.data; }

// The largest divisor of a number of heads up to kMaxHeads.
TM_INLINE int64_t heads_together(int64_t all) {
  int64_t heads = kMaxHeads;
  while (all % heads != 0) --heads;
  return heads;
}

// Of query i of request b in head h. Packed sequences, of which this one begins at `start`, lie
// behind each other.
template <class Params>
TM_INLINE float* lse_at(const Params& d, int64_t b, int64_t start, int64_t i, int64_t h) {
  const AttentionParams& p = d.attention;
  return p.lse + (p.cu_seqlens_q ? h * p.seqlen_q + start + i : d.lse_at(b, i, h));
}

// What all workers share. A unit has all queries of a request, or with tiles a chunk of them.
template <class Keys, int kRows, bool kTiles>
struct DecodePlan {
  using Params = typename Keys::Params;
  struct Unit {
    typename Keys::Row row;
    int64_t first_item, kept;  // kept: where, in floats
    int32_t arrived;           // ranges
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
      const int64_t most = ceil_div(steps * heads, kShortRange);
      const int64_t least = ceil_div(steps * heads, long_range);
      wanted = most < kRanges ? most : least > kRanges ? least : kRanges;
    }
    return wanted < steps ? wanted : steps > 1 ? steps : 1;
  }
  int64_t partial_size() const { return heads * rows * partial_row; }

  const Params& d;
  const AttentionParams& p;
  int64_t heads, head_groups;  // of a unit; units of a request
  int64_t group;               // query heads of one head
  int64_t chunk, chunks;       // queries of a unit; units of these
  int64_t rows;                // of one head
  int64_t head_blocks;         // RowBlocks of one head
  int64_t ldo, partial_row;
  int64_t long_range;
  cpu::Workspace unit_memory;
  Unit* unit;  // and one behind the last, which has first_item alone
  int64_t partial_floats = 0, kept_floats = 0;
  cpu::Workspace memory;
  // [items][heads * rows][partial_row]: sums of values, of weights, and row_max (other kinds than
  // softmax: what a row is divided by)
  float* partials;
  float* kept;

 private:
  int64_t queries_together() const {
    const int64_t queries = Keys::queries(d);
    if (!kTiles || !Keys::kChunks || queries * group <= kTileRowsTogether) return queries;
    return group < kTileRowsTogether ? kTileRowsTogether / group : 1;
  }

  // Returns the floats that partials and what is kept take; partials are needed only where a unit
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
