// Memory and grids of the kernels of delta_attention.
#pragma once
#include "cuda/launch.cuh"
#include "linear/delta_attention/kernel_chunk.cuh"

namespace tokenmill::cuda::delta_attention {

inline int64_t slots_of(const DeltaAttentionParams& p) {
  if (p.cu_seqlens) return ceil_div(p.seqlen, kTokens) + p.batch;
  return p.batch * ceil_div(p.seqlen, kTokens);
}

inline int64_t rows_in(const DeltaAttentionParams& p) {
  return p.cu_seqlens ? p.seqlen : p.batch * p.seqlen;
}

inline int64_t slices_of(const DeltaAttentionParams& p) { return ceil_div(p.value_dim, kColumns); }

inline int64_t chunk_blocks(const DeltaAttentionParams& p) { return slots_of(p) * p.heads; }
inline int64_t sweep_blocks(const DeltaAttentionParams& p) {
  return p.batch * p.heads * slices_of(p);
}

struct SizedScratch {
  Scratch scratch;
  int64_t floats;
};

// Calls fn.template operator()<T, kPerChannel, kCorrects>().
template <typename Fn>
const char* visit_rule(const DeltaAttentionParams& p, const Fn& fn) {
  return visit_dtype(p.dtype, [&]<typename T>() {
    if (!p.per_channel) return fn.template operator()<T, false, true>();
    return p.beta.data ? fn.template operator()<T, true, true>()
                       : fn.template operator()<T, true, false>();
  });
}

// Places in the workspace.
template <typename T>
SizedScratch scratch_of(const DeltaAttentionParams& p, bool backward) {
  SizedScratch sized{{slots_of(p)}, 0};
  Scratch& s = sized.scratch;
  const auto take = [&](int64_t floats) {
    float* const at = p.workspace + sized.floats;
    sized.floats += ceil_div(floats, 4) * 4;
    return at;
  };
  s.vectors = is_vectorizable<T>(p.q.data, p.head_dim, p.q.batch, p.q.seq, p.q.head) &&
              is_vectorizable<T>(p.k.data, p.head_dim, p.k.batch, p.k.seq, p.k.head);
  const int64_t owned = s.slots * p.heads, rows = rows_in(p) * p.heads;
  const bool corrects = p.beta.data;
  s.matrices = pair_matrices(corrects);
  s.pairs = take(owned * s.matrices * kTokens * kTokens);
  s.factors = take(owned * kFactorFloats);
  const int64_t channels = p.per_channel ? owned * kTokens * p.head_dim : 0;
  s.enters = take(channels);
  s.stays = take(channels);
  if (!backward) return sized;
  s.states = take(owned * p.head_dim * p.value_dim);
  s.dstates = take(owned * p.head_dim * p.value_dim);
  s.y = take(corrects ? rows * p.value_dim : 0);
  s.dy = take(corrects ? rows * p.value_dim : 0);
  s.dbeta = take(corrects ? slices_of(p) * rows : 0);
  s.dq = take(rows * p.head_dim);
  s.dk = take(rows * p.head_dim);
  return sized;
}

}  // namespace tokenmill::cuda::delta_attention
