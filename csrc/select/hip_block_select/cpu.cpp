// Searches the query blocks one after the other. Queries are in vector lanes, and the keys of
// representatives are multiplied with them one by one: from a copy of their head if many query
// blocks read it, else directly from memory. Few queries are multiplied along head_dim instead.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "cpu/element_bytes.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/tile.h"
#include "cpu/workspace.h"
#include "select/hip_block_select/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr float kNegInf = -__builtin_inff();
constexpr float kUnknown = __builtin_nanf("");
constexpr int kRows = kWidth == 16 ? 8 : 6;  // keys per register tile
constexpr int kVectors = 2;                  // query vectors per register tile
constexpr int kLanes = kVectors * kWidth;
constexpr int64_t kFewQueries = 4;
constexpr int64_t kAhead = 2 * kRows;  // prefetch distance, in keys
constexpr int64_t kAheadFew = 64;
// Keys of a head share memory pages with other heads: from this many keys on, address translation
// takes a quarter of the time, and a copy of the head pays if each key is read this often.
constexpr int64_t kCopiedKeys = 8192, kCopiedReads = 16;

// Order-preserving unsigned integers of scores, and back.
TM_INLINE uint32_t key_of(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
TM_INLINE float score_of(uint32_t key) {
  return std::bit_cast<float>(key >> 31 ? key & 0x7fffffffu : ~key);
}

// Key of a representative, and its mask.
struct Probe {
  const char* key;
  int32_t slot;  // index of its node among the scored nodes
  // distance from the key to the end of the last query; queries with a smaller deficit see the key
  float room;
};

// best[i] = max(best[i], products of row i with the kLanes queries that see it), one vector per
// row. A separate function, like the register tile in cpu/tile.h.
template <class Op>
__attribute__((noinline)) void score_rows(const float* const (&rows)[kRows], const float* queries,
                                          int64_t words, const float* deficits,
                                          const float (&rooms)[kRows], bool masked,
                                          float* const (&best)[kRows]) {
  vf acc[kRows][kVectors];
  clear(acc);
  TM_UNROLL(2)
  for (int64_t w = 0; w < words; ++w) {
    vf q[kVectors];
    TM_UNROLL(2)
    for (int n = 0; n < kVectors; ++n) q[n] = load(queries + w * kLanes + n * kWidth);
    TM_UNROLL(8)
    for (int i = 0; i < kRows; ++i) {
      const vf x = set(rows[i][w]);
      TM_UNROLL(2)
      for (int n = 0; n < kVectors; ++n) acc[i][n] = Op::madd(acc[i][n], x, q[n]);
    }
  }
  TM_UNROLL(8)
  for (int i = 0; i < kRows; ++i) {
    vf maximum = load(best[i]);
    TM_UNROLL(2)
    for (int n = 0; n < kVectors; ++n) {
      vf x = acc[i][n];
      if (masked) x = select(less(load(deficits + n * kWidth), set(rooms[i])), x, set(kNegInf));
      maximum = max_of(x, maximum);  // not NaN
    }
    store(best[i], maximum);
  }
}

template <class Op>
class Searcher {
 public:
  Searcher(const HipParams& p, int64_t shares)
      : p(p),
        shares(shares),
        element_size(element_bytes(p.dtype)),
        words(words_of<Op>(p.head_dim)),
        ldw(round_up(words, kWidth)),
        row_floats(round_up(p.head_dim, 16) + 16),
        max_queries(p.group * (std::min(p.block_q, p.queries) / p.stride_q + 1)),
        padded(round_up(max_queries, kLanes)),
        room(2 * p.wanted + kWidth),
        copies(p.k.rows >= kCopiedKeys &&
               p.blocks / shares * 4 * p.wanted * p.block_k >= kCopiedReads * p.k.rows),
        memory(padded * (ldw + 1) + kLanes * row_floats + kRows * ldw + room * (kWidth + 6) +
               row_floats + p.wanted * 2 * p.block_k * kProbeFloats +
               (copies ? p.k.rows * ldw : 0) + 16 * 18) {
    queries = memory.take(padded * ldw);
    deficits = memory.take(padded);
    gathered = reinterpret_cast<char*>(memory.take(kLanes * row_floats));
    converted = memory.take(kRows * ldw);
    best = memory.take(room * kWidth);
    nodes = reinterpret_cast<HipNode*>(memory.take(2 * room));
    scores = memory.take(room);
    first_scores = memory.take(room);
    found_scores = memory.take(room);
    numbers = reinterpret_cast<int32_t*>(memory.take(room + kWidth));
    zeros = memory.take(row_floats);
    std::fill(zeros, zeros + row_floats, 0.f);
    probes = reinterpret_cast<Probe*>(memory.take(p.wanted * 2 * p.block_k * kProbeFloats));
    if (!copies) return;
    copy = memory.take(p.k.rows * ldw);
    cpu::prefer_huge_pages(copy, p.k.rows * ldw * 4);
  }

  // Processes a share of the query blocks of one list.
  void run(int64_t item) {
    const int64_t list = item / shares % p.lists, request = item / (shares * p.lists);
    kv_head = list * p.kv_heads / p.lists;
    for (int64_t block = item % shares; block < p.blocks; block += shares) {
      at = hip_block(p, request, block);
      search(request, list, block);
    }
  }

 private:
  static constexpr int64_t kProbeFloats = sizeof(Probe) / sizeof(float);

  void search(int64_t request, int64_t list, int64_t block) {
    const int64_t row = (request * p.lists + list) * p.blocks + block;
    const HipRows rows = hip_rows(p, at);
    end = hip_end(p, at, rows.first);
    const HipNode all = hip_admissible(p, rows, end);
    int32_t* const indices = p.indices + row * p.wanted;
    int64_t found = std::min<int64_t>(all.end - all.begin, p.wanted);
    if (all.end - all.begin <= p.wanted) {
      for (int32_t i = 0; i < found; ++i) indices[i] = all.begin + i;
    } else {
      load_queries(list, rows);
      if (copies && !few) copy_head();
      found = p.exact ? scan(all) : descend(all, request, list, block);
      for (int64_t i = 0; i < found; ++i) indices[i] = nodes[i].begin;
    }
    std::fill(indices + found, indices + p.wanted, -1);
    p.counts[row] = static_cast<int32_t>(found);
  }

  void add(int64_t& count, HipNode node) {
    nodes[count] = node;
    first_scores[count] = kUnknown;
    scores[count++] = kUnknown;
  }

  // Scores all admissible blocks, at most one list's length at a time.
  int64_t scan(HipNode all) {
    int64_t count = 0;
    for (int32_t block = all.begin; block < all.end;) {
      const int32_t last = static_cast<int32_t>(std::min(all.end, block + int32_t(p.wanted)));
      for (; block < last; ++block) add(count, {block, block + 1});
      score(count);
      count = keep_best(count);
    }
    return count;
  }

  int64_t descend(HipNode all, int64_t request, int64_t list, int64_t block) {
    int64_t count = p.start ? list_nodes(all, {request, list, block}) : 0;
    if (count == 0) count = start_nodes(all);
    while (true) {
      int32_t largest = 0;
      for (int64_t i = 0; i < count; ++i)
        largest = std::max(largest, nodes[i].end - nodes[i].begin);
      if (largest == 1) return count;
      count = halve(count);
      score(count);
      count = keep_best(count);
    }
  }

  int64_t start_nodes(HipNode all) {
    const int64_t n = all.end - all.begin;
    int64_t count = 0;
    for (int64_t i = 0; i < p.wanted; ++i)
      add(count, {static_cast<int32_t>(all.begin + n * i / p.wanted),
                  static_cast<int32_t>(all.begin + n * (i + 1) / p.wanted)});
    return count;
  }

  int64_t list_nodes(HipNode all, const int64_t (&row)[3]) {
    const int32_t *ids = p.start, *counts = p.start_counts;
    for (int i = 0; i < 3; ++i) {
      ids += row[i] * p.start_strides[i];
      counts += row[i] * p.start_count_strides[i];
    }
    int64_t count = 0;
    int32_t before = -1;
    for (int64_t i = 0; i < std::min<int64_t>(*counts, p.wanted); ++i) {
      if (ids[i] <= before || ids[i] < all.begin || ids[i] >= all.end) continue;
      before = ids[i];
      const HipNode node = hip_restart_node(p, all, before);
      if (count == 0 || nodes[count - 1].begin != node.begin) add(count, node);
    }
    return count;
  }

  // Splits nodes into halves in place, from the last on. The scores of a node's representative and,
  // if it represented an earlier node, of its first block are already known.
  int64_t halve(int64_t count) {
    int64_t halves = 2 * count;
    for (int64_t i = 0; i < count; ++i) halves -= nodes[i].end - nodes[i].begin == 1;
    for (int64_t i = count - 1, to = halves; i >= 0; --i) {
      const HipNode node = nodes[i];
      const float score = scores[i], first_score = first_scores[i];
      const int32_t middle = node.begin + (node.end - node.begin) / 2;
      const int32_t scored = hip_representative(p, node);
      const auto known = [&](int32_t block) TM_LAMBDA {
        return block == scored ? score : block == node.begin ? first_score : kUnknown;
      };
      const auto put = [&](HipNode half) TM_LAMBDA {
        nodes[--to] = half;
        scores[to] = known(hip_representative(p, half));
        first_scores[to] = known(half.begin);
      };
      put({middle, node.end});  // a node of one block remains
      if (middle > node.begin) put({node.begin, middle});
    }
    return halves;
  }

  // Loads the queries that score a block, the last one first, head by head. Lanes without a query
  // repeat the last query.
  void load_queries(int64_t list, HipRows rows) {
    count_queries = p.group * rows.rows;
    few = count_queries <= kFewQueries;
    const auto row = [&](int64_t i) TM_LAMBDA {
      const int64_t h = i < count_queries ? i / rows.rows : 0;
      const int64_t t = i < count_queries ? i % rows.rows : 0;
      deficits[i] = p.causal ? static_cast<float>(t * p.stride_q) : 0.f;
      return static_cast<const char*>(p.q.data) +
             (at.b * p.q.batch + (at.q_start + rows.first - t * p.stride_q) * p.q.seq +
              (list * p.group + h) * p.q.head) *
                 element_size;
    };
    max_deficit = p.causal ? static_cast<float>((rows.rows - 1) * p.stride_q) : 0.f;
    if (few) {
      for (int64_t i = 0; i < count_queries; ++i)
        pack_rows<Op>(row(i), p.dtype, 0, 1, 1, p.head_dim, 1, queries + i * ldw, ldw);
      return;
    }
    panels = ceil_div(count_queries, kLanes);
    const int64_t stride = row_floats * 4 / element_size;
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int64_t i = 0; i < kLanes; ++i)
        std::memcpy(gathered + i * row_floats * 4, row(panel * kLanes + i),
                    p.head_dim * element_size);
      pack_transposed<Op, kLanes>(gathered, p.dtype, stride, kLanes, p.head_dim, 1,
                                  queries + panel * kLanes * words);
    }
  }

  const char* key(int64_t t) const {
    const KeyRun run = key_run(p.k, at.b, at.k_start + t);
    if (run.offset < 0) return reinterpret_cast<const char*>(zeros);
    return static_cast<const char*>(p.k.data) + (run.offset + kv_head * p.k.head) * element_size;
  }

  // Copies the keys of the current head, as words.
  void copy_head() {
    const int64_t head = at.b * p.kv_heads + kv_head;
    if (head == copied) return;
    for (int64_t t = 0; t < at.tokens; ++t) {
      prefetch(key(std::min(t + kAhead, at.tokens - 1)), p.head_dim * element_size);
      pack_rows<Op>(key(t), p.dtype, 0, 1, 1, p.head_dim, 1, copy + t * ldw, ldw);
    }
    copied = head;
  }

  // Scores the nodes that have no score.
  void score(int64_t count) {
    int64_t slots = 0, probed = 0;
    const bool from_copy = copies && !few, anywhere = !from_copy && p.k.table != nullptr;
    const char* const keys = from_copy  ? reinterpret_cast<const char*>(copy)
                             : anywhere ? nullptr
                                        : key(0);
    const int64_t step = from_copy ? ldw * 4 : p.k.seq * element_size;
    for (int64_t i = 0; i < count; ++i) {
      if (scores[i] == scores[i]) continue;
      const int64_t first = hip_representative(p, nodes[i]) * p.block_k;
      const int64_t from = std::max(first, p.num_sink), until = std::min(first + p.block_k, end);
      for (int64_t t = from; t < until; ++t)
        probes[probed++] = {anywhere ? key(t) : keys + t * step, static_cast<int32_t>(slots),
                            static_cast<float>(end - t)};
      numbers[slots++] = static_cast<int32_t>(i);
    }
    if (slots == 0) return;
    if (few)
      score_few(probed, slots);
    else
      score_many(probed, slots, from_copy);
    for (int64_t i = 0; i < slots; ++i) scores[numbers[i]] = found_scores[i] + 0.f;  // not -0
  }

  static TM_INLINE void prefetch(const char* row, int64_t bytes) {
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }

  void score_many(int64_t probed, int64_t slots, bool from_copy) {
    const bool direct =
        from_copy || p.dtype == DType::float32 || (Op::kPair == 2 && p.head_dim % 2 == 0);
    const int64_t row_bytes = from_copy ? words * 4 : p.head_dim * element_size;
    for (int64_t i = 0; i < slots * kWidth; i += kWidth) store(best + i, set(kNegInf));
    for (int64_t first = 0; first < probed; first += kRows) {
      const float* rows[kRows];
      float* to[kRows];
      float rooms[kRows];
      bool masked = false;
      for (int i = 0; i < kRows; ++i) {
        const Probe& probe = probes[std::min(first + i, probed - 1)];
        rows[i] = reinterpret_cast<const float*>(probe.key);
        to[i] = best + probe.slot * kWidth;
        rooms[i] = probe.room;
        masked |= probe.room <= max_deficit;
        prefetch(probes[std::min(first + i + kAhead, probed - 1)].key, row_bytes);
      }
      if (!direct)
        for (int i = 0; i < kRows; ++i) {
          pack_rows<Op>(rows[i], p.dtype, 0, 1, 1, p.head_dim, 1, converted + i * ldw, ldw);
          rows[i] = converted + i * ldw;
        }
      for (int64_t panel = 0; panel < panels; ++panel)
        score_rows<Op>(rows, queries + panel * kLanes * words, words, deficits + panel * kLanes,
                       rooms, masked, to);
    }
    for (int64_t i = 0; i < slots; i += kWidth) {
      vf maximum[kWidth];
      TM_UNROLL(16)
      for (int j = 0; j < kWidth; ++j) maximum[j] = load(best + (i + j) * kWidth);
      transpose(maximum);
      TM_UNROLL(4)
      for (int step = kWidth / 2; step > 0; step /= 2)
        for (int j = 0; j < step; ++j) maximum[j] = max_of(maximum[j], maximum[j + step]);
      store(found_scores + i, maximum[0]);
    }
  }

  void score_few(int64_t probed, int64_t slots) {
    std::fill(found_scores, found_scores + slots, kNegInf);
    visit_words<Op>(p.k.data, p.dtype, 1, [&]<typename T>(const T*, const auto words_at) TM_LAMBDA {
      for (int64_t first = 0; first < probed; first += kWidth) {
        const T* row[kWidth];
        for (int64_t i = 0; i < kWidth; ++i) {
          row[i] = reinterpret_cast<const T*>(probes[std::min(first + i, probed - 1)].key);
          prefetch(probes[std::min(first + i + kAheadFew, probed - 1)].key,
                   p.head_dim * element_size);
        }
        for (int64_t r = 0; r < count_queries; ++r) {
          vf acc[kWidth];
          TM_UNROLL(16)
          for (int i = 0; i < kWidth; ++i) acc[i] = zero();
          for (int64_t w = 0; w < ldw; w += kWidth) {
            const vf q = load(queries + r * ldw + w);
            TM_UNROLL(16)
            for (int i = 0; i < kWidth; ++i)
              acc[i] = Op::madd(acc[i], q, words_at(row[i], w * Op::kPair, p.head_dim));
          }
          float sums[kWidth];
          store(sums, sum_rows(acc));
          for (int64_t i = 0; i < std::min<int64_t>(kWidth, probed - first); ++i) {
            const Probe& probe = probes[first + i];
            float& to = found_scores[probe.slot];
            if (deficits[r] < probe.room && sums[i] > to) to = sums[i];
          }
        }
      }
    });
  }

  // Moves the best nodes to the front, in order; among equal ones the lower blocks win. Returns
  // their number.
  int64_t keep_best(int64_t count) {
    if (count <= p.wanted) return count;
    const int64_t length = round_up(count, kWidth);
    std::fill(scores + count, scores + length, kUnknown);
    vf minimum = set(-kNegInf), maximum = set(kNegInf);
    for (int64_t i = 0; i < length; i += kWidth) {
      minimum = min_of(load(scores + i), minimum);  // not NaN
      maximum = max_of(load(scores + i), maximum);
    }
    // At least `wanted` scores are >= `low`, fewer are >= `high`.
    uint32_t low = key_of(-max_lanes(zero() - minimum)), high = key_of(max_lanes(maximum)) + 1;
    int64_t reaching = count;
    while (high - low > 1 && reaching != p.wanted) {
      const uint32_t middle = low + (high - low) / 2;
      const int64_t now = count_reaching(score_of(middle), length);
      if (now >= p.wanted) {
        low = middle;
        reaching = now;
      } else {
        high = middle;
      }
    }
    const vf bar = set(score_of(low));
    int64_t kept = 0, above = 0;
    if (reaching == p.wanted) {
      for (int64_t i = 0; i < length; i += kWidth) {
        const vf x = load(scores + i);
        kept += store_lane_numbers(numbers + kept, static_cast<int32_t>(i),
                                   either(less(bar, x), equal(bar, x)));
      }
    } else {
      for (int64_t i = 0; i < count; ++i) above += scores[i] > first(bar);
      for (int64_t i = 0, ties = p.wanted - above; i < count; ++i) {
        const bool tied = scores[i] == first(bar) && ties > 0;
        numbers[kept] = static_cast<int32_t>(i);
        kept += scores[i] > first(bar) || tied;
        ties -= tied;
      }
    }
    for (int64_t i = 0; i < kept; ++i) {
      nodes[i] = nodes[numbers[i]];
      scores[i] = scores[numbers[i]];
      first_scores[i] = first_scores[numbers[i]];
    }
    return kept;
  }

  int64_t count_reaching(float bar, int64_t length) const {
    const vf x = set(bar), one = set(1.f);
    vf count = zero();
    for (int64_t i = 0; i < length; i += kWidth) {
      const vf s = load(scores + i);
      count = count + select(either(less(x, s), equal(x, s)), one, zero());
    }
    return static_cast<int64_t>(sum_lanes(count));
  }

  const HipParams& p;
  int64_t shares, element_size, words, ldw, row_floats, max_queries, padded, room;
  bool copies;
  cpu::Workspace memory;
  float *queries, *deficits, *converted, *best, *zeros;
  char* gathered;
  float* copy = nullptr;  // rows of ldw words
  HipNode* nodes;
  float *scores, *first_scores;  // kUnknown: not known yet
  float* found_scores;
  int32_t* numbers;
  Probe* probes;
  HipBlock at{};
  int64_t kv_head = 0, copied = -1, end = 0, count_queries = 0, panels = 0;
  float max_deficit = 0;
  bool few = false;
};

template <class Op>
void search(const HipParams& p, int threads) {
  const int64_t lists = p.requests() * p.lists;
  if (lists == 0 || p.blocks == 0) return;
  // At least four items per thread, for load balance.
  const int64_t shares =
      threads == 1 ? 1 : std::min(p.blocks, ceil_div(int64_t{4} * threads, lists));
  cpu::parallel_items(lists * shares, threads, [&](cpu::ItemCounter& counter) {
    FlushDenormals flush;
    Searcher<Op> searcher(p, shares);
    for (int64_t item; (item = counter.next()) >= 0;) searcher.run(item);
  });
}

}  // namespace

void hip_block_select(const HipParams& p) {
  // Below about 64 Ki products a parallel region costs more than it gains.
  const int64_t products = p.requests() * p.lists * p.group * p.queries * p.k.rows;
  const int threads = products < (1 << 16) ? 1 : cpu::num_threads();
#if defined(TM_DOTS)
  if (p.dtype == DType::bfloat16) return search<BFloat16>(p, threads);
#endif
  search<Float32>(p, threads);
}

}  // namespace tokenmill::TOKENMILL_ISA
