// Decode engine: rows of keys stream past all queries that read them, for any source of keys.
//
// A unit is the row of keys of a few heads of one request, an item a range of it. Ranges depend on
// the unit only: neither the number of threads nor other requests change a bit. The worker that
// finishes the last range of a unit merges its ranges in order.
//
// The template argument Keys, one object per worker, defines the rows:
//
//   Params, Row, Step  type of the call; of a unit's row; of kStep keys: StepRows and more
//   requests, request  number of requests to answer; index of the n-th
//   queries            queries per request
//   row_heads, heads   heads that have a row of keys; heads per unit
//   row, range, kept   row of a unit; its keys that any query sees; floats kept for it
//   begin, find        start of a unit; look-up of a step
//   skips              true if no query sees any key of a step
//   query, place       operand row of a query; rows of a step for one head of the unit
//   turn               applies RoPE to some of these rows, where place asks for it
//   general, add       true if keys add to logits; adds that term for one head
//   hides, hide        true if a query does not see some of a step; masks its exponents
//   holes              true if rows of one query may see less of a step than was read
//   visible            number of keys that a query of a head sees, for Normalize::count
//   keep, count        passes on the weights of a step; their use after normalisation
#pragma once
#include "attention/cpu_epilogue.h"
#include "attention/cpu_kinds.h"
#include "dense/attention_decode/cpu_codes.h"
#include "dense/attention_decode/cpu_plan.h"
#include "dense/attention_decode/cpu_tiles.h"

namespace tokenmill::TOKENMILL_ISA {

// kTiles: blocks of kWidth rows with the products of cpu_tiles.h, for a cache of any type.
template <class Keys, int kRows, bool kTiles>
class DecodeWorker {
 public:
  using Op = typename Keys::Op;
  static constexpr DType kType = Keys::kType;

  explicit DecodeWorker(const DecodePlan<Keys, kRows, kTiles>& plan)
      : plan_(plan),
        p_(plan.p),
        kind_(exponent_of(plan.p)),
        blocks_(plan.heads * plan.head_blocks),
        ldq_(round_up(words_of<Op>(p_.head_dim), kWidth)),
        element_(element_bytes(plan.d.cache.dtype)),
        scaled_(has_scales(plan.d.cache)),
        words_(plan.d.cache, p_.head_dim, p_.value_dim),
        workspace_(blocks_ * (kRows * (ldq_ + plan.ldo + kStep) + kBlockFloats) +
                   plan.partial_size() + 2 * plan.heads * kStep +
                   (kTiles ? words_.size() + ldq_ : 0) + 9 * 16),
        keys_(plan.d) {
    q_ = workspace_.take(blocks_ * kRows * ldq_);
    out_ = workspace_.take(blocks_ * kRows * plan.ldo);
    own_ = workspace_.take(plan.partial_size());
    weights_ = workspace_.take(blocks_ * kStep * kRows);
    block_ = reinterpret_cast<RowBlock<kRows>*>(workspace_.take(blocks_ * kBlockFloats));
    scales_ = workspace_.take(2 * plan.heads * kStep);
    if constexpr (!kTiles) return;
    words_.place(workspace_.take(words_.size()));
    row_ = workspace_.take(ldq_);
  }

  void run(int64_t item) {
    find(item);
    load_queries();
    stream_keys();
    float* partial = parts_ > 1 ? plan_.partials + item * plan_.partial_size() : own_;
    store_partial(partial);
    if (parts_ == 1) return merge(partial);
    if (__atomic_add_fetch(&plan_.unit[unit_].arrived, 1, __ATOMIC_ACQ_REL) == parts_)
      merge(plan_.partials + (item - part_) * plan_.partial_size());
  }

 private:
  static constexpr int kCount = kKeys<kRows>;
  static constexpr int64_t kBlockFloats = ceil_div(sizeof(RowBlock<kRows>), 64) * 16;
  static_assert(!kTiles || kRows == kWidth);
  static constexpr bool kCodes = kType == DType::float8_e4m3fn;
  static constexpr bool kCoarse = kType == DType::float16 || kType == DType::bfloat16;
  static constexpr int kDegree = kCoarse ? 3 : 5;  // degree of exp2
  using Step = typename Keys::Step;

