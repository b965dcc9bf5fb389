#pragma once
#include "cpu/isa.h"
#include "linear/params.h"

namespace tokenmill {

// One number for each token and head, [B, S, H]; steps in elements, batch = 0 where packed.
struct TokenGates {
  float* data;
  int64_t batch, seq, head;
};

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
  float* workspace;                         // of the CUDA kernels
};

struct TitansBackwardParams {
  TitansParams forward;
  Rows dout;                  // null data: zeros
  States dmemory, dmomentum;  // of the last state; null: zeros
  Rows dq, dk, dv;            // in the dtype of q
  TokenGates dalpha, deta, dtheta;
  States dinitial_memory, dinitial_momentum;  // null: not wanted
};

// Of the CUDA kernels; shapes decide.
int64_t workspace_bytes(const TitansParams&);
int64_t workspace_bytes(const TitansBackwardParams&);

// null, or what went wrong
const char* launch_cuda(const TitansParams&, void* stream);
const char* launch_cuda(const TitansBackwardParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(titans_memory_forward, TitansParams)
TOKENMILL_CPU_KERNEL(titans_memory_backward, TitansBackwardParams)
