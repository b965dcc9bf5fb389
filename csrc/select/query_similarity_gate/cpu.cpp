#include <cmath>

#include "cpu/simd.h"
#include "select/query_similarity_gate/params.h"

namespace tokenmill::TOKENMILL_ISA {
namespace {

// Sum over the tokens for kWidth elements. The cosine does not depend on the norm of a vector.
TM_INLINE vf sum_tokens(const SimilarityGateParams& p, int which, int64_t b, int64_t h, int64_t d) {
  const Rows& r = p.rows[which];
  vf sum = zero();
  for (int64_t t = 0; t < p.lengths[which]; ++t)
    sum = sum + load_as_float_n(r.data, p.dtype, b * r.batch + t * r.seq + h * r.head + d,
                                p.head_dim - d);
  return sum;
}

}  // namespace

void query_similarity_gate(const SimilarityGateParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    double dot = 0, norm = 0, norm_ref = 0;
    for (int64_t h = 0; h < p.heads; ++h)
      for (int64_t d = 0; d < p.head_dim; d += kWidth) {
        const vf x = sum_tokens(p, 0, b, h, d), y = sum_tokens(p, 1, b, h, d);
        dot += sum_lanes(x * y);
        norm += sum_lanes(x * x);
        norm_ref += sum_lanes(y * y);
      }
    p.out[b] = dot / (std::sqrt(norm) * std::sqrt(norm_ref)) >= p.threshold;
  }
}

}  // namespace tokenmill::TOKENMILL_ISA
