// Key source of the attention_decode engine for listed keys: the sink keys of a request, the blocks
// of a list, the recent keys, and keys from outside the cache.
#pragma once
#include "cpu/float8.h"
#include "dense/attention_decode/cpu_decode.h"
#include "sparse/sparse_decode_attention/params.h"

namespace tokenmill::TOKENMILL_ISA {

template <class Products, DType kElementType, class CallParams>
class ListedKeys {
 public:
  using Op = Products;
  static constexpr DType kType = kElementType;
  // Keys rotated in float32 are rounded to the operand type of the products.
  static constexpr DType kTurned = Op::kPair == 2 ? DType::bfloat16 : DType::float32;
  static constexpr bool kTurns = true, kChunks = false;
  using Params = CallParams;
  using Row = KeyRow;

  // Query i sees key t of a step if from[t] <= i < until[t].
  struct Step : StepRows {
    float from[kStep], until[kStep];
    int32_t turn[kStep];   // row of the rotary tables, or -1
    int32_t extra[kStep];  // index of an extra key, or -1
    bool all_seen, all_cached;
  };
  struct Placed {
    const char *const *k, *const *v;
    int64_t k_offset, v_offset;
    bool turned;   // keys are rotated rows of kTurned, computed by `turn`
    bool widened;  // values are rows of floats, times their scales
  };

  static int64_t requests(const Params& d) { return d.attention.batch; }
  static int64_t request(const Params&, int64_t n) { return n; }
  static int64_t queries(const Params& d) { return d.attention.seqlen_q; }
  static int64_t row_heads(const Params& d) { return d.row_heads(); }
  // Heads that share a list read adjacent memory.
  static int64_t heads(const Params& d) {
    return d.list_heads == 1 ? heads_together(d.row_heads()) : 1;
  }
  static Row row(const Params& d, int64_t b, int64_t head) { return KeyRow::of(d, b, head); }
  static KeyRange range(const Row& row) { return {0, row.total}; }
  template <int kRows>
  static int64_t kept(const Params& d, const Row& row, int64_t blocks) {
    return d.mass ? kept_steps(row) * blocks * kKept<kRows> : 0;
  }

  explicit ListedKeys(const Params& d)
      : d_(d),
        p_(d.attention),
        element_(element_bytes(d.cache.dtype)),
        extra_element_(element_bytes(p_.dtype)),
        scaled_(has_scales(d.cache)),
        mixes_(d.extra > 0 && d.cache.dtype != p_.dtype),
        ldk_(round_up(p_.head_dim, 2 * kWidth)),
        ldv_(round_up(p_.value_dim, 2 * kWidth)),
        workspace_(round_up(p_.head_dim > p_.value_dim ? p_.head_dim : p_.value_dim, 16) +
                   (heads(d) * kStep + 3) * ldk_ + (mixes_ ? heads(d) * kStep * ldv_ : 0) +
                   5 * 16) {
    const int64_t widest = p_.head_dim > p_.value_dim ? p_.head_dim : p_.value_dim;
    float* zeros = workspace_.take(widest);
    for (int64_t i = 0; i < widest; ++i) zeros[i] = 0;
    zeros_ = reinterpret_cast<const char*>(zeros);
    loaded_ = workspace_.take(ldk_);
    moved_ = workspace_.take(ldk_);
    turned_ = reinterpret_cast<char*>(workspace_.take((heads(d) * kStep + 1) * ldk_));
    if (mixes_) widened_ = workspace_.take(heads(d) * kStep * ldv_);
  }

  void begin(int64_t b, int64_t head, const Row& row, float* kept) {
    b_ = b;
    head_ = head;
    row_ = row;
    recent_ = d_.num_recent < row.length ? d_.num_recent : row.length;
    kept_ = kept;
  }

