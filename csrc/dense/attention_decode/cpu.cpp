#include "attention/cpu_mask.h"
#include "dense/attention_decode/cpu_decode.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

// All visible keys of a request, in place in the KV cache.
template <class Products, DType kElementType>
class DenseKeys {
 public:
  using Op = Products;
  static constexpr DType kType = kElementType, kTurned = kElementType;
  static constexpr bool kTurns = false, kChunks = true;
  using Params = DecodeParams;
  using Row = KeyRange;
  // Ids of the keys under a mask of spans, and their hull.
  struct Step : StepRows {
    int32_t first[kStep], last[kStep];
    Hull ids;
  };
  struct Placed {
    const char *const *k, *const *v;
    int64_t k_offset, v_offset;
    static constexpr bool turned = false, widened = false;
  };

  static int64_t requests(const Params& d) { return d.num_requests; }
  static int64_t request(const Params& d, int64_t n) { return d.requests ? d.requests[n] : n; }
  static int64_t queries(const Params& d) { return d.queries; }
  static int64_t row_heads(const Params& d) { return d.attention.kv_heads; }
  static int64_t heads(const Params& d) { return heads_together(d.attention.kv_heads); }
  static Row row(const Params& d, int64_t b, int64_t) {
    return KeyRange::of(decode_band(d.attention, d.queries, d.cache.length(b)));
  }
  // Keys that `count` queries from `first` on see, as far as the queries exist.
  static Row row_of_chunk(const Params& d, int64_t b, int64_t first, int64_t count) {
    const Band band = decode_band(d.attention, d.queries, d.cache.length(b));
    const int64_t behind = first + count < d.queries ? first + count : d.queries;
    const int64_t begin = band.begin(first), end = band.end(behind - 1);
    return {begin, begin < end ? end : begin};
  }
  static KeyRange range(const Row& row) { return row; }
  template <int kRows>
  static int64_t kept(const Params&, const Row&, int64_t) {
    return 0;
  }

  explicit DenseKeys(const Params& d)
      : d_(d), element_(element_bytes(d.cache.dtype)), scaled_(has_scales(d.cache)) {}

  void begin(int64_t b, int64_t head, const Row&, float*) {
    const AttentionParams& p = d_.attention;
    b_ = b;
    head_ = head;
    band_ = decode_band(p, d_.queries, d_.cache.length(b));
    q_start_ = p.cu_seqlens_q ? p.cu_seqlens_q[b] : 0;
    queries_ = {};
    const int64_t group = p.heads / p.kv_heads;
    // Masks differ between heads only in their ranges.
    const int64_t heads = p.mask.ranges_head ? heads_together(p.kv_heads) * group : 1;
    for (int64_t h = 0; p.mask.any() && h < heads; ++h)
      for (int64_t i = 0; i < d_.queries; ++i)
        mask_of_head(head * group + h).add_query(i, queries_);
  }

  void find(Step& to, const KeyRange& range, int64_t key0) const {
    const int64_t last = range.end - 1;
    for (int64_t i = 0; i < kStep; ++i) {
      const KvCache::Slot at = d_.cache.slot(b_, key0 + i < last ? key0 + i : last);
      const auto row = [&](const Rows& rows) {
        return static_cast<const char*>(rows.data) + KvCache::offset(rows, at, head_) * element_;
      };
      to.k[i] = row(d_.cache.k);
      to.v[i] = row(d_.cache.v);
      if (!scaled_) continue;
      to.k_scale[i] = scale_of(d_.cache.k_scale, at, head_);
      to.v_scale[i] = scale_of(d_.cache.v_scale, at, head_);
    }
    if (!d_.attention.mask.q_spans) return;
    const HeadMask mask = mask_of_head(0);
    to.ids = {};
    for (int64_t i = 0; i < kStep; ++i) {
      const Span ids = mask.key(key0 + i < last ? key0 + i : last);
      to.first[i] = ids.first;
      to.last[i] = ids.last;
      to.ids.add(ids);
    }
  }
  bool skips(const KeyRange& range, int64_t key0) const {
    return d_.attention.mask.any() && mask_of_head(0).seen(queries_, hull_of(range, key0), key0,
                                                           end_of(range, key0)) == Seen::none;
  }

  QueryRow query(const void* row, int64_t) const { return {row, d_.attention.dtype}; }
  Placed place(const Step& step, int64_t own) const {
    return {step.k, step.v, own * d_.cache.k.head * element_, own * d_.cache.v.head * element_};
  }
  static bool general(const Step&) { return false; }
  template <int kRows>
  static vf add(const Step&, int64_t, int64_t, vf z) {
    return z;
  }

