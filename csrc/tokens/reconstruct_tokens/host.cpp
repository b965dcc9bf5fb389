#include <cmath>
#include <string_view>

#include "core/stream.h"
#include "sparse/transpose_block_list/params.h"
#include "tokens/checks.h"
#include "tokens/reconstruct_tokens/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "reconstruct_tokens";
constexpr int64_t kMaxChannels = 4096;

// The checks of python/tokenmill/tokens/reconstruct.py, in its order and words.
ReconstructParams make_params(const View& features, const View& centroids, const View& values,
                              int64_t k, double tau, std::string_view norm) {
  check_tokens(kOp, "features", features);
  const int64_t batch = features.size(0), channels = features.size(2);
  for (const auto& [name, t] : {std::pair("centroids", &centroids), std::pair("values", &values)}) {
    check_tokens(kOp, name, *t);
    check(t->dtype == features.dtype, kOp, name,
          Rule("must have the dtype of features, ", features.dtype), t->dtype);
    check_device_of(kOp, name, *t, "features", features);
    check(t->size(0) == batch, kOp, name, Rule("must have the batch size of features, ", batch),
          t->size(0));
  }
  check(channels >= 1 && channels <= kMaxChannels, kOp, "features",
        Rule("must have 1 to ", kMaxChannels, " channels"), channels);
  check(centroids.size(2) == channels, kOp, "centroids",
        Rule("must have the channels of features, ", channels), centroids.size(2));
  const int64_t clusters = centroids.size(1);
  check(values.size(1) == clusters, kOp, "values",
        Rule("must have a row for each centroid, ", clusters), values.size(1));
  check(k >= 1 && k <= clusters, kOp, "k",
        Rule("must be 1 to ", clusters, ", the number of centroids"), k);
  check(tau >= 0 && std::isfinite(tau), kOp, "tau", "must be finite and at least 0", tau);
  check(norm == "l1" || norm == "l2", kOp, "norm", "must be 'l1' or 'l2'", norm);
  ReconstructParams p{};
  p.batch = batch;
  p.tokens = features.size(1);
  p.clusters = clusters;
  p.channels = channels;
  p.value_channels = values.size(2);
  p.k = k;
  p.dtype = to_dtype(features.dtype);
  p.unit_norm = norm == "l2";
  p.tau = static_cast<float>(tau);
  p.features = features.data();
  p.features_batch = features.step(0);
  p.features_row = features.step(1);
  p.centroids = centroids.data();
  p.centroids_batch = centroids.step(0);
  p.centroids_row = centroids.step(1);
  p.values = values.data();
  p.values_batch = values.step(0);
  p.values_row = values.step(1);
  return p;
}

void run(ReconstructParams& p, const View& features) {
#if defined(TOKENMILL_WITH_CUDA)
  if (features.is_cuda) {
    Tensor workspace = empty({workspace_bytes(p)}, features.tensor, ScalarType::Byte);
    p.workspace = workspace.mutable_data_ptr();
    return launch_on_device(kOp, features, p);
  }
#endif
  cpu::reconstruct_tokens(p);
}