  void find(Step& to, const KeyRange& range, int64_t key0) const {
    const int64_t old = row_.length - p_.seqlen_q;  // position of query 0
    to.all_seen = key0 + kStep <= range.end;
    to.all_cached = true;
    for (int64_t i = 0; i < kStep; ++i) {
      const int64_t t = key0 + i;
      to.k[i] = to.v[i] = zeros_;
      to.from[i] = static_cast<float>(p_.seqlen_q);
      to.until[i] = 0;
      to.k_scale[i] = to.v_scale[i] = &kUnscaled;
      to.turn[i] = to.extra[i] = -1;
      if (t >= range.end) {
        to.all_cached = false;
        continue;
      }
      if (t >= row_.cached) {
        find_extra(to, i, t - row_.cached);
        continue;
      }
      const RowKey key = row_.key(d_, b_, head_, t);
      const bool recent = t >= row_.list_end;
      const int64_t first = key.position - old + (recent ? 0 : recent_);
      const int64_t last = recent ? key.position - old + recent_ : p_.seqlen_q;
      if (key.position == RowKey::kNowhere || first >= p_.seqlen_q) {
        to.all_seen = to.all_cached = false;
        continue;
      }
      to.from[i] = static_cast<float>(first > 0 ? first : 0);
      to.until[i] = static_cast<float>(last < p_.seqlen_q ? last : p_.seqlen_q);
      to.all_seen &= first <= 0 && last >= p_.seqlen_q;
      to.k[i] = row_at(d_.cache.k, key.at, element_);
      to.v[i] = row_at(d_.cache.v, key.at, element_);
      if (scaled_) {
        to.k_scale[i] = scale_of(d_.cache.k_scale, key.at, d_.kv_head(head_));
        to.v_scale[i] = scale_of(d_.cache.v_scale, key.at, d_.kv_head(head_));
      }
      if (d_.cos) to.turn[i] = table_row(d_.cache_positions ? t : key.position);
    }
    // Rows lie on different memory pages: prefetch their TLB entries together.
    for (int64_t i = 0; i < kStep; ++i) {
      __builtin_prefetch(to.k[i], 0, 2);
      __builtin_prefetch(to.v[i], 0, 2);
    }
    if (!d_.cos) return;
    for (int64_t i = 0; i < kStep; ++i) {
      if (to.turn[i] < 0) continue;
      for (int64_t c = 0; c < d_.pairs; c += 16) {
        __builtin_prefetch(d_.cos + to.turn[i] * d_.cos_stride + c, 0, 2);
        __builtin_prefetch(d_.sin + to.turn[i] * d_.sin_stride + c, 0, 2);
      }
    }
  }

  static bool skips(const KeyRange&, int64_t) { return false; }
  QueryRow query(const void* row, int64_t i) {
    if (!d_.cos) return {row, p_.dtype};
    const int64_t position = row_.length - p_.seqlen_q + i;
    char* to = turned_row(heads(d_), 0);
    turn_row(row, p_.dtype, table_row(d_.cache_positions ? row_.cached - 1 : position), to);
    return {to, kTurned};
  }

  Placed place(const Step& step, int64_t own) {
    const bool mixed = mixes_ && !step.all_cached;
    Placed to{
        step.k,          step.v, own * d_.cache.k.head * element_, own * d_.cache.v.head * element_,
        d_.cos || mixed, mixed};
    Rearranged& mine = rearranged_[own];
    if (!step.all_cached) {
      for (int64_t i = 0; i < kStep; ++i) {
        const bool cached = step.k[i] != zeros_ && step.extra[i] < 0;
        mine.k[i] =
            step.k[i] + (cached ? to.k_offset : extra_offset(d_.extra_k, step.extra[i], own));
        mine.v[i] =
            step.v[i] + (cached ? to.v_offset : extra_offset(d_.extra_v, step.extra[i], own));
        mine.log_count[i] = log_count(step.extra[i], own);
      }
      to.k = mine.k;
      to.v = mine.v;
      to.k_offset = to.v_offset = 0;
    }
    if (mixed) {
      for (int64_t i = 0; i < kStep; ++i) {
        float* const row = widened_ + (own * kStep + i) * ldv_;
        const bool cached = step.extra[i] < 0 && step.v_scale[i] != &kUnscaled;
        const float scale = cached ? step.v_scale[i][own * d_.cache.v_scale.head] : 1;
        widen_row(mine.v[i], type_of(step, i), p_.value_dim, scale, row, ldv_);
        mine.v[i] = reinterpret_cast<const char*>(row);
      }
    }
    if (to.turned) {
      for (int64_t i = 0; i < kStep; ++i) {
        mine.unturned[i] = to.k[i] + to.k_offset;
        mine.turned[i] = turned_row(own, i);
      }
      to.k = mine.turned;
      to.k_offset = 0;
    }
    return to;
  }

  void turn(const Step& step, int64_t own, int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i)
      turn_row(rearranged_[own].unturned[i], type_of(step, i), step.turn[i], turned_row(own, i));
  }

