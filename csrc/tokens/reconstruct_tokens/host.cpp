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

struct ReconstructTokensArgs : Record {
  View features, centroids, values;
  int64_t k;
  double tau;
  std::string_view norm;
};

ReconstructParams make_params(const ReconstructTokensArgs& a) {
  check_tokens(kOp, "features", a.features);
  const int64_t batch = a.features.size(0), channels = a.features.size(2);
  for (const auto& [name, t] :
       {std::pair("centroids", &a.centroids), std::pair("values", &a.values)}) {
    check_tokens(kOp, name, *t);
    check(t->dtype == a.features.dtype, kOp, name,
          Rule("must have the dtype of features, ", a.features.dtype), t->dtype);
    check_device_of(kOp, name, *t, "features", a.features);
    check(t->size(0) == batch, kOp, name, Rule("must have the batch size of features, ", batch),
          t->size(0));
  }
  check(channels >= 1 && channels <= kMaxChannels, kOp, "features",
        Rule("must have 1 to ", kMaxChannels, " channels"), channels);
  check(a.centroids.size(2) == channels, kOp, "centroids",
        Rule("must have the channels of features, ", channels), a.centroids.size(2));
  const int64_t clusters = a.centroids.size(1);
  check(a.values.size(1) == clusters, kOp, "values",
        Rule("must have a row for each centroid, ", clusters), a.values.size(1));
  check(a.k >= 1 && a.k <= clusters, kOp, "k",
        Rule("must be 1 to ", clusters, ", the number of centroids"), a.k);
  check(a.tau >= 0 && std::isfinite(a.tau), kOp, "tau", "must be finite and at least 0", a.tau);
  check(a.norm == "l1" || a.norm == "l2", kOp, "norm", "must be 'l1' or 'l2'", a.norm);
  ReconstructParams p{};
  p.batch = batch;
  p.tokens = a.features.size(1);
  p.clusters = clusters;
  p.channels = channels;
  p.value_channels = a.values.size(2);
  p.k = a.k;
  p.dtype = to_dtype(a.features.dtype);
  p.unit_norm = a.norm == "l2";
  p.tau = static_cast<float>(a.tau);
  p.features = a.features.data();
  p.features_batch = a.features.step(0);
  p.features_row = a.features.step(1);
  p.centroids = a.centroids.data();
  p.centroids_batch = a.centroids.step(0);
  p.centroids_row = a.centroids.step(1);
  p.values = a.values.data();
  p.values_batch = a.values.step(0);
  p.values_row = a.values.step(1);
  return p;
}

void run(ReconstructParams& p, const View& features) {
  if (features.is_cuda) return launch_with_workspace(kOp, features, p, p.workspace);
  cpu::reconstruct_tokens(p);
}

std::tuple<Array, Array, Array> reconstruct_tokens(const ReconstructTokensArgs& a) {
  ReconstructParams p = make_params(a);
  Array out = empty({p.batch, p.tokens, p.value_channels}, a.values);
  Array index = empty({p.batch, p.tokens, a.k}, a.features, ScalarType::Int);
  Array weight = empty({p.batch, p.tokens, a.k}, a.features, ScalarType::Float);
  p.out = out.mutable_data();
  p.index = index.mutable_data<int32_t>();
  p.weight = weight.mutable_data<float>();
  if (index.numel() > 0) run(p, a.features);
  return {out, index, weight};
}

// Transposes the lists of tokens into lists per centroid.
TransposeBlockListParams transposition(const ReconstructBackwardParams& p, const int32_t* counts) {
  TransposeBlockListParams t{};
  t.list.indices = p.index;
  t.list.indices_batch = p.tokens * p.k;
  t.list.indices_row = p.k;
  t.list.counts = counts;  // the same for every list
  t.list.heads = 1;
  t.list.rows = p.tokens;
  t.list.entries = p.k;
  t.batch = p.batch;
  t.blocks = p.clusters;
  return t;
}

void run(ReconstructBackwardParams& p, const View& dout, Array& counts) {
  TransposeBlockListParams t = transposition(p, counts.mutable_data<int32_t>());
  Array offsets = empty({p.batch, p.clusters + 1}, dout, ScalarType::Int);
  Array listed = empty({p.batch, p.tokens * p.k}, dout, ScalarType::Int);
  t.offsets = offsets.mutable_data<int32_t>();
  t.rows = listed.mutable_data<int32_t>();
  p.offsets = t.offsets;
  p.listed = t.rows;
  if (dout.is_cuda) {
    Array workspace = empty({workspace_on_device(dout, t)}, dout, ScalarType::Byte);
    t.workspace = workspace.mutable_data();
    launch_on_device(kOp, dout, t);
    return launch_on_device(kOp, dout, p);
  }
  cpu::transpose_block_list(t);
  cpu::reconstruct_tokens_backward(p);
}

struct ReconstructTokensBackwardArgs : Record {
  View dout, index, weight;
  ReconstructTokensArgs forward;
};

Array reconstruct_tokens_backward(const ReconstructTokensBackwardArgs& a) {
  const ReconstructTokensArgs& in = a.forward;
  const ReconstructParams forward = make_params(in);
  check_like(kOp, "dout", a.dout, {forward.batch, forward.tokens, forward.value_channels},
             in.features.dtype, "features", in.features);
  const std::vector<int64_t> lists{forward.batch, forward.tokens, in.k};
  check_like(kOp, "index", a.index, lists, ScalarType::Int, "features", in.features);
  check_like(kOp, "weight", a.weight, lists, ScalarType::Float, "features", in.features);
  check(a.index.contiguous(), kOp, "index", "must be contiguous; strides", a.index.strides);
  check(a.weight.contiguous(), kOp, "weight", "must be contiguous; strides", a.weight.strides);
  ReconstructBackwardParams p{};
  p.batch = forward.batch;
  p.tokens = forward.tokens;
  p.clusters = forward.clusters;
  p.value_channels = forward.value_channels;
  p.k = in.k;
  p.dtype = forward.dtype;
  p.dout = a.dout.data();
  p.dout_batch = a.dout.step(0);
  p.dout_row = a.dout.step(1);
  p.index = a.index.data<int32_t>();
  p.weight = a.weight.data<float>();
  Array dvalues = empty(in.values.sizes, in.values);
  p.dvalues = dvalues.mutable_data();
  if (dvalues.numel() == 0) return dvalues;
  Array counts = empty({1}, in.features, ScalarType::Int);
  fill(static_cast<double>(in.k), counts);
  run(p, a.dout, counts);
  return dvalues;
}

const Registration kOperators(
    {&implement<reconstruct_tokens>("reconstruct_tokens"),
     &implement<reconstruct_tokens_backward>("reconstruct_tokens_backward")});

}  // namespace
}  // namespace tokenmill
