// The recurrence that forward and backward are made of:
//   S_t = exp(decay_t) S_{t-1} + k_t^T v_t,  out_t = scale q_t S_t,
// run forwards or, with reversed tokens, backwards.
#pragma once
#include "linear/linear_attention/params.h"

namespace tokenmill::cuda::linear_attention {

struct Operand {
  Rows rows;
  int dim;
  int group;  // heads of the recurrence that share one of the operand
  FeatureMap map;
};

// State of a head: element (feature, column) is feature_step x feature + column_step x column on.
struct StateRows {
  float* data;
  int64_t sequence, head, feature_step, column_step;
};

// A feature beyond those of queries and keys: given for one side, 1 on the other.
enum class Extra : int32_t { none, queries, keys };

constexpr int kSegment = 256;  // tokens from one saved state to the next

struct Recurrence {
  int64_t batch, heads, seqlen;  // as in LinearAttentionParams
  const int32_t* cu_seqlens;
  DType dtype;
  Operand q, k, v;
  int columns;  // of the state
  Rows out;
  bool out_float;  // whatever the dtype
  float scale;
  bool scale_keys;  // not queries: the state holds the scale

  bool no_diagonal;   // a token does not see itself
  bool taylor;        // taylor2 on q and k
  bool key_factors;   // of taylor2: k has those that depend on the scale, not q
  bool value_taylor;  // columns are the features taylor2 of v
  bool value_factors;
  bool normalize;
  float* normalizer;
  LogDecay decay;
  StateRows initial, final;
  Extra extra;
  const float* extra_data;  // as the normaliser
  float* saved;  // [segments of all sequences, H, slices], slots: states at the ends of segments
  float* workspace;
};

// Of a recurrence, in floats; the current device decides.
int64_t workspace_floats(const Recurrence&);
const char* launch_recurrence(const Recurrence&, bool reverse, void* stream);

}  // namespace tokenmill::cuda::linear_attention
