// Each token finds its nearest centroids and sums their values while they are in cache.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/parallel.h"
#include "tokens/cpu_nearest.h"
#include "tokens/reconstruct_tokens/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// Sorts a list by index instead of distance, and computes weights from distances.
void write_list(const ReconstructParams& p, const float* d, const int32_t* ids, int64_t row) {
  int32_t* const index = p.index + row * p.k;
  float* const weight = p.weight + row * p.k;
  std::vector<std::pair<int32_t, float>> entries(p.k);
  for (int64_t j = 0; j < p.k; ++j) entries[j] = {ids[j], d[j]};
  std::sort(entries.begin(), entries.end());
  float sum = 0;
  for (int64_t j = 0; j < p.k; ++j) {
    const vf t = set((d[0] - entries[j].second) * (p.tau * kLog2e));
    const float w = d[0] < kMaxDistance ? first(exp2<5>(t)) : __builtin_nanf("");
    index[j] = entries[j].first;
    weight[j] = w;
    sum += p.unit_norm ? w * w : w;
  }
  const float norm = p.unit_norm ? std::sqrt(sum) : sum;
  for (int64_t j = 0; j < p.k; ++j) weight[j] /= norm;
}

template <class Type>
void write_out(const ReconstructParams& p, Type e, int64_t b, int64_t row) {
  const int32_t* const index = p.index + row * p.k;
  const float* const weight = p.weight + row * p.k;
  for (int64_t c = 0; c < p.value_channels; c += kWidth) {
    const int64_t n = p.value_channels - c;
    vf sum = zero();
    for (int64_t j = 0; j < p.k; ++j) {
      const int64_t at = b * p.values_batch + index[j] * p.values_row + c;
      sum = fma(set(weight[j]), e.load_n(p.values, at, n), sum);
    }
    e.store_n(p.out, row * p.value_channels + c, sum, n);
  }
}

}  // namespace

void reconstruct_tokens(const ReconstructParams& p) {
  const int64_t work = p.batch * p.tokens * (p.clusters * p.channels + p.k * p.value_channels);
  const int threads = work < (1 << 16) ? 1 : cpu::num_threads();
  const int64_t chunk = NearestFinder::chunk_rows(p.tokens, p.channels, threads);
  const int64_t chunks = ceil_div(p.tokens, chunk), size = size_of(p.dtype);
  const RowSets sets{p.centroids, p.dtype,           p.batch,        p.clusters,
                     p.channels,  p.centroids_batch, p.centroids_row};
  for_screened_sets(
      sets, p.tokens, p.k, threads, [&](const RowSets& some, const Screen* screen, int64_t set) {
        cpu::parallel_items(some.batch * chunks, threads, [&](cpu::ItemCounter& counter) {
          FlushDenormals flush;
          NearestFinder finder(some, screen, chunk, p.k, true);
          std::vector<const char*> rows(chunk);
          for (int64_t item; (item = counter.next()) >= 0;) {
            const int64_t b = set + item / chunks, begin = item % chunks * chunk;
            const int64_t count = std::min(chunk, p.tokens - begin), row = b * p.tokens + begin;
            for (int64_t i = 0; i < count; ++i) {
              const int64_t at = b * p.features_batch + (begin + i) * p.features_row;
              rows[i] = static_cast<const char*>(p.features) + at * size;
            }
            finder.run(item / chunks, rows.data(), p.dtype, count);
            for (int64_t i = 0; i < count; ++i)
              write_list(p, finder.distance(i), finder.id(i), row + i);
            visit_elements(p.dtype, [&](auto e) {
              for (int64_t i = 0; i < count; ++i) write_out(p, e, b, row + i);
            });
          }
        });
      });
}

void reconstruct_tokens_backward(const ReconstructBackwardParams& p) {
  const int64_t work = p.batch * (p.tokens * p.k + p.clusters) * p.value_channels;
  const int threads = work < (1 << 16) ? 1 : cpu::num_threads();
  const int64_t width = round_up(p.value_channels, kWidth);
  cpu::parallel_items(p.batch * p.clusters, threads, [&](cpu::ItemCounter& counter) {
    FlushDenormals flush;
    cpu::Workspace memory(width);
    float* const sum = memory.take(width);
    for (int64_t item; (item = counter.next()) >= 0;) {
      const int64_t b = item / p.clusters, m = item % p.clusters;
      const int32_t* const offsets = p.offsets + b * (p.clusters + 1) + m;
      std::fill(sum, sum + width, 0.f);
      visit_elements(p.dtype, [&](auto e) {
        for (int64_t i = offsets[0]; i < offsets[1]; ++i) {
          const int64_t token = p.listed[b * p.tokens * p.k + i];
          const vf w = set(p.weight_of(b, token, m));
          const int64_t from = b * p.dout_batch + token * p.dout_row;
          for (int64_t c = 0; c < p.value_channels; c += kWidth) {
            const vf d = e.load_n(p.dout, from + c, p.value_channels - c);
            store(sum + c, fma(w, d, load(sum + c)));
          }
        }
        for (int64_t c = 0; c < p.value_channels; c += kWidth)
          e.store_n(p.dvalues, item * p.value_channels + c, load(sum + c), p.value_channels - c);
      });
    }
  });
}

}  // namespace tokenmill::TOKENMILL_ISA
