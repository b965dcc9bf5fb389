// Vectors run along A: sums over keys and queries are sums of vectors, and a score is one sum over
// the lanes of its vector.
#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/workspace.h"
#include "dense/additive_attention/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr float kNegInf = -__builtin_inff();
constexpr int kBlock = 4;  // queries that share the vectors of a key

int threads_for(const AdditiveParams& p) {
  const double tangents = static_cast<double>(p.batch * p.rows) * static_cast<double>(p.keys) *
                          static_cast<double>(p.width);
  return tangents < (1 << 15) ? 1 : cpu::num_threads();
}

const uint8_t* mask_of(const AdditiveParams& p, int64_t b, int64_t i) {
  return p.mask ? p.mask + b * p.mask_batch + i * p.mask_row : nullptr;
}

// Calls visit.operator()<M>() for M = min(queries, kBlock) queries.
template <typename Visit>
TM_INLINE void visit_block(int64_t queries, const Visit& visit) {
  switch (queries) {
    case 1:
      return visit.template operator()<1>();
    case 2:
      return visit.template operator()<2>();
    case 3:
      return visit.template operator()<3>();
    default:
      return visit.template operator()<kBlock>();
  }
}

// Forward: an item is a tile of scores.
constexpr int64_t kTileRows = 32, kTileKeys = 256;

class ScoreTiles {
 public:
  explicit ScoreTiles(const AdditiveParams& p)
      : p_(p),
        ld_(round_up(p.width, kWidth)),
        memory_((kTileRows + kWidth + 1) * ld_ + 3 * 16),
        q_(memory_.take(kTileRows * ld_)),
        k_(memory_.take(kWidth * ld_)),
        v_(memory_.take(ld_)) {
    pack(p.v, 0, v_);
  }

  static int64_t tiles_of_rows(const AdditiveParams& p) { return ceil_div(p.rows, kTileRows); }
  static int64_t tiles_of_keys(const AdditiveParams& p) { return ceil_div(p.keys, kTileKeys); }
  static int64_t items(const AdditiveParams& p) {
    return p.batch * tiles_of_rows(p) * tiles_of_keys(p);
  }

  void run(int64_t item) {
    const int64_t j0 = item % tiles_of_keys(p_) * kTileKeys, rest = item / tiles_of_keys(p_);
    const int64_t i0 = rest % tiles_of_rows(p_) * kTileRows, b = rest / tiles_of_rows(p_);
    const int64_t rows = std::min(kTileRows, p_.rows - i0), end = std::min(p_.keys, j0 + kTileKeys);
    for (int64_t i = 0; i < rows; ++i)
      pack(p_.q, b * p_.q_batch + (i0 + i) * p_.q_row, q_ + i * ld_);
    for (int64_t j = j0; j < end; j += kWidth) {
      const int64_t count = std::min<int64_t>(kWidth, end - j);
      for (int64_t n = 0; n < count; ++n)
        pack(p_.k, b * p_.k_batch + (j + n) * p_.k_row, k_ + n * ld_);
      for (int64_t i = 0; i < rows; i += kBlock)
        visit_block(rows - i, [&]<int M>() TM_LAMBDA { run_block<M>(b, i0 + i, i, j, count); });
    }
  }

 private:
  // A row of A elements as floats, zeros up to ld.
  void pack(const void* from, int64_t at, float* to) const {
    visit_elements(p_.dtype, [&](auto e) TM_LAMBDA {
      for (int64_t a = 0; a < p_.width; a += kWidth)
        store(to + a, e.load_n(from, at + a, p_.width - a));
    });
  }

  // Scores of queries i to i + M - 1, in q_ from `packed` on, and the `count` keys in k_.
  template <int M>
  __attribute__((noinline)) void run_block(int64_t b, int64_t i, int64_t packed, int64_t j,
                                           int64_t count) const {
    const uint8_t* masks[M];
    for (int x = 0; x < M; ++x) masks[x] = mask_of(p_, b, i + x);
    vf sums[M][kWidth];
    for (int64_t n = 0; n < count; ++n) {
      vf sum[M];
      TM_UNROLL(4)
      for (int x = 0; x < M; ++x) sum[x] = zero();
      bool seen = !p_.mask;
      for (int x = 0; p_.mask && x < M; ++x) seen |= masks[x][j + n] != 0;
      const float *const q = q_ + packed * ld_, *const k = k_ + n * ld_;
      for (int64_t a = 0; seen && a < ld_; a += kWidth) {
        const vf key = load(k + a), v = load(v_ + a);
        TM_UNROLL(4)
        for (int x = 0; x < M; ++x) sum[x] = fma(v, tanh(load(q + x * ld_ + a) + key), sum[x]);
      }
      TM_UNROLL(4)
      for (int x = 0; x < M; ++x) sums[x][n] = sum[x];
    }
    for (int x = 0; x < M; ++x) {
      for (int64_t n = count; n < kWidth; ++n) sums[x][n] = zero();
      float* const to = p_.scores + (b * p_.rows + i + x) * p_.keys + j;
      Elements<DType::float32>::store_n(to, 0, sum_rows(sums[x]), count);
      for (int64_t n = 0; p_.mask && n < count; ++n)
        if (!masks[x][j + n]) to[n] = kNegInf;
    }
  }

