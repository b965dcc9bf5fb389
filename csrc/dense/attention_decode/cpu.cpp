// An item is a range of the keys of a few KV heads of one request, which streams past all queries
// that read it. Ranges depend on the request alone: neither the number of threads nor other
// requests change a bit. Whoever finishes the last range of these heads merges them in order.
#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "dense/attention/cpu_finish.h"
#include "dense/attention_decode/cpu_rows.h"
#include "dense/attention_decode/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int64_t kRangeSteps = 64;  // of an automatic range of one KV head
// KV heads of an item: what they have of a token lies together, and memory is read in longer runs.
constexpr int64_t kMaxHeads = 8;
// Weights may exceed 1 by this power of two before a softmax row moves its pivot.
constexpr float kHeadroom = 8;
constexpr int64_t kSerialBytes = 1 << 17;  // what one thread reads in the time of a parallel region

constexpr int64_t size_of(DType t) { return t == DType::float32 ? 4 : 2; }

// The largest divisor of the number of KV heads up to kMaxHeads.
int64_t heads_of_item(int64_t kv_heads) {
  int64_t heads = kMaxHeads;
  while (kv_heads % heads != 0) --heads;
  return heads;
}

// What all workers share.
struct Plan {
  explicit Plan(const DecodeParams& d)
      : d(d),
        p(d.attention),
        group(p.heads / p.kv_heads),
        rows(group * p.seqlen_q),
        heads(heads_of_item(p.kv_heads)),
        head_groups(p.kv_heads / heads),
        ldo(round_up(p.value_dim, 2 * kWidth)),
        partial_row(ldo + 2),
        workspace(counts_floats() + partial_floats()) {
    first_item = reinterpret_cast<int64_t*>(workspace.take(2 * (p.batch + 1)));
    arrived = reinterpret_cast<int32_t*>(workspace.take(p.batch * head_groups));
    partials = workspace.take(partial_floats());
    first_item[0] = 0;
    for (int64_t b = 0; b < p.batch; ++b)
      first_item[b + 1] = first_item[b] + head_groups * parts_of(range_of(b).steps(kStep));
    for (int64_t i = 0; i < p.batch * head_groups; ++i) arrived[i] = 0;
  }

  KeyRange range_of(int64_t b) const { return KeyRange::of(decode_band(p, d.cache.length(b))); }
  int64_t items() const { return first_item[p.batch]; }
  int64_t parts_of(int64_t steps) const {
    const int64_t wanted = d.num_splits > 0 ? d.num_splits : ceil_div(steps * heads, kRangeSteps);
    return wanted < steps ? wanted : steps > 1 ? steps : 1;
  }
  int64_t partial_size() const { return heads * rows * partial_row; }

  const DecodeParams& d;
  const AttentionParams& p;
  int64_t group, rows;         // of one KV head
  int64_t heads, head_groups;  // KV heads of an item; groups of so many
  int64_t ldo, partial_row;
  cpu::Workspace workspace;
  int64_t* first_item;  // of each request
  int32_t* arrived;     // ranges of each group of heads
  float* partials;      // [items][heads * rows][partial_row]: sums of values, of weights, pivot

 private:
  int64_t counts_floats() const { return 2 * p.batch + p.batch * head_groups + 64; }
  // None where no request has more than one range.
  int64_t partial_floats() const {
    int64_t items = 0;
    bool any = false;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t parts = parts_of(range_of(b).steps(kStep));
      items += head_groups * parts;
      any |= parts > 1;
    }
    return any ? items * partial_size() : 0;
  }
};

// kRows rows of one KV head of an item.
template <int kRows>
struct RowBlock {
  int64_t begin[kRows], end[kRows], position[kRows];
  alignas(64) float slope[kWidth], constant[kWidth];
  alignas(64) float pivot[kWidth], raise_above[kWidth], sums[kWidth];
};

template <class Op, DType kType, int kRows>
class Worker {
 public:
  explicit Worker(const Plan& plan)
      : plan_(plan),
        d_(plan.d),
        p_(plan.p),
        head_blocks_(ceil_div(plan.rows, kRows)),
        blocks_(plan.heads * head_blocks_),
        ldq_(round_up(words_of<Op>(p_.head_dim), kWidth)),
        workspace_(blocks_ * kRows * (ldq_ + plan.ldo) + plan.partial_size() + kStep * kRows +
                   blocks_ * kBlockFloats + 5 * 16) {
    q_ = workspace_.take(blocks_ * kRows * ldq_);
    out_ = workspace_.take(blocks_ * kRows * plan.ldo);
    own_ = workspace_.take(plan.partial_size());
    weights_ = workspace_.take(kStep * kRows);
    block_ = reinterpret_cast<RowBlock<kRows>*>(workspace_.take(blocks_ * kBlockFloats));
  }

