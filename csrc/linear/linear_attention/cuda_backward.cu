// The backward is three recurrences. With y the sums before normalization, w the decays between two
// tokens and phi the feature map:
//
//   dphi(q)_i = sum of w (dy_i . v_j) phi(k)_j over j <= i       forwards, transposed state
//   dphi(k)_j = sum of w (v_j . dy_i) phi(q)_i over i >= j       backwards, transposed state
//   dv_j      = sum of w (phi(k)_j . phi(q)_i) dy_i over i >= j  backwards
//
// The normalizer's column of ones is an extra feature of the first two.
#include "cuda/refuse.cuh"
#include "linear/linear_attention/cuda_plan.cuh"
#include "linear/linear_attention/kernel_backward.cuh"
#include "linear/linear_attention/per_channel.h"

namespace tokenmill {
namespace cuda::linear_attention {
namespace {

// Bump allocator on the workspace; with a null base it only measures the size.
class Allocator {
 public:
  explicit Allocator(float* base) : base_(base) {}
  float* take(int64_t floats) {
    float* const at = base_ ? base_ + used_ : nullptr;
    used_ += round_up(floats, 32);
    return at;
  }
  int64_t used() const { return used_; }

 private:
  float* base_;
  int64_t used_ = 0;
};

struct Backward {
  LinearAttentionBackwardParams p;
  BackwardPlan plan{};
  Recurrence to_queries{}, to_keys{}, to_values{};
  int64_t floats = 0;

  explicit Backward(const LinearAttentionBackwardParams& params) : p(params) {
    const LinearAttentionParams& f = p.forward;
    Allocator workspace(f.workspace);
    const int64_t size = f.dtype == DType::float32 ? 4 : 2;
    const bool plain = f.map == FeatureMap::identity && !p.ddecay.data;
    plan.tokens = f.cu_seqlens ? f.seqlen : f.batch * f.seqlen;
    plan.group = static_cast<int>(f.heads / f.kv_heads);
    plan.taylor = f.map == FeatureMap::taylor2;
    plan.features = static_cast<int>(feature_dim(f.map, f.head_dim));
    const int64_t rows = plan.tokens * f.heads;
    if (f.normalize || !p.dout.data)
      plan.dy_zero = workspace.take(rows * f.value_dim * size / 4 + 1);
    if (f.normalize) plan.dz = workspace.take(rows);
    in_workspace_ = {!plain, !plain || plan.group > 1, plan.group > 1};
    if (in_workspace_[0]) plan.dq = workspace.take(rows * plan.features);
    if (in_workspace_[1]) plan.dk = workspace.take(rows * plan.features);
    if (in_workspace_[2]) plan.dv = workspace.take(rows * f.value_dim);
    set_recurrences();
    const RecurrencePlan saved = plan_recurrence(to_queries);
    plan.segments = saved.segments;
    plan.slices = saved.slices;
    plan.slot_floats = saved.slot_floats;
    const int64_t columns = saved.warps * kColumnsPerWarp;
    plan.state_floats = saved.features * columns;
    plan.tail_floats = f.normalize ? columns : 0;
    if (p.ddecay.data) {
      const int64_t states = plan.segments * f.heads * plan.slices * plan.slot_floats;
      plan.forward_states = workspace.take(states);
      plan.backward_states = workspace.take(states);
      plan.change = workspace.take(rows);
      plan.diagonal = workspace.take(rows);
      to_queries.no_diagonal = to_keys.no_diagonal = true;
      plan.partial = workspace.take(plan.segments * f.heads);
      to_queries.saved = plan.forward_states;
      to_keys.saved = plan.backward_states;
    }
    int64_t maximum = 0;
    for (const Recurrence* r : {&to_queries, &to_keys, &to_values})
      if (const int64_t n = workspace_floats(*r); n > maximum) maximum = n;
    float* const states = workspace.take(maximum);
    for (Recurrence* r : {&to_queries, &to_keys, &to_values}) r->workspace = states;
    floats = workspace.used();
  }

