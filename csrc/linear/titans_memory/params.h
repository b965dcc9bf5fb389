#pragma once
#include "cpu/isa.h"
#include "linear/params.h"

namespace tokenmill {

struct TitansParams {
  int64_t batch, heads;  // batch counts sequences
  int64_t seqlen;        // packed: all tokens
  int64_t head_dim, value_dim;
  int64_t chunk_size;  // at most max(seqlen, 1)
  DType dtype;
  Rows q, k, v, out;
  TokenGates alpha, eta, theta;
  States initial_memory, initial_momentum;  // null: zeros
  States memory, momentum;                  // after the last token; null: not wanted
  const int32_t* cu_seqlens;                // [B + 1], null unless packed
  float* workspace;                         // CUDA only
};

struct TitansBackwardParams {
  TitansParams forward;
  Rows dout;                  // null data: zeros
  States dmemory, dmomentum;  // gradients of the last state; null: zeros
  Rows dq, dk, dv;            // dtype of q
  TokenGates dalpha, deta, dtheta;
  States dinitial_memory, dinitial_momentum;  // null: not wanted
};

// CUDA workspace; depends on shapes only.
int64_t workspace_bytes(const TitansParams&);
int64_t workspace_bytes(const TitansBackwardParams&);

// null, or an error message
const char* launch_cuda(const TitansParams&, void* stream);
const char* launch_cuda(const TitansBackwardParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(titans_memory_forward, TitansParams)
TOKENMILL_CPU_KERNEL(titans_memory_backward, TitansBackwardParams)
