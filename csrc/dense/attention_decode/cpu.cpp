#include "dense/attention_decode/cpu_engine.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

// All keys of a request, or the last ones of it, as they lie in the cache.
template <class Products, DType kElementType>
class DenseKeys {
 public:
  using Op = Products;
  static constexpr DType kType = kElementType, kTurned = kElementType;
  static constexpr bool kTurns = false;
  using Params = DecodeParams;
  using Row = KeyRange;
  using Step = StepRows;
  struct Placed {
    const char *const *k, *const *v;
    int64_t k_offset, v_offset;
    static constexpr bool turned = false;
  };

  static int64_t row_heads(const Params& d) { return d.attention.kv_heads; }
  static int64_t heads(const Params& d) { return heads_together(d.attention.kv_heads); }
  static Row row(const Params& d, int64_t b, int64_t) {
    return KeyRange::of(decode_band(d.attention, d.cache.length(b)));
  }
  static KeyRange range(const Row& row) { return row; }
  template <int kRows>
  static int64_t kept(const Params&, const Row&, int64_t) {
    return 0;
  }

  explicit DenseKeys(const Params& d) : d_(d) {}

  void begin(int64_t b, int64_t head, const Row&, float*) {
    b_ = b;
    head_ = head;
    band_ = decode_band(d_.attention, d_.cache.length(b));
  }

  void find(Step& to, const KeyRange& range, int64_t key0) const {
    const int64_t last = range.end - 1;
    for (int64_t i = 0; i < kStep; ++i) {
      const KvCache::Slot at = d_.cache.slot(b_, key0 + i < last ? key0 + i : last);
      const auto row = [&](const Rows& rows) {
        return static_cast<const char*>(rows.data) + KvCache::offset(rows, at, head_) * kElement;
      };
      to.k[i] = row(d_.cache.k);
      to.v[i] = row(d_.cache.v);
    }
  }

  QueryRow query(const void* row, int64_t) const { return {row, kType}; }
  Placed place(const Step& step, int64_t own) const {
    return {step.k, step.v, own * d_.cache.k.head * kElement, own * d_.cache.v.head * kElement};
  }
  static bool general(const Step&) { return false; }
  template <int kRows>
  static vf add(const Step&, int64_t, int64_t, vf z) {
    return z;
  }

  // The first row sees least of the last keys, the last one least of the first.
  template <int kRows>
  bool hides(const RowBlock<kRows>& block, const Step&, int64_t key0, int64_t vectors) const {
    return key0 < band_.begin(block.query[kRows - 1]) ||
           key0 + vectors * kKeys<kRows> > band_.end(block.query[0]);
  }
  template <int kRows>
  void hide(const RowBlock<kRows>& block, const Step&, int64_t key0, vf* scores, int64_t vectors,
            vf hidden) const {
    constexpr int kCount = kKeys<kRows>;
    const auto relative = [&](int64_t x) {
      x -= key0;
      return static_cast<float>(x < 0 ? 0 : x > kStep ? kStep : x);
    };
    const vf begin = lanes_of<kRows>([&](int r) { return relative(band_.begin(block.query[r])); });
    const vf end = lanes_of<kRows>([&](int r) { return relative(band_.end(block.query[r])); });
    const vf key = lanes_of_keys<kRows>([](int k) { return static_cast<float>(k); });
    for (int64_t j = 0; j < vectors; ++j) {
      const vf at = key + set(static_cast<float>(j * kCount));
      const vf inside = select(less(at, begin), hidden, scores[j]);
      scores[j] = select(less(at, end), inside, hidden);
    }
  }

  template <int kRows>
  static void keep(int64_t, int64_t, int64_t, const RowBlock<kRows>&, const vf*, int64_t) {}
  template <int kRows>
  static void count(const RowBlock<kRows>*, int64_t, int64_t) {}

 private:
  static constexpr int64_t kElement = kElementBytes<kType>;

  const Params& d_;
  int64_t b_ = 0, head_ = 0;
  Band band_{};
};

}  // namespace

void attention_decode(const DecodeParams& d) { decode_elements<DenseKeys>(d); }

}  // namespace tokenmill::TOKENMILL_ISA
