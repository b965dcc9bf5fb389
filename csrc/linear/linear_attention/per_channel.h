// Decays per channel: linear_attention is the recurrence of delta_attention without its correction,
// whose kernels keep the decays inside the products of pairs.
#pragma once
#include "linear/delta_attention/params.h"
#include "linear/linear_attention/params.h"

namespace tokenmill {

inline TokenGates gates_of(const LogDecay& x) { return {x.data, x.batch, x.seq, x.head}; }

inline DeltaAttentionParams without_correction(const LinearAttentionParams& p) {
  DeltaAttentionParams d{};
  d.batch = p.batch;
  d.heads = d.key_heads = p.heads;
  d.seqlen = p.seqlen;
  d.head_dim = p.head_dim;
  d.value_dim = p.value_dim;
  d.dtype = p.dtype;
  d.scale = p.scale;
  d.q = p.q;
  d.k = p.k;
  d.v = p.v;
  d.out = p.out;
  d.log_decay = gates_of(p.decay);
  d.per_channel = true;
  d.initial = p.initial;
  d.final = p.final;
  d.cu_seqlens = p.cu_seqlens;
  d.workspace = p.workspace;
  return d;
}

inline DeltaAttentionBackwardParams without_correction(const LinearAttentionBackwardParams& p) {
  DeltaAttentionBackwardParams d{};
  d.forward = without_correction(p.forward);
  d.dout = p.dout;
  d.dfinal = p.dfinal;
  d.dq = p.dq;
  d.dk = p.dk;
  d.dv = p.dv;
  d.dlog_decay = gates_of(p.ddecay);
  d.dinitial = p.dinitial;
  return d;
}

}  // namespace tokenmill