  void run(int64_t item) {
    find(item);
    load_queries();
    stream_keys();
    float* partial = parts_ > 1 ? plan_.partials + item * plan_.partial_size() : own_;
    store_partial(partial);
    if (parts_ == 1) return merge(partial);
    int32_t& arrived = plan_.arrived[b_ * plan_.head_groups + head_group_];
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == parts_)
      merge(plan_.partials + (item - part_) * plan_.partial_size());
  }

 private:
  static constexpr int kCount = kKeys<kRows>;
  static constexpr int64_t kBlockFloats = ceil_div(sizeof(RowBlock<kRows>), 64) * 16;
  static constexpr int64_t kElement = kType == DType::float32 ? 4 : 2;
  static constexpr int kDegree = kType == DType::float32 ? 5 : 3;  // of exp2

  void find(int64_t item) {
    int64_t low = 0, high = p_.batch;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (plan_.first_item[middle] <= item ? low : high) = middle;
    }
    b_ = low;
    const KeyRange all = plan_.range_of(b_);
    const int64_t steps = all.steps(kStep), in_request = item - plan_.first_item[b_];
    parts_ = plan_.parts_of(steps);
    head_group_ = in_request / parts_;
    part_ = in_request % parts_;
    keys_ = all.part(part_ * steps / parts_, (part_ + 1) * steps / parts_, kStep);
    length_ = d_.cache.length(b_);
  }

  // Row r of KV head `kv` of the item is query i of head h.
  struct Query {
    int64_t i, h;
  };
  Query query_of(int64_t kv, int64_t r) const {
    return {r / plan_.group, (head_group_ * plan_.heads + kv) * plan_.group + r % plan_.group};
  }
  char* row_at(const Rows& rows, Query at) const {
    return static_cast<char*>(rows.data) +
           (b_ * rows.batch + at.i * rows.seq + at.h * rows.head) * kElement;
  }

  // The constant of a head, of which softmax weights do not see the finite part.
  struct Constant {
    float seen, shift;
  };
  Constant constant_of(int64_t head) const {
    float x = p_.score_bias_value;
    if (p_.score_bias) x += p_.score_bias[b_ * p_.score_bias_batch + head];
    if (p_.score_bias_neg_log_n && length_ > 0)
      x -= static_cast<float>(std::log(static_cast<double>(length_)));
    if (p_.map == ScoreMap::softmax && std::isfinite(x)) return {0, x};
    return {x, 0};
  }

  void load_queries() {
    general_ = p_.softcap > 0 || p_.alibi_slopes;
    const Band band = decode_band(p_, length_);
    for (int64_t n = 0; n < blocks_; ++n) {
      RowBlock<kRows>& block = block_[n];
      for (int r = 0; r < kRows; ++r) {
        // Rows that do not exist repeat the last one.
        const int64_t row = n % head_blocks_ * kRows + r;
        const auto [i, head] = query_of(n / head_blocks_, row < plan_.rows ? row : plan_.rows - 1);
        pack_rows<Op>(row_at(p_.q, {i, head}), kType, 0, 1, 1, p_.head_dim, 1.f,
                      q_ + (n * kRows + r) * ldq_, ldq_);
        block.begin[r] = band.begin(i);
        block.end[r] = band.end(i);
        block.position[r] = i + length_ - p_.seqlen_q;
        const float slope = p_.alibi_slopes ? p_.alibi_slopes[b_ * p_.alibi_batch + head] : 0;
        const float constant = constant_of(head).seen;
        general_ |= constant != 0 || constant != constant;
        for (int k = 0; k < kCount; ++k) {
          block.slope[r * kCount + k] = slope;
          block.constant[r * kCount + k] = constant;
        }
      }
      for (int l = 0; l < kWidth; ++l)
        block.pivot[l] = block.sums[l] = 0, block.raise_above[l] = -kInf;
    }

    for (int64_t i = 0; i < blocks_ * kRows * plan_.ldo; i += kWidth) store(out_ + i, zero());
  }

  // Key `t` of the request: where dense and paged caches differ. Rows of the item's first head.
  void find_rows(StepRows& to, int64_t key0) const {
    const int64_t last = keys_.end - 1, head = head_group_ * plan_.heads;
    for (int64_t i = 0; i < kStep; ++i) {
      const KvCache::Slot at = d_.cache.slot(b_, key0 + i < last ? key0 + i : last);
      const auto row = [&](const Rows& rows) {
        return static_cast<const char*>(rows.data) + KvCache::offset(rows, at, head) * kElement;
      };
      to.k[i] = row(d_.cache.k);
      to.v[i] = row(d_.cache.v);
    }
  }

  void stream_keys() {
    if (keys_.begin >= keys_.end) return;
    StepRows rows[2];
    find_rows(rows[0], keys_.begin);
    int at = 0;
    for (int64_t key0 = keys_.begin; key0 < keys_.end; key0 += kStep, at ^= 1) {
      const bool more = key0 + kStep < keys_.end;
      if (more) find_rows(rows[at ^ 1], key0 + kStep);
      const int64_t count = keys_.end - key0 < kStep ? keys_.end - key0 : kStep;
      Ahead ahead{more ? &rows[at ^ 1] : nullptr, 0, 0};
      for (int64_t n = 0; n < blocks_; ++n) add_step(n, rows[at], key0, count, ahead);
    }
  }

  // What of the next step was asked for ahead of time.
  struct Ahead {
    const StepRows* rows;
    int64_t key, head;
  };

  void add_step(int64_t n, const StepRows& rows, int64_t key0, int64_t count, Ahead& ahead) {
    RowBlock<kRows>& block = block_[n];
    const int64_t vectors = ceil_div(count, 2 * kCount) * 2, kv = n / head_blocks_;
    vf scores[kStep / kCount];
    for (int64_t j = 0; j < vectors; ++j) {
      if (n % head_blocks_ == 0) prefetch(ahead);
      scores[j] = multiply_keys<Op, kType, kRows>(q_ + n * kRows * ldq_, ldq_, rows.k + j * kCount,
                                                  kv * d_.cache.k.head * kElement, p_.head_dim);
    }
    general_ ? exponents<true>(block, scores, key0, vectors)
             : exponents<false>(block, scores, key0, vectors);
    p_.map == ScoreMap::softmax ? softmax(n, scores, vectors) : sigmoid(scores, vectors);
    for (int64_t j = 0; j < vectors; j += 2)
      store_weights<Op>(weights_, j, scores[j], scores[j + 1]);
    multiply_values<Op, kType, kRows>(weights_, rows.v, kv * d_.cache.v.head * kElement,
                                      round_up(count, Op::kPair), p_.value_dim,
                                      out_ + n * kRows * plan_.ldo, plan_.ldo);
  }

  // kCount rows of keys and of values, in the order of memory: no hardware prefetcher follows the
  // order of the computation. To L2, which holds a step of all heads.
  void prefetch(Ahead& ahead) const {
    if (!ahead.rows) return;
    for (int i = 0; i < kCount && ahead.key < kStep; ++i) {
      const char* k = ahead.rows->k[ahead.key] + ahead.head * d_.cache.k.head * kElement;
      const char* v = ahead.rows->v[ahead.key] + ahead.head * d_.cache.v.head * kElement;
      for (int64_t at = 0; at < p_.head_dim * kElement; at += 64) __builtin_prefetch(k + at, 0, 2);
      for (int64_t at = 0; at < p_.value_dim * kElement; at += 64) __builtin_prefetch(v + at, 0, 2);
      if (++ahead.head == plan_.heads) ahead.head = 0, ++ahead.key;
    }
  }

  // f(r) in the lanes of row r.
  template <typename F>
  TM_INLINE static vf lanes_of(const F& f) {
    alignas(64) float x[kWidth];
    for (int r = 0; r < kRows; ++r)
      for (int k = 0; k < kCount; ++k) x[r * kCount + k] = f(r);
    return load(x);
  }
  static vf key_lanes() {
    alignas(64) float x[kWidth];
    for (int l = 0; l < kWidth; ++l) x[l] = static_cast<float>(l % kCount);
    return load(x);
  }

  // Exponents in base 2 of the weights: q.k times scale with all terms, hidden keys at infinity.
  template <bool kGeneral>
  __attribute__((noinline)) void exponents(const RowBlock<kRows>& block, vf* scores, int64_t key0,
                                           int64_t vectors) const {
    const float unit = p_.map == ScoreMap::softmax ? kLog2e : -kLog2e;
    const vf factor = set(unit * p_.scale);
    if constexpr (kGeneral) {
      const vf slope = load(block.slope), constant = load(block.constant), key = key_lanes();
      const vf position =
          lanes_of([&](int r) { return static_cast<float>(block.position[r] - key0); });
      for (int64_t j = 0; j < vectors; ++j) {
        vf z = scores[j] * set(p_.scale);
        if (p_.softcap > 0) z = set(p_.softcap) * tanh(z * set(1 / p_.softcap));
        const vf at = key + set(static_cast<float>(j * kCount));
        if (p_.alibi_slopes) z = z - slope * abs_of(position - at);
        scores[j] = (z + constant) * set(unit);
      }
    } else {
      for (int64_t j = 0; j < vectors; ++j) scores[j] = scores[j] * factor;
    }
    // The first row sees least of the last keys, the last one least of the first.
    if (key0 >= block.begin[kRows - 1] && key0 + vectors * kCount <= block.end[0]) return;
    const auto relative = [&](int64_t x) {
      x -= key0;
      return static_cast<float>(x < 0 ? 0 : x > kStep ? kStep : x);
    };
    const vf begin = lanes_of([&](int r) { return relative(block.begin[r]); });
    const vf end = lanes_of([&](int r) { return relative(block.end[r]); });
    const vf key = key_lanes(), hidden = set(unit > 0 ? -kInf : kInf);
    for (int64_t j = 0; j < vectors; ++j) {
      const vf at = key + set(static_cast<float>(j * kCount));
      const vf inside = select(less(at, begin), hidden, scores[j]);
      scores[j] = select(less(at, end), inside, hidden);
    }
  }

  void softmax(int64_t n, vf* scores, int64_t vectors) {
    RowBlock<kRows>& block = block_[n];
    vf top = scores[0];
    for (int64_t j = 1; j < vectors; ++j) top = max_of(top, scores[j]);
    if (any(less(load(block.raise_above), top))) raise_pivots(n, top);
    const vf pivot = load(block.pivot);
    vf sum = zero();
    for (int64_t j = 0; j < vectors; ++j) {
      scores[j] = exp2<kDegree>(scores[j] - pivot);
      sum = sum + scores[j];
    }
    store(block.sums, load(block.sums) + sum);
  }

  // Moves the pivots that a weight exceeds too far, and rescales what was summed before.
  __attribute__((noinline)) void raise_pivots(int64_t n, vf top) {
    RowBlock<kRows>& block = block_[n];
    alignas(64) float lane[kWidth];
    store(lane, top);
    for (int r = 0; r < kRows; ++r) {
      float most = -kInf;
      for (int l = r * kCount; l < (r + 1) * kCount; ++l) most = lane[l] > most ? lane[l] : most;
      if (!(most > block.raise_above[r * kCount])) continue;
      const bool seen = block.raise_above[r * kCount] > -kInf;
      const float factor = seen ? std::exp2(block.pivot[r * kCount] - most) : 0;
      for (int l = r * kCount; l < (r + 1) * kCount; ++l) {
        block.pivot[l] = most;
        block.raise_above[l] = most + kHeadroom;
        block.sums[l] *= factor;
      }
      float* out = out_ + (n * kRows + r) * plan_.ldo;
      for (int64_t c = 0; c < plan_.ldo; c += kWidth) store(out + c, load(out + c) * set(factor));
    }
  }

  static void sigmoid(vf* scores, int64_t vectors) {
    const vf one = set(1.f);
    for (int64_t j = 0; j < vectors; ++j) {
      const vf x = one + exp2<kDegree>(scores[j]);
      scores[j] = kType == DType::float32 ? one / x : reciprocal_approx(x);
    }
  }

  void store_partial(float* to) {
    for (int64_t kv = 0; kv < plan_.heads; ++kv)
      for (int64_t row = 0; row < plan_.rows; ++row, to += plan_.partial_row) {
        const int64_t n = kv * head_blocks_ + row / kRows, lane = row % kRows * kCount;
        const RowBlock<kRows>& block = block_[n];
        float sum = 0;
        for (int k = 0; k < kCount; ++k) sum += block.sums[lane + k];
        float* from = out_ + (n * kRows + row % kRows) * plan_.ldo;
        restore_order<Op>(from, plan_.ldo);
        for (int64_t c = 0; c < plan_.ldo; c += kWidth) store(to + c, load(from + c));
        to[plan_.ldo] = sum;
        to[plan_.ldo + 1] = block.raise_above[lane] > -kInf ? block.pivot[lane] : -kInf;
      }
  }

  // All ranges of the item's heads, from that at `first` on, in order.
  void merge(const float* first) const {
    const int64_t between = plan_.partial_size();
    for (int64_t row = 0; row < plan_.heads * plan_.rows; ++row, first += plan_.partial_row) {
      const auto [i, head] = query_of(row / plan_.rows, row % plan_.rows);
      const auto pivot_of = [&](int64_t n) { return first[n * between + plan_.ldo + 1]; };
      float top = -kInf;
      for (int64_t n = 0; n < parts_; ++n) top = pivot_of(n) > top ? pivot_of(n) : top;
      float sum = 0;
      for (int64_t c = 0; c < plan_.ldo; c += kWidth) store(out_ + c, zero());
      for (int64_t n = 0; n < parts_; ++n) {
        const float* from = first + n * between;
        const float shrink = pivot_of(n) - top;
        const float factor =
            p_.map == ScoreMap::sigmoid || pivot_of(n) == top ? 1 : std::exp2(shrink);
        sum += from[plan_.ldo] * factor;
        for (int64_t c = 0; c < plan_.ldo; c += kWidth)
          store(out_ + c, fma(load(from + c), set(factor), load(out_ + c)));
      }
      RowScale scale{1, 0};
      if (p_.map == ScoreMap::softmax) {
        scale = finish_softmax(sum, top, top > -kInf, p_.sink ? p_.sink + head : nullptr,
                               constant_of(head).shift);
        p_.lse[(b_ * p_.heads + head) * p_.seqlen_q + i] = scale.lse;
      }
      store_row(out_, scale.factor, row_at(p_.out, {i, head}), kType, p_.value_dim);
    }
  }

  const Plan& plan_;
  const DecodeParams& d_;
  const AttentionParams& p_;
  int64_t head_blocks_, blocks_, ldq_;
  cpu::Workspace workspace_;
  float *q_, *out_, *own_, *weights_;
  RowBlock<kRows>* block_;
  int64_t b_, head_group_, part_, parts_, length_;
  KeyRange keys_;
  bool general_ = false;
};

