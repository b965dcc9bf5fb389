#include "cuda/launch.cuh"
#include "linear/titans_memory/kernel_backward.cuh"

namespace tokenmill {
namespace {

using namespace cuda::titans_memory;

// Columns per slice. A sweep is a sequential chain of token blocks: a narrow slice processes each
// block sooner, but narrow slices do more work in total, since each one recomputes the token pairs.
constexpr int kWide = 32, kNarrow = 8;

int64_t sweep_blocks(const TitansParams& p, int width) {
  return (p.batch + (p.cu_seqlens != nullptr)) * p.heads * ceil_div(p.value_dim, width);
}

// Narrow if a wide slice does not fit, or if each narrow slice gets an SM of its own.
int width_of(const TitansParams& p) {
  const bool alone = sweep_blocks(p, kNarrow) <= cuda::multiprocessors();
  return p.head_dim > 128 || alone ? kNarrow : kWide;
}

int64_t slots_of(const TitansParams& p) { return slots_before(p, p.batch, p.seqlen); }

constexpr int64_t kPlaceFloats = sizeof(Place) / sizeof(float);

int64_t tokens_of(const TitansParams& p) { return p.cu_seqlens ? p.seqlen : p.batch * p.seqlen; }

Kept kept_of(const TitansParams& p) {
  Kept kept{slots_of(p)};
  kept.places = reinterpret_cast<Place*>(p.workspace);
  kept.states = p.workspace + kept.slots * kPlaceFloats;
  kept.u = kept.states + kept.slots * p.heads * 4 * p.head_dim * p.value_dim;
  kept.du = kept.u + tokens_of(p) * p.heads * p.value_dim;
  return kept;
}

template <typename T, int kWidth>
const char* launch_backward(const TitansBackwardParams& p, cudaStream_t stream) {
  const TitansParams& f = p.forward;
  const Kept kept = kept_of(f);
  const int64_t bytes = sweep_floats(f.head_dim, kWidth) * 4, blocks = sweep_blocks(f, kWidth);
  if (const char* error =
          cuda::launch<states_kernel<T, kWidth, true>>(blocks, kThreads, bytes, stream, f, kept))
    return error;
  if (const char* error =
          cuda::launch<gradients_kernel<T, kWidth>>(blocks, kThreads, bytes, stream, p, kept))
    return error;
  return cuda::launch<block_kernel<T>>((kept.slots + (f.cu_seqlens != nullptr)) * f.heads, kThreads,
                                       sizeof(BlockShared), stream, p, kept);
}

constexpr const char* kTooWide = "head_dim 256 at most on CUDA";

}  // namespace

int64_t workspace_bytes(const TitansParams&) { return 0; }

int64_t workspace_bytes(const TitansBackwardParams& p) {
  const TitansParams& f = p.forward;
  const int64_t floats = slots_of(f) * (kPlaceFloats + f.heads * 4 * f.head_dim * f.value_dim) +
                         2 * tokens_of(f) * f.heads * f.value_dim;
  return 4 * floats;
}

const char* launch_cuda(const TitansParams& p, void* stream) {
  if (p.head_dim > cuda::titans_memory::kMaxHeadDim) return kTooWide;
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    const auto s = static_cast<cudaStream_t>(stream);
    const int width = width_of(p);
    const int64_t bytes = sweep_floats(p.head_dim, width) * 4, blocks = sweep_blocks(p, width);
    return width == kWide
               ? cuda::launch<states_kernel<T, kWide, false>>(blocks, kThreads, bytes, s, p, Kept{})
               : cuda::launch<states_kernel<T, kNarrow, false>>(blocks, kThreads, bytes, s, p,
                                                                Kept{});
  });
}

const char* launch_cuda(const TitansBackwardParams& p, void* stream) {
  if (p.forward.head_dim > cuda::titans_memory::kMaxHeadDim) return kTooWide;
  return cuda::visit_dtype(p.forward.dtype, [&]<typename T>() {
    const auto s = static_cast<cudaStream_t>(stream);
    return width_of(p.forward) == kWide ? launch_backward<T, kWide>(p, s)
                                        : launch_backward<T, kNarrow>(p, s);
  });
}

}  // namespace tokenmill
