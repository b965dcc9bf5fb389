// Parts of the sequences of a recurrence, and its launch.
#pragma once
#include "cuda/launch.cuh"
#include "linear/linear_attention/kernel_shape.cuh"

namespace tokenmill::cuda::linear_attention {

// Minimum tokens per part: fewer do not pay for a CTA and a state.
constexpr int64_t kMinTokens = 256;
// Maximum parts of a sequence that are chained, each waiting for the state of the previous part.
// More parts are scanned by a separate launch, because the round trips of states to L2 add up in a
// chain.
constexpr int64_t kMaxChained = 5;
constexpr int64_t kMaxRecurrenceLength = int64_t{1} << 29;

inline int bucket_of(const Recurrence& p) {
  const int dim = p.q.dim;
  return p.taylor || dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}

// True if the state does not fit in the accumulators (RecurrenceShape::kSteps).
inline bool in_steps(const Recurrence& p) { return p.taylor || bucket_of(p) > 128; }

// Same as RecurrenceShape::kChains.
inline bool has_chains(const Recurrence& p) {
  return !in_steps(p) && (p.dtype != DType::float32 || bucket_of(p) <= 64);
}

// Calls visit.operator()<T, kBucket, kTaylor>() for the instance.
template <typename T, typename Visit>
auto visit_instance(const Recurrence& p, const Visit& visit) {
  if (p.taylor) return visit.template operator()<T, 64, true>();
  switch (bucket_of(p)) {
    case 64:
      return visit.template operator()<T, 64, false>();
    case 128:
      return visit.template operator()<T, 128, false>();
    default:
      return visit.template operator()<T, 256, false>();
  }
}

template <typename Shape>
int shared_bytes(const Recurrence& p, int warps, int stages) {
  return static_cast<int>(sizeof(SharedVectors<Shape::kTokens>)) + Shape::kWeightBytes +
         (Shape::kTaylor ? 2 * Shape::kFeatureBytes : 0) +
         stages * Shape::stage_bytes(warps, p.value_taylor);
}

// Warps per CTA: for 64 columns of V, or for 128 if there are more and a stage of them fits.
inline int warps_of(const Recurrence& p) {
  if (p.columns <= kSubtileColumns) return 4;
  const int bytes = visit_dtype(p.dtype, [&]<typename Element>() {
    return visit_instance<Element>(p, [&]<typename T, int kBucket, bool kTaylor>() {
      return shared_bytes<RecurrenceShape<T, kBucket, kTaylor>>(p, 8, 1);
    });
  });
  return bytes <= shared_limit() ? 8 : 4;
}

// Splits sequences into parts of at least this many tokens.
inline void set_parts(RecurrencePlan& plan, const Recurrence& p, int64_t tokens) {
  tokens = round_up(tokens < kMinTokens ? kMinTokens : tokens, 64);
  plan.tokens_per_part = static_cast<int>(tokens < p.seqlen ? tokens : round_up(p.seqlen + 64, 64));
  plan.parts = p.cu_seqlens || p.seqlen == 0 ? 1 : ceil_div(p.seqlen, plan.tokens_per_part);
  plan.all_parts = p.cu_seqlens ? p.seqlen / plan.tokens_per_part + p.batch : p.batch * plan.parts;
  plan.blocks = (plan.all_parts + (p.cu_seqlens ? 1 : 0)) * p.heads * plan.slices;
  plan.from_workspace = tokens < p.seqlen;
  plan.chained = plan.from_workspace && has_chains(p) && ceil_div(p.seqlen, tokens) <= kMaxChained;
}

// Instance-independent part of the plan, from shapes only.
inline RecurrencePlan plan_recurrence(const Recurrence& p) {
  RecurrencePlan plan{};
  plan.warps = warps_of(p);
  plan.slices = static_cast<int>(ceil_div(p.columns, plan.warps * kColumnsPerWarp));
  plan.features = p.taylor
                      ? static_cast<int>(round_up(feature_dim(FeatureMap::taylor2, p.q.dim), 64))
                      : bucket_of(p);
  const int columns = plan.warps * kColumnsPerWarp;
  plan.tail = plan.features > columns ? plan.features : columns;
  plan.slot_floats = int64_t{plan.features} * columns + plan.tail + 4;
  plan.segments = p.cu_seqlens ? p.seqlen / kSegment + p.batch
                               : p.batch * ceil_div(p.seqlen, int64_t{kSegment});
  const int64_t blocks = p.heads * plan.slices, wanted = 2 * multiprocessors();
  const int64_t sequences = p.cu_seqlens ? 1 : p.batch;
  int64_t tokens = p.seqlen;
  if (p.batch * blocks < wanted) tokens = ceil_div(sequences * p.seqlen * blocks, wanted);
  set_parts(plan, p, tokens);
  return plan;
}

// sm_90a plan, with one CTA per SM: at most as many parts as run concurrently. Packed, each
// sequence may end with a short part. There are no more parts than in plan_recurrence, which sizes
// the workspace.
inline RecurrencePlan plan_sm90(const Recurrence& p) {
  RecurrencePlan plan = plan_recurrence(p);
  const int64_t at_once = multiprocessors() / (p.heads * plan.slices);
  const int64_t full = p.cu_seqlens ? at_once - p.batch : at_once / p.batch;
  set_parts(plan, p, full > 0 ? ceil_div(p.seqlen, full) : p.seqlen);
  plan.chained = false;
  return plan;
}

// Compiled once for each element type (kernel.cu).
template <typename T>
const char* launch_recurrence(const Recurrence& p, const RecurrencePlan& plan, cudaStream_t stream);

}  // namespace tokenmill::cuda::linear_attention