  const AdditiveParams& p_;
  const int64_t ld_;
  cpu::Workspace memory_;
  float *const q_, *const k_, *const v_;
};

// Backward: an item is a vector of A of one sequence and one part of its queries. dk and dv are
// summed over parts in order; the parts depend on shapes only.
constexpr int64_t kGradientRows = 64, kGradientKeys = 128;  // per tile
constexpr int64_t kItems = 64;  // target number of items, reached by splitting into parts

struct Parts {
  int64_t chunks, count, rows;  // vectors of A; parts of the queries, queries of each but the last

  explicit Parts(const AdditiveParams& p) : chunks(ceil_div(p.width, kWidth)) {
    const int64_t tiles = ceil_div(p.rows, kGradientRows);
    const int64_t wanted = std::clamp<int64_t>(kItems / (chunks * p.batch), 1, tiles);
    rows = ceil_div(tiles, wanted) * kGradientRows;
    count = ceil_div(p.rows, rows);
  }
};

class Gradients {
 public:
  Gradients(const AdditiveBackwardParams& backward, const Parts& parts)
      : backward_(backward),
        p_(backward.forward),
        parts_(parts),
        lists_(p_.batch * parts.chunks),
        memory_(lists_ * parts.count * (p_.keys + 1) * kWidth + lists_ + parts.chunks + 4 * 16),
        dk_(memory_.take(lists_ * parts.count * p_.keys * kWidth)),
        dv_(memory_.take(lists_ * parts.count * kWidth)),
        finished_lists_(reinterpret_cast<int32_t*>(memory_.take(lists_))),
        finished_chunks_(reinterpret_cast<int32_t*>(memory_.take(parts.chunks))) {
    std::memset(finished_lists_, 0, lists_ * sizeof(int32_t));
    std::memset(finished_chunks_, 0, parts.chunks * sizeof(int32_t));
  }

  int64_t items() const { return lists_ * parts_.count; }

  class Worker {
   public:
    explicit Worker(const Gradients& shared)
        : s_(shared),
          p_(shared.p_),
          memory_((kGradientRows + 2 * kGradientKeys) * kWidth + kBlock * kGradientKeys + 4 * 16),
          dq_(memory_.take(kGradientRows * kWidth)),
          k_(memory_.take(kGradientKeys * kWidth)),
          dk_(memory_.take(kGradientKeys * kWidth)),
          g_(memory_.take(kBlock * kGradientKeys)) {}

    void run(int64_t item) {
      const int64_t part = item % s_.parts_.count, list = item / s_.parts_.count;
      b_ = list / s_.parts_.chunks;
      at_ = list % s_.parts_.chunks * kWidth;
      lanes_ = p_.width - at_;
      const vf v = load_as_float_n(p_.v, p_.dtype, at_, lanes_);
      float* const dk = s_.dk_of(list, part);
      std::memset(dk, 0, p_.keys * kWidth * sizeof(float));
      vf dv = zero();
      const int64_t begin = part * s_.parts_.rows;
      const int64_t end = std::min(p_.rows, begin + s_.parts_.rows);
      for (int64_t i = begin; i < end; i += kGradientRows)
        dv = dv + run_rows(i, std::min(kGradientRows, end - i), v, dk);
      store(s_.dv_of(list, part), dv);
      s_.finish(list);
    }

   private:
    // Returns dv of these queries, adds to dk and writes dq.
    vf run_rows(int64_t first, int64_t rows, vf v, float* dk) {
      std::memset(dq_, 0, rows * kWidth * sizeof(float));
      vf dv = zero();
      for (int64_t j = 0; j < p_.keys; j += kGradientKeys) {
        const int64_t keys = std::min(kGradientKeys, p_.keys - j);
        visit_elements(p_.dtype, [&](auto e) TM_LAMBDA {
          const int64_t from = b_ * p_.k_batch + j * p_.k_row + at_;
          for (int64_t n = 0; n < keys; ++n)
            store(k_ + n * kWidth, e.load_n(p_.k, from + n * p_.k_row, lanes_));
        });
        std::memset(dk_, 0, keys * kWidth * sizeof(float));
        vf tile = zero();
        for (int64_t i = 0; i < rows; i += kBlock)
          visit_block(rows - i, [&]<int M>() TM_LAMBDA {
            tile = tile + run_block<M>(first + i, dq_ + i * kWidth, j, keys, v);
          });
        dv = dv + tile;
        for (int64_t n = 0; n < keys * kWidth; n += kWidth) {
          float* const to = dk + j * kWidth + n;
          store(to, load(to) + load(dk_ + n));
        }
      }
      visit_elements(p_.dtype, [&](auto e) TM_LAMBDA {
        const int64_t to = (b_ * p_.rows + first) * p_.width + at_;
        for (int64_t i = 0; i < rows; ++i)
          e.store_n(s_.backward_.dq, to + i * p_.width, load(dq_ + i * kWidth), lanes_);
      });
      return dv;
    }

