#include "cuda/choose.h"
#include "cuda/refuse.cuh"
#include "linear/linear_attention/cuda_plan.cuh"
#include "linear/linear_attention/kernels.h"
#include "linear/linear_attention/launch_sm90.h"
#include "linear/linear_attention/per_channel.h"

namespace tokenmill {
namespace cuda::linear_attention {
namespace {

constexpr int kAhead = 4;  // loads in flight

// Turns the states computed from each part separately into the states at the end of each part of a
// sequence.
__global__ void __launch_bounds__(kMaxThreads)
    recurrence_scan_kernel(const __grid_constant__ Recurrence p,
                           const __grid_constant__ RecurrencePlan plan) {
  const int64_t b = blockIdx.z, head_slice = blockIdx.y;
  int64_t first = b * plan.parts;
  int length = static_cast<int>(p.seqlen);
  if (p.cu_seqlens) {
    const PackedRows rows = rows_of_sequence(p.cu_seqlens, p.batch, p.seqlen, b);
    first = first_slot(rows, b, plan.tokens_per_part);
    length = rows.length;
  }
  const int64_t end = first + (length + plan.tokens_per_part - 1) / plan.tokens_per_part - 1;
  if (first + 1 >= end) return;  // the first part's own state is already final
  const int64_t step = p.heads * plan.slices * plan.slot_floats;
  const int64_t total = plan.slot_floats - 4;
  const int64_t used = p.normalize || p.extra != Extra::none ? total : total - plan.tail;
  float* const slots = p.workspace + head_slice * plan.slot_floats;
  for (int64_t i = 4 * (blockIdx.x * int64_t{kMaxThreads} + threadIdx.x); i < used;
       i += int64_t{4} * kMaxThreads * gridDim.x) {
    float4 sum = *reinterpret_cast<const float4*>(slots + first * step + i);
    for (int64_t part = first + 1; part < end; part += kAhead) {
      float4 x[kAhead];
      float decay[kAhead];
#pragma unroll
      for (int n = 0; n < kAhead; ++n) {
        const float* const slot = slots + (part + n < end ? part + n : part) * step;
        x[n] = *reinterpret_cast<const float4*>(slot + i);
        decay[n] = slot[total];
      }
#pragma unroll
      for (int n = 0; n < kAhead; ++n) {
        if (part + n == end) break;
        sum = {fmaf(decay[n], sum.x, x[n].x), fmaf(decay[n], sum.y, x[n].y),
               fmaf(decay[n], sum.z, x[n].z), fmaf(decay[n], sum.w, x[n].w)};
        *reinterpret_cast<float4*>(slots + (part + n) * step + i) = sum;
      }
    }
  }
}

Recurrence forward_of(const LinearAttentionParams& p) {
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  const int group = static_cast<int>(p.heads / p.kv_heads);
  const bool taylor = p.map == FeatureMap::taylor2;
  const FeatureMap map = taylor ? FeatureMap::identity : p.map;
  const auto state = [&](const States& s) {
    return StateRows{s.data, s.sequence, s.head, p.value_dim + p.normalize, 1};
  };
  Recurrence r{};
  r.batch = p.batch;
  r.heads = p.heads;
  r.seqlen = p.seqlen;
  r.cu_seqlens = p.cu_seqlens;
  r.dtype = p.dtype;
  r.q = {p.q, head_dim, 1, map};
  r.k = {p.k, head_dim, group, map};
  r.v = {p.v, value_dim, group, FeatureMap::identity};
  r.columns = value_dim;
  r.out = p.out;
  r.scale = p.scale;
  r.taylor = taylor;
  r.normalize = p.normalize;
  r.normalizer = p.normalizer;
  r.decay = p.decay;
  r.initial = state(p.initial);
  r.final = state(p.final);
  r.workspace = p.workspace;
  return r;
}

// For parts that are not chained: a first launch computes their separate states.
template <typename Launch>
const char* launch_all_parts(const Recurrence& p, RecurrencePlan plan, cudaStream_t stream,
                             const Launch& launch_parts) {
  if (plan.from_workspace && !plan.chained) {
    plan.states_only = true;
    if (const char* error = launch_parts(plan)) return error;
    plan.states_only = false;
    const dim3 grid(static_cast<unsigned>(ceil_div(plan.slot_floats, int64_t{4} * kMaxThreads)),
                    static_cast<unsigned>(p.heads * plan.slices), static_cast<unsigned>(p.batch));
    if (const char* error = launch<recurrence_scan_kernel>(grid, kMaxThreads, 0, stream, p, plan))
      return error;
  }
  return launch_parts(plan);
}

}  // namespace

int64_t workspace_floats(const Recurrence& p) {
  const RecurrencePlan plan = plan_recurrence(p);
  if (!in_steps(p) && !plan.from_workspace) return 0;
  const int64_t slots = plan.all_parts * p.heads * plan.slices;
  return slots * plan.slot_floats + (plan.chained ? slots + 1 : 0);
}

const char* launch_recurrence(const Recurrence& p, bool reverse, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (p.batch == 0 || p.heads == 0) return nullptr;
  if (p.seqlen >= kMaxRecurrenceLength)
    return refuse("q", "must have fewer than 2^29 tokens on CUDA", p.seqlen);
  RecurrencePlan plan = plan_recurrence(p);
  plan.reverse = reverse;
  const auto launch_parts = [&](const RecurrencePlan& plan) {
    return visit_dtype(p.dtype,
                       [&]<typename T>() { return launch_recurrence<T>(p, plan, stream); });
  };
  if (plan.chained) {
    const int64_t slots = plan.all_parts * p.heads * plan.slices;
    plan.begun = reinterpret_cast<unsigned*>(p.workspace + slots * plan.slot_floats);
    plan.arrived = plan.begun + 1;
    if (const char* error = set_bytes(plan.begun, 0, (slots + 1) * sizeof(unsigned), stream))
      return error;
  }
  return launch_all_parts(p, plan, stream, launch_parts);
}

const char* launch_on_sm80(const LinearAttentionParams& p, void* stream) {
  return launch_recurrence(forward_of(p), false, stream);
}

#if defined(TOKENMILL_SM90)
const char* launch_on_sm90(const LinearAttentionParams& p, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const Recurrence r = forward_of(p);
  return launch_all_parts(r, plan_sm90(r), stream, [&](const RecurrencePlan& plan) {
    return p.dtype == DType::float16 ? launch_sm90<__half>(r, plan, stream)
                                     : launch_sm90<__nv_bfloat16>(r, plan, stream);
  });
}
#endif

}  // namespace cuda::linear_attention

int64_t workspace_bytes(const LinearAttentionParams& p) {
  if (p.batch == 0 || p.heads == 0) return 0;
  if (p.decay.per_channel) return workspace_bytes(without_correction(p));
  return 4 * cuda::linear_attention::workspace_floats(cuda::linear_attention::forward_of(p));
}

const char* launch_cuda(const LinearAttentionParams& p, void* stream) {
  if (p.batch == 0 || p.heads == 0) return nullptr;
  if (p.seqlen >= cuda::linear_attention::kMaxRecurrenceLength)
    return cuda::refuse("q", "must have fewer than 2^29 tokens on CUDA", p.seqlen);
  return cuda::launch_first(kernels_of(p), p, stream);
}

}  // namespace tokenmill
