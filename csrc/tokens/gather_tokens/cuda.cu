#include "cuda/refuse.cuh"
#include "tokens/gather_tokens/kernel.cuh"

namespace tokenmill {

const char* launch_cuda(const GatherTokensParams& p, void* stream) {
  using namespace cuda;
  using namespace cuda::gather_tokens;
  const auto tokens = FastDivmod::of(static_cast<int>(p.tokens));
  const uint64_t bits =
      address(p.x) | address(p.out) | p.x_batch | p.x_token | p.out_batch | p.out_row | p.row_bytes;
  return visit_width(bits, [&]<typename T>() -> const char* {
    const RowGrid g(ceil_div(p.row_bytes, sizeof(T)), p.entries, p.batch);
    if (!g.fits) return refuse("indices", kMaxBlocks, ceil_div(p.entries, g.block.y));
    return launch<gather_tokens_kernel<T>>(g.grid, g.block, 0, static_cast<cudaStream_t>(stream), p,
                                           tokens);
  });
}

}  // namespace tokenmill
