#include "core/stream.h"
#include "tokens/best_match/params.h"
#include "tokens/checks.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "best_match";
constexpr int64_t kMaxChannels = 4096;

void run(MatchParams& p, const View& a) {
#if defined(TOKENMILL_WITH_CUDA)
  if (a.is_cuda) {
    Tensor workspace = empty({workspace_bytes(p)}, a.tensor, ScalarType::Byte);
    p.workspace = workspace.mutable_data_ptr();
    return launch_on_device(kOp, a, p);
  }
#endif
  cpu::best_match(p);
}

// The checks of python/tokenmill/tokens/best_match.py, in its order and words.
std::tuple<Tensor, Tensor> best_match(Tensor a, Tensor b, bool normalize) {
  const View av(a), bv(b);
  check_tokens(kOp, "a", av);
  check_tokens(kOp, "b", bv);
  check(bv.dtype == av.dtype, kOp, "b", Rule("must have the dtype of a, ", av.dtype), bv.dtype);
  check_device_of(kOp, "b", bv, "a", av);
  const int64_t batch = av.size(0), channels = av.size(2);
  check(channels >= 1 && channels <= kMaxChannels, kOp, "a",
        Rule("must have 1 to ", kMaxChannels, " channels"), channels);
  check(bv.size(0) == batch, kOp, "b", Rule("must have the batch size of a, ", batch), bv.size(0));
  check(bv.size(2) == channels, kOp, "b", Rule("must have the channels of a, ", channels),
        bv.size(2));
  MatchParams p{};
  p.batch = batch;
  p.rows = av.size(1);
  p.partners = bv.size(1);
  p.channels = channels;
  p.dtype = to_dtype(av.dtype);
  p.normalize = normalize;
  p.a = av.data();
  p.a_batch = av.step(0);
  p.a_row = av.step(1);
  p.b = bv.data();
  p.b_batch = bv.step(0);
  p.b_row = bv.step(1);
  Tensor index = empty({batch, p.rows}, a, ScalarType::Int);
  Tensor score = empty({batch, p.rows}, a, ScalarType::Float);
  p.index = static_cast<int32_t*>(index.mutable_data_ptr());
  p.score = static_cast<float*>(score.mutable_data_ptr());
  if (index.numel() > 0) run(p, av);
  return {index, score};
}

}  // namespace

TOKENMILL_IMPL(CPU, m) { m.impl("best_match", TOKENMILL_BOX(best_match)); }

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) { m.impl("best_match", TOKENMILL_BOX(best_match)); }
#endif

}  // namespace tokenmill
