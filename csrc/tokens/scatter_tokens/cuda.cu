#include "cuda/refuse.cuh"
#include "tokens/scatter_tokens/kernel.cuh"

namespace tokenmill {

const char* launch_cuda(const ScatterTokensParams& p, void* stream) {
  using namespace cuda;
  using namespace cuda::scatter_tokens;
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t bytes = p.batch * p.tokens * sizeof(int32_t);
  if (const char* error = set_bytes(p.places, 0xff, bytes, s)) return error;  // places = -1
  const int64_t blocks = ceil_div(p.entries, kRowThreads);
  if (blocks > kMaxGrid) return refuse("indices", kMaxBlocks, blocks);
  const int64_t sequences = p.sequences < kMaxBatches ? p.sequences : kMaxBatches;
  const dim3 places(static_cast<unsigned>(blocks), static_cast<unsigned>(sequences));
  if (const char* error = launch<scatter_places_kernel>(places, kRowThreads, 0, s, p)) return error;
  const uint64_t strides = p.row_bytes | p.y_batch | p.y_row | p.base_batch | p.base_token;
  return visit_width(address(p.y) | address(p.base) | strides, [&]<typename T>() {
    const RowGrid g(ceil_div(p.row_bytes, sizeof(T)), p.tokens, p.batch);
    return launch<scatter_tokens_kernel<T>>(g.grid, g.block, 0, s, p);
  });
}

}  // namespace tokenmill
