// Parameters shared by the operators of linear attention.
#pragma once
#include "core/dtype.h"
#include "core/rows.h"

namespace tokenmill {

// Applied to queries and keys. taylor2 keeps moments of the keys, (1, k_i, k_i k_j for i <= j), and
// applies the factors to the query: its state does not depend on the scale.
enum class FeatureMap : int32_t { identity, elu1, relu, silu, taylor2 };
constexpr int64_t kMaxTaylorHeadDim = 32;

// Natural log of the decay of the state from one token to the next: none (null), per head (strides
// batch = seq = 0) or per token. Strides in elements.
struct LogDecay {
  float* data;
  int64_t batch, seq, head;
  bool per_token;
  bool per_channel;  // contiguous numbers for each row of the state
};

// One number per token and head, [B, S, H]; strides in elements, batch = 0 if packed.
struct TokenGates {
  float* data;
  int64_t batch, seq, head;
};

// [N, H, F, Dv], with a normalizer [N, H, F, Dv + 1]: each head is contiguous.
struct States {
  float* data;
  int64_t sequence, head;
};

TOKENMILL_HOST_DEVICE constexpr int64_t feature_dim(FeatureMap map, int64_t head_dim) {
  return map == FeatureMap::taylor2 ? 1 + head_dim + head_dim * (head_dim + 1) / 2 : head_dim;
}

// Added to the normalizer.
constexpr float kNormalizerEpsilon = 1e-6f;

// Added to the sum of squares that normalizes q and k of the delta rule.
constexpr float kL2NormEpsilon = 1e-6f;

}  // namespace tokenmill