  template <int kRows>
  bool hides(const RowBlock<kRows>& block, const Step& step, int64_t key0, int64_t vectors) const {
    return leaves_band<kRows>(block, key0, vectors) || cuts<kRows>(block, step, key0);
  }
  template <int kRows>
  void hide(const RowBlock<kRows>& block, const Step& step, int64_t key0, vf* scores,
            int64_t vectors, vf hidden) const {
    constexpr int kCount = kKeys<kRows>;
    if (leaves_band<kRows>(block, key0, vectors)) {
      const auto relative = [&](int64_t x) {
        x -= key0;
        return static_cast<float>(x < 0 ? 0 : x > kStep ? kStep : x);
      };
      const vf begin =
          lanes_of<kRows>([&](int r) { return relative(band_.begin(block.query[r])); });
      const vf end = lanes_of<kRows>([&](int r) { return relative(band_.end(block.query[r])); });
      const vf key = lanes_of_keys<kRows>([](int k) { return static_cast<float>(k); });
      for (int64_t j = 0; j < vectors; ++j) {
        const vf at = key + set(static_cast<float>(j * kCount));
        const vf inside = select(less(at, begin), hidden, scores[j]);
        scores[j] = select(less(at, end), inside, hidden);
      }
    }
    if (cuts<kRows>(block, step, key0))
      hide_pairs<kRows>(block, step, key0, scores, vectors, hidden);
  }
  bool holes() const { return d_.attention.mask.any(); }

  float visible(int64_t i, int64_t head) const {
    const int64_t begin = band_.begin(i), end = band_.end(i);
    if (!d_.attention.mask.any()) return static_cast<float>(begin < end ? end - begin : 0);
    const HeadMask mask = mask_of_head(head);
    int64_t count = 0;
    for (int64_t j = begin; j < end; ++j) count += mask.sees(i, j);
    return static_cast<float>(count);
  }

  template <int kRows>
  static void keep(int64_t, int64_t, int64_t, const RowBlock<kRows>&, const vf*, int64_t) {}
  template <int kRows>
  static void count(const RowBlock<kRows>*, int64_t, int64_t) {}

 private:
  HeadMask mask_of_head(int64_t head) const {
    return HeadMask(d_.attention.mask, b_, head, q_start_, 0);
  }
  static int64_t end_of(const KeyRange& range, int64_t key0) {
    return key0 + kStep < range.end ? key0 + kStep : range.end;
  }
  Hull hull_of(const KeyRange& range, int64_t key0) const {
    Hull ids;
    if (!d_.attention.mask.q_spans) return ids;
    const HeadMask mask = mask_of_head(0);
    for (int64_t j = key0; j < end_of(range, key0); ++j) ids.add(mask.key(j));
    return ids;
  }

  // The first row sees the fewest of the last keys, the last row the fewest of the first.
  template <int kRows>
  bool leaves_band(const RowBlock<kRows>& block, int64_t key0, int64_t vectors) const {
    return key0 < band_.begin(block.query[kRows - 1]) ||
           key0 + vectors * kKeys<kRows> > band_.end(block.query[0]);
  }
  // True if the mask hides some key of the step from some row.
  template <int kRows>
  bool cuts(const RowBlock<kRows>& block, const Step& step, int64_t key0) const {
    if (!d_.attention.mask.any()) return false;
    QueryHull rows;
    for (int r = 0; r < kRows; ++r) mask_of_head(block.head[r]).add_query(block.query[r], rows);
    const int64_t end = key0 + kStep < band_.columns ? key0 + kStep : band_.columns;
    return mask_of_head(0).seen(rows, step.ids, key0, end) != Seen::all;
  }
  template <int kRows>
  __attribute__((noinline)) void hide_pairs(const RowBlock<kRows>& block, const Step& step,
                                            int64_t key0, vf* scores, int64_t vectors,
                                            vf hidden) const {
    constexpr int kCount = kKeys<kRows>;
    const bool ids = d_.attention.mask.q_spans;
    alignas(64) float shown[kRows][kStep];
    for (int r = 0; r < kRows; ++r) {
      const HeadMask mask = mask_of_head(block.head[r]);
      for (int k = 0; k < kStep; k += kWidth) {
        const vm seen = mask.seen_keys(block.query[r], positions(key0 + k),
                                       ids ? load_integers(step.first + k) : vi{},
                                       ids ? load_integers(step.last + k) : vi{});
        store(shown[r] + k, select(seen, set(1.f), zero()));
      }
    }
    for (int64_t j = 0; j < vectors; ++j) {
      alignas(64) float lane[kWidth];
      for (int r = 0; r < kRows; ++r)
        std::memcpy(lane + r * kCount, shown[r] + j * kCount, kCount * sizeof(float));
      scores[j] = select(less(zero(), load(lane)), scores[j], hidden);
    }
  }

  const Params& d_;
  const int64_t element_;  // bytes per element of the cache
  const bool scaled_;
  int64_t b_ = 0, head_ = 0, q_start_ = 0;
  Band band_{};
  QueryHull queries_;  // of all rows of the unit
};

}  // namespace

void attention_decode(const DecodeParams& d) { decode_elements<DenseKeys>(d); }

}  // namespace tokenmill::TOKENMILL_ISA