  void find(int64_t item) {
    int64_t low = 0, high = plan_.units();
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (plan_.unit[middle].first_item <= item ? low : high) = middle;
    }
    unit_ = low;
    b_ = plan_.request(unit_);
    q_start_ = p_.cu_seqlens_q ? p_.cu_seqlens_q[b_] : 0;
    first_head_ = unit_ % plan_.head_groups * plan_.heads;
    first_query_ = plan_.first_query(unit_);
    const auto& unit = plan_.unit[unit_];
    const KeyRange all = plan_.range_of(unit_);
    const int64_t steps = all.steps(kStep);
    parts_ = plan_.parts_of(steps);
    part_ = item - unit.first_item;
    range_ = all.part(part_ * steps / parts_, (part_ + 1) * steps / parts_, kStep);
    length_ = plan_.d.length(b_);
    keys_.begin(b_, first_head_, unit.row, plan_.kept + unit.kept);
  }

  // Row r of head `own` of the unit is query i of head h.
  struct Query {
    int64_t i, h;
  };
  Query query_of(int64_t own, int64_t r) const {
    return {first_query_ + r / plan_.group, (first_head_ + own) * plan_.group + r % plan_.group};
  }
  char* row_at(const Rows& rows, Query at) const {
    const QueryPlace to = plan_.d.place(b_, at.i);
    return row_of(rows, p_.dtype, to.b, q_start_, to.i, at.h);
  }

