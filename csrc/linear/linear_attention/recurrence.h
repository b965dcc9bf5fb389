// Recurrence from which forward and backward are built:
//   S_t = exp(decay_t) S_{t-1} + k_t^T v_t,  out_t = scale q_t S_t,
// run forwards or, with reversed tokens, backwards.
#pragma once
#include "linear/linear_attention/params.h"

namespace tokenmill::cuda::linear_attention {

struct Operand {
  Rows rows;
  int dim;
  int group;  // heads of the recurrence per head of the operand
  FeatureMap map;
};

// State of a head: element (feature, column) is at feature_step x feature + column_step x column.
struct StateRows {
  float* data;
  int64_t sequence, head, feature_step, column_step;
};

// One feature in addition to the features of q and k: given for one side, 1 on the other.
enum class Extra : int32_t { none, queries, keys };

constexpr int kSegment = 256;  // tokens between saved states

struct Recurrence {
  int64_t batch, heads, seqlen;  // as in LinearAttentionParams
  const int32_t* cu_seqlens;
  DType dtype;
  Operand q, k, v;
  int columns;  // columns of the state
  Rows out;
  bool out_float;  // out is float32, whatever the dtype
  float scale;
  bool scale_keys;  // applies the scale to keys instead of queries: the state includes it

  bool split_state;   // 16 bits: states enter and leave products with twice the digits
  bool no_diagonal;   // strictly causal: a token does not see itself
  bool taylor;        // taylor2 on q and k
  bool key_factors;   // taylor2: the scale-dependent factors are applied to k instead of q
  bool value_taylor;  // the columns are the taylor2 features of v
  bool value_factors;
  bool normalize;
  float* normalizer;
  LogDecay decay;
  StateRows initial, final;
  Extra extra;
  const float* extra_data;  // layout of the normalizer
  float* saved;  // [segments of all sequences, H, slices] slots: states at the ends of segments
  float* workspace;
};

// Workspace of a recurrence in floats; depends on the current device.
int64_t workspace_floats(const Recurrence&);
const char* launch_recurrence(const Recurrence&, bool reverse, void* stream);

}  // namespace tokenmill::cuda::linear_attention
