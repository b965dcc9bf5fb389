#include "core/qkv.h"
#include "core/stream.h"
#include "select/query_similarity_gate/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "query_similarity_gate";

void run(const SimilarityGateParams& p, const View& q) {
  if (q.is_cuda) return launch_on_device(kOp, q, p);
  cpu::query_similarity_gate(p);
}

struct QuerySimilarityGateArgs : Record {
  View q, q_ref;
  double threshold;
};

Array query_similarity_gate(const QuerySimilarityGateArgs& a) {
  const View views[2] = {a.q, a.q_ref};
  constexpr const char* kNames[2] = {"q", "q_ref"};
  for (int i = 0; i < 2; ++i)
    check(views[i].dim() == 4, kOp, kNames[i], "must have 4 dimensions [B, S, H, D]",
          views[i].dim());
  const View &first = views[0], &second = views[1];
  check_dtype(kOp, "q", first);
  check(second.dtype == first.dtype, kOp, "q_ref", Rule("must have the dtype of q, ", first.dtype),
        second.dtype);
  check_device_of_q(kOp, "q_ref", second, first);
  for (int i = 0; i < 2; ++i) check_last_contiguous(kOp, kNames[i], views[i]);
  const std::vector<int64_t> wanted{first.size(0), first.size(2), first.size(3)};
  const std::vector<int64_t> found{second.size(0), second.size(2), second.size(3)};
  check(found == wanted, kOp, "q_ref", Rule("must have the B, H and D of q, ", wanted), found);
  SimilarityGateParams p{};
  p.batch = first.size(0);
  p.heads = first.size(2);
  p.head_dim = first.size(3);
  p.dtype = to_dtype(first.dtype);
  p.threshold = static_cast<float>(a.threshold);
  for (int i = 0; i < 2; ++i) {
    p.lengths[i] = views[i].size(1);
    p.rows[i] = rows_of(views[i], false);
  }
  Array out = empty({p.batch}, a.q, ScalarType::Bool);
  p.out = out.mutable_data<bool>();
  if (p.batch > 0) run(p, first);
  return out;
}

const Registration kOperators({&implement<query_similarity_gate>("query_similarity_gate")});

}  // namespace
}  // namespace tokenmill
