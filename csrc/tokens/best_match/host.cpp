#include "core/stream.h"
#include "tokens/best_match/params.h"
#include "tokens/checks.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "best_match";
constexpr int64_t kMaxChannels = 4096;

void run(MatchParams& p, const View& a) {
  if (a.is_cuda) return launch_with_workspace(kOp, a, p, p.workspace);
  cpu::best_match(p);
}

struct BestMatchArgs : Record {
  View a, b;
  bool normalize;
};

std::tuple<Array, Array> best_match(const BestMatchArgs& a) {
  check_tokens(kOp, "a", a.a);
  check_tokens(kOp, "b", a.b);
  check(a.b.dtype == a.a.dtype, kOp, "b", Rule("must have the dtype of a, ", a.a.dtype), a.b.dtype);
  check_device_of(kOp, "b", a.b, "a", a.a);
  const int64_t batch = a.a.size(0), channels = a.a.size(2);
  check(channels >= 1 && channels <= kMaxChannels, kOp, "a",
        Rule("must have 1 to ", kMaxChannels, " channels"), channels);
  check(a.b.size(0) == batch, kOp, "b", Rule("must have the batch size of a, ", batch),
        a.b.size(0));
  check(a.b.size(2) == channels, kOp, "b", Rule("must have the channels of a, ", channels),
        a.b.size(2));
  MatchParams p{};
  p.batch = batch;
  p.rows = a.a.size(1);
  p.partners = a.b.size(1);
  p.channels = channels;
  p.dtype = to_dtype(a.a.dtype);
  p.normalize = a.normalize;
  p.a = a.a.data();
  p.a_batch = a.a.step(0);
  p.a_row = a.a.step(1);
  p.b = a.b.data();
  p.b_batch = a.b.step(0);
  p.b_row = a.b.step(1);
  Array index = empty({batch, p.rows}, a.a, ScalarType::Int);
  Array score = empty({batch, p.rows}, a.a, ScalarType::Float);
  p.index = index.mutable_data<int32_t>();
  p.score = score.mutable_data<float>();
  if (index.numel() > 0) run(p, a.a);
  return {index, score};
}

const Registration kOperators({&implement<best_match>("best_match")});

}  // namespace
}  // namespace tokenmill