std::tuple<Tensor, Tensor, Tensor> reconstruct_tokens(Tensor features, Tensor centroids,
                                                      Tensor values, int64_t k, double tau,
                                                      std::string norm) {
  const View f(features), c(centroids), v(values);
  ReconstructParams p = make_params(f, c, v, k, tau, norm);
  Tensor out = empty({p.batch, p.tokens, p.value_channels}, values);
  Tensor index = empty({p.batch, p.tokens, k}, features, ScalarType::Int);
  Tensor weight = empty({p.batch, p.tokens, k}, features, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.index = static_cast<int32_t*>(index.mutable_data_ptr());
  p.weight = static_cast<float*>(weight.mutable_data_ptr());
  if (index.numel() > 0) run(p, f);
  return {out, index, weight};
}

// The lists of tokens, seen from the centroids.
TransposeBlockListParams transposition(const ReconstructBackwardParams& p, const int32_t* counts) {
  TransposeBlockListParams t{};
  t.list.indices = p.index;
  t.list.indices_batch = p.tokens * p.k;
  t.list.indices_row = p.k;
  t.list.counts = counts;  // of every list the same
  t.list.heads = 1;
  t.list.rows = p.tokens;
  t.list.entries = p.k;
  t.batch = p.batch;
  t.blocks = p.clusters;
  return t;
}

void run(ReconstructBackwardParams& p, const View& dout, Tensor& counts) {
  TransposeBlockListParams t = transposition(p, static_cast<int32_t*>(counts.mutable_data_ptr()));
  Tensor offsets = empty({p.batch, p.clusters + 1}, dout.tensor, ScalarType::Int);
  Tensor listed = empty({p.batch, p.tokens * p.k}, dout.tensor, ScalarType::Int);
  t.offsets = static_cast<int32_t*>(offsets.mutable_data_ptr());
  t.rows = static_cast<int32_t*>(listed.mutable_data_ptr());
  p.offsets = t.offsets;
  p.listed = t.rows;
#if defined(TOKENMILL_WITH_CUDA)
  if (dout.is_cuda) {
    Tensor workspace = empty({workspace_bytes(t)}, dout.tensor, ScalarType::Byte);
    t.workspace = workspace.mutable_data_ptr();
    launch_on_device(kOp, dout, t);
    return launch_on_device(kOp, dout, p);
  }
#endif
  cpu::transpose_block_list(t);
  cpu::reconstruct_tokens_backward(p);
}

Tensor reconstruct_tokens_backward(Tensor dout, Tensor index, Tensor weight, Tensor features,
                                   Tensor centroids, Tensor values, int64_t k, double tau,
                                   std::string norm) {
  const View d(dout), i(index), w(weight), f(features), c(centroids), v(values);
  const ReconstructParams forward = make_params(f, c, v, k, tau, norm);
  check_like(kOp, "dout", d, {forward.batch, forward.tokens, forward.value_channels}, f.dtype,
             "features", f);
  const std::vector<int64_t> lists{forward.batch, forward.tokens, k};
  check_like(kOp, "index", i, lists, ScalarType::Int, "features", f);
  check_like(kOp, "weight", w, lists, ScalarType::Float, "features", f);
  check(index.is_contiguous(), kOp, "index", "must be contiguous; strides", i.strides);
  check(weight.is_contiguous(), kOp, "weight", "must be contiguous; strides", w.strides);
  ReconstructBackwardParams p{};
  p.batch = forward.batch;
  p.tokens = forward.tokens;
  p.clusters = forward.clusters;
  p.value_channels = forward.value_channels;
  p.k = k;
  p.dtype = forward.dtype;
  p.dout = d.data();
  p.dout_batch = d.step(0);
  p.dout_row = d.step(1);
  p.index = i.data<int32_t>();
  p.weight = w.data<float>();
  Tensor dvalues = empty(v.sizes, values);
  p.dvalues = dvalues.mutable_data_ptr();
  if (dvalues.numel() == 0) return dvalues;
  Tensor counts =
      torch::stable::fill_(empty({1}, features, ScalarType::Int), static_cast<double>(k));
  run(p, d, counts);
  return dvalues;
}

}  // namespace

TOKENMILL_IMPL(CPU, m) {
  m.impl("reconstruct_tokens", TOKENMILL_BOX(reconstruct_tokens));
  m.impl("reconstruct_tokens_backward", TOKENMILL_BOX(reconstruct_tokens_backward));
}

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) {
  m.impl("reconstruct_tokens", TOKENMILL_BOX(reconstruct_tokens));
  m.impl("reconstruct_tokens_backward", TOKENMILL_BOX(reconstruct_tokens_backward));
}
#endif

}  // namespace tokenmill