 private:
  // Rows [tokens, H, dim] of the workspace.
  Rows workspace_rows(float* data, int64_t dim) const {
    const LinearAttentionParams& f = p.forward;
    return {data, f.cu_seqlens ? 0 : f.seqlen * f.heads * dim, f.heads * dim, dim};
  }

  void set_recurrences() {
    const LinearAttentionParams& f = p.forward;
    const int head_dim = static_cast<int>(f.head_dim), value_dim = static_cast<int>(f.value_dim);
    const FeatureMap map = plan.taylor ? FeatureMap::identity : f.map;
    const Rows dy_rows = plan.dy_zero || f.normalize || !p.dout.data
                             ? workspace_rows(plan.dy_zero, value_dim)
                             : p.dout;
    const Operand q{f.q, head_dim, 1, map}, k{f.k, head_dim, plan.group, map};
    const Operand v{f.v, value_dim, plan.group, FeatureMap::identity};
    plan.dy = dy_rows;
    const Operand dy{dy_rows, value_dim, 1, FeatureMap::identity};
    const int64_t columns = value_dim + f.normalize;
    const auto straight = [&](const States& s) {
      return StateRows{s.data, s.sequence, s.head, columns, 1};
    };
    const auto transposed = [&](const States& s) {
      return StateRows{s.data, s.sequence, s.head, 1, columns};
    };
    Recurrence r{};
    r.batch = f.batch;
    r.heads = f.heads;
    r.seqlen = f.seqlen;
    r.cu_seqlens = f.cu_seqlens;
    r.dtype = f.dtype;
    r.scale = f.scale;
    r.decay = f.decay;

    to_queries = to_keys = to_values = r;
    for (Recurrence* x : {&to_queries, &to_keys}) {
      x->columns = plan.features;
      x->value_taylor = plan.taylor;
      x->extra_data = plan.dz;
    }
    to_keys.scale_keys = to_values.scale_keys = true;
    to_queries.q = dy;
    to_queries.k = v;
    to_queries.v = k;
    to_queries.out_float = in_workspace_[0];
    to_queries.out = in_workspace_[0] ? workspace_rows(plan.dq, plan.features) : p.dq;
    to_queries.initial = transposed(f.initial);
    if (f.normalize) to_queries.extra = Extra::queries;

    to_keys.q = v;
    to_keys.k = dy;
    to_keys.v = q;
    to_keys.value_factors = true;
    to_keys.out_float = in_workspace_[1];
    to_keys.out = in_workspace_[1] ? workspace_rows(plan.dk, plan.features) : p.dk;
    to_keys.initial = transposed(p.dfinal);
    // In the gradient of a decay what states add to dphi(q) and dphi(k) cancels against <S, dS>.
    to_queries.split_state = to_keys.split_state = p.ddecay.data != nullptr;
    to_keys.final = transposed(p.dinitial);
    if (f.normalize) to_keys.extra = Extra::keys;

    to_values.q = k;
    to_values.k = q;
    to_values.v = dy;
    to_values.columns = value_dim;
    to_values.taylor = plan.taylor;
    to_values.key_factors = true;
    to_values.out_float = in_workspace_[2];
    to_values.out = in_workspace_[2] ? workspace_rows(plan.dv, value_dim) : p.dv;
    to_values.initial = straight(p.dfinal);
  }