    // dscores of query i and the keys from j on, 0 where masked.
    const float* gradients_of(int64_t i, int64_t j, int64_t keys, float* memory) const {
      const AdditiveBackwardParams& bp = s_.backward_;
      const float* const g = bp.dscores + b_ * bp.dscores_batch + i * bp.dscores_row + j;
      if (!p_.mask) return g;
      const uint8_t* const mask = mask_of(p_, b_, i) + j;
      for (int64_t n = 0; n < keys; ++n) memory[n] = mask[n] ? g[n] : 0.f;
      return memory;
    }

    // Queries i to i + M - 1 and the keys in k_, which start at j. Returns their dv.
    template <int M>
    __attribute__((noinline)) vf run_block(int64_t i, float* dq, int64_t j, int64_t keys, vf v) {
      const float* g[M];
      vf q[M], sum[M], dv = zero();
      for (int x = 0; x < M; ++x) {
        g[x] = gradients_of(i + x, j, keys, g_ + x * kGradientKeys);
        const int64_t from = b_ * p_.q_batch + (i + x) * p_.q_row + at_;
        q[x] = load_as_float_n(p_.q, p_.dtype, from, lanes_);
        sum[x] = zero();
      }
      for (int64_t n = 0; n < keys; ++n) {
        const vf key = load(k_ + n * kWidth);
        vf dk = load(dk_ + n * kWidth);
        TM_UNROLL(4)
        for (int x = 0; x < M; ++x) {
          if (g[x][n] == 0) continue;
          const vf gx = set(g[x][n]), e = tanh(q[x] + key), gv = gx * v;
          const vf d = fma(-(gv * e), e, gv);
          sum[x] = sum[x] + d;
          dk = dk + d;
          dv = fma(gx, e, dv);
        }
        store(dk_ + n * kWidth, dk);
      }
      for (int x = 0; x < M; ++x) {
        float* const to = dq + x * kWidth;
        store(to, load(to) + sum[x]);
      }
      return dv;
    }

    const Gradients& s_;
    const AdditiveParams& p_;
    cpu::Workspace memory_;
    float *const dq_, *const k_, *const dk_, *const g_;
    int64_t b_ = 0, at_ = 0, lanes_ = 0;
  };

 private:
  // list: index of a sequence and, within it, of a vector of A.
  float* dk_of(int64_t list, int64_t part) const {
    return dk_ + (list * parts_.count + part) * p_.keys * kWidth;
  }
  float* dv_of(int64_t list, int64_t part) const {
    return dv_ + (list * parts_.count + part) * kWidth;
  }

  // The last part that finishes reduces all parts.
  void finish(int64_t list) const {
    const int64_t chunk = list % parts_.chunks, at = chunk * kWidth, lanes = p_.width - at;
    if (__atomic_add_fetch(finished_lists_ + list, 1, __ATOMIC_ACQ_REL) == parts_.count)
      visit_elements(p_.dtype, [&](auto e) TM_LAMBDA {
        const int64_t to = list / parts_.chunks * p_.keys * p_.width + at;
        for (int64_t j = 0; j < p_.keys; ++j) {
          vf sum = load(dk_of(list, 0) + j * kWidth);
          for (int64_t part = 1; part < parts_.count; ++part)
            sum = sum + load(dk_of(list, part) + j * kWidth);
          e.store_n(backward_.dk, to + j * p_.width, sum, lanes);
        }
      });
    const int64_t all = p_.batch * parts_.count;
    if (__atomic_add_fetch(finished_chunks_ + chunk, 1, __ATOMIC_ACQ_REL) == all) {
      vf sum = zero();
      for (int64_t b = 0; b < p_.batch; ++b)
        for (int64_t part = 0; part < parts_.count; ++part)
          sum = sum + load(dv_of(b * parts_.chunks + chunk, part));
      store_from_float_n(backward_.dv, p_.dtype, at, sum, lanes);
    }
  }

  const AdditiveBackwardParams& backward_;
  const AdditiveParams& p_;
  const Parts parts_;
  const int64_t lists_;
  cpu::Workspace memory_;
  float *const dk_, *const dv_;
  int32_t *const finished_lists_, *const finished_chunks_;
};

}  // namespace

void additive_scores(const AdditiveParams& p) {
  cpu::parallel_items(ScoreTiles::items(p), threads_for(p), [&](cpu::ItemCounter& items) {
    ScoreTiles tiles(p);
    for (int64_t item; (item = items.next()) >= 0;) tiles.run(item);
  });
}

void additive_scores_backward(const AdditiveBackwardParams& p) {
  Gradients gradients(p, Parts(p.forward));
  cpu::parallel_items(gradients.items(), threads_for(p.forward), [&](cpu::ItemCounter& items) {
    FlushDenormals flush;
    Gradients::Worker worker(gradients);
    for (int64_t item; (item = items.next()) >= 0;) worker.run(item);
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