template <class Op, DType kType, int kRows>
void decode(const DecodeParams& d) {
  const Plan plan(d);
  const AttentionParams& p = d.attention;
  int64_t keys = 0;
  for (int64_t b = 0; b < p.batch; ++b) keys += plan.range_of(b).end - plan.range_of(b).begin;
  const int64_t bytes = keys * p.kv_heads * (p.head_dim + p.value_dim) * size_of(kType);
  const int threads = bytes < kSerialBytes ? 1 : cpu::num_threads();
  cpu::parallel_items(plan.items(), threads, [&](cpu::ItemCounter& items) {
    FlushDenormals flush;
    Worker<Op, kType, kRows> worker(plan);
    for (int64_t item; (item = items.next()) >= 0;) worker.run(item);
  });
}

template <class Op, DType kType>
void decode(const DecodeParams& d) {
  const int64_t rows = d.attention.heads / d.attention.kv_heads * d.attention.seqlen_q;
  if (rows == 1) return decode<Op, kType, 1>(d);
  rows == 2 ? decode<Op, kType, 2>(d) : decode<Op, kType, 4>(d);
}

}  // namespace

void attention_decode(const DecodeParams& d) {
  switch (d.attention.dtype) {
    case DType::float16:
      return decode<Float32, DType::float16>(d);
    case DType::bfloat16:
#if defined(__AVX512BF16__)
      return decode<BFloat16, DType::bfloat16>(d);
#else
      return decode<Float32, DType::bfloat16>(d);
#endif
    default:
      return decode<Float32, DType::float32>(d);
  }
}

}  // namespace tokenmill::TOKENMILL_ISA