  struct {
    bool which[3];
    bool operator[](int i) const { return which[i]; }
  } in_workspace_{};
};

// Grid with one warp per row and head.
struct HeadWarps {
  dim3 grid;
  unsigned threads;
  HeadWarps(int64_t rows, int64_t heads) {
    const int64_t warps = heads < kMaxThreads / kWarpSize ? heads : kMaxThreads / kWarpSize;
    threads = static_cast<unsigned>(warps * kWarpSize);
    grid = {static_cast<unsigned>(rows), static_cast<unsigned>(ceil_div(heads, warps))};
  }
};

template <typename T>
const char* finish(const Backward& of, cudaStream_t stream) {
  const BackwardPlan& plan = of.plan;
  const LinearAttentionParams& f = of.p.forward;
  const int head_dim = static_cast<int>(f.head_dim), value_dim = static_cast<int>(f.value_dim);
  if (of.p.ddecay.data) {
    const HeadWarps warps(plan.tokens, f.heads);
    if (const char* error =
            launch<decay_change_kernel<T>>(warps.grid, warps.threads, 0, stream, f, plan))
      return error;
  }
  const GradientRows q{plan.dq, plan.diagonal, f.q,   f.k, of.p.dq, plan.features, head_dim,
                       1,       plan.group,    f.map, true};
  const GradientRows k{plan.dk,  plan.diagonal, f.k, f.q,   of.p.dk, plan.features,
                       head_dim, plan.group,    1,   f.map, false};
  const GradientRows v{plan.dv,   nullptr,   {},         {}, of.p.dv,
                       value_dim, value_dim, plan.group, 1,  FeatureMap::identity,
                       false};
  for (const GradientRows* rows : {&q, &k, &v}) {
    if (!rows->from) continue;
    const HeadWarps warps(plan.tokens, f.heads / rows->group);
    if (const char* error =
            launch<finish_gradients_kernel<T>>(warps.grid, warps.threads, 0, stream, f, *rows))
      return error;
  }
  return nullptr;
}

const char* launch_decay_gradients(const Backward& of, cudaStream_t stream) {
  const LinearAttentionParams& f = of.p.forward;
  const int64_t segments = of.plan.segments + (f.cu_seqlens ? 1 : 0);  // see max_tiles
  if (const char* error =
          launch<decay_gradient_kernel>(segments * f.heads, kSegment, 0, stream, of.p, of.plan))
    return error;
  if (of.p.ddecay.per_token) return nullptr;
  const HeadWarps sums(f.batch, f.heads);
  return launch<sum_decay_gradients_kernel>(sums.grid, sums.threads, 0, stream, of.p, of.plan);
}

const char* launch_backward(const Backward& of, cudaStream_t stream) {
  const BackwardPlan& plan = of.plan;
  const LinearAttentionParams& f = of.p.forward;
  if (plan.tokens > kMaxGrid)
    return refuse("q", "must have at most 2^31 - 1 tokens in all sequences on CUDA", plan.tokens);
  const HeadWarps warps(plan.tokens, f.heads);

  if (plan.dy_zero)
    if (const char* error = visit_dtype(f.dtype, [&]<typename T>() {
          return launch<divide_gradients_kernel<T>>(warps.grid, warps.threads, 0, stream, of.p,
                                                    plan);
        }))
      return error;
  if (const char* error = launch_recurrence(of.to_queries, false, stream)) return error;
  if (const char* error = launch_recurrence(of.to_keys, true, stream)) return error;
  if (const char* error = launch_recurrence(of.to_values, true, stream)) return error;
  if (const char* error = visit_dtype(f.dtype, [&]<typename T>() { return finish<T>(of, stream); }))
    return error;
  return of.p.ddecay.data ? launch_decay_gradients(of, stream) : nullptr;
}

}  // namespace
}  // namespace cuda::linear_attention

int64_t workspace_bytes(const LinearAttentionBackwardParams& p) {
  if (p.forward.batch == 0 || p.forward.heads == 0) return 0;
  if (p.forward.decay.per_channel) return workspace_bytes(without_correction(p));
  LinearAttentionBackwardParams unplaced = p;
  unplaced.forward.workspace = nullptr;
  return 4 * cuda::linear_attention::Backward(unplaced).floats;
}

const char* launch_cuda(const LinearAttentionBackwardParams& p, void* stream) {
  if (p.forward.batch == 0 || p.forward.heads == 0) return nullptr;
  if (p.forward.decay.per_channel) return launch_cuda(without_correction(p), stream);
  return cuda::linear_attention::launch_backward(cuda::linear_attention::Backward(p),
                                                 static_cast<cudaStream_t>(stream));
}

}  // namespace tokenmill
