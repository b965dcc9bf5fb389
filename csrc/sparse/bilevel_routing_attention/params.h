// Attention of the regions of a feature map to listed regions. Free of torch.
#pragma once
#include "cpu/isa.h"
#include "sparse/listed.h"
#include "sparse/regions.h"

namespace tokenmill {

// Pixel (y, x) of a map [B, Y, X, H, D] is row y * X + x. `seq` of its Rows is the stride of x, the
// `line` strides belong to y. lse is [B, H, Y, X].
struct BilevelParams : ListedAttention {  // without softcap
  RegionGrid queries, keys;               // same number of regions in both
  int64_t q_line, k_line, v_line, out_line;
  // Padding keys that extend listed regions to full size take part in the softmax, with logit 0 and
  // value 0. If false, there is no padding.
  bool pads_count;

  // Number of (query, key) pairs if lists are full.
  double max_pairs() const {
    const AttentionParams& p = attention;
    double seen = static_cast<double>(list.entries) * keys.pixels();
    if (seen > static_cast<double>(p.seqlen_k)) seen = static_cast<double>(p.seqlen_k);
    return seen * static_cast<double>(p.batch * p.heads * p.seqlen_q);
  }
};

struct BilevelBackwardParams {
  BilevelParams forward;  // includes out and lse
  Rows dout;
  int64_t dout_line;
  const float* dlse;  // layout of lse, or null
  Rows dq, dk, dv;    // contiguous, dtype of q
  // CUDA: as in BlockSparseBackwardParams
  const int32_t *offsets, *rows;
  void* workspace;
};

// null, or an error message
const char* launch_cuda(const BilevelParams&, void* stream);
const char* launch_cuda(const BilevelBackwardParams&, void* stream);
int64_t workspace_bytes(const BilevelBackwardParams&);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(bilevel_routing_attention_forward, BilevelParams)
TOKENMILL_CPU_KERNEL(bilevel_routing_attention_backward, BilevelBackwardParams)