  // Constant of a head; its finite part is left out of softmax weights.
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
    for (int64_t n = 0; n < blocks_; ++n) {
      RowBlock<kRows>& block = block_[n];
      for (int r = 0; r < kRows; ++r) {
        // Rows beyond the last one repeat it.
        const int64_t row = n % plan_.head_blocks * kRows + r;
        const auto [at, head] =
            query_of(n / plan_.head_blocks, row < plan_.rows ? row : plan_.rows - 1);
        const int64_t last = Keys::queries(plan_.d) - 1, i = at < last ? at : last;
        const auto [from, type] = keys_.query(row_at(p_.q, {i, head}), i);
        float* const words = kTiles ? row_ : q_ + (n * kRows + r) * ldq_;
        pack_rows<Op>(from, type, 0, 1, 1, p_.head_dim, 1.f, words, ldq_);
        for (int64_t w = 0; kTiles && w < ldq_; ++w) q_[(n * ldq_ + w) * kRows + r] = words[w];
        block.query[r] = i;
        block.head[r] = head;
        const float slope = p_.alibi_slopes ? p_.alibi_slopes[b_ * p_.alibi_batch + head] : 0;
        const float constant = constant_of(head).seen;
        general_ |= constant != 0 || constant != constant;
        for (int k = 0; k < kCount; ++k) {
          block.slope[r * kCount + k] = slope;
          block.constant[r * kCount + k] = constant;
        }
      }
      for (int l = 0; l < kWidth; ++l)
        block.row_max[l] = block.sums[l] = block.divisors[l] = 0, block.raise_above[l] = -kInf;
    }
    for (int64_t i = 0; i < blocks_ * kRows * plan_.ldo; i += kWidth) store(out_ + i, zero());
  }

  // First step from the one at `key0` on of which a query sees any key.
  int64_t next_step(int64_t key0) const {
    while (key0 < range_.end && keys_.skips(range_, key0)) key0 += kStep;
    return key0;
  }

  void stream_keys() {
    int64_t key0 = next_step(range_.begin);
    if (key0 >= range_.end) return;
    Step steps[2];
    keys_.find(steps[0], range_, key0);
    for (int at = 0; key0 < range_.end; at ^= 1) {
      const int64_t next = next_step(key0 + kStep);
      const bool more = next < range_.end;
      if (more) keys_.find(steps[at ^ 1], range_, next);
      const int64_t count = range_.end - key0 < kStep ? range_.end - key0 : kStep;
      add_step(steps[at], key0, count, more ? &steps[at ^ 1] : nullptr);
      key0 = next;
    }
  }

  // Heads in succession, so that keys and values are read in memory order; the same rows of the
  // next step are prefetched to L2, which holds them for all heads.
  void add_step(const Step& step, int64_t key0, int64_t count, const Step* next) {
    const KvCache& cache = plan_.d.cache;
    const int64_t vectors = ceil_div(count, 2 * kCount) * 2, keys = round_up(count, Op::kPair);
    for (int64_t own = 0; own < plan_.heads; ++own) {
      placed_[own] = keys_.place(step, own);
      if (scaled_) load_scales(step, own);
    }
    if constexpr (kTiles) {
      for (int64_t own = 0; own < plan_.heads; ++own) add_tiles(step, own, key0, count, next);
    } else {
      for (int64_t j = 0; j < vectors; ++j)
        for (int64_t own = 0; own < plan_.heads; ++own) {
          if (next) ask_for(next->k + j * kCount, kCount, own * cache.k.head, p_.head_dim);
          multiply_head(step, own, j);
        }
      for (int64_t n = 0; n < blocks_; ++n) apply_map(n, step, key0, vectors);
      const int64_t run = plan_.heads > 1 ? kRun : kStep;
      for (int64_t key = 0; key < keys; key += run)
        for (int64_t own = 0; own < plan_.heads; ++own) {
          if (next) ask_for(next->v + key, run, own * cache.v.head, p_.value_dim);
          add_values(own, key, keys - key < run ? keys - key : run);
        }
    }
  }

  int64_t element() const { return kTiles ? element_ : element_bytes(kType); }
  void ask_for(const char* const* rows, int64_t count, int64_t column, int64_t columns) const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t at = 0; at < columns * element(); at += 64)
        __builtin_prefetch(rows[i] + column * element() + at, 0, 2);
  }

  // null if the cache has no scales
  float* key_scales(int64_t own) const { return scaled_ ? scales_ + 2 * own * kStep : nullptr; }
  float* value_scales(int64_t own) const { return key_scales(own) + (scaled_ ? kStep : 0); }
  void load_scales(const Step& step, int64_t own) {
    const KvCache& cache = plan_.d.cache;
    const auto scale = [own](const float* first, int64_t head) {
      return first == &kUnscaled ? kUnscaled : first[own * head];
    };
    for (int64_t i = 0; i < kStep; ++i) {
      key_scales(own)[i] = scale(step.k_scale[i], cache.k_scale.head);
      value_scales(own)[i] = scale(step.v_scale[i], cache.v_scale.head);
    }
  }

  // A step of one head with the products of cpu_tiles.h.
  void add_tiles(const Step& step, int64_t own, int64_t key0, int64_t count, const Step* next) {
    const KvCache& cache = plan_.d.cache;
    const typename Keys::Placed& placed = placed_[own];
    const int64_t keys = round_up(count, kTileHeight), vectors = round_up(count, 2);
    const int64_t first = own * plan_.head_blocks, blocks = plan_.head_blocks;
    if constexpr (Keys::kTurns)
      if (placed.turned) keys_.turn(step, own, 0, keys);
    words_.load_keys(placed, key_scales(own), keys, placed.turned ? Keys::kTurned : cache.dtype);
    RowsAhead ahead;  // S = Q K^T
    if (next) ahead = {next->k, own * cache.k.head * element_, p_.head_dim * element_};
    multiply_key_tiles<Op>(words_.keys(), words_.ld(), keys, words_of<Op>(p_.head_dim),
                           q_ + first * kRows * ldq_, kRows * ldq_, blocks,
                           weights_ + first * kStep * kRows, kStep * kRows, ahead);
    for (int64_t n = first; n < first + blocks; ++n) apply_map(n, step, key0, vectors);
    const bool shared = words_.shared() && !placed.turned && !placed.widened;
    if (!shared)
      words_.load_values(placed, value_scales(own), vectors,
                         placed.widened ? DType::float32 : cache.dtype);
    const float* const values = shared ? words_.keys() : words_.values();  // O += P V
    ahead = {};
    if (next && !shared) ahead = {next->v, own * cache.v.head * element_, p_.value_dim * element_};
    constexpr int64_t kColumns = kTileColumns * kWidth;
    const int64_t lines = ceil_div(ahead.left(), plan_.ldo / kColumns * blocks);
    for (int64_t column = 0; column < plan_.ldo; column += kColumns)
      for (int64_t n = first; n < first + blocks; ++n) {
        ahead.ask(lines);
        for (int64_t r = 0; r < kRows; r += kTileHeight)
          multiply_value_tile<Op>(weights_ + n * kStep * kRows + r, values + column, words_.ld(),
                                  vectors / Op::kPair, block_[n].uneven,
                                  out_ + (n * kRows + r) * plan_.ldo + column, plan_.ldo);
      }
  }

  // S = Q K^T of kCount keys.
  void multiply_head(const Step& step, int64_t own, int64_t j) {
    const typename Keys::Placed& placed = placed_[own];
    const char* const* k = placed.k + j * kCount;
    if constexpr (Keys::kTurns)
      if (placed.turned) keys_.turn(step, own, j * kCount, kCount);
    for (int64_t n = own * plan_.head_blocks; n < (own + 1) * plan_.head_blocks; ++n) {
      const float* q = q_ + n * kRows * ldq_;
      float* to = weights_ + n * kStep * kRows + j * kWidth;
      if (Keys::kTurns && placed.turned)
        store(to, multiply_keys<Op, Keys::kTurned, kRows>(q, ldq_, k, 0, p_.head_dim));
      else if constexpr (kCodes)
        store(to, multiply_key_codes<kRows>(q, ldq_, k, placed.k_offset, p_.head_dim));
      else
        store(to, multiply_keys<Op, kType, kRows>(q, ldq_, k, placed.k_offset, p_.head_dim));
    }
  }

  // Turns scores into weights.
  void apply_map(int64_t n, const Step& step, int64_t key0, int64_t vectors) {
    RowBlock<kRows>& block = block_[n];
    float* weights = weights_ + n * kStep * kRows;
    vf scores[kStep / kCount];
    for (int64_t j = 0; j < vectors; ++j) scores[j] = load(weights + j * kWidth);
    const bool hides = keys_.template hides<kRows>(block, step, key0, vectors);
    block.uneven = hides && (kTiles || Keys::queries(plan_.d) > 1 || keys_.holes());
    if constexpr (kCodes) {
      const float* const scales = key_scales(n / plan_.head_blocks);
      for (int64_t j = 0; scaled_ && j < vectors; ++j)
        scores[j] = scores[j] * by_key<kRows>(scales, j);
    }
    general_ || keys_.general(step) ? exponents<true>(n, scores, step, key0, vectors, hides)
                                    : exponents<false>(n, scores, step, key0, vectors, hides);
    switch (kind_) {
      case Exponent::softmax:
        softmax(n, scores, vectors);
        break;
      case Exponent::sigmoid:
        sigmoid(scores, vectors);
        break;
      case Exponent::logit:
        weigh_logits(n, scores, vectors);
    }
    keys_.keep(key0, n, blocks_, block, scores, vectors);
    if constexpr (kCodes) {
      const float* const scales = value_scales(n / plan_.head_blocks);
      const bool widened = placed_[n / plan_.head_blocks].widened;
      for (int64_t j = 0; scaled_ && !widened && !block.uneven && j < vectors; ++j)
        scores[j] = weighted(scores[j], by_key<kRows>(scales, j));
    }
    for (int64_t j = 0; j < vectors; j += 2)
      kTiles ? store_weight_rows<Op>(weights, j, scores[j], scores[j + 1])
             : store_weights<Op>(weights, j, scores[j], scores[j + 1]);
  }

  // O += P V of `count` keys from `key` on.
  void add_values(int64_t own, int64_t key, int64_t count) {
    const typename Keys::Placed& placed = placed_[own];
    for (int64_t n = own * plan_.head_blocks; n < (own + 1) * plan_.head_blocks; ++n) {
      constexpr DType kRow = kCodes ? DType::float32 : kType;
      const float* const weights = weights_ + (n * kStep + key / Op::kPair) * kRows;
      float* const out = out_ + n * kRows * plan_.ldo;
      if constexpr (kCodes) {
        if (!placed.widened) {
          const auto product = block_[n].uneven ? &multiply_value_codes<kRows, true>
                                                : &multiply_value_codes<kRows, false>;
          const float* const scales = scaled_ ? value_scales(own) + key : nullptr;
          product(weights, scales, placed.v + key, placed.v_offset, count, p_.value_dim, out,
                  plan_.ldo);
          continue;
        }
      }
      const auto product = block_[n].uneven ? &multiply_values<Op, kRow, kRows, true>
                                            : &multiply_values<Op, kRow, kRows, false>;
      product(weights, placed.v + key, placed.v_offset, count, p_.value_dim, out, plan_.ldo);
    }
  }

  // Exponents in base 2: q.k after score_mod, masked keys at infinity.
  template <bool kGeneral>
  __attribute__((noinline)) void exponents(int64_t n, vf* scores, const Step& step, int64_t key0,
                                           int64_t vectors, bool hides) const {
    const RowBlock<kRows>& block = block_[n];
    const float unit = exponent_unit(kind_);
    const vf factor = set(unit * p_.scale);
    if constexpr (kGeneral) {
      const vf slope = load(block.slope), constant = load(block.constant);
      const vf key = lanes_of_keys<kRows>([](int k) { return static_cast<float>(k); });
      const vf position = lanes_of<kRows>([&](int r) {
        return static_cast<float>(block.query[r] + length_ - Keys::queries(plan_.d) - key0);
      });
      for (int64_t j = 0; j < vectors; ++j) {
        vf z = scores[j] * set(p_.scale);
        if (p_.softcap > 0) z = set(p_.softcap) * tanh(z * set(1 / p_.softcap));
        const vf at = key + set(static_cast<float>(j * kCount));
        if (p_.alibi_slopes) z = z - slope * abs_of(position - at);
        z = keys_.template add<kRows>(step, n / plan_.head_blocks, j, z);
        scores[j] = (z + constant) * set(unit);
      }
    } else {
      for (int64_t j = 0; j < vectors; ++j) scores[j] = scores[j] * factor;
    }
    if (hides) keys_.hide(block, step, key0, scores, vectors, set(hidden_exponent(kind_)));
  }

  // P = 2^(S - row_max); updates row_max and row_sum.
  void softmax(int64_t n, vf* scores, int64_t vectors) {
    RowBlock<kRows>& block = block_[n];
    vf top = scores[0];
    for (int64_t j = 1; j < vectors; ++j) top = max_of(top, scores[j]);
    if (any(less(load(block.raise_above), top))) update_row_max(n, top);
    const vf row_max = load(block.row_max);
    vf sum = zero();
    for (int64_t j = 0; j < vectors; ++j) {
      scores[j] = exp2<kDegree>(scores[j] - row_max);
      sum = sum + scores[j];
    }
    store(block.sums, load(block.sums) + sum);
  }

  // Updates row_max of rows where a weight exceeds the headroom, and rescales their sums.
  __attribute__((noinline)) void update_row_max(int64_t n, vf top) {
    RowBlock<kRows>& block = block_[n];
    alignas(64) float lane[kWidth];
    store(lane, top);
    for (int r = 0; r < kRows; ++r) {
      float maximum = -kInf;
      for (int l = r * kCount; l < (r + 1) * kCount; ++l)
        maximum = lane[l] > maximum ? lane[l] : maximum;
      if (!(maximum > block.raise_above[r * kCount])) continue;
      const bool seen = block.raise_above[r * kCount] > -kInf;
      const float factor = seen ? std::exp2(block.row_max[r * kCount] - maximum) : 0;
      for (int l = r * kCount; l < (r + 1) * kCount; ++l) {
        block.row_max[l] = maximum;
        block.raise_above[l] = maximum + kHeadroom;
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
      scores[j] = kCoarse ? reciprocal_approx(x) : one / x;
    }
  }

  __attribute__((noinline)) void weigh_logits(int64_t n, vf* scores, int64_t vectors) {
    RowBlock<kRows>& block = block_[n];
    add_weights<kCoarse>(p_.map, scores, vectors, block.sums);
    if (p_.normalize == Normalize::sum) add_rounded<Op>(scores, vectors, block.divisors);
  }

  void store_partial(float* to) {
    for (int64_t own = 0; own < plan_.heads; ++own)
      for (int64_t row = 0; row < plan_.rows; ++row, to += plan_.partial_row) {
        const int64_t n = own * plan_.head_blocks + row / kRows, lane = row % kRows * kCount;
        const RowBlock<kRows>& block = block_[n];
        float sum = 0, divisor = 0;
        for (int k = 0; k < kCount; ++k) sum += block.sums[lane + k];
        for (int k = 0; k < kCount; ++k) divisor += block.divisors[lane + k];
        float* from = out_ + (n * kRows + row % kRows) * plan_.ldo;
        if constexpr (!kTiles) restore_order<Op>(from, plan_.ldo);
        for (int64_t c = 0; c < plan_.ldo; c += kWidth) store(to + c, load(from + c));
        to[plan_.ldo] = sum;
        if (kind_ == Exponent::softmax)
          to[plan_.ldo + 1] = block.raise_above[lane] > -kInf ? block.row_max[lane] : -kInf;
        else
          to[plan_.ldo + 1] = Op::kPair == 1 ? sum : divisor;
      }
  }

  // Merges all ranges of the unit, from the one at `first` on, in order.
  void merge(const float* first) {
    const int64_t between = plan_.partial_size();
    for (int64_t n = 0; n < blocks_; ++n) store(block_[n].sums, zero());
    for (int64_t row = 0; row < plan_.heads * plan_.rows; ++row, first += plan_.partial_row) {
      const int64_t own = row / plan_.rows, r = row % plan_.rows;
      const auto [i, head] = query_of(own, r);
      if (i >= Keys::queries(plan_.d)) continue;
      const auto row_max_of = [&](int64_t n) { return first[n * between + plan_.ldo + 1]; };
      float top = -kInf;
      for (int64_t n = 0; n < parts_ && kind_ == Exponent::softmax; ++n)
        top = row_max_of(n) > top ? row_max_of(n) : top;
      float sum = 0, divisor = 0;
      for (int64_t c = 0; c < plan_.ldo; c += kWidth) store(out_ + c, zero());
      for (int64_t n = 0; n < parts_; ++n) {
        const float* from = first + n * between;
        const float shrink = row_max_of(n) - top;
        const float factor =
            kind_ != Exponent::softmax || row_max_of(n) == top ? 1 : std::exp2(shrink);
        sum += from[plan_.ldo] * factor;
        divisor += from[plan_.ldo + 1];
        for (int64_t c = 0; c < plan_.ldo; c += kWidth)
          store(out_ + c, fma(load(from + c), set(factor), load(out_ + c)));
      }
      RowScale scale{1, 0};
      if (kind_ == Exponent::softmax) {
        scale = softmax_epilogue(sum, top, top > -kInf, p_.sink ? p_.sink + head : nullptr,
                                 constant_of(head).shift, p_.lse);
      } else if (kind_ == Exponent::logit) {
        if (p_.normalize == Normalize::count) sum = divisor = keys_.visible(i, head);
        scale = {normalizer(p_, divisor), sum};
      }
      if (p_.lse) *lse_at(plan_.d, b_, q_start_, i, head) = scale.lse;
      store_row(out_, scale.factor, row_at(p_.out, {i, head}), p_.dtype, p_.value_dim);
      // Its sums are no longer needed: they now hold the normalisation factor of the row.
      RowBlock<kRows>& block = block_[own * plan_.head_blocks + r / kRows];
      for (int l = r % kRows * kCount; l < (r % kRows + 1) * kCount; ++l)
        block.row_max[l] = top, block.sums[l] = scale.factor;
    }
    keys_.template count<kRows>(block_, plan_.heads, plan_.head_blocks);
  }

  const DecodePlan<Keys, kRows, kTiles>& plan_;
  const AttentionParams& p_;
  const Exponent kind_;
  int64_t blocks_, ldq_;
  const int64_t element_;  // bytes per element of the cache
  const bool scaled_;
  StepWords<Op> words_;  // with kTiles
  cpu::Workspace workspace_;
  float *q_, *out_, *own_, *weights_;
  float* scales_;  // K and V scales of a step, per head
  float* row_;     // with kTiles: a query
  RowBlock<kRows>* block_;
  Keys keys_;
  typename Keys::Placed placed_[kMaxHeads];
  int64_t unit_, b_, q_start_, first_head_, first_query_, part_, parts_, length_;
  KeyRange range_;
  bool general_ = false;
};

}  // namespace tokenmill::TOKENMILL_ISA