  bool general(const Step& step) const { return d_.extra_log_count && !step.all_cached; }
  template <int kRows>
  vf add(const Step& step, int64_t own, int64_t j, vf z) const {
    return general(step) ? z + by_key<kRows>(rearranged_[own].log_count, j) : z;
  }

  template <int kRows>
  static bool hides(const RowBlock<kRows>&, const Step& step, int64_t, int64_t) {
    return !step.all_seen;
  }
  template <int kRows>
  void hide(const RowBlock<kRows>& block, const Step& step, int64_t, vf* scores, int64_t vectors,
            vf hidden) const {
    const vf query = lanes_of<kRows>([&](int r) { return static_cast<float>(block.query[r]); });
    for (int64_t j = 0; j < vectors; ++j) {
      const vf seen = select(less(query, by_key<kRows>(step.from, j)), hidden, scores[j]);
      scores[j] = select(less(query, by_key<kRows>(step.until, j)), seen, hidden);
    }
  }

  static bool holes() { return false; }
  static float visible(int64_t, int64_t) { return 0; }  // "count" is not an option of lists

  // Stores weights relative to the current row_max, and that row_max.
  template <int kRows>
  void keep(int64_t key0, int64_t n, int64_t blocks, const RowBlock<kRows>& block, const vf* scores,
            int64_t vectors) const {
    const bool listed = key0 + kStep > row_.list_begin && key0 < row_.list_end;
    if (!d_.mass || !listed || row_.list_begin == row_.list_end) return;
    float* to = kept_ + ((key0 / kStep - row_.list_begin / kStep) * blocks + n) * kKept<kRows>;
    store(to, load(block.row_max));
    for (int64_t j = 0; j < vectors; ++j) store(to + (j + 1) * kWidth, scores[j]);
  }

  // Adds the mass of the entries. block[n].row_max and .sums hold the final row_max and the factors
  // of weights relative to it.
  template <int kRows>
  void count(const RowBlock<kRows>* block, int64_t heads, int64_t head_blocks) const {
    if (!d_.mass) return;
    constexpr int kCount = kKeys<kRows>;
    for (int64_t own = 0; own < heads; ++own) {
      float* mass = d_.mass + (b_ * d_.row_heads() + head_ + own) * d_.entries;
      for (int64_t e = 0; e < d_.entries; ++e) mass[e] = 0;
      for (int64_t s = 0; s < kept_steps(row_); ++s) {
        const int64_t key0 = (row_.list_begin / kStep + s) * kStep;
        const float* from = kept_ + (s * heads + own) * head_blocks * kKept<kRows>;
        vf sum[kStep / kCount] = {};
        for (int64_t n = 0; n < head_blocks; ++n, from += kKept<kRows>) {
          const RowBlock<kRows>& rows = block[own * head_blocks + n];
          // row_max only rises, except for a row that saw no key: its row_max is above the final
          // one, and its weights are 0.
          const vf shrink = min_of(load(from) - load(rows.row_max), zero());
          const vf factor = load(rows.sums) * exp2<5>(shrink);
          for (int64_t j = 0; j < kept_vectors<kRows>(key0); ++j)
            sum[j] = sum[j] + load(from + (j + 1) * kWidth) * factor;
        }
        add_mass<kRows>(mass, sum, key0);
      }
    }
  }

 private:
  static constexpr int64_t kTurnedBytes = kTurned == DType::float32 ? 4 : 2;
  template <int kRows>
  static constexpr int64_t kKept = kStep * kRows + kWidth;  // per block and step

  // Rows of a head in a step that are not all usable as they lie in the cache.
  struct Rearranged {
    const char *k[kStep], *v[kStep], *unturned[kStep], *turned[kStep];
    float log_count[kStep];
  };
  char* turned_row(int64_t own, int64_t i) const {
    return turned_ + (own * kStep + i) * ldk_ * kTurnedBytes;
  }

  static int64_t kept_steps(const Row& row) {
    if (row.list_begin == row.list_end) return 0;
    return ceil_div(row.list_end, kStep) - row.list_begin / kStep;
  }
  template <int kRows>
  int64_t kept_vectors(int64_t key0) const {
    const int64_t keys = row_.list_end - key0 < kStep ? row_.list_end - key0 : kStep;
    return ceil_div(keys, kKeys<kRows>);
  }

