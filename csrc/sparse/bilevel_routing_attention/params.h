// Attention of the regions of a map to listed regions. Free of torch.
#pragma once
#include "cpu/isa.h"
#include "sparse/listed.h"
#include "sparse/regions.h"

namespace tokenmill {

// Pixel (y, x) of a map [B, Y, X, H, D] is row y * X + x: `seq` of its Rows leads from x to x + 1,
// and what is called a line here from y to y + 1. lse is [B, H, Y, X].
struct BilevelParams : ListedAttention {  // without softcap
  RegionGrid queries, keys;               // as many regions in both
  int64_t q_line, k_line, v_line, out_line;
  // Keys that fill up listed regions to the size of a whole one count, with a logit and a value of
  // 0. If not, they do not exist.
  bool pads_count;

  // Pairs of a query and a key, if lists are full.
  double most_pairs() const {
    const AttentionParams& p = attention;
    double seen = static_cast<double>(list.entries) * keys.pixels();
    if (seen > static_cast<double>(p.seqlen_k)) seen = static_cast<double>(p.seqlen_k);
    return seen * static_cast<double>(p.batch * p.heads * p.seqlen_q);
  }
};

struct BilevelBackwardParams {
  BilevelParams forward;  // out and lse as the forward left them
  Rows dout;
  int64_t dout_line;
  const float* dlse;  // like lse, or null
  Rows dq, dk, dv;    // contiguous, in the dtype of q
  // CUDA: as in BlockSparseBackwardParams
  const int32_t *offsets, *rows;
  void* workspace;
};

// null, or what went wrong
const char* launch_cuda(const BilevelParams&, void* stream);
const char* launch_cuda(const BilevelBackwardParams&, void* stream);
int64_t workspace_bytes(const BilevelBackwardParams&);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(bilevel_routing_attention_forward, BilevelParams)
TOKENMILL_CPU_KERNEL(bilevel_routing_attention_backward, BilevelBackwardParams)
