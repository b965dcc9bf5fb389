// Bound by the memory traffic of the keys: the columns of a head stay in registers over the tokens
// of a block.
#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/workspace.h"
#include "select/block_pool_keys/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

constexpr int kColumns = kWidth == 16 ? 8 : 4;  // vectors; there are twice as many accumulators
constexpr float kInfinity = __builtin_inff();

// Memory to prefetch: `step` bytes per pooled row.
struct Ahead {
  const char* from;
  int64_t step;
};

// Columns c .. c + N * kWidth - 1 (N = 1: up to kWidth of them) of one head over the rows, which
// are at rows[t] + head.
template <DType kType, bool kMean, int N>
TM_INLINE void pool_columns(const PoolParams& p, const int64_t* rows, int64_t count, int64_t head,
                            const Ahead& ahead, void* out, int64_t c) {
  const int64_t n = N == 1 ? std::min<int64_t>(kWidth, p.head_dim - c) : kWidth;
  vf low[N], high[N], nan[N];
  TM_UNROLL(8)
  for (int j = 0; j < N; ++j) {
    low[j] = set(kMean ? 0 : kInfinity);
    high[j] = set(-kInfinity);
    nan[j] = zero();
  }
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t byte = 0; byte < ahead.step; byte += 64)
      __builtin_prefetch(ahead.from + t * ahead.step + byte, 0, 2);
    TM_UNROLL(8)
    for (int j = 0; j < N; ++j) {
      const vf x = Elements<kType>::load_n(p.k.data, rows[t] + head + c + j * kWidth, n);
      if constexpr (kMean) {
        low[j] = low[j] + x;
      } else {
        low[j] = min_of(x, low[j]);
        high[j] = max_of(x, high[j]);
        nan[j] = select(equal(x, x), nan[j], x);
      }
    }
  }
  const vf divisor = set(static_cast<float>(std::max<int64_t>(count, 1)));
  TM_UNROLL(8)
  for (int j = 0; j < N; ++j) {
    const int64_t column = c + j * kWidth;
    if constexpr (kMean) {
      Elements<kType>::store_n(out, column, low[j] / divisor, n);
    } else {
      const vm number = equal(nan[j], nan[j]);
      if (p.mode == PoolMode::minmax)
        Elements<kType>::store_n(out, column, select(number, low[j], nan[j]), n);
      Elements<kType>::store_n(out, p.out_half + column, select(number, high[j], nan[j]), n);
    }
  }
}

template <DType kType, bool kMean>
void pool_block(const PoolParams& p, int64_t b, int64_t block, const int64_t* rows, int64_t count) {
  using Element = typename Elements<kType>::type;
  // Each head prefetches a share of the next block, so that memory is read in order: hardware
  // prefetchers do not follow the rows of a head across pages.
  const bool in_order = !p.k.table && p.kv_heads * p.head_dim == p.k.seq && count > 0;
  const int64_t step = in_order ? p.head_dim * static_cast<int64_t>(sizeof(Element)) : 0;
  const int64_t next = in_order ? rows[0] + p.block * p.k.seq : 0;
  for (int64_t h = 0; h < p.kv_heads; ++h) {
    Element* const out =
        static_cast<Element*>(p.out) + b * p.out_batch + block * p.out_block + h * p.out_head;
    const Element* const from = static_cast<const Element*>(p.k.data) + next;
    Ahead ahead{reinterpret_cast<const char*>(from) + h * count * step, step};
    int64_t c = 0;
    for (; c + kColumns * kWidth <= p.head_dim; c += kColumns * kWidth, ahead.step = 0)
      pool_columns<kType, kMean, kColumns>(p, rows, count, h * p.k.head, ahead, out, c);
    for (; c < p.head_dim; c += kWidth, ahead.step = 0)
      pool_columns<kType, kMean, 1>(p, rows, count, h * p.k.head, ahead, out, c);
  }
}

}  // namespace

void block_pool_keys(const PoolParams& p) {
  // Below about 128 Ki elements a parallel region costs more than it gains.
  const int64_t elements = p.batch * p.k.rows * p.kv_heads * p.head_dim;
  const int threads = p.start || elements < (1 << 17) ? 1 : cpu::num_threads();
  // An item is a run of blocks with at least 64 tokens.
  const int64_t each = ceil_div(64, p.block), runs = ceil_div(p.blocks, each);
  const int64_t maximum = std::min(p.block, p.k.rows);
  cpu::parallel_items(p.batch * runs, threads, [&](cpu::ItemCounter& items) {
    cpu::Workspace memory(2 * maximum);
    int64_t* const rows = reinterpret_cast<int64_t*>(memory.take(2 * maximum));
    for (int64_t item; (item = items.next()) >= 0;) {
      const int64_t b = item / runs;
      const PoolBlocks blocks = pool_blocks(p, b);
      const int64_t first = std::max(item % runs * each, blocks.begin);
      const int64_t last = std::min((item % runs + 1) * each, blocks.end);
      for (int64_t block = first; block < last; ++block) {
        const int64_t end = std::min((block + 1) * p.block, blocks.length);
        int64_t count = 0;
        for (int64_t t = block * p.block; t < end;) {
          const KeyRun run = key_run(p.k, b, t);
          for (int64_t i = 0; t < std::min(run.end, end); ++t, ++i)
            rows[count++] = run.offset + i * p.k.seq;
        }
        visit_elements(p.dtype, [&]<DType kType>(Elements<kType>) {
          if (p.mode == PoolMode::mean)
            pool_block<kType, true>(p, b, block, rows, count);
          else
            pool_block<kType, false>(p, b, block, rows, count);
        });
      }
    }
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