  template <int kRows>
  void add_mass(float* mass, const vf* sum, int64_t key0) const {
    constexpr int kCount = kKeys<kRows>;
    for (int64_t j = 0; j < kept_vectors<kRows>(key0); ++j) {
      alignas(64) float lane[kWidth];
      store(lane, sum[j]);
      for (int k = 0; k < kCount; ++k) {
        const int64_t t = key0 + j * kCount + k;
        if (t < row_.list_begin || t >= row_.list_end) continue;
        float rows = 0;
        for (int r = 0; r < kRows; ++r) rows += lane[r * kCount + k];
        mass[row_.first + ((t - row_.list_begin) >> d_.log2_block)] += rows;
      }
    }
  }

  const char* row_at(const Rows& rows, KvCache::Slot at, int64_t element) const {
    return static_cast<const char*>(rows.data) +
           KvCache::offset(rows, at, d_.kv_head(head_)) * element;
  }
  int64_t extra_offset(const Rows& rows, int64_t extra, int64_t own) const {
    return extra < 0 ? 0 : own * rows.head * extra_element_;
  }
  // Type of a row of a step; missing keys are zeros of any type.
  DType type_of(const Step& step, int64_t i) const {
    return step.extra[i] < 0 ? d_.cache.dtype : p_.dtype;
  }
  float log_count(int64_t extra, int64_t own) const {
    if (extra < 0 || !d_.extra_log_count) return 0;
    return d_.extra_log_count[b_ * d_.extra_log_count_batch +
                              (d_.kv_head(head_) + own) * d_.extra_log_count_head + extra];
  }
  int32_t table_row(int64_t position) const {
    const int64_t last = d_.positions - 1;
    return static_cast<int32_t>(position < 0 ? 0 : position < last ? position : last);
  }

  void find_extra(Step& to, int64_t i, int64_t extra) const {
    to.all_cached = false;
    const KvCache::Slot at{static_cast<int32_t>(b_), static_cast<int32_t>(extra)};
    to.k[i] = row_at(d_.extra_k, at, extra_element_);
    to.v[i] = row_at(d_.extra_v, at, extra_element_);
    to.extra[i] = static_cast<int32_t>(extra);
    to.from[i] = 0;
    to.until[i] = static_cast<float>(p_.seqlen_q);
  }

  // Rotates the column pairs of a row; `at` < 0: no rotation.
  void turn_row(const void* from, DType type, int64_t at, void* to) {
    const int64_t dim = p_.head_dim, pairs = d_.pairs;
    float* __restrict x = loaded_, * __restrict y = moved_;
    widen_row(from, type, dim, 1, x, round_up(dim, kWidth));
    const float* result = x;
    if (at >= 0) {
      const float* __restrict cos = d_.cos + at * d_.cos_stride;
      const float* __restrict sin = d_.sin + at * d_.sin_stride;
      if (d_.interleaved) {
        for (int64_t i = 0; i < pairs; ++i) {
          y[2 * i] = x[2 * i] * cos[i] - x[2 * i + 1] * sin[i];
          y[2 * i + 1] = x[2 * i] * sin[i] + x[2 * i + 1] * cos[i];
        }
      } else {
        for (int64_t i = 0; i < pairs; ++i) {
          y[i] = x[i] * cos[i] - x[pairs + i] * sin[i];
          y[pairs + i] = x[i] * sin[i] + x[pairs + i] * cos[i];
        }
      }
      for (int64_t c = 2 * pairs; c < dim; ++c) y[c] = x[c];
      result = y;
    }
    // Rows have room for whole vectors.
    for (int64_t c = 0; c < dim; c += kWidth) Elements<kTurned>::store(to, c, load(result + c));
  }

  const Params& d_;
  const AttentionParams& p_;
  const int64_t element_, extra_element_;  // bytes, of the cache and of extra keys
  const bool scaled_;
  const bool mixes_;  // the type of extra keys differs from the cache's
  int64_t ldk_, ldv_;
  cpu::Workspace workspace_;
  const char* zeros_;
  float *loaded_, *moved_;  // scratch rows of a rotation
  char* turned_;            // kStep key rows per head, and one query row
  float* widened_;          // kStep value rows per head
  Rearranged rearranged_[kMaxHeads];
  int64_t b_ = 0, head_ = 0;
  Row row_{};
  int64_t recent_ = 0;     // number of recent tokens that exist
  float* kept_ = nullptr;  // [steps][blocks][kKept]
};

}  // namespace tokenmill::TOKENMILL_ISA
