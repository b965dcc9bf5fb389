#include "core/check.h"
#include "core/door.h"
#include "core/qkv.h"
#include "core/stream.h"
#include "cuda/probe/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "gpu_probe";

struct ProbeArgs : Record {
  View x;
  std::string_view of;
  int64_t blocks, steps;
};

// One launch of a loop of bench primitives. A probe of the device, as cpu_rate is of the CPU: its
// tensors are not differentiated, faked or sharded.
Array gpu_probe(const ProbeArgs& a) {
  check(a.x.is_cuda, kOp, "x", "must be on CUDA", std::string("cpu"));
  check(a.x.dim() == 1 && a.x.size(0) == kProbeWords, kOp, "x", "must have shape [1024]",
        a.x.sizes);
  check(a.x.dtype == ScalarType::Float, kOp, "x", "must be float32", a.x.dtype);
  check_last_contiguous(kOp, "x", a.x);
  const bool shared = a.of == "shared", exp2 = a.of == "exp2";
  check(shared || exp2 || a.of == "barrier", kOp, "of", "must be 'shared', 'exp2' or 'barrier'",
        std::string(a.of));
  constexpr int64_t kMaximum = 1 << 20;
  check(a.blocks > 0 && a.blocks <= kMaximum, kOp, "blocks", "must be 1 to 2^20", a.blocks);
  check(a.steps >= 0 && a.steps <= kMaximum, kOp, "steps", "must be 0 to 2^20", a.steps);
  Array out = empty({a.blocks, kProbeThreads}, a.x, ScalarType::Float);
#if defined(TOKENMILL_WITH_CUDA)
  using Of = ProbeParams::Of;
  ProbeParams p{};
  p.of = shared ? Of::shared : exp2 ? Of::exp2 : Of::barrier;
  p.blocks = a.blocks;
  p.steps = a.steps;
  p.x = a.x.data<float>();
  p.out = out.mutable_data<float>();
  launch_with_workspace(kOp, a.x, p, p.workspace);
#endif
  return out;
}

const Registration kOperators({&implement<gpu_probe>("gpu_probe")});

}  // namespace
}  // namespace tokenmill
